"""Guards of compiled code, evaluated once a sampler run instead of at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from sd.features import has
from sd.optimise.aot import AheadOfTime
from sd.optimise.runtimes import Runtime, kinds


class GuardedOnce:
    """A compiled method of `network`, or of an object that calls it, whose guards are evaluated once a run.

    Dynamo's guards check every module and weight of a network at each call: for 1.4 ms with the embedded model's UNet, a fifth
    of the call. Between the calls of one sampler run only values of the arguments change. So the first call of a run
    evaluates the guards, and later ones with arguments of the same kind execute the code that Dynamo chose there. Within a
    run nothing else may change that guards check but the dtype and device of the weights, threads and gradients. Code that was
    compiled ahead of time, whose weights and arguments are compared instead, is kept for a run in the same way.
    """

    def __init__(self, method: Callable[..., Any], compiled: Callable[..., Any], network: nn.Module):
        self.method, self.compiled, self.network = method, compiled, network
        self.is_checked = isinstance(compiled, AheadOfTime) or (
            has("cache_entries") and not isinstance(compiled, Runtime)
        )
        self.codes: dict[Any, Callable[..., Any]] | None = None  # of the current run

    def of_run(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which calls this method, for one run. Outside of such calls all guards are evaluated."""
        codes: dict[Any, Callable[..., Any]] = {}

        def called(*arguments: Any) -> Any:
            self.codes = codes
            try:
                return call(*arguments)
            finally:
                self.codes = None

        return called

    def __call__(self, *arguments: Any) -> Any:
        codes = self.codes if self.is_checked else None
        if codes is None:
            return self.compiled(*arguments)
        weight = next(self.network.parameters())
        settings = (weight.dtype, weight.device, torch.is_grad_enabled(), torch.get_num_threads())
        key = (settings, kinds(arguments))
        code = codes.get(key)
        if code is not None:
            return code(*arguments)
        if isinstance(self.compiled, AheadOfTime):
            code = codes[key] = self.compiled.code(arguments)
            return code(*arguments)
        out = self.compiled(*arguments)
        codes[key] = _chosen_code(self.method, arguments) or self.compiled
        return out


def _chosen_code(method: Any, arguments: Sequence[Any]) -> Callable[..., Any] | None:
    """The code that Dynamo executed in the last call of the method; None where it executed none, since it is told not to."""
    dynamo: Any = torch._dynamo
    function = method.__func__
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    if not entries or dynamo.eval_frame._stance.stance != "default" or function.__closure__:
        return None
    # Dynamo moves the entry that it executes to the front.
    values = dict(zip(function.__code__.co_varnames, (method.__self__, *arguments)))
    if not entries[0].guard_manager.check(values):
        return None
    code = FunctionType(entries[0].code, function.__globals__, function.__name__, function.__defaults__)
    return MethodType(code, method.__self__)
