"""Full txt2img runs, prompt in and pixels in host memory out, by attention implementation and batch size."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from perf.clock import synchronised_clock
from perf.configurations import Configuration, attention_by_batch
from sd import Optimisations, StableDiffusion
from sd.attention import SDPA_KERNELS
from sd.errors import Unavailable

ROUNDS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGURATIONS = attention_by_batch("tiny", "full")
if DEVICE == "cuda":  # full size, with random weights: speed does not depend on their values
    CONFIGURATIONS += attention_by_batch("sd2", "autocast")


@pytest.fixture(scope="session")
def load():
    """Models by name, each loaded once."""
    loaded = {}

    def model(name: str) -> StableDiffusion:
        if name not in loaded:
            loaded[name] = (
                StableDiffusion.tiny(DEVICE) if name == "tiny" else StableDiffusion.random(name, device=DEVICE)
            )
        return loaded[name]

    return model


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.id)
@pytest.mark.benchmark(timer=synchronised_clock)
def test_txt2img(benchmark, load, configuration: Configuration):
    """One round is one call of txt2img; loading and one warm-up round are outside."""
    benchmark.group = f"{configuration.model}, batch {configuration.batch}"
    model = load(configuration.model)
    try:
        model.optimise(
            Optimisations(
                attention=configuration.attention,
                sdpa_kernels=configuration.sdpa_kernels or SDPA_KERNELS,
                precision=configuration.precision,
                compile=configuration.compile,
            )
        )
    except Unavailable as reason:
        pytest.skip(str(reason))

    seeds = itertools.count(configuration.seed)  # every round makes another picture, so that none can be a cached one
    pictures, stages = [], []

    def one_round():
        result = model.txt2img(
            configuration.prompt,
            steps=configuration.steps,
            sampler=configuration.sampler,
            scale=configuration.scale,
            seed=next(seeds) * 1000,  # apart by more than a batch: image i has seed + i
            batch=configuration.batch,
        )
        pictures.append(hashlib.sha256(result.images.numpy().tobytes()).hexdigest())
        stages.append(result.seconds)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    assert len(set(pictures)) == len(pictures), "two rounds with different seeds gave the same picture"
    # Only the timed rounds: the warm-up round is the first of them, if there was one.
    timed = slice(-ROUNDS, None)
    benchmark.extra_info.update(
        configuration=configuration.as_dict(),
        kernels={network: list(names) for network, names in model.kernels.items()},
        image_sha256=pictures[timed],
        stage_seconds=stages[timed],
        seconds_per_image=[sum(stage.values()) / configuration.batch for stage in stages[timed]],
    )
