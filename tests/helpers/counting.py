"""Exact counts of a function's aten operators, bytes, copies and host waits."""

from __future__ import annotations

import pytest

from perf.worker import counts
from sd.features import has

needs_counting = pytest.mark.skipif(not has("sdpa"), reason="torch 1.12 has another API of dispatch modes")
# Before 2.2, SDPA on a CPU is composed of a dozen operators and copies, which would be counted as the model's.
needs_fused_attention = pytest.mark.skipif(
    not has("cpu_flash"), reason="this torch composes CPU attention of several operators"
)


class Counting(counts.Counting):
    """As of a measured round, with calls: (name, input tensors, output) in order."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = super().__torch_dispatch__(function, types, arguments, options)
        name = function.overloadpacket.__name__
        if name not in counts.VIEWS:
            self.calls.append((name, list(counts.tensors_in(arguments)), out))
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
    def made(self) -> int:
        """Number of tensors made from host data, which would be copied to a device."""
        return sum(self.ops[name] for name in ("lift_fresh", "scalar_tensor", "arange", "tensor"))
