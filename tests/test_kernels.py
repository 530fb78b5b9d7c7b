"""Our Triton kernels: exact by Triton's interpreter on a CPU, compiled for GPUs that are not here, and on a GPU where there is one.

Under TRITON_INTERPRET=1, which is read as triton is imported, the tests of numbers run on the CPU; without it on CUDA.
`test_by_the_interpreter` runs this file once more in a process that has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from agreement import GPU
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.kernels import require_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHERE = [] if INTERPRETED else GPU
DEVICE = "cpu" if INTERPRETED else "cuda"
if not has("triton_op"):
    pytest.skip("torch.library.triton_op: torch >= 2.6", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton comes with torch for NVIDIA GPUs")

# Relative (norm) to float64: fp32 as the whole exact tier has it; half dtypes by the rounding of their output, 2^-9 and 2^-12
# of a number on average, and the input is theirs already.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# (batch, channels, height, width): a group in one program, and split ones, of widths that are no power of two and with a last
# split that is shorter.
SMALL = [(2, 32, 8, 8), (3, 1920, 4, 3), (2, 960, 19, 20), (1, 128, 61, 43)]
LARGE = [(2, 320, 64, 64), (16, 640, 32, 32), (2, 2560, 16, 16), (4, 1280, 8, 8), (2, 320, 96, 96), (1, 128, 512, 512)]


def nhwc(*shape, dtype=torch.float32, mean=0.0):
    return (torch.randn(*shape, device=DEVICE) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def group_norm_error(shape, dtype, silu=True, bias=True, add=2, mean=0.0) -> float:
    """The kernel's relative error; add: images that `add` is given for, 0 for none."""
    from sd.triton_kernels import group_norm

    channels = shape[1]
    x = nhwc(*shape, dtype=dtype, mean=mean)
    weight, shift = (torch.randn(channels, device=DEVICE).to(dtype) for _ in range(2))
    bias = torch.randn(channels, device=DEVICE).to(dtype) if bias else None
    add = torch.randn(add and shape[0] if add != 1 else 1, channels, 1, 1, device=DEVICE).to(dtype) if add else None
    out = group_norm(x, weight, shift, 32, 1e-5, bias, add, silu)
    assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    exact = x.double()
    for more in (bias, add):
        exact = exact if more is None else exact + more.double().reshape(-1, channels, 1, 1)
    exact = F.group_norm(exact, 32, weight.double(), shift.double(), 1e-5)
    return relative_error(out.double(), F.silu(exact) if silu else exact)


@pytest.mark.parametrize("shape", SMALL if INTERPRETED else SMALL + LARGE, ids=str)
class TestGroupNorm:
    pytestmark = WHERE

    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    def test_all_at_once(self, shape, dtype):
        assert group_norm_error(shape, dtype) <= BOUNDS[dtype]

    def test_the_norm_alone(self, shape):
        assert group_norm_error(shape, torch.float32, silu=False, bias=False, add=0) <= BOUNDS[torch.float32]

    def test_one_row_for_the_batch(self, shape):
        assert group_norm_error(shape, torch.float32, add=1) <= BOUNDS[torch.float32]


class TestNumbers:
    pytestmark = WHERE

    @pytest.mark.parametrize("shape", [(2, 64, 8, 8), (1, 64, 70, 70)], ids=str)
    def test_a_mean_far_from_zero(self, shape):
        """A mean of 1000 deviations: squares that are summed first would leave nothing of the variance."""
        assert group_norm_error(shape, torch.float32, mean=1000.0) <= 2e-4  # the input's own rounding, times 1000
        x = torch.randn(shape).double() + 1000
        rounded = F.group_norm(x.float().double(), 32)
        assert relative_error(rounded, F.group_norm(x, 32)) > 1e-6

    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    @pytest.mark.parametrize("shape", [(2, 64, 2 * 1280), (1, 9, 2 * 100), (3, 77, 2 * 257), (5, 2)], ids=str)
    def test_geglu(self, shape, dtype):
        from sd.triton_kernels import geglu

        x = (3 * torch.randn(*shape, device=DEVICE)).to(dtype)
        value, gate = x.double().chunk(2, dim=-1)
        out = geglu(x)
        assert out.dtype == dtype and relative_error(out.double(), value * F.gelu(gate)) <= BOUNDS[dtype]

    def test_other_layouts_are_copied(self):
        from sd.triton_kernels import geglu, group_norm

        x, ones = torch.randn(2, 64, 9, 5, device=DEVICE), torch.ones(64, device=DEVICE)
        assert relative_error(group_norm(x, ones, 0 * ones, 32, 1e-5), F.group_norm(x, 32)) <= 1e-5
        x = torch.randn(6, 40, device=DEVICE).t()
        assert torch.equal(geglu(x), geglu(x.contiguous()))

    def test_an_image_is_the_same_at_any_place_of_a_batch(self):
        from sd.triton_kernels import group_norm

        x, ones = nhwc(3, 64, 40, 40), torch.ones(64, device=DEVICE)
        together = group_norm(x, ones, ones, 32, 1e-5, silu=True)
        for i in range(3):
            assert torch.equal(group_norm(x[i : i + 1], ones, ones, 32, 1e-5, silu=True)[0], together[i])

    def test_the_whole_model(self):
        """A picture with the kernels, without them, and with them again."""
        plain = Optimisations(attention="sdpa", channels_last=True)
        chosen = Optimisations(attention="sdpa", channels_last=True, triton_group_norm=True, triton_geglu=True)
        model = StableDiffusion.tiny(device=DEVICE, optimisations=plain)
        how = {"steps": 1, "sampler": "ddim", "seed": 3}
        before = model.txt2img("a red star", **how)
        model.optimise(chosen)
        kept = model.txt2img("a red star", **how)
        again = model.txt2img("a red star", **how)
        assert relative_error(kept.latents, before.latents) <= 1e-5
        assert torch.equal(kept.latents, again.latents) and not torch.equal(kept.latents, before.latents)
        model.optimise(plain)
        assert torch.equal(model.txt2img("a red star", **how).latents, before.latents)


