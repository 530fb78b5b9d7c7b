"""GPU code of the compiled networks without a GPU: launches, bytes, layouts, and ptxas's use of registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gpu_codegen
import pytest
import torch
from gpu_codegen import CASES, HEAD, PAGE, Counts, Generated, only_moves, strides

from perf.launch.process import ROOT
from sd.choices import INDUCTOR_OPTIONS

GIVEN = "size_hints={'x': 4194304},\n{'signature': {'in_ptr0': '*fp16', 'in_ptr1': '*fp16', 'out_ptr0': '*%s', 'xnumel': 'i32'}}\n"
LOAD = "    tmp0 = tl.load(in_ptr0 + (x0), None).to(tl.float32)\n"
SLOW = ("sd2 unet, fast", "sd1 unet", "sd2 step")  # over a minute of CPU time each: not in .ci/run
# Of the latents in fp16 after two steps, relative; 1.5e-3 in Triton's interpreter, 1.8e-3 not compiled.
MOST_ERROR = 2e-3
UNET_CALLS = 3  # of two PLMS steps
needs_triton = pytest.mark.skipif(gpu_codegen.missing() is not None, reason=f"{gpu_codegen.missing()}")


@needs_triton
@pytest.mark.gpu_codegen
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(SLOW)) for name in gpu_codegen.call_names()]
)
def test_generated_code(name, tmp_path):
    """The counts are those of the docs; convolutions are NHWC and no layout is copied; every kernel fits in registers.

    The code for the embedded model computes its latents, in Triton's interpreter.
    """
    code = tmp_path / "code.py"
    result = output_of("gpu_codegen.py", name, "--json", "--ptxas", "--code", str(code))
    counts = Counts(**result["counts"])
    assert not counts.others
    if CASES[name].optimise != "none":
        assert counts.copies == counts.transposed == 0
        assert counts.convolutions_nhwc == counts.convolutions
        assert len(result["resources"]) == counts.kernels
    for kernel, use in result["resources"].items():
        assert use["STACK"] == use["LOCAL"] == 0, f"{kernel} spills: {use}"
        assert use["REG"] * 32 * use["WARPS"] <= 65536, f"{kernel}: {use}"
    page = PAGE.read_text(encoding="utf-8")
    row = counts.row(gpu_codegen.row_name(name))
    changed = gpu_codegen.changes(gpu_codegen.row_name(name), row, page)
    assert row in page, f"{changed}; python tests/helpers/gpu_codegen.py {name!r} --write accepts it"
    # The code for sm_80 has the same kernels, and that of the older torch some with grids of two dimensions.
    if name == "tiny unet, fast" and gpu_codegen.RELEASE != gpu_codegen.OLDER:
        computed = output_of("triton_interpreter.py", str(code), cwd=tmp_path)
        assert computed["kernels"] == counts.kernels and computed["launches"] == UNET_CALLS * counts.generated
        assert max(computed["error"], computed["error_uncompiled"]) <= MOST_ERROR, computed


def output_of(script, *arguments, cwd=ROOT):
    """What a script of tests/helpers prints as JSON in its last line."""
    command = [sys.executable, str(ROOT / "tests/helpers" / script), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if script == "triton_interpreter.py" else "0"}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.gpu_codegen
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_every_option_of_inductor_changes_the_code(mode):
    """An option that changes nothing must not be measured as a technique. Two need a GPU to be seen: the epilogues of a
    template that a measurement chose, and the padding that a measurement decides."""
    unseen = {"no_epilogue_fusion", "no_shape_padding"}
    unseen.add("persistent_tma_matmul" if mode == "default" else "conv_1x1_as_mm")  # of templates; included in the mode
    assert set(output_of("gpu_codegen.py", "--options", mode)) == set(INDUCTOR_OPTIONS) - unseen


def test_the_docs_have_exactly_these_calls():
    text = PAGE.read_text(encoding="utf-8")
    assert list(gpu_codegen.rows_in(text)) == list(gpu_codegen.ROWS) and HEAD in text


def test_what_changed_is_named():
    name = next(iter(CASES))
    page = f"{HEAD}\n| `{name}` | 548 | 52 (52) | 142 | 32 | 322 | 159 | 0 | 0 | 5.74 | 51 | 978 |\n"
    row = f"| `{name}` | 568 | 52 (52) | 142 | 32 | 342 | 159 | 0 | 42 | 5.80 | 51 | 978 |"
    assert gpu_codegen.changes(name, row, page) == (
        f"COUNTS {name}: launches 548 -> 568, generated 322 -> 342, transposed 0 -> 42, GB 5.74 -> 5.80"
    )
    assert gpu_codegen.changes("another", row, page).startswith("COUNTS another: new")


@pytest.mark.parametrize(
    "body, output, moves",
    [
        (LOAD + "    tl.store(out_ptr0 + (x1), tmp0, None)", "fp16", True),
        (LOAD + "    tl.store(out_ptr0 + (x1), tmp0, None)", "fp32", False),  # a cast
        (LOAD + "    tmp1 = tmp0 + tmp0\n    tl.store(out_ptr0 + (x1), tmp1, None)", "fp16", False),
        (LOAD + "    tmp1 = tl.load(in_ptr1 + (x0), None)\n    tmp2 = tl.where(x0 < 4, tmp0, tmp1)", "fp16", False),
    ],
)
def test_copies_of_a_layout_are_recognised(body, output, moves):
    assert only_moves(GIVEN % output + body) is moves


@pytest.mark.parametrize(
    "sizes, indices, address, expected",
    [
        ("{'x': 4194304}", "    x0 = (xindex % 320)\n    x1 = xindex // 320\n", "x0 + 320*x1", False),
        ("{'x': 4194304}", "    x0 = (xindex % 320)\n    x1 = xindex // 320\n", "x1 + 4096*x0", True),
        (
            "{'x': 64}",
            "    x0 = (xindex % 320)\n    x1 = xindex // 320\n",
            "x1 + 4096*x0",
            False,
        ),  # too small to matter
        ("{'y': 8192, 'x': 512}", "    x2 = xindex\n    y0 = (yindex % 4096)\n", "y0 + 4096*x2 + 1310720*y1", True),
        ("{'y': 8192, 'x': 512}", "    x2 = xindex\n    y3 = yindex\n", "x2 + 320*y3", False),
        ("{'y': 2048, 'x': 4096}", "    x2 = xindex\n", "320*x2 + 1310720*y1 + (y0)", True),
        ("{'x': 4194304}", "    x0 = (xindex % 640)\n", "320*x1 + 4096*((-320) + x0)", True),
        (
            "{'x': 512, 'r0_': 32768}",
            "    r0_index = 0\n    r0_2 = r0_index\n",
            "8*x0 + 256*(r0_2 // 8) + ((r0_2 % 8))",
            False,
        ),
        (
            "{'x': 512, 'r0_': 8192}",
            "    r0_index = 0\n    r0_3 = r0_index\n",
            "960*((r0_3 + 8192*x1) // 30) + x0",
            False,
        ),
        ("{'x': 4194304}", "    x0 = (xindex % 640)\n", "320*x4 + (20*(x0 // 20) + ((x0 % 20)))", False),
        (
            "{'x': 4096, 'r0_': 128}, ReductionHint.OUTER",
            "    r0_index = 0\n    x0 = xindex\n",
            "x0 + 320*r0_index",
            False,
        ),
        ("{'x': 64, 'r0_': 65536}, ReductionHint.OUTER", "    r0_index = 0\n    x0 = xindex\n", "r0_3 + 10*x0", True),
        ("{'x': 64, 'r0_': 65536}", "    r0_index = 0\n    r0_2 = (r0_index % 10)\n", "r0_2 + 10*x0 + 320*r0_3", False),
        (
            "{'x': 64, 'r0_': 65536}",
            "    r0_index = 0\n    r0_2 = (r0_index % 4096)\n",
            "r0_3 + 10*x0 + 320*r0_2",
            True,
        ),
    ],
)
def test_strided_accesses_are_recognised(sizes, indices, address, expected):
    assert strides(f"size_hints={sizes}\n{indices}    tmp0 = tl.load(in_ptr0 + ({address}), None)") is expected


def test_counts_of_a_known_output():
    """One convolution in NHWC and one in NCHW, a product, an attention, two launches of one kernel that copies."""
    code = f"""
