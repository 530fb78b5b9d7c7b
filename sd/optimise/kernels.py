"""Our own kernels as techniques: whether they can run here, and switching them on and off. sd.optimise.triton_kernels has them."""

from __future__ import annotations

import os

import torch

from sd.errors import Unavailable
from sd.features import require
from sd.models.layers import GEGLU, GroupNorm

CAPABILITY = (8, 0)  # the oldest GPU that the kernels are compiled for in the tests


def require_kernels(asked_by: str, device: torch.device) -> None:
    """Raise Unavailable, naming the option that asked, where Triton kernels cannot run.

    They need an NVIDIA GPU of compute capability 8.0, or, for tests alone, Triton's interpreter: with TRITON_INTERPRET=1
    in the environment before triton is imported, they also run on a CPU, a thousand times slower.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(f"{asked_by}: needs an NVIDIA GPU, and the device is {device}: leave it out")
    require("triton_op", asked_by)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{asked_by}: needs triton, which comes with torch for NVIDIA GPUs ({error})") from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise Unavailable(
            f"{asked_by}: needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, and {device} has less"
        )


def use_kernels(networks, group_norm: bool, geglu: bool) -> None:
    """Give every GroupNorm and every GEGLU of the networks its kernel, or the plain code back."""
    if group_norm or geglu:
        from sd.optimise import triton_kernels  # half a second, and not every torch has what it needs
    for network in networks:
        for module in network.modules():
            if isinstance(module, GroupNorm):
                module.kernel = triton_kernels.group_norm if group_norm else None
            elif isinstance(module, GEGLU):
                module.kernel = triton_kernels.geglu if geglu else None
