"""Our networks on a CPU against what a user would pick instead: same weights, same inputs, outputs compared, rounds alternated.

    pytest perf/test_peers.py                         UNet calls, against diffusers, OpenVINO and ONNX Runtime
    pytest perf/test_peers.py -k "sd2 and threads1"   full size at 256 pixels, the VAE's decoder at 128: minutes a side
    python tests/helpers/peers_table.py               the tables of docs/cpu-peers.md

`sd` and `diffusers` are eager. `sd-fast` uses `Optimisations.fast("cpu")` in fp32, `sd-fast-bf16` in bf16. `sd-fast-int8`
has the wide linear layers in int8 besides (extra `quant`), which changes the image. `diffusers-compiled` follows diffusers'
documentation (channels_last, fused projections, torch.compile in the same mode). OpenVINO and ONNX Runtime run our plain
network; they come with the extra `peers-cpu`. `pytest perf -m peers_cpu` compares whole images.

Rounds alternate between the sides, so that changes of the machine affect all of them, and then pass through `benchmark` by
a replay clock. In a round a side repeats its call as a sampler does, but for the long calls of full size; before its first
call the caches hold another side's weights, and threads of another side may still wait actively. One thread is timed by CPU
time, which other load affects less than wall time, several by wall time; the other one is beside it.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from perf.analysis import flops
from perf.analysis.paired import paired_ratio
from perf.plugin.benchmark_bridge import ReplayClock
from perf.worker.reference_workload import matmul_flops_per_second
from sd.checkpoint import diffusers_folder, layouts
from sd.config.presets import TextConfig, UNetConfig, preset
from sd.errors import Unavailable
from sd.features import computes_slowly, has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet
from sd.optimise.apply import apply
from sd.optimise.approximate import require_quantisation
from sd.optimise.optimisations import Optimisations
from sd.optimise.presets import parse
from sd.optimise.runtimes import PACKAGES

pytestmark = [pytest.mark.peers, pytest.mark.slow]
ROUNDS, BLOCK = 30, 5
REPEATED_SECONDS = 0.05  # at least, of a call in a round
PRODUCT = "product"  # of square matrices: what the processor itself gains from threads in these rounds
PRODUCT_SIZE = 1024
SD_TOPOLOGY_34M = UNetConfig(
    context_dim=256, model_channels=64, num_head_channels=32, use_linear_in_transformer=True
)  # a fifth of SD2's width
CASES = {"tiny": (preset("tiny").unet, 8), "sd-34M": (SD_TOPOLOGY_34M, 16)}  # (config, latent height and width)
# Full size, which takes minutes and 16 GB: only where the name is selected.
FULL_SIZE = {"sd2": (preset("sd2").unet, 32), "sd2-vae": (preset("sd2").autoencoder, 16)}
WITH_WIDE_LAYERS = ("sd-34M", "sd2")  # others have no linear layer that int8 would change
SIDES = {  # and their bound of the relative error
    "sd": 1e-5,
    "sd-fast": 1e-5,
    "sd-fast-bf16": 0.05,
    "sd-fast-int8": 0.05,
    "diffusers": 1e-5,
    "diffusers-compiled": 1e-5,
    "openvino": 1e-5,
    "openvino-bf16": 0.08,
    "onnxruntime": 1e-5,
}
CPU = torch.device("cpu")


def optimisations(side: str) -> Optimisations:
    """How a side runs our network."""
    if side in ("openvino", "openvino-bf16", "onnxruntime"):
        backend = "onnxrt" if side == "onnxruntime" else "openvino"
        half = "bf16" if side.endswith("bf16") else "full"
        chosen = Optimisations(compile="default", compile_backend=backend, precision=half)
        return replace(chosen, compile_autoencoder="default", cache_context_kv=True, cache_time_embeddings=True)
    if side == "sd":
        return Optimisations()
    if side == "sd-fast-int8":
        return parse("fast,bf16,int8", CPU)
    fast = parse("fast,bf16" if side.endswith("bf16") else "fast,full", CPU)
    return replace(fast, compile_autoencoder=fast.compile)


def diffusers_unet(unet: UNet):
    """diffusers' UNet with the same weights, in the same memory. Skips the test where the extra `peers` is not installed."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    text = TextConfig("openclip", width=unet.config.context_dim, layers=1)
    config = replace(preset("sd2"), unet=unet.config, text=text)
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config))
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()), assign=True)
    return peer