triton_poi_fused_clone_0 = async_compile.triton('triton_poi_fused_clone_0', '''
{GIVEN % "fp16"}{LOAD}''', device_str='cuda')

    def call(self, args):
            triton_poi_fused_clone_0.run(arg0_1, buf0, 8, stream=raw_stream0)
            buf1 = extern_kernels.convolution(buf0, arg3_1, stride=(1, 1), bias=None)
            assert_tensor_metadata(buf1, (2, 320, 64, 64), (1310720, 1, 20480, 320), torch.float16, 'x')
            buf2 = extern_kernels.convolution(buf1, arg3_1, stride=(1, 1), bias=None)
            assert_tensor_metadata(buf2, (2, 320, 64, 64), (1310720, 4096, 64, 1), torch.float16, 'x')
            extern_kernels.addmm(arg1, buf2, arg2, alpha=1, beta=1, out=buf3)
            buf4 = torch.ops.aten._scaled_dot_product_flash_attention.default(buf3, buf3, buf3)
            triton_poi_fused_clone_0.run(buf4, buf5, 8, stream=raw_stream0)
"""
    counts = Generated(code, 5_000_000_000, {"mm a": 3, "mm b": 4, "mm c": 0}).counts()
    assert counts == Counts(2, 1, 1, 2, 1, 1, 2, 0, 5_000_000_000, 3, 7, ())
    assert counts.row("x") == "| `x` | 6 | 2 (1) | 1 | 1 | 2 | 1 | 2 | 0 | 5.00 | 3 | 7 |"


@pytest.mark.skipif(torch.__version__.startswith(("2.15.", "2.11.")), reason="this is a torch of the counts")
def test_another_torch_is_refused_by_name():
    assert "2.15 and 2.11" in gpu_codegen.missing()
