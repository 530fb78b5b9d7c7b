"""Exact counts of one untimed round: operators, their bytes, and operators for which the host waits.

Library calls of compiled code are operators too; kernels that the compiler generates are not, and are counted by
`perf.worker.server`. What a CUDA graph replays is not dispatched: a replay counts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perf.worker.engines.interface import Engine

# Operators that move no data: the output is a view of the input, or nothing is computed.
VIEWS = {
    "alias", "as_strided", "chunk", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view",
    "_reshape_alias", "device",
}  # fmt: skip
# `.item()`, float(tensor), branches on a tensor and the like: the host waits for the device.
HOST_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


def tensors_in(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """Yield the tensors of arguments, also those in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


class Counting(TorchDispatchMode):
    """Counts operators while active. ops: number by name, without views. bytes: all their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.bytes = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions run compiled while counting, instead of eagerly."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        name = getattr(function, "overloadpacket", function).__name__  # a higher-order operator has no overloads
        if name not in VIEWS:
            self.ops[name] += 1
            tensors = [*tensors_in(arguments), *tensors_in([out])]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out

    @property
    def host_waits(self) -> int:
        """Number of operators for which the host waits."""
        return sum(self.ops[name] for name in HOST_WAITS)


def of_round(engine: Engine, seed: int) -> dict[str, Any]:
    """`operators` by name, `bytes` and `host_waits` of one round; None where this torch cannot count them."""
    modern = hasattr(torch.nn.functional, "scaled_dot_product_attention")  # torch 1.x has another API of dispatch modes
    # Without this method an active dispatch mode makes compiled functions run eagerly.
    if not modern or (engine.compiles and not hasattr(TorchDispatchMode, "ignore_compile_internals")):
        return {"operators": None, "bytes": None, "host_waits": None}
    counting = Counting()
    with counting:
        engine.round(seed)
    return {"operators": dict(counting.ops), "bytes": counting.bytes, "host_waits": counting.host_waits}
