"""Our UNet against diffusers' UNet: the same weights, fp32, SDPA on both sides, in turns, on one thread of a CPU.

    pytest perf/test_peers.py

`sd` is the plain code and `diffusers` its counterpart, both eager; `sd-fast` is what `Optimisations.fast("cpu")` makes of
ours and `diffusers-compiled` what diffusers' documentation advises for its own (channels_last, fused projections,
torch.compile with the same mode as ours). Whole pictures are compared by `pytest perf -m peers`.

Rounds alternate between the sides, so that what the machine does meanwhile meets all of them; each side's rounds then pass
through `benchmark` by a replay clock. The clock is the CPU time of the thread, which other work on the machine moves
less than wall time.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace

import pytest
import torch

from perf.analysis import flops
from perf.analysis.statistics import paired_ratio
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
ROUNDS = 30
SD_TOPOLOGY_34M = UNetConfig(
    context_dim=256, model_channels=64, num_head_channels=32, use_linear_in_transformer=True
)  # a fifth of SD2's width
CASES = {"tiny": (preset("tiny").unet, 8), "sd-34M": (SD_TOPOLOGY_34M, 16)}  # and the latents' height and width
SIDES = ("sd", "sd-fast", "diffusers", "diffusers-compiled")


def _diffusers_unet(unet: UNet):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    text = TextConfig("openclip", width=unet.config.context_dim, layers=1)
    config = replace(preset("sd2"), unet=unet.config, text=text)
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config))
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    return peer.eval()


def _calls(unet: UNet, x, t, context) -> dict:
    """One call of the UNet by each side, over weights of its own."""
    peer = _diffusers_unet(unet)
    compiled = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    compiled.fuse_qkv_projections()
    compiled = torch.compile(compiled, fullgraph=True, dynamic=False)
    how = Optimisations.fast("cpu")
    fast = copy.deepcopy(unet)
    others = Autoencoder(preset("tiny").autoencoder), TextEncoder(preset("tiny").text)  # not measured
    call = apply(fast, *others, torch.device("cpu"), how).unet
    nhwc = x.contiguous(memory_format=how.memory_format())
    # What `fast` computes once per prompt and once per run.
    row, contexts = fast.time_table(t[:1]), fast.project_context(context)
    return {
        "sd": lambda: unet(x, t, context),
        "sd-fast": lambda: call(nhwc, row, contexts),
        "diffusers": lambda: peer(x, t, context, return_dict=False)[0],
        "diffusers-compiled": lambda: compiled(nhwc, t, context, return_dict=False)[0],
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is measured here has one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ceiling():
    """FLOP/s of one thread in a large matrix product, by the same clock: what no call can be faster than."""
    return matmul_flops_per_second(torch.device("cpu"), torch.float32, time.thread_time)


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
        x, t = torch.randn(2, 4, size, size), torch.tensor([501.0, 501.0])
        context = torch.randn(2, 77, config.context_dim)
        with torch.no_grad():
            calls = _calls(unet, x, t, context)
            reference = calls["sd"]()
            for side, call in calls.items():
                error = (call() - reference).norm() / reference.norm()
                assert error <= 1e-5, f"{side}: not the same numbers ({error:.1e}): nothing to compare"
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


@pytest.mark.skipif(not has("compile"), reason="SDPA and torch.compile are on both sides")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=clock)
def test_unet_forward(benchmark, alternated, ceiling, case, side):
    """CPU seconds of a UNet call; in the saved run `ratio_to_...` with its 95 % interval, and what part of the ceiling it is."""
    if benchmark.disabled and case != "tiny":
        pytest.skip("it compiles for minutes, and untimed shows nothing that the tiny one does not")
    benchmark.group = f"UNet forward, {case}, one thread, CPU time"
    seconds = alternated(case)
    clock.load(seconds[side])
    benchmark.pedantic(clock.advance, rounds=ROUNDS)
    config, size = CASES[case]
    benchmark.extra_info["flops_fraction"] = (
        2 * flops.total(flops.unet(config, size, size)) / statistics.median(seconds[side]) / ceiling
    )
    for peer in ("diffusers", "diffusers-compiled"):
        ratio = paired_ratio(seconds[side], seconds[peer], seed=f"{case}-{side}")
        benchmark.extra_info[f"ratio_to_{peer.replace('-', '_')}"] = [ratio.estimate, ratio.low, ratio.high]