@pytest.mark.skipif(INTERPRETED, reason="no interpreter in graphs")
class TestOnAGPU:
    pytestmark = GPU

    def test_one_graph_without_a_break(self):
        fast = Optimisations.fast("cuda")
        with_kernels = {**fast.changed(), "triton_group_norm": True, "triton_geglu": True}
        plain = StableDiffusion.tiny(device="cuda").txt2img("a red star", steps=4)
        model = StableDiffusion.tiny(
            device="cuda", optimisations=Optimisations(**with_kernels)
        )  # fullgraph, and a CUDA graph
        picture = model.txt2img("a red star", steps=4)
        assert (picture.images.astype(float) - plain.images).std() < 4.5  # 35 dB

    def test_in_a_cuda_graph(self):
        from sd.graphs import Graphed
        from sd.triton_kernels import group_norm

        ones = torch.ones(64, device="cuda")

        def call(x):
            return group_norm(x, ones, ones, 32, 1e-5, silu=True)

        graphed = Graphed(call)
        for _ in range(3):
            x = nhwc(2, 64, 40, 40)
            assert torch.equal(graphed(x), call(x))


@pytest.mark.skipif(INTERPRETED, reason="is running")
def test_by_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout


def launches():
    """(kernel, its compile-time arguments, warps) as SD 1 and 2 launch them at 512x512, batch 1 with guidance."""
    from sd import triton_kernels as kernels

    everything = {"HAS_CONV_BIAS": True, "HAS_ADD": True}
    tile = {"TILE_ROWS": kernels.ROWS, "TILE_COLUMNS": kernels.COLUMNS}
    for cells, channels in ((64, 1280), (256, 1280), (256, 2560), (1024, 320)):
        width = channels // 32
        rows, columns = kernels.whole_group_tile(cells, width) or (0, 0)
        if rows:
            yield kernels.whole_group, {
                "WIDTH": width, "TILE_ROWS": rows, "TILE_COLUMNS": columns, **everything, "SILU": True,
            }, kernels.warps(rows * columns)  # fmt: skip
    yield kernels.channel_statistics, tile, 4
    for cells, channels in ((1024, 640), (4096, 320), (512 * 512, 128)):
        _, splits = kernels.splits_of(cells, channels)
        sizes = {"TILE_SPLITS": triton.next_power_of_2(splits), "TILE_COLUMNS": triton.next_power_of_2(channels // 32)}
        yield kernels.scales_and_shifts, {"WIDTH": channels // 32, **sizes, **everything}, 4
    yield kernels.scaled, {**tile, "SILU": True}, 4
    yield kernels.gated, {"TILE_ROWS": kernels.GATED_ROWS, "TILE_COLUMNS": kernels.GATED_COLUMNS}, 4


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_compiles_for_a_gpu_that_is_not_here(capability, dtype, tmp_path):
    """As machine code for an A100 and an H100 or H200: in registers, none of which has to be kept in memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton comes without cuobjdump")
    pointers = {**dict.fromkeys(("means", "squares", "scales", "shifts"), "*fp32"), "eps": "fp32"}
    pointers |= dict.fromkeys(("x", "out", "weight", "bias", "conv_bias", "add"), f"*{dtype}")
    for kernel, constants, warps in launches():
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        file = tmp_path / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        used = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in used and "LOCAL:0 " in used, (kernel.fn.__name__, constants, used)
        assert made.metadata.shared <= 48 * 1024


@pytest.mark.skipif(INTERPRETED, reason="is allowed, for these tests")
def test_a_cpu_is_refused_by_name():
    with pytest.raises(Unavailable, match="triton_geglu: needs an NVIDIA GPU"):
        StableDiffusion.tiny(optimisations=Optimisations(triton_geglu=True))


def test_an_old_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(Unavailable, match=r"triton_group_norm: needs compute capability 8\.0"):
        require_kernels("triton_group_norm", torch.device("cuda"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"triton_group_norm": True}, "add channels_last"),
        ({"triton_geglu": True, "aot": "a.pt2"}, "aot: with triton_group_norm or triton_geglu"),
    ],
)
def test_what_does_not_go_together(fields, words):
    with pytest.raises(ConfigError, match=words):
        Optimisations(**fields)