@dataclass(frozen=True)
class Unet:
    """One UNet call with guidance's batch of 2."""

    config: UNetConfig
    size: int

    def network(self) -> UNet:
        return UNet(self.config)

    def flops(self) -> float:
        return 2 * flops.total(flops.unet(self.config, self.size, self.size))

    def inputs(self) -> tuple[torch.Tensor, ...]:
        x = torch.randn(2, 4, self.size, self.size)
        return x, torch.tensor([501.0, 501.0]), torch.randn(2, 77, self.config.context_dim)

    def ours(self, unet: UNet, chosen: Optimisations, inputs) -> Callable[[], torch.Tensor]:
        x, t, context = inputs
        unused = Autoencoder(preset("tiny").autoencoder), TextEncoder(preset("tiny").text)
        call = apply(unet, *unused, CPU, chosen).unet_of_run()
        x, context = x.contiguous(memory_format=chosen.memory_format()), context.to(unet.dtype)
        # Computed once per run and once per prompt.
        t = unet.time_table(t[:1]) if chosen.cache_time_embeddings else t
        context = unet.project_context(context) if chosen.cache_context_kv else context
        return lambda: call(x, t, context)

    def diffusers(self, unet: UNet, inputs, compiled: bool) -> Callable[[], torch.Tensor]:
        peer, (x, t, context) = diffusers_unet(unet).eval(), inputs
        if compiled:
            peer.to(memory_format=torch.channels_last).fuse_qkv_projections()
            peer, x = torch.compile(peer, fullgraph=True, dynamic=False), x.to(memory_format=torch.channels_last)
        return lambda: peer(x, t, context, return_dict=False)[0]


@dataclass(frozen=True)
class Decoder(Unet):
    """One call of the VAE's decoder."""

    def network(self) -> Autoencoder:
        return Autoencoder(self.config)

    def flops(self) -> float:
        return flops.total(flops.decoder(self.config, self.size, self.size))

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return (torch.randn(1, self.config.latent_channels, self.size, self.size),)

    def ours(self, autoencoder: Autoencoder, chosen: Optimisations, inputs) -> Callable[[], torch.Tensor]:
        unused = UNet(preset("tiny").unet), TextEncoder(preset("tiny").text)
        decode = apply(unused[0], autoencoder, unused[1], CPU, chosen).decode
        z = inputs[0].contiguous(memory_format=chosen.memory_format())
        return lambda: decode(z)

    def diffusers(self, autoencoder: Autoencoder, inputs, compiled: bool) -> Callable[[], torch.Tensor]:
        import diffusers

        config = replace(preset("sd2"), autoencoder=self.config)
        peer = diffusers.AutoencoderKL.from_config(diffusers_folder.autoencoder_config(config)).eval()
        peer.load_state_dict(layouts.autoencoder_to_diffusers(autoencoder.state_dict()), assign=True)
        decode = peer.decode
        if compiled:
            peer.to(memory_format=torch.channels_last)
            decode = torch.compile(decode, fullgraph=True, dynamic=False)
        return lambda: decode(inputs[0], return_dict=False)[0]


TASKS: dict[str, Unet] = {
    **{name: Unet(*case) for name, case in CASES.items()},
    "tiny-vae": Decoder(preset("tiny").autoencoder, 8),
    **{name: (Decoder if name.endswith("vae") else Unet)(*case) for name, case in FULL_SIZE.items()},
}


def missing(side: str) -> str | None:
    """Why this interpreter cannot run a side, or None."""
    packages = {"diffusers": ("diffusers",), "openvino": PACKAGES["openvino"], "onnxruntime": PACKAGES["onnxrt"]}
    absent = [name for name in packages.get(side.split("-")[0], ()) if find_spec(name) is None]
    if absent:
        return f"needs {', '.join(absent)}, of the extra `{'peers' if 'diffusers' in absent else 'peers-cpu'}`"
    if side.endswith(("bf16", "int8")) and computes_slowly(torch.bfloat16):
        return "this processor emulates bf16"
    if side == "sd-fast-bf16" and not has("packed"):
        return "this torch has no packed weights"
    if side == "sd-fast-int8":
        try:
            require_quantisation("int8", CPU)
        except Unavailable as error:
            return str(error)
    return None


def sides_of(name: str, timed: bool = True) -> list[str]:
    """The sides that run here; at full size without those that the smaller sizes already order.

    Untimed without those that only compile the same networks in another way, for minutes.
    """
    left_out = ("diffusers", "onnxruntime") if name in FULL_SIZE else ()
    left_out += () if timed else ("sd-fast-bf16", "sd-fast-int8", "diffusers-compiled", "openvino-bf16")
    left_out += () if name in WITH_WIDE_LAYERS else ("sd-fast-int8",)
    return [side for side in SIDES if missing(side) is None and side not in left_out]


@dataclass(frozen=True)
class Seconds:
    """CPU and wall seconds of a call in each round of a side."""

    cpu: list[float]
    wall: list[float]

    def add(self, call: Callable[[], object], repeat: bool) -> None:
        """Add the time of a call, or the mean of repeated calls after a first one."""
        if repeat:
            call()
        begin, cpu, calls = time.perf_counter(), time.process_time(), 0
        while not calls or (repeat and time.perf_counter() < begin + REPEATED_SECONDS):
            call()
            calls += 1
        self.wall.append((time.perf_counter() - begin) / calls)
        self.cpu.append((time.process_time() - cpu) / calls)

    def of_clock(self, threads: int) -> list[float]:
        """CPU time of one thread, wall time of several."""
        return self.cpu if threads == 1 else self.wall


def own_network(network: torch.nn.Module, side: str) -> torch.nn.Module:
    """A copy of the network; where the side leaves weights as they are it shares them, as a copy of SD2 has 3.5 GB."""
    shares = side in ("sd", "openvino", "onnxruntime")
    weights = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, weights if shares else {})


