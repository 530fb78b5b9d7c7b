"""Triton kernels: accuracy, machine code for GPUs that need not be present, refusals and switching."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from kernel_cases import (
    BOUNDS,
    UNET_SHAPES,
    VAE_SHAPES,
    geglu_error,
    group_norm_bound,
    group_norm_error,
)
from models import SMALLEST, relative_error

from perf.launch.process import ROOT
from sd import Optimisations, StableDiffusion
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.models.unet import UNet
from sd.optimise.apply import require_triton, use_triton_kernels

BOTH = {"triton_group_norm": True, "triton_geglu": True}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not has("triton_op"), reason="needs triton and torch >= 2.6"
)


def _triton_older_than(*version: int) -> bool:
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2])) < version
    except metadata.PackageNotFoundError:  # needs_triton skips
        return False


@needs_triton
@pytest.mark.skipif(
    "_triton_older_than(3, 9)", reason="its interpreter cannot count a loop with a newer numpy (seen in 3.6)"
)
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_accuracy_by_the_interpreter(part):
    """Kernels against float64, the embedded model against the plain code."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        part,
        "tests/helpers/interpreted_kernels.py",
    ]
    process = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout
    assert re.search(r"\d\d? passed", process.stdout) and "skipped" not in process.stdout


class TestMachineCode:
    """Machine code compiled for GPUs that need not be present; ptxas comes with triton."""

    POINTERS = ("x", "out", "weight", "bias", "conv_bias", "add")
    BETWEEN = ("means", "squares", "scales", "shifts")
    OPTIONS = ("HAS_CONV_BIAS", "HAS_ADD", "SILU")

    @pytest.fixture(autouse=True)
    def _empty_cache(self, monkeypatch, tmp_path):
        triton = pytest.importorskip("triton", reason="needs triton, which is where torch is for NVIDIA GPUs")
        if not hasattr(triton, "knobs") or not has("triton_op"):
            pytest.skip("this triton does not expose the paths of its tools")
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def _launches(self):
        """(kernel, constants, warps) of every kernel at every shape of SD1 and SD2."""
        from sd.optimise import triton_kernels as kernels

        tile = {"TILE_ROWS": kernels.ROWS, "TILE_COLUMNS": kernels.COLUMNS}
        gated = {"TILE_ROWS": kernels.GATED_ROWS, "TILE_COLUMNS": kernels.GATED_COLUMNS}
        launches = [(kernels.channel_statistics, tile, 4), (kernels.scaled, tile, 4), (kernels.gated, gated, 4)]
        for cells, channels in UNET_SHAPES + VAE_SHAPES:
            width = channels // 32
            whole = kernels.whole_group_tile(cells, width)
            if whole:
                constants = {"WIDTH": width, "TILE_ROWS": whole[0], "TILE_COLUMNS": whole[1]}
                launches.append((kernels.whole_group, constants, kernels.warps(whole[0] * whole[1])))
            else:
                _, splits = kernels.splits_of(cells, channels)
                padded = [1 << (number - 1).bit_length() for number in (splits, width)]
                constants = {"WIDTH": width, "TILE_SPLITS": padded[0], "TILE_COLUMNS": padded[1]}
                launches.append((kernels.scales_and_shifts, constants, 4))
        return [launch for i, launch in enumerate(launches) if launch not in launches[:i]]

    def _compiled(self, kernel, constants, warps, dtype, capability):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constants = {
            name: value
            for name, value in {**dict.fromkeys(self.OPTIONS, True), **constants}.items()
            if name in kernel.arg_names
        }
        types = {"eps": "fp32", **dict.fromkeys(self.POINTERS, f"*{dtype}"), **dict.fromkeys(self.BETWEEN, "*fp32")}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        aligned = (*self.POINTERS, *self.BETWEEN, "cells", "channels", "inner")  # alignment at a launch
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})

    @pytest.mark.parametrize("capability", [80, 90])
    @pytest.mark.parametrize("dtype", ["fp16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bf16", "fp32"))])
    def test_fits_in_registers(self, dtype, capability, tmp_path):
        """No spills, no stack, at most 4 KiB of shared memory; rows are read and written 16 bytes at a time."""
        import triton

        from sd.optimise import triton_kernels as kernels

        cubin, most = tmp_path / "kernel.cubin", {}
        launches = self._launches()
        for kernel, constants, warps in launches:
            code = self._compiled(kernel, constants, warps, dtype, capability)
            cubin.write_bytes(code.asm["cubin"])
            report = subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
                capture_output=True,
                text=True,
                check=True,
            )
            use = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
            launch = f"{kernel.__name__} {constants} of {dtype} for sm_{capability}: {use}"
            # The ptxas of triton 3.6 gives scales_and_shifts a frame of 8 bytes on sm_90; a spilled tile would have hundreds.
            frame = 8 if kernel is kernels.scales_and_shifts else 0
            assert int(use["STACK"]) <= frame and use["LOCAL"] == "0", launch
            assert int(use["REG"]) * 32 * warps <= 65536 and code.metadata.shared <= 4096, launch
            most[kernel.__name__] = max(most.get(kernel.__name__, 0), int(use["REG"]))
            if kernel.__name__ in ("channel_statistics", "scaled", "gated"):
                assert "ld.global.v4.b32" in code.asm["ptx"], launch
            if kernel.__name__ in ("scaled", "gated"):
                assert "st.global.v4.b32" in code.asm["ptx"], launch
        print(f"sm_{capability} {dtype}: {len(launches)} compiled; registers {most}")
        assert {kernel.__name__ for kernel, *_ in launches} == {
            *("whole_group", "channel_statistics", "scales_and_shifts", "scaled", "gated")
        }


