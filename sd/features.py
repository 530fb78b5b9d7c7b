"""Features of the installed torch, looked up by name, so that no other file compares versions."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import library

from sd.errors import Unavailable

PROBE_CALLS = 9  # the first one may allocate or reorder weights
PROBE_SIDE, PROBE_RATIO = 384, 1.3  # of bf16_beats_fp32: the ratio is about 2, or far below 1


@dataclass(frozen=True)
class Feature:
    """A feature that some torch versions lack."""

    description: str
    available: bool
    needs: str  # the version that has it


def _source(path: str) -> str:
    """The text of a file of torch, which takes less time than its import; empty if there is none."""
    file = Path(torch.__file__).parent / path
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _defines(package: str, function: str) -> bool:
    """Search the package's source for the function; importing the compiler would take 4 s of every process."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    return f"\ndef {function}(" in Path(spec.origin).read_text(encoding="utf-8")


def _cpu_half_convolution() -> bool:
    try:
        F.conv2d(torch.zeros(1, 1, 1, 1).half(), torch.zeros(1, 1, 1, 1).half())
    except RuntimeError:
        return False
    return True


def _cpu_fused_adamw() -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "CPU"))
    except RuntimeError:  # no such operator
        return False


_CACHE_KEY_TAG = hasattr(getattr(getattr(torch, "compiler", None), "config", None), "cache_key_tag")
_DYNAMO: Any = getattr(torch._C, "_dynamo", None)
_CPP_WRAPPER = _source("_inductor/codegen/cpp_wrapper_cpu.py")
_AOT_LOADER: Any = getattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader", None)
FEATURES = {
    "sdpa": Feature("F.scaled_dot_product_attention", hasattr(F, "scaled_dot_product_attention"), "torch >= 2.0"),
    "compile": Feature("torch.compile", hasattr(torch, "compile"), "torch >= 2.0"),
    "cpu_flash": Feature(
        "the CPU flash attention kernel",
        hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
        "torch >= 2.2",
    ),
    "cudnn_sdpa": Feature(
        "the cuDNN attention kernel", hasattr(torch.backends.cuda, "enable_cudnn_sdp"), "torch >= 2.5"
    ),
    "recompile_limit": Feature(
        "torch.compile(recompile_limit=...)",
        hasattr(torch, "compile") and _has_parameter(torch.compile, "recompile_limit"),
        "a newer torch; 2.15 has it",
    ),
    "compile_cache": Feature(
        "torch.compiler.save_cache_artifacts",
        hasattr(torch, "compiler") and hasattr(torch.compiler, "save_cache_artifacts"),
        "torch >= 2.7",
    ),
    "cache_entries": Feature(
        "a list of the code that Dynamo compiled, with its guards",
        hasattr(getattr(getattr(_DYNAMO, "eval_frame", None), "_CacheEntry", None), "guard_manager")
        and hasattr(_DYNAMO.eval_frame, "_debug_get_cache_entry_list")
        and "\n_stance = " in _source("_dynamo/eval_frame.py"),
        "a newer torch; 2.11 has it",
    ),
    "cache_key_tag": Feature(
        "torch.compiler.config.cache_key_tag",
        _CACHE_KEY_TAG,
        "torch >= 2.7",
    ),
    "fp32_precision": Feature(
        "torch.backends.fp32_precision", hasattr(torch.backends, "fp32_precision"), "torch >= 2.9"
    ),
    "mode_options": Feature(
        "inductor's options of a mode", _defines("torch._inductor", "list_mode_options"), "torch >= 2.1"
    ),
    "vector_instructions": Feature(
        "inductor's search for vector instructions", bool(_source("_inductor/cpu_vec_isa.py")), "torch >= 2.5"
    ),
    "aot": Feature(
        "AOTInductor packages, and their loader's boxed_run",
        hasattr(_AOT_LOADER, "boxed_run") and hasattr(_AOT_LOADER, "load_metadata_from_package"),
        "a newer torch; 2.11 has it",
    ),
    "aot_checks": Feature(
        "replaceable checks of AOTInductor's inputs",
        "prefix.splice_aot(" in _CPP_WRAPPER and "__check_inputs_outputs(" in _CPP_WRAPPER,
        "a newer torch; 2.15 has it",
    ),
    "capture_error_mode": Feature(
        "torch.cuda.graph(capture_error_mode=...)",
        _has_parameter(torch.cuda.graph, "capture_error_mode"),
        "torch >= 2.1",
    ),
    "foreach_lerp": Feature("torch._foreach_lerp_", hasattr(torch, "_foreach_lerp_"), "torch >= 2.1"),
    # In torch 2.0 it cannot be resumed: the number of steps is loaded to the CPU (pytorch #103256).
    "fused_adamw": Feature(
        "AdamW(fused=True)",
        _has_parameter(torch.optim.AdamW, "fused") and hasattr(torch, "_foreach_lerp_"),
        "torch >= 2.1",
    ),
    "cpu_fused_adamw": Feature("AdamW(fused=True) on the CPU", _cpu_fused_adamw(), "torch >= 2.4"),
    "grad_scaler": Feature("a gradient scaler for the CPU", hasattr(torch.amp, "GradScaler"), "torch >= 2.3"),
    "device_context": Feature("torch.device as a context", hasattr(torch.device, "__enter__"), "torch >= 2.0"),
    "load_assign": Feature(
        "load_state_dict(assign=True)", _has_parameter(torch.nn.Module.load_state_dict, "assign"), "torch >= 2.1"
    ),
    "reduction_choices": Feature(
        "inductor's overridable split of reductions",
        # Without a tag the compile cache would return code of other choices.
        "def reduction_split_factor" in _source("_inductor/choices.py") and _CACHE_KEY_TAG,
        "torch >= 2.7",
    ),
    "avx512_attention": Feature(
        "operators of our own, and a check for avx512_bf16",
        hasattr(library, "register_fake") and hasattr(getattr(torch, "cpu", None), "_is_avx512_bf16_supported"),
        "torch >= 2.5",
    ),
    "avx2": Feature(
        "torch's stable C++ interface with parallel_for (torch/csrc/stable/ops.h)",
        "parallel_for" in _source("include/torch/csrc/stable/ops.h"),
        "torch >= 2.10",
    ),
    "packed": Feature(
        "oneDNN's operators for packed weights",
        torch.backends.mkldnn.is_available()
        and hasattr(library, "register_fake")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md"),
        "torch >= 2.4 with oneDNN",
    ),
    "cache_validator": Feature(
        "a replaceable check of what the compile cache can hold",
        "@staticmethod\n    def check_tensor(t: Tensor)" in _source("_inductor/codecache.py"),
        "a newer torch; 2.15 has it",
    ),
    "cpu_fp16": Feature("fp16 convolution on the CPU", _cpu_half_convolution(), "torch >= 2.1"),
}


