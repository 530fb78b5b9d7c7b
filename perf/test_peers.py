"""Our UNet against diffusers' UNet: the same weights, fp32, SDPA on both sides, in turns, on one thread.

    pytest perf/test_peers.py

Rounds alternate between the two sides, so that what the machine does meanwhile meets both; each side's rounds then pass
through `benchmark` by a replay clock. The clock is the CPU time of the thread, which other work on the machine moves
less than wall time.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from perf.clock import ReplayClock
from perf.statistics import paired_ratio
from sd import diffusers_folder, layouts
from sd.config import TextConfig, UNetConfig, preset
from sd.features import has
from sd.unet import UNet

pytestmark = pytest.mark.peers
ROUNDS = 30
SD_TOPOLOGY_34M = UNetConfig(
    context_dim=256, model_channels=64, num_head_channels=32, use_linear_in_transformer=True
)  # a fifth of SD2's width
CASES = {"tiny": (preset("tiny").unet, 8), "sd-34M": (SD_TOPOLOGY_34M, 16)}  # and the latents' height and width
SIDES = ("sd", "diffusers")


def _diffusers_unet(unet: UNet):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    text = TextConfig("openclip", width=unet.config.context_dim, layers=1)
    config = replace(preset("sd2"), unet=unet.config, text=text)
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config))
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    return peer.eval()


@pytest.fixture(scope="module")
def alternated():
    """CPU seconds of one UNet call with guidance's batch of 2, by case and side, measured in turns."""
    measured = {}

    def measure(case: str) -> dict[str, list[float]]:
        if case in measured:
            return measured[case]
        config, size = CASES[case]
        torch.manual_seed(0)
        unet = UNet(config).eval().requires_grad_(False)
        peer = _diffusers_unet(unet)
        x, t, context = (
            torch.randn(2, 4, size, size),
            torch.tensor([501.0, 501.0]),
            torch.randn(2, 77, config.context_dim),
        )
        calls = {"sd": lambda: unet(x, t, context), "diffusers": lambda: peer(x, t, context, return_dict=False)[0]}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                ours, theirs = calls["sd"](), calls["diffusers"]()
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), "not the same numbers: nothing to compare"
                calls["sd"](), calls["diffusers"]()  # warm-up
                measured[case] = {side: [] for side in SIDES}
                for i in range(ROUNDS):
                    for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                        begin = time.thread_time()
                        calls[side]()
                        measured[case][side].append(time.thread_time() - begin)
        finally:
            torch.set_num_threads(threads)
        return measured[case]

    return measure


clock = ReplayClock()


@pytest.mark.skipif(not has("sdpa"), reason="both sides are compared with SDPA")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=clock)
def test_unet_forward(benchmark, alternated, case, side):
    """CPU seconds of a UNet call; `ratio_to_diffusers` in the saved run has its 95 % interval."""
    benchmark.group = f"UNet forward, {case}, one thread, CPU time"
    seconds = alternated(case)
    clock.load(seconds[side])
    benchmark.pedantic(clock.advance, rounds=ROUNDS)
    ratio = paired_ratio(seconds[side], seconds["diffusers"], seed=f"{case}-{side}")
    benchmark.extra_info["ratio_to_diffusers"] = [ratio.estimate, ratio.low, ratio.high]
