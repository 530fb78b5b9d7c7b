"""The named sets of configurations, such as `published` and `ladder`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from perf.configurations.configuration import CHOICES, Configuration, usual, usual_precision
from sd.choices import APPROXIMATE, INDUCTOR_OPTIONS


def cross(configurations: list[Configuration], values: dict[str, list[Any]]) -> list[Configuration]:
    """Every configuration with every combination of the given field values, each once, in order.

    `size` stands for height and width together: (pixels, pixels).
    """
    combinations = [dict(zip(values, choice)) for choice in itertools.product(*values.values())]
    crossed = [_with(configuration, choice) for configuration in configurations for choice in combinations]
    return list(dict.fromkeys(crossed))


def _with(configuration: Configuration, choice: dict[str, Any]) -> Configuration:
    if "size" in choice:
        height, width = choice["size"]
        choice = {**{name: value for name, value in choice.items() if name != "size"}, "height": height, "width": width}
    changed = replace(configuration, **choice)
    usual_before = configuration.precision == usual_precision(configuration.model)
    if "precision" not in choice and usual_before:  # another model brings its own usual precision
        changed = replace(changed, precision=usual_precision(changed.model))
    return changed


def _variants(model: str, choices: Sequence[dict[str, Any]], batches: Sequence[int] = (1,)) -> list[Configuration]:
    return [replace(usual(model), batch=batch, **choice) for batch in batches for choice in choices]


PUBLISHED_FIVE: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "xformers"},
    {"attention": "mha", "sdpa_kernels": ("math",)},
    {"attention": "mha", "sdpa_kernels": ("mem_efficient",)},
    {"attention": "mha", "sdpa_kernels": ("mem_efficient",), "compile": "default"},
]


# For two cores and minutes: each attention that a CPU has, and torch.compile.
SMOKE: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "mha"},
    {"attention": "sdpa"},
    {"attention": "sdpa", "compile": "default"},
]


COMPILE_MODES = [{"compile": mode} for mode in CHOICES["compile"]]


INDUCTOR = [
    {"compile": "max-autotune-no-cudagraphs", "optimise": option, "precision": "fp16"}
    for option in ("", *INDUCTOR_OPTIONS)
]


# What is compiled, and what is recorded, as one: the UNet (the preset's own choice), its blocks, the step, the whole loop.
SCOPES = [
    {"optimise": "fast" + more} for more in ("", ",compile_blocks", ",cuda_graph_loop", ",compile_step,cuda_graph_loop")
]


# Our own kernels on top of what inductor makes: whether they beat it is what decides if the preset gets them.
KERNELS = [
    {"optimise": "fast" + more}
    for more in ("", ",triton_group_norm", ",triton_geglu", ",triton_group_norm,triton_geglu")
]


# What changes the picture, each on top of the preset.
APPROXIMATIONS = [{"optimise": ",".join(("fast", *more))} for more in ((), *((name,) for name in APPROXIMATE))]


# From the first code's own loop, each rung with all that the rungs before it have, and the preset at the end.
EXACT = ("channels_last", "fused_qkv", "cache_context_kv", "cache_time_embeddings")


LADDER: list[dict[str, Any]] = [
    {"optimise": "original"},
    {"attention": "original"},
    {"attention": "sdpa"},
    {"attention": "sdpa", "precision": "fp16"},
    *({"attention": "sdpa", "precision": "fp16", "optimise": ",".join(EXACT[: n + 1])} for n in range(len(EXACT))),
    {"attention": "sdpa", "precision": "fp16", "optimise": ",".join(EXACT), "compile": "default"},
    {"optimise": "fast"},
]


SETS: dict[str, list[Configuration]] = {
    # The article's five on SD2; the two rounds of a launch are its --n_iter 2.
    "published": _variants("sd2", PUBLISHED_FIVE, batches=(1, 2, 4)),
    "published_sd1": _variants("sd1", [{"attention": "original"}, {"attention": "mha"}], batches=(2,)),
    # The two exercises that the article leaves to its reader.
    "sd1_compile": _variants("sd1", [PUBLISHED_FIVE[0], *PUBLISHED_FIVE[3:]]),
    "peers": _variants(
        "sd1",
        [
            {"attention": "original"},
            {"optimise": "fast"},
            {"engine": "diffusers", "attention": "xformers", "precision": "fp16"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "fp16"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "bf16", "compile": "max-autotune"},
        ],
    ),
    "ladder": _variants("sd2", LADDER),
    "compile_modes": _variants("sd2", COMPILE_MODES),
    "scopes": _variants("sd2", SCOPES),
    "kernels": _variants("sd2", KERNELS, batches=(1, 8)),
    "inductor": _variants("sd2", INDUCTOR),
    "approximate": _variants("sd2", APPROXIMATIONS),
    "smoke": [replace(usual("tiny"), steps=20, **choice) for choice in SMOKE],
    # Every attention at three batch sizes; the published protocol's question, asked of this machine's own model.
    "batches": _variants("sd2", [{"attention": attention} for attention in CHOICES["attention"]], batches=(1, 2, 4)),
    "stages": [
        replace(usual("tiny"), workload=workload, attention=attention)
        for workload in ("text", "unet", "vae")
        for attention in ("original", "sdpa")
    ],
}


SUMMARIES = {
    "published": "the article's five configurations on SD2, batch 1, 2 and 4",
    "published_sd1": "the companion article's two on SD1, batch 2",
    "sd1_compile": "compile on SD1, the article's first exercise",
    "peers": "diffusers' SD1 with xFormers and PyTorch's attention beside ours, its second",
    "ladder": "one optimisation at a time on SD2",
    "compile_modes": "every mode of torch.compile",
    "scopes": "blocks, the UNet, the step or the whole loop as one",
    "kernels": "our own kernels on top of the preset, at batch 1 and 8",
    "inductor": "the options of torch.compile's code generator, one at a time",
    "approximate": "what changes the picture, one technique at a time on top of the preset",
    "smoke": "the embedded model, for a machine without a GPU",
    "batches": "every attention at batch 1, 2 and 4",
    "stages": "text encoder, one UNet call and VAE decoder by themselves",
}


def suiting(device: str) -> str:
    """The name of the set that is run when nothing is asked for."""
    return "batches" if device == "cuda" else "smoke"