def measure(name: str, threads: int, timed: bool) -> dict[tuple[str, int], Seconds]:
    """Seconds by side and threads, rounds alternated. Raises AssertionError where an output differs.

    With several threads, also with one thread and of a matrix product, in the same rounds; not at full size, where memory
    might not hold both.
    """
    task, sides = TASKS[name], sides_of(name, timed)
    compared = threads > 1 and name not in FULL_SIZE
    torch.manual_seed(0)
    network, inputs = task.network().eval().requires_grad_(False), task.inputs()
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    with torch.no_grad():
        for count in (1, threads) if compared else (threads,):
            torch.set_num_threads(count)
            if compared:
                matrix = torch.rand(PRODUCT_SIZE, PRODUCT_SIZE)
                calls[PRODUCT, count] = partial(torch.mm, matrix, matrix)
                calls[PRODUCT, count]()  # warm-up
            reference = task.ours(network, Optimisations(), inputs)()
            for side in sides:
                if side.startswith("diffusers"):
                    call = task.diffusers(network, inputs, side.endswith("compiled"))
                else:
                    call = task.ours(own_network(network, side), optimisations(side), inputs)
                error = ((call().float() - reference).norm() / reference.norm()).item()
                assert error <= SIDES[side], f"{side}: different output (relative error {error:.1e})"
                call()  # warm-up
                calls[side, count] = call
                gc.collect()
        measured = {key: Seconds([], []) for key in calls}
        for i in range(ROUNDS):
            for key in calls if i % 2 == 0 else [*calls][::-1]:
                torch.set_num_threads(key[1])
                measured[key].add(calls[key], repeat=timed and name not in FULL_SIZE)
    return measured


def blocks(seconds: list[float]) -> list[list[float]]:
    """Blocks of neighbouring rounds, which stand for the launches that one process lacks."""
    return [seconds[start : start + BLOCK] for start in range(0, len(seconds), BLOCK)]


@pytest.fixture(scope="module")
def alternated():
    """A function that returns the seconds of a task's sides, measured once."""
    threads_before, measured = torch.get_num_threads(), {}

    def once(name: str, threads: int, timed: bool) -> dict[tuple[str, int], Seconds]:
        if (name, threads) not in measured:
            measured[name, threads] = measure(name, threads, timed)
        torch.set_num_threads(threads)
        return measured[name, threads]

    yield once
    torch.set_num_threads(threads_before)


@pytest.fixture(scope="module")
def peak_flops_per_second():
    """FLOP/s of one thread in a large matrix product by dtype, by CPU time: the upper bound of every call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = {dtype: matmul_flops_per_second(CPU, dtype, time.process_time) for dtype in (torch.float32, torch.bfloat16)}
    torch.set_num_threads(threads)
    return rates


clock = ReplayClock()


@pytest.mark.skipif(not has("load_assign"), reason="needs torch >= 2.1: load_state_dict(assign=True)")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("threads", [1, 2], ids="threads{}".format)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.benchmark(timer=clock)
def test_call(benchmark, alternated, peak_flops_per_second, request, task, threads, side):
    """Seconds of a call; the saved run adds both clocks, ratios to the peers with their 95 % intervals, the
    fraction of peak FLOP/s of that dtype, and with several threads the gain over one, beside that of a matrix product."""
    if task in FULL_SIZE and "sd2" not in request.config.option.keyword:
        pytest.skip("full size: select it by -k sd2")
    if benchmark.disabled and (task != "tiny" or threads > 1):
        pytest.skip("compiles for minutes; without timing the tiny case covers the same code")
    if side not in sides_of(task, benchmark.enabled):
        pytest.skip(missing(side) or "not measured for this network, or untimed")
    benchmark.group = f"{task}, {threads} threads, wall time" if threads > 1 else f"{task}, 1 thread, CPU time"
    seconds = alternated(task, threads, benchmark.enabled)
    own = seconds[side, threads].of_clock(threads)
    clock.load(own)
    benchmark.pedantic(clock.advance, rounds=ROUNDS)
    info, median = benchmark.extra_info, statistics.median(own)
    info["cpu_seconds"] = statistics.median(seconds[side, threads].cpu)
    info["wall_seconds"] = statistics.median(seconds[side, threads].wall)
    half = side.endswith(("bf16", "int8"))  # with int8, convolutions are in bf16
    peak = peak_flops_per_second[torch.bfloat16 if half else torch.float32]
    info["flops_fraction"] = TASKS[task].flops() / median / threads / peak
    for peer in sides_of(task, benchmark.enabled):
        ratio = paired_ratio(blocks(own), blocks(seconds[peer, threads].of_clock(threads)))
        info[f"ratio_to_{peer.replace('-', '_')}"] = [ratio.estimate, ratio.low, ratio.high]
    if (PRODUCT, 1) in seconds:
        for name, key in (("gain_over_one_thread", side), ("gain_of_product", PRODUCT)):
            gain = paired_ratio(blocks(seconds[key, 1].wall), blocks(seconds[key, threads].wall))
            info[name] = [gain.estimate, gain.low, gain.high]
