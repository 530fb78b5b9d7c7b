"""One training step of `sd` against diffusers: same weights, noise and timesteps, fp32, SDPA, one CPU thread.

    pytest perf/test_training_peers.py

`diffusers` is its UNet in our step. `diffusers-script` is the step of its examples/text_to_image/train_text_to_image.py:
AdamW and clipping by torch's defaults, averaged weights by its EMAModel. Losses of three updates are compared first.

Rounds alternate between the sides, so that changes of the machine affect all of them, and then pass through `benchmark` by
a replay clock. The clock is CPU time of the thread, which other load affects less than wall time.
"""

from __future__ import annotations

import copy
import ctypes
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from perf.analysis import flops
from perf.analysis.paired import paired_ratio
from perf.plugin.benchmark_bridge import ReplayClock
from perf.test_peers import CASES, blocks, diffusers_unet
from perf.worker.reference_workload import matmul_flops_per_second
from sd.features import has
from sd.models.unet import UNet
from sd.sampling.schedule import Schedule
from sd.training import Batch, Recipe, Trainer, denoising_loss, noised, prepare_unet

pytestmark = [pytest.mark.peers, pytest.mark.slow]
SIDES = ("sd", "sd-compiled", "diffusers", "diffusers-script")
ROUNDS, BATCH, RATE = 20, 4, 1e-5
ALPHAS = Schedule().alphas_cumprod.float()


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


clock = ReplayClock()


def _updates(unet: UNet, batch: Batch) -> dict[str, Callable[[], float]]:
    """One update of each side, with its own copy of the weights; returns the loss."""

    def ours(network, recipe: Recipe) -> Callable[[], float]:
        trainer = Trainer(network, recipe)
        call = network if isinstance(network, UNet) else lambda *inputs: network(*inputs, return_dict=False)[0]
        return lambda: trainer.update([lambda: denoising_loss(call, batch, ALPHAS, False)])[0].item()

    plain, compiled = Recipe(rate=RATE), Recipe(rate=RATE, compile="default")
    device = torch.device("cpu")
    return {
        "sd": ours(prepare_unet(copy.deepcopy(unet), plain, device), plain),
        "sd-compiled": ours(prepare_unet(copy.deepcopy(unet), compiled, device), compiled),
        "diffusers": ours(diffusers_unet(copy.deepcopy(unet)).train(), plain),
        "diffusers-script": _script(diffusers_unet(copy.deepcopy(unet)).train(), batch),
    }


def _script(peer, batch: Batch) -> Callable[[], float]:
    from diffusers.training_utils import EMAModel

    average = EMAModel(peer.parameters(), model_cls=type(peer), model_config=peer.config)
    optimiser = torch.optim.AdamW(peer.parameters(), lr=RATE, weight_decay=1e-2)
    noisy = noised(batch, ALPHAS)

    def update() -> float:
        predicted = peer(noisy, batch.timesteps, batch.context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), batch.noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(peer.parameters())
        return loss.item()

    return update


def _peak_bytes(update: Callable[[], float]) -> int | None:
    """Resident memory that an update needs above what is there before it: gradients, activations, temporaries."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        update()
        return _status("VmHWM") - before
    except (OSError, AttributeError):  # not on Linux
        return None


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


@pytest.fixture(scope="module")
def trained():
    """A function that returns CPU seconds and peak bytes of updates by side, measured in turns."""
    measured = {}

    def measure(case: str, sides: list[str]) -> tuple[dict[str, list[float]], dict[str, int | None]]:
        if case in measured:
            return measured[case]
        config, size = CASES[case]
        torch.manual_seed(0)
        shape = BATCH, 4, size, size
        context, t = torch.randn(BATCH, 77, config.context_dim), torch.randint(1000, (BATCH,))
        batch = Batch(torch.randn(shape), context, t, torch.randn(shape))
        updates = {side: update for side, update in _updates(UNet(config), batch).items() if side in sides}
        losses = {side: [update() for _ in range(3)] for side, update in updates.items()}  # and warm-up
        for side in sides:
            assert losses[side] == pytest.approx(losses["sd"], rel=1e-4), side
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for i in range(ROUNDS):
            for side in sides if i % 2 == 0 else sides[::-1]:
                begin = time.thread_time()
                updates[side]()
                seconds[side].append(time.thread_time() - begin)
        measured[case] = seconds, {side: _peak_bytes(update) for side, update in updates.items()}
        return measured[case]

    return measure


@pytest.mark.skipif(not has("load_assign"), reason="needs torch >= 2.1: load_state_dict(assign=True)")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=clock)
def test_training_step(benchmark, trained, peak_flops_per_second, case, side):
    """CPU seconds of an update of batch 4; the saved run adds ratios with their 95 % interval, and peak memory."""
    if benchmark.disabled and (case != "tiny" or side == "sd-compiled"):
        pytest.skip("compiles for minutes; without timing the tiny case covers the same code")
    benchmark.group = f"training step, {case}, one thread, CPU time"
    seconds, peaks = trained(case, [each for each in SIDES if benchmark.enabled or each != "sd-compiled"])
    clock.load(seconds[side])
    benchmark.pedantic(clock.advance, rounds=ROUNDS)
    config, size = CASES[case]
    work = 3 * BATCH * flops.total(flops.unet(config, size, size))
    benchmark.extra_info["flops_fraction"] = work / statistics.median(seconds[side]) / peak_flops_per_second
    benchmark.extra_info["peak_bytes"] = peaks[side]
    for peer in seconds:
        ratio = paired_ratio(blocks(seconds[side]), blocks(seconds[peer]))
        benchmark.extra_info[f"ratio_to_{peer.replace('-', '_')}"] = [ratio.estimate, ratio.low, ratio.high]
