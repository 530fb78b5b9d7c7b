"""Which attention kernels a network really ran, read from the profiler."""

from __future__ import annotations

import os

import torch

# Operator names that tell which kernel ran, as the profiler records them.
KERNEL_OPERATORS = {
    "aten::_scaled_dot_product_attention_math": "math",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "mem_efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_flash_attention_forward": "flash",
    "aten::_efficient_attention_forward": "mem_efficient",
    "aten::_native_multi_head_attention": "native_mha",
    "xformers::efficient_attention": "small_k",  # until 0.0.16
    "xformers::efficient_attention_forward_small_k": "small_k",
    "xformers::efficient_attention_forward_cutlass": "mem_efficient",
    "xformers_flash::flash_fwd": "flash",
}


def kernels_in(operators) -> tuple[str, ...]:
    """The attention kernels among profiled operator names; `softmax` when the scores were plain tensors, empty if compiled away."""
    operators = set(operators)
    kernels = {kernel for operator, kernel in KERNEL_OPERATORS.items() if operator in operators}
    if not kernels and operators & {"aten::softmax", "aten::_softmax"}:
        kernels = {"softmax"}
    return tuple(sorted(kernels))


class ObservedCall:
    """A network's call, one of which runs under the profiler to see which attention kernels it really uses.

    The second by default: under torch.compile the first one traces every candidate.
    """

    def __init__(self, call, observe_call: int = 2):
        self.call, self.observe_call = call, observe_call
        self.calls, self.kernels = 0, ()

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls != self.observe_call:
            return self.call(*arguments)
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # or the profiler writes a line to stderr at every start and stop
        # Not torch.profiler.profile, whose start imports inductor and dynamo: 4 s of everybody's first picture.
        with torch.autograd.profiler.profile() as profile:
            out = self.call(*arguments)
        self.kernels = kernels_in(event.key for event in profile.key_averages())
        return out
