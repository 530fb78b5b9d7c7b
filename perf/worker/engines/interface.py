"""Interface of an engine, ours and the user's: one configuration as a loaded model whose `round` makes one output.

    class Engine:
        def __init__(self, configuration):  # loads the model
            self.model = Model().to(configuration.device)

        def round(self, seed):  # timed, from input to output
            return self.model(seed)

Instead of a class there may be a function that returns such an object or the function `round` itself, or a module with the
functions `load(configuration)` and `round(seed)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Output of one round.

    latents: [B, ...], one entry per image: the final latents of txt2img, the output of a stage, what a user's engine
        returned, or of `train` [1, 2 steps], the losses and then the gradient norms.
    images: uint8 [B, H, W, 3], None without images. stages: seconds by stage, empty for a stage alone. varied:
    whether an output of equal values is an error.
    """

    latents: Tensor
    images: Tensor | None
    stages: dict[str, float]
    unet_calls: int
    varied: bool = True


class Engine(Protocol):
    """What a worker times. Only `round` is required.

    The constructor has one argument, the fields of a perf.configurations.configuration.Configuration; its `device` is that
    of the session. Further attributes:

    prepare(seed): makes the state from which a round starts; untimed.
    stages: seconds by stage of the last round, shown beside its time.
    precision: the precision in effect (full, autocast, fp16, bf16), which decides how far an output may be from the
        reference. Default: that of the configuration.
    compiles: whether torch.compile is in effect. Default: whether the configuration says so.
    config: shape of the networks (sd.config.presets.ModelConfig), for FLOPs. Default: none are counted.
    kernels(): attention kernels that ran, by network. stop_observing(): they are not needed, and must not be profiled.
    release(): called at the end of a launch.
    reference(configuration), of the class or module: the engine whose output is right, in a process of its own. Without
        it outputs are not compared, and the session says so.
    """

    def round(self, seed: int) -> Any:
        """One call of the workload, from prompt or input to output: a tensor, an array, images, bytes, or an Output."""


class Fields:
    """The fields of a configuration as attributes. `read` holds the names of those that were read."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values=dict(values), read=set())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.values:
            raise AttributeError(f"a configuration has no field {name!r}; it has {', '.join(self.values)}")
        self.read.add(name)
        return self.values[name]


def output_of(returned: Any, stages: Mapping[str, float]) -> Output:
    """The output of a round from whatever an engine returned. Raises TypeError for what cannot be compared."""
    if isinstance(returned, Output):
        return returned
    tensor = _tensor(returned)
    images = tensor if tensor.dtype == torch.uint8 and tensor.dim() == 4 and tensor.shape[-1] == 3 else None
    return Output(tensor, images, dict(stages), 0, varied=images is not None)


def nothing() -> Output:
    """The output of a function that returns none."""
    return Output(torch.empty(1, 0), None, {}, 0, varied=False)


def _tensor(returned: Any) -> Tensor:
    """[B, ...] on the CPU: a tensor or array as it is; images stacked; several tensors, bytes, a text as one row."""
    if isinstance(returned, str):
        returned = returned.encode()
    if isinstance(returned, (bytes, bytearray)):
        return torch.from_numpy(np.frombuffer(returned, "uint8").copy())[None]
    if hasattr(returned, "images"):  # an output of a diffusers pipeline
        returned = returned.images
    if isinstance(returned, Mapping):
        returned = list(returned.values())
    if isinstance(returned, (list, tuple)):
        entries = [_tensor(entry) for entry in returned]
        if entries and all(_is_image(entry) for entry in returned):
            return torch.cat(entries)
        if entries:
            return torch.cat([entry.float().reshape(-1) for entry in entries])[None]
    if _is_image(returned):
        return torch.from_numpy(np.array(returned.convert("RGB")))[None]
    if isinstance(returned, (int, float)):
        returned = torch.tensor(float(returned))
    if isinstance(returned, np.ndarray):
        returned = torch.from_numpy(returned)
    if not isinstance(returned, Tensor):
        raise TypeError(
            f"a round returned {type(returned).__name__}: return a tensor, an array, images or bytes to check"
        )
    returned = returned.detach().cpu()
    return returned if returned.dim() else returned[None]


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "getbands")  # PIL's, which need not be installed
