"""Which attention backends run on this machine, with the reason where one does not."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import torch

from sd.attention.functions import CHOICES, Attention, allowed_kernels
from sd.choices import ATTENTION, ATTENTION_WITH_KERNELS, SDPA_KERNELS
from sd.errors import Unavailable
from sd.features import has, missing

HEAD_DIMS = (64, 40, 80, 160, 512)  # of SD2's UNet, SD1's UNet, and the VAE


def _cannot_exist(attention: Attention, device: torch.device) -> str | None:
    """Why no kernel of this choice exists for such a device in this torch, before anything is tried."""
    if attention.implementation == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            return f"the package xformers is not installed or does not import ({error})"
    if attention.implementation == "sdpa" and not has("sdpa"):
        return missing("sdpa")
    if attention.implementation not in ATTENTION_WITH_KERNELS or not attention.restricted:
        return None
    if not has("sdpa"):
        return f"torch {torch.__version__} has no SDPA kernels to choose from (torch >= 2.0)"
    if device.type == "cuda":
        if attention.kernels == ("cudnn",) and not has("cudnn_sdpa"):
            return missing("cudnn_sdpa")
        return None
    here = {"math", "flash"} if has("cpu_flash") else {"math"}
    if not here.intersection(attention.kernels):
        return f"on {device.type}, this torch has only the kernels {', '.join(sorted(here))}: the others need an NVIDIA GPU"
    if attention.implementation == "mha" and "math" not in attention.kernels:
        return f"on {device.type}, nn.MultiheadAttention's fast path obeys no kernel choice but math"
    return None


@functools.cache
def _try(attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run the choice once on a few tokens and say why it failed, if it did: what really runs, not what imports."""
    q = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype)
    try:
        with torch.no_grad(), allowed_kernels(attention):
            attention.function()(q, q, q)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"it refuses {str(dtype).replace('torch.', '')} with head size {head_dim} on {device.type}: {_first_reason(error)}"
    return None


def _first_reason(error: Exception) -> str:
    """What an error says, in one line. xFormers lists every reason of every operator: the first of each is enough."""
    refusals = {}
    for operator, reason in re.findall(r"`(\S+)` is not supported because:\s*(.+)", str(error)):
        refusals.setdefault(reason.strip(), []).append(operator)
    if refusals:
        return "; ".join(f"{', '.join(operators)}: {reason}" for reason, operators in refusals.items())
    return " ".join(str(error).split())[:300]


def why_not(attention: Attention, device="cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> str | None:
    """None if `attention` runs on `device` for this dtype and head size, else the reason in one sentence."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device here"
    if device.type == "meta":
        return None
    return _cannot_exist(attention, device) or _try(attention, device, dtype, head_dim)


def check(attention: Attention, device, dtype: torch.dtype, head_dims) -> None:
    """Raise Unavailable, with the reason and what is available here, unless `attention` takes every head size."""
    for head_dim in sorted(set(head_dims)):
        reason = why_not(attention, device, dtype, head_dim)
        if reason:
            usable = [name for name in ATTENTION if why_not(Attention(name), device, dtype, head_dim) is None]
            asked = attention.implementation + (
                f" with kernels {','.join(attention.kernels)}" if attention.restricted else ""
            )
            raise Unavailable(f"attention {asked} cannot run here: {reason}. Available here: {', '.join(usable)}")


def for_head_dim(attention: Attention, device, dtype: torch.dtype, head_dim: int) -> Attention:
    """The choice itself if it takes this head size, else the nearest that does.

    For the VAE, whose single 512-wide head flash and cuDNN do not take: the rule is stated here and the outcome is
    readable as `autoencoder.attention`, so that nothing changes in silence.
    """
    candidates = [attention]
    if has("sdpa") and attention.implementation != "original":
        candidates += [replace(attention, implementation="sdpa", kernels=SDPA_KERNELS)]
    candidates += [Attention("original")]
    return next(choice for choice in candidates if why_not(choice, device, dtype, head_dim) is None)


def described(choice: Attention) -> tuple[str, str]:
    """Implementation and kernel of one of CHOICES, as the tables name them."""
    if choice.implementation not in ATTENTION_WITH_KERNELS:
        return choice.implementation, "-"
    return choice.implementation, choice.kernels[0] if choice.restricted else "any"


def table(device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(implementation, kernel, "usable" or why not) for this machine, at the UNet's and the VAE's head sizes."""
    rows = []
    for choice in CHOICES.values():
        reason = why_not(choice, device, dtype, HEAD_DIMS[0])
        refused = [size for size in HEAD_DIMS if not reason and why_not(choice, device, dtype, size)]
        verdict = reason or "usable" + (f", but not with head size {', '.join(map(str, refused))}" if refused else "")
        rows.append((*described(choice), verdict))
    return rows
