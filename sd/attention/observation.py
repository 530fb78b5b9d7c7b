"""Attention kernels that a network really ran, read from the profiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Kernel by the operator name that the profiler records.
KERNEL_OPERATORS = {
    "aten::_scaled_dot_product_attention_math": "math",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "mem_efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_flash_attention_forward": "flash",
    "aten::_efficient_attention_forward": "mem_efficient",
    "aten::_native_multi_head_attention": "native_mha",
    "sd::avx2_attention": "avx2",
    "sd::avx512_attention": "avx512",
    "xformers::efficient_attention": "small_k",  # until 0.0.16
    "xformers::efficient_attention_forward_small_k": "small_k",
    "xformers::efficient_attention_forward_cutlass": "mem_efficient",
    "xformers_flash::flash_fwd": "flash",
    "xformers_flash3::flash_fwd": "flash",  # its default on Hopper
}


def kernels_in(operators: Iterable[str]) -> tuple[str, ...]:
    """Attention kernels among profiled operators; `softmax` for plain tensor operations, empty if compiled away."""
    operators = set(operators)
    kernels = {kernel for operator, kernel in KERNEL_OPERATORS.items() if operator in operators}
    if not kernels and operators & {"aten::softmax", "aten::_softmax"}:
        kernels = {"softmax"}
    return tuple(sorted(kernels))


class ObservedCall:
    """A network's call, profiled once to record its attention kernels.

    observe_call: number of the profiled call; 2 by default, since under torch.compile call 1 traces every candidate; 0 for none.
    """

    def __init__(self, call: Callable[..., Any], observe_call: int = 2):
        self.call, self.observe_call = call, observe_call
        self.calls = 0
        self.kernels: tuple[str, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls != self.observe_call:
            return self.call(*arguments)
        # Under a profiler of the caller, in which torch cannot nest this one, a later call is observed.
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            self.observe_call += 1
            return self.call(*arguments)
        # Without this the profiler writes a line to stderr at every start and stop.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        # Not torch.profiler.profile, which imports inductor and dynamo: 4 s in every process.
        with torch.autograd.profiler.profile() as profile:
            out = self.call(*arguments)
        self.kernels = kernels_in(event.key for event in profile.key_averages())
        return out
