"""UNet of `sd` against the UNet of diffusers: same weights, fp32, SDPA, one CPU thread.

    pytest perf/test_peers.py

`sd` and `diffusers` are eager. `sd-fast` uses `Optimisations.fast("cpu")`; `diffusers-compiled` follows diffusers'
documentation (channels_last, fused projections, torch.compile in the same mode). `pytest perf -m peers` compares whole
images.

Rounds alternate between the sides, so that changes of the machine affect all of them, and then pass through `benchmark` by
a replay clock. The clock is CPU time of the thread, which other load affects less than wall time.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace

import pytest
import torch

from perf.analysis import flops
from perf.analysis.paired import paired_ratio
from perf.plugin.benchmark_bridge import ReplayClock
from perf.worker.reference_workload import matmul_flops_per_second
from sd.checkpoint import diffusers_folder, layouts
from sd.config.presets import TextConfig, UNetConfig, preset
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.apply import apply
from sd.optimise.optimisations import Optimisations

pytestmark = [pytest.mark.peers, pytest.mark.slow]
ROUNDS, BLOCK = 30, 5
SD_TOPOLOGY_34M = UNetConfig(
    context_dim=256, model_channels=64, num_head_channels=32, use_linear_in_transformer=True
)  # a fifth of SD2's width
CASES = {"tiny": (preset("tiny").unet, 8), "sd-34M": (SD_TOPOLOGY_34M, 16)}  # (config, latent height and width)
SIDES = ("sd", "sd-fast", "diffusers", "diffusers-compiled")


def _blocks(seconds: list[float]) -> list[list[float]]:
    """Blocks of neighbouring rounds, which stand for the launches that one process lacks."""
    return [seconds[start : start + BLOCK] for start in range(0, len(seconds), BLOCK)]


def _diffusers_unet(unet: UNet):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    text = TextConfig("openclip", width=unet.config.context_dim, layers=1)
    config = replace(preset("sd2"), unet=unet.config, text=text)
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config))
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    return peer.eval()


def _calls(unet: UNet, x, t, context) -> dict:
    """One UNet call of each side, with its own copy of the weights."""
    peer = _diffusers_unet(unet)
    compiled = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    compiled.fuse_qkv_projections()
    compiled = torch.compile(compiled, fullgraph=True, dynamic=False)
    optimisations = Optimisations.fast("cpu")
    fast = copy.deepcopy(unet)
    unused = Autoencoder(preset("tiny").autoencoder), TextEncoder(preset("tiny").text)
    call = apply(fast, *unused, torch.device("cpu"), optimisations).unet
    nhwc = x.contiguous(memory_format=optimisations.memory_format())
    # `fast` computes the first once per run and the second once per prompt.
    row, contexts = fast.time_table(t[:1]), fast.project_context(context)
    return {
        "sd": lambda: unet(x, t, context),
        "sd-fast": lambda: call(nhwc, row, contexts),
        "diffusers": lambda: peer(x, t, context, return_dict=False)[0],
        "diffusers-compiled": lambda: compiled(nhwc, t, context, return_dict=False)[0],
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Limit torch to one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def peak_flops_per_second():
    """FLOP/s of one thread in a large matrix product by the same clock: the upper bound of every call."""
    return matmul_flops_per_second(torch.device("cpu"), torch.float32, time.thread_time)


@pytest.fixture(scope="module")
def alternated():
    """A function that returns the CPU seconds of UNet calls with batch 2 (guidance) by side, measured in turns."""
    measured = {}

    def measure(case: str) -> dict[str, list[float]]:
        if case in measured:
            return measured[case]
        config, size = CASES[case]
        torch.manual_seed(0)
        unet = UNet(config).eval().requires_grad_(False)
        x, t = torch.randn(2, 4, size, size), torch.tensor([501.0, 501.0])
        context = torch.randn(2, 77, config.context_dim)
        with torch.no_grad():
            calls = _calls(unet, x, t, context)
            reference = calls["sd"]()
            for side, call in calls.items():
                error = (call() - reference).norm() / reference.norm()
                assert error <= 1e-5, f"{side}: different output (relative error {error:.1e})"
                call()  # warm-up
            measured[case] = {side: [] for side in SIDES}
            for i in range(ROUNDS):
                for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                    begin = time.thread_time()
                    calls[side]()
                    measured[case][side].append(time.thread_time() - begin)
        return measured[case]

    return measure


clock = ReplayClock()


@pytest.mark.skipif(not has("compile"), reason="both sides need SDPA and torch.compile")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=clock)
def test_unet_forward(benchmark, alternated, peak_flops_per_second, case, side):
    """CPU seconds of a UNet call; the saved run adds `ratio_to_...` with its 95 % interval and the fraction of peak FLOP/s."""
    if benchmark.disabled and case != "tiny":
        pytest.skip("compiles for minutes; without timing the tiny case covers the same code")
    benchmark.group = f"UNet forward, {case}, one thread, CPU time"
    seconds = alternated(case)
    clock.load(seconds[side])
    benchmark.pedantic(clock.advance, rounds=ROUNDS)
    config, size = CASES[case]
    benchmark.extra_info["flops_fraction"] = (
        2 * flops.total(flops.unet(config, size, size)) / statistics.median(seconds[side]) / peak_flops_per_second
    )
    for peer in ("diffusers", "diffusers-compiled"):
        ratio = paired_ratio(_blocks(seconds[side]), _blocks(seconds[peer]))
        benchmark.extra_info[f"ratio_to_{peer.replace('-', '_')}"] = [ratio.estimate, ratio.low, ratio.high]
