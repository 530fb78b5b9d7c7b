"""Exact counts of a function's aten operators, bytes, copies and synchronisations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd.features import has

needs_counting = pytest.mark.skipif(not has("sdpa"), reason="torch 1.12 has another API of dispatch modes")
# Before 2.2, SDPA on a CPU is composed of a dozen operators and copies, which would be counted as the model's.
needs_fused_attention = pytest.mark.skipif(
    not has("cpu_flash"), reason="this torch composes CPU attention of several operators"
)

# Operators that move no data: the output is a view of the input, or nothing is computed.
VIEWS = {
    "alias", "as_strided", "chunk", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view",
    "_reshape_alias",
}  # fmt: skip
# `.item()`, float(tensor), branches on a tensor and the like: the host waits for the device.
SYNCHRONISATIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Counting(TorchDispatchMode):
    """Counts operators while active.

    ops: number by name, without views. bytes: all their inputs and outputs, which eager kernels read or write once.
    calls: (name, input tensors, output) in order.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.bytes, self.calls = Counter(), 0, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.ops[name] += 1
            tensors = [*_tensors(arguments), *_tensors([out])]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls.append((name, list(_tensors(arguments)), out))
        return out

    @property
    def total(self) -> int:
        """Number of operators without views."""
        return sum(self.ops.values())

    @property
    def copies(self) -> int:
        """Number of operators that only copy, also to another layout, dtype or device."""
        return sum(self.ops[name] for name in ("clone", "_to_copy", "copy_", "contiguous"))

    @property
    def synchronisations(self) -> int:
        """Number of operators for which the host waits."""
        return sum(self.ops[name] for name in SYNCHRONISATIONS)

    @property
    def made(self) -> int:
        """Number of tensors made from host data, which would be copied to a device."""
        return sum(self.ops[name] for name in ("lift_fresh", "scalar_tensor", "arange", "tensor"))
