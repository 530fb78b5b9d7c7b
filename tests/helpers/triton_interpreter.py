"""Results of the GPU code that inductor generates, on a machine without a GPU: its Triton kernels run in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/helpers/triton_interpreter.py CODE.py

CODE.py is the code of a UNet call of the embedded model (gpu_codegen.py CASE --code CODE.py). It serves the embedded model
with its weights: library calls by PyTorch on the CPU in fp16, generated kernels by the interpreter. Prints as JSON the
relative error of the latents after two steps against the fp32 `original`, the same without compilation in this precision,
and the launches.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor import async_compile

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.optimise.presets import parse

STEPS = 2
MOST_ELEMENTS = 4096  # of a block: few and large, since the interpreter takes a millisecond for each
# Fields of `fast` on a GPU that a CPU refuses, and the compilation of the other networks.
FIELDS_LEFT_OUT = (
    "tf32",
    "cuda_graph",
    "cudnn_benchmark",
    "whole_norms",
    "compile_autoencoder",
    "compile_text_encoder",
)
# Names that the generated code takes from the GPU, and those that a CPU has for them.
CPU_NAMES = {
    "torch._C._dynamo.guards._empty_strided_cuda": "torch._C._dynamo.guards._empty_strided_cpu",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = int",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
    "torch.ops.aten._scaled_dot_product_flash_attention.default(": "flash_attention(",
}


class Kernel:
    """A generated kernel in the interpreter; `run` takes the arguments of the generated code.

    Its source becomes a file of the working folder, since the interpreter reads the source of functions.
    """

    def __init__(self, name: str, source: str, launches: Counter[str]):
        self.name, self.launches = name, launches
        for removed in (", triton_heuristics", "libdevice, ", "triton_helpers.set_driver_to_gpu()"):
            source = source.replace(removed, "")
        path = Path(f"{name}.py").absolute()
        path.write_text(source, encoding="utf-8")
        module = {
            "__name__": name,
            "__file__": str(path),
            "triton_heuristics": SimpleNamespace(
                pointwise=self._decorator, persistent_reduction=self._decorator, reduction=self._looped
            ),
            # Looked up at each call: for a launch the interpreter replaces Triton's functions.
            "libdevice": SimpleNamespace(rsqrt=lambda x: tl.rsqrt(x), exp=lambda x: tl.exp(x), erf=lambda x: tl.erf(x)),
        }
        self.blocks: dict[str, int] = {}
        exec(compile(source, str(path), "exec"), module)
        self.function = module[name]

    def _decorator(self, size_hints: dict[str, int], inductor_meta: dict[str, Any], **_: Any) -> Callable[[Any], Any]:
        assert inductor_meta["grid_type"] == "Grid1D" and set(size_hints) <= {"x", "r0_"}
        self.blocks["XBLOCK"] = max(1, min(size_hints["x"], MOST_ELEMENTS // size_hints.get("r0_", 1)))
        return lambda function: function

    def _looped(self, size_hints: dict[str, int], inductor_meta: dict[str, Any], **_: Any) -> Callable[[Any], Any]:
        """Of a reduction in a loop over blocks: at least two of them, so that the loop is tested."""
        self.blocks["R0_BLOCK"] = size_hints["r0_"] // 2
        return self._decorator(size_hints, inductor_meta)

    def run(self, *arguments: Any, stream: Any) -> None:
        self.launches[self.name] += 1
        elements = next(each for each in arguments if isinstance(each, int))
        self.function[(triton.cdiv(elements, self.blocks["XBLOCK"]),)](*arguments, **self.blocks)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Sequence[Tensor]:
    """As aten's: the output [b, heads, tokens, d] is laid out as [b, tokens, heads, d]."""
    result = F.scaled_dot_product_attention(query, key, value, **options)
    return (result.transpose(1, 2).contiguous().transpose(1, 2),)


def interpreted(code: str, launches: Counter[str]) -> Callable[[list[Any]], Sequence[Tensor]]:
    """The generated `call`, with its kernels in the interpreter. launches: counted by kernel."""
    for name, instead in CPU_NAMES.items():
        assert name in code, name
        code = code.replace(name, instead)
    assert "cuda" not in code[code.index("def call(") : code.index("def get_args")].replace("empty_strided_cuda", "")
    compiler = SimpleNamespace(
        triton=lambda name, source, device_str: Kernel(name, source, launches), wait=lambda scope: None
    )
    module: dict[str, Any] = {"__name__": "generated", "flash_attention": flash_attention}
    with mock.patch.object(async_compile, "AsyncCompile", return_value=compiler):
        exec(compile(code, "generated", "exec"), module)
    return module["call"]


def main() -> None:
    launches: Counter[str] = Counter()
    call = interpreted(Path(sys.argv[1]).read_text(encoding="utf-8"), launches)
    compile_graph = torch.compile

    def compile_with_the_code(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def backend(graph: Any, inputs: Any) -> Any:
            return lambda *arguments: call(list(arguments))

        return compile_graph(function, fullgraph=True, dynamic=False, backend=backend)

    def latents(optimisations: Optimisations) -> Tensor:
        model = StableDiffusion.tiny("cpu")
        model.optimise(optimisations)
        return model.txt2img("a red star on a blue background", seed=1, steps=STEPS).latents

    plain = Optimisations()
    fast = replace(parse("fast", torch.device("cuda")), **{name: getattr(plain, name) for name in FIELDS_LEFT_OUT})
    original = latents(Optimisations(attention="original"))
    for_compiled_code = ("nhwc_norms", "separate_bias", "folded_projections")
    uncompiled = latents(replace(fast, compile="none", **dict.fromkeys(for_compiled_code, False)))
    with mock.patch("sd.optimise.apply.require_available"), mock.patch("torch.compile", compile_with_the_code):
        compiled = latents(fast)
    errors = {"error": relative_error(compiled, original), "error_uncompiled": relative_error(uncompiled, original)}
    print(json.dumps({**errors, "launches": sum(launches.values()), "kernels": len(launches)}))


if __name__ == "__main__":
    main()
