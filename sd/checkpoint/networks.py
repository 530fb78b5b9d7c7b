"""The networks of a config: their constructors, the shapes of their weights without memory, and modules made of weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sd.config.presets import ModelConfig
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet


def meta_device() -> contextlib.AbstractContextManager[Any]:
    """Context manager that makes the current thread build modules of shapes alone, without memory, on every torch."""
    return _shapes_only() if has("device_context") else _meta_empty()


def _shapes_only() -> contextlib.AbstractContextManager[Any]:
    from torch.overrides import TorchFunctionMode  # as a context manager not in torch 1.12

    class ShapesOnly(TorchFunctionMode):
        """Like torch.device("meta"), without initialisers: on meta tensors they import 900 modules."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs, name = kwargs or {}, getattr(function, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):
                return args[0] if args else kwargs["tensor"]
            return function(*args, **({**kwargs, "device": "meta"} if function is torch.empty else kwargs))

    return ShapesOnly()


_EMPTY_LOCK = threading.RLock()


@contextlib.contextmanager
def _meta_empty() -> Iterator[None]:
    """Replace torch.empty, from which all layers of torch.nn allocate, for torch < 2.0.

    Thread-safe: the lock admits one thread at a time, and calls from other threads still allocate memory.
    """
    with _EMPTY_LOCK:
        empty, owner = torch.empty, threading.get_ident()

        def empty_on_meta(*size: Any, **kwargs: Any) -> Tensor:
            if threading.get_ident() == owner:
                kwargs["device"] = "meta"
            return empty(*size, **kwargs)

        torch.empty = empty_on_meta
        try:
            yield
        finally:
            torch.empty = empty


def factories(config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
    """Constructors of the three networks of a config, by the names under which `load` returns their weights."""
    return {
        "unet": lambda: UNet(config.unet),
        "autoencoder": lambda: Autoencoder(config.autoencoder),
        "text_encoder": lambda: TextEncoder(config.text),
    }


@lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> dict[str, dict[str, torch.Size]]:
    """Shape of every weight of {unet, autoencoder, text_encoder}."""
    with meta_device():
        return {
            network: {name: weight.shape for name, weight in make().state_dict().items()}
            for network, make in factories(config).items()
        }


def materialise(
    module_factory: Callable[[], nn.Module],
    state: dict[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the module of `module_factory` with the tensors of `state` as its weights, without allocating others.

    `state` must contain every weight of the module and is emptied; each tensor is freed once it is on `device` in `dtype`
    (None: unchanged). Tensors that need no conversion are used without a copy. Returns the module in eval mode.
    """
    with meta_device():
        module = module_factory()
    for name in [name for name, _ in module.named_parameters()]:
        tensor = state.pop(name).to(device=device, dtype=dtype).contiguous()
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    assert not state and not list(module.buffers()), "load() returns exactly the parameters of the module"
    return module.eval()
