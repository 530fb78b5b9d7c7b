"""The UNet compiled ahead of time by AOTInductor into one file, which another process runs without tracing anything.

Source: torch.export and torch._inductor.aoti_compile_and_package; the use for diffusion is huggingface/flux-fast's.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from sd.errors import ConfigError
from sd.features import require
from sd.optimise.cuda_graphs import leaves

SAMPLED = 4096  # numbers of each weight that its fingerprint reads: enough to tell one checkpoint from another


class _Denoise(nn.Module):
    """UNet.denoise as the module that torch.export takes."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timesteps, context):
        return type(self.unet).denoise(self.unet, x, timesteps, context)  # not the file's, which stands in its place


def fingerprint(module: nn.Module) -> str:
    """sha256 of names, shapes and evenly spaced numbers of all weights of a module."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        numbers = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class AheadOfTime:
    """A UNet's `denoise` from `path`: what the file holds, or, where there is none, compiled and written at the first call.

    The file holds the weights, for one set of shapes, one kind of device and `choice`, the way the model is run; all
    are checked, since such code checks nothing itself and would return another model's pictures. Raises ConfigError
    where they differ.
    """

    def __init__(self, unet, path: Path, choice: str):
        self.unet, self.path, self.choice = unet, path, choice
        self.call, self.signature = None, None

    def __call__(self, x, timesteps, context):
        """As UNet.denoise."""
        arguments = (x, timesteps, context)
        signature = [[list(leaf.shape), str(leaf.dtype), leaf.device.type] for leaf in leaves(arguments)]
        if self.call is None:
            self._load(arguments, signature)
        if signature != self.signature:
            raise ConfigError(
                f"aot {self.path}: was made for x of shape {self.signature[0][0]} and {self.signature[0][1:]}, and is "
                f"given {signature[0][0]} and {signature[0][1:]}: give another file for other batches and sizes"
            )
        return self.call(*arguments)

    def _load(self, arguments, signature) -> None:
        identity = {"weights": fingerprint(self.unet), "choice": self.choice, "torch": torch.__version__}
        if not self.path.exists():
            self._export(arguments, {**identity, "signature": json.dumps(signature)})
        try:
            call = torch._inductor.aoti_load_package(str(self.path))
            made = call.get_metadata()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"aot {self.path}: cannot be loaded; remove it ({str(error).splitlines()[0]})") from None
        for name, value in identity.items():
            if made.get(name) != value:
                raise ConfigError(f"aot {self.path}: was made of other {name}; remove it, or give another file")
        self.call, self.signature = call, json.loads(made["signature"])

    def _export(self, arguments, metadata: dict[str, str]) -> None:
        exported = torch.export.export(_Denoise(self.unet), arguments, strict=False)
        partial = self.path.with_name(f"{os.getpid()}-{self.path.name}")
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(partial), inductor_configs={"aot_inductor.metadata": metadata}
        )
        partial.replace(self.path)


def check_path(path: str) -> Path:
    """The file for `AheadOfTime`; ConfigError for one that it cannot be."""
    require("aot", "aot")
    file = Path(path)
    if file.suffix != ".pt2":
        raise ConfigError(f"aot {path}: must end in .pt2")
    if not file.parent.is_dir():
        raise ConfigError(f"aot {path}: there is no folder {file.parent}")
    return file
