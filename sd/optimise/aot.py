"""The UNet compiled ahead of time by AOTInductor into one file, which other processes run without tracing.

Source: torch.export and torch._inductor.aoti_compile_and_package; the use for diffusion follows huggingface/flux-fast.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.attention.modules import ProjectedContext
from sd.errors import ConfigError
from sd.features import require
from sd.models.unet import UNet
from sd.optimise.cuda_graphs import Nested, leaves

SAMPLES = 4096  # numbers of each weight in a fingerprint: enough to distinguish checkpoints


class _Denoise(nn.Module):
    """UNet.denoise as a module, which torch.export requires."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        return UNet.denoise(self.unet, x, timesteps, context)  # the instance's own attribute is an AheadOfTime


def fingerprint(module: nn.Module) -> str:
    """sha256 of names, shapes, dtypes and evenly spaced numbers of a module's weights."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        numbers = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)]
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class AheadOfTime:
    """`UNet.denoise` from the package `path`, compiled and written at the first call if absent.

    A package holds the weights and is for one set of shapes, one device type and one choice of optimisations. Compiled
    code checks none of these and would return another model's images, so they are compared here; raises ConfigError for
    a difference.
    """

    def __init__(self, unet: UNet, path: Path, choice: str):
        self.unet, self.path, self.choice = unet, path, choice
        self.call: Callable[..., Any] | None = None
        self.signature: list[Any] = []

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        """As UNet.denoise."""
        arguments = (x, timesteps, context)
        signature = [[list(leaf.shape), str(leaf.dtype), leaf.device.type] for leaf in leaves(arguments)]
        call = self.call or self._load(arguments, signature)
        if signature != self.signature:
            raise ConfigError(
                f"aot {self.path}: was made for x of shape {self.signature[0][0]} and {self.signature[0][1:]}, not for "
                f"{signature[0][0]} and {signature[0][1:]}: use another file for other batches and sizes"
            )
        out: Tensor = call(*arguments)
        return out

    def _load(self, arguments: tuple[Nested, ...], signature: list[Any]) -> Callable[..., Any]:
        identity = {"weights": fingerprint(self.unet), "choice": self.choice, "torch": torch.__version__}
        if not self.path.exists():
            self._export(arguments, {**identity, "signature": json.dumps(signature)})
        try:
            call = torch._inductor.aoti_load_package(str(self.path))
            metadata = call.get_metadata()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"aot {self.path}: cannot be loaded; remove it ({str(error).splitlines()[0]})") from None
        for name, value in identity.items():
            if metadata.get(name) != value:
                raise ConfigError(f"aot {self.path}: was made with other {name}; remove it, or use another file")
        self.call, self.signature = call, json.loads(metadata["signature"])
        return call

    def _export(self, arguments: tuple[Nested, ...], metadata: dict[str, str]) -> None:
        exported = torch.export.export(_Denoise(self.unet), arguments, strict=False)
        partial = self.path.with_name(f"{os.getpid()}-{self.path.name}")
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(partial), inductor_configs={"aot_inductor.metadata": metadata}
        )
        partial.replace(self.path)


def check_package_path(path: str) -> None:
    """Raise Unavailable where torch has no AOTInductor packages, ConfigError for a path that cannot be one."""
    require("aot", "aot")
    file = Path(path)
    if file.suffix != ".pt2":
        raise ConfigError(f"aot {path}: must end in .pt2")
    if not file.parent.is_dir():
        raise ConfigError(f"aot {path}: there is no folder {file.parent}")