def computes_slowly(dtype: torch.dtype) -> bool:
    """Whether oneDNN emulates the half-precision `dtype` on this processor; False where this torch cannot tell."""
    names = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}
    supported = getattr(torch.ops.mkldnn, names[dtype], None) if dtype in names else None
    return supported is not None and not supported()


def processor_has(instructions: str) -> bool:
    """Whether the processor has `avx2`, `avx512`, `avx512_bf16` or `amx_tile`; False where this torch cannot tell."""
    return bool(getattr(getattr(torch, "cpu", None), f"_is_{instructions}_supported", bool)())


@torch.no_grad()
def fastest_calls(*functions: Callable[[], object]) -> list[float]:
    """Seconds of the fastest of PROBE_CALLS calls of each function, which take turns, so that load on the machine affects all."""
    durations: list[list[float]] = [[] for _ in functions]
    for _ in range(PROBE_CALLS):
        for function, of_function in zip(functions, durations):
            begin = time.perf_counter()
            function()
            of_function.append(time.perf_counter() - begin)
    return list(map(min, durations))


@functools.cache
def bf16_beats_fp32() -> bool:
    """Whether this processor multiplies bf16 matrices much faster than fp32: it has the instructions, and a probe of 10 ms.

    Capability bits alone do not decide: a processor with avx512_bf16 was seen to need twice the time of fp32.
    """
    if not (processor_has("avx512_bf16") or processor_has("amx_tile")):
        return False
    a = torch.ones(PROBE_SIDE, PROBE_SIDE)
    b = a.bfloat16()
    fp32, bf16 = fastest_calls(lambda: torch.mm(a, a), lambda: torch.mm(b, b))
    return fp32 >= PROBE_RATIO * bf16


def has(name: str) -> bool:
    """Whether this torch has the feature `name` of FEATURES."""
    return FEATURES[name].available


def missing(name: str) -> str | None:
    """None if this torch has the feature, else the reason, naming the version that has it."""
    feature = FEATURES[name]
    return (
        None if feature.available else f"{feature.description} needs {feature.needs}, this is torch {torch.__version__}"
    )


def require(name: str, option: str) -> None:
    """Raise Unavailable, naming the option, unless this torch has the feature `name`."""
    feature = FEATURES[name]
    if not feature.available:
        raise Unavailable(
            f"{option} needs {feature.description} ({feature.needs}), and this is torch {torch.__version__}: "
            f"choose another setting or a newer torch"
        )