@needs_triton
@pytest.mark.compile
def test_a_compiled_unet_is_one_graph_without_copies_for_kernels(monkeypatch):
    """Inductor's input graph contains the kernels, each of which writes only its outputs."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        """The target that kernels are lowered for, to find the arguments they write; nothing is launched."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    if not hasattr(driver, "_active"):
        pytest.skip("this triton accepts no absent GPU as the target")
    monkeypatch.setattr(driver, "_active", Driver())
    graphs = []

    class GraphCaptured(Exception):
        pass

    def compiler(module, inputs):
        graphs.append(module.graph)
        raise GraphCaptured

    torch.manual_seed(0)
    unet = UNet(SMALLEST.unet).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    use_triton_kernels((unet,), True, True)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    counters.clear()
    torch._dynamo.reset()
    call = torch.compile(unet.denoise, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=compiler))
    with torch.no_grad(), pytest.raises(Exception, match="GraphCaptured"):
        call(x, torch.full((2,), 501.0), torch.randn(2, 77, 32))
    torch._dynamo.reset()
    assert len(graphs) == 1 and not counters["graph_break"]
    names = [str(node.target) for node in graphs[0].nodes]
    kernels = [node for node in graphs[0].nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    norms = sum(2 for _ in unet.res_blocks) + len(unet.transformers) + 1
    assert len(kernels) == norms + len(unet.transformer_blocks())
    assert not {"aten.native_group_norm.default", "aten.gelu.default"} & set(names)
    assert {tuple(node.kwargs["tensors_to_clone"]) for node in kernels} == {("out",)}
    copies = [node for node in graphs[0].nodes if str(node.target) == "aten.clone.default"]
    arguments = [value for kernel in kernels for value in kernel.kwargs["kwargs"].values()]
    assert not set(copies) & {value for value in arguments if isinstance(value, torch.fx.Node)}


@pytest.mark.parametrize("name", BOTH)
def test_is_refused_by_name_without_a_gpu(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = StableDiffusion.tiny()
    with pytest.raises(Unavailable, match=f"{name}: needs an NVIDIA GPU, and the device is cpu"):
        model.optimise(Optimisations(channels_last=True, **{name: True}))
    assert not model.optimisations.channels_last


@needs_triton
@pytest.mark.parametrize("module, match", [("triton", "needs triton"), (None, "compute capability 8.0")])
def test_is_refused_by_name_on_an_unsuitable_gpu(module, match, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if module:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(Unavailable, match=f"triton_geglu: .*{match}"):
        require_triton("triton_geglu", torch.device("cuda"))


@pytest.mark.skipif(has("triton_op"), reason="this torch has triton_op")
def test_is_refused_by_name_on_an_old_torch():
    with pytest.raises(Unavailable, match="triton_geglu needs custom operators from Triton kernels"):
        require_triton("triton_geglu", torch.device("cuda"))


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"triton_group_norm": True}, "triton_group_norm: .* add channels_last"),
        ({"triton_geglu": True, "aot": "unet.pt2"}, "not offered"),
    ],
)
def test_contradictions(fields, match):
    with pytest.raises(ConfigError, match=match):
        Optimisations(**fields)


