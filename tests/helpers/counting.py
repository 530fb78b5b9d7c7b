"""What a function asks of PyTorch, counted exactly: aten ops, bytes, copies between layouts and waits for the host."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd.features import has

needs_counting = pytest.mark.skipif(not has("sdpa"), reason="torch 1.12 enters dispatch modes in another way")
# Before 2.2, SDPA on a CPU is a function of a dozen ops and copies of its own, and those would be counted as the model's.
needs_fused_attention = pytest.mark.skipif(
    not has("cpu_flash"), reason="this torch has no fused attention on the CPU: its parts would be counted"
)

# These move no data: the output is a view of the input, or nothing is computed.
VIEWS = {
    "alias", "as_strided", "chunk", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view",
    "_reshape_alias",
}  # fmt: skip
# `.item()`, and with it float(tensor), an if on a tensor, ...: the host waits for the device.
SYNCHRONISATIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Counting(TorchDispatchMode):
    """Counts while it is entered.

    ops: by name, views left out. bytes: of every input and output of them, each read or written once: what eager
    kernels move. synchronisations: ops for which the host waits. copies: of layout, dtype or device. made: tensors
    made from host data.
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
        """Number of ops that are no views."""
        return sum(self.ops.values())

    @property
    def copies(self) -> int:
        """Ops that only copy, be it to another layout, dtype or device."""
        return sum(self.ops[name] for name in ("clone", "_to_copy", "copy_", "contiguous"))

    @property
    def synchronisations(self) -> int:
        """Ops for which the host waits."""
        return sum(self.ops[name] for name in SYNCHRONISATIONS)

    @property
    def made(self) -> int:
        """Tensors made from numbers of the host, which a device would have to be sent."""
        return sum(self.ops[name] for name in ("lift_fresh", "scalar_tensor", "arange", "tensor"))