def test_is_in_no_preset_and_imports_no_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for preset in (
        Optimisations.none(),
        Optimisations.original(),
        Optimisations.fast("cpu"),
        Optimisations.fast("cuda"),
    ):
        assert not preset.triton_group_norm and not preset.triton_geglu
    code = "import sys, sd.pipeline; sys.exit('sd.optimise.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_triton
class TestOnAGPU:
    @pytest.fixture(scope="class")
    def model(self):
        return StableDiffusion.tiny("cuda")

    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    def test_group_norm(self, dtype):
        """All shapes of SD1 and SD2, and all options at one shape for each code path."""
        from sd.optimise.triton_kernels import group_norm

        def error(cells, channels, batch, **options):
            side = int(cells**0.5)
            return group_norm_error(group_norm, (batch, channels, side, side), 32, dtype, "cuda", **options)

        for cells, channels in UNET_SHAPES + VAE_SHAPES:
            assert error(cells, channels, batch=2, add=1) <= BOUNDS[dtype], (cells, channels)
        for cells, channels in ((64, 2560), (4096, 320)):
            for add, conv_bias, silu in ((None, False, True), (1, True, False), (32, False, False)):
                options = {"add": add, "conv_bias": conv_bias, "silu": silu}
                assert error(cells, channels, batch=32, **options) <= BOUNDS[dtype], (cells, channels, options)

    @pytest.mark.parametrize("cells, channels", [(64, 2560), (4096, 320), (262144, 128)])
    def test_a_large_mean(self, cells, channels):
        from sd.optimise.triton_kernels import group_norm

        side = int(cells**0.5)
        error = group_norm_error(group_norm, (2, channels, side, side), 32, torch.float32, "cuda", mean=3000.0)
        assert error <= group_norm_bound(torch.float32, 3000.0)

    @pytest.mark.parametrize("dtype", BOUNDS, ids=str)
    @pytest.mark.parametrize("shape", [(2, 4096, 2560), (16, 1024, 5120), (2, 64, 10240), (3, 7, 600)])
    def test_geglu(self, shape, dtype):
        from sd.optimise.triton_kernels import geglu

        assert geglu_error(geglu, shape, dtype, "cuda") <= BOUNDS[dtype]

    @pytest.mark.parametrize(
        "fields", [{}, {"cuda_graph": "unet"}, {"cuda_graph": "loop"}], ids=["eager", "unet", "loop"]
    )
    def test_images_equal_those_of_the_plain_code(self, model, fields):
        """Another seed replays the graph; afterwards the plain code gives the former images bit for bit."""

        def results():
            return [model.txt2img("a red star", steps=5, scale=4.0, seed=seed) for seed in (2, 3)]

        plain = Optimisations(channels_last=True)
        model.optimise(plain)
        before = results()
        model.optimise(Optimisations(channels_last=True, **BOTH, **fields))
        for ours, theirs in zip(results(), before):
            assert relative_error(ours.latents, theirs.latents) <= 1e-4
        model.optimise(plain)
        for again, theirs in zip(results(), before):
            assert torch.equal(again.images, theirs.images)

    @pytest.mark.slow
    @pytest.mark.compile
    @pytest.mark.parametrize("scope", ["unet", "blocks", "step"])
    def test_compiled(self, model, scope):
        """No graph break, no recompilation, and the results of the plain code."""
        from torch._dynamo.utils import counters

        model.optimise(Optimisations(attention="original"))
        expected = model.txt2img("a red star", steps=5, scale=4.0, seed=2).latents
        torch._dynamo.reset()
        counters.clear()
        model.optimise(Optimisations(channels_last=True, compile="default", compile_scope=scope, **BOTH))
        ours = model.txt2img("a red star", steps=5, scale=4.0, seed=2).latents
        graphs = counters["stats"]["unique_graphs"]
        model.txt2img("a green ring", steps=5, scale=4.0, seed=3)
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
        assert relative_error(ours, expected) <= 1e-4

    def test_fast_with_kernels(self):
        from dataclasses import replace

        plain = StableDiffusion.tiny("cuda", Optimisations(attention="original"))
        expected = plain.txt2img("a red star", steps=5, scale=4.0, seed=2).latents
        fast = StableDiffusion.tiny("cuda", replace(Optimisations.fast("cuda"), **BOTH))
        assert relative_error(fast.txt2img("a red star", steps=5, scale=4.0, seed=2).latents, expected) <= 0.05
