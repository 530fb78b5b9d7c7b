"""Availability of the attention backends on this machine, with the reason where one cannot run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from sd.attention.functions import CHOICES, Attention, allowed_kernels
from sd.choices import ATTENTION, ATTENTION_WITH_KERNELS, SDPA_KERNELS
from sd.errors import Unavailable
from sd.features import has, missing
from sd.kernels import OWN_ATTENTION

# SD1's UNet: 40, 80, 160; SD2's: 64; the VAE: 512; 32 is the largest that xFormers' CPU kernel supports.
HEAD_DIMS = (32, 40, 64, 80, 160, 512)


def _missing_requirement(attention: Attention, device: torch.device) -> str | None:
    """The reason known without a trial: a package that is not installed, or a kernel that this torch lacks."""
    if attention.implementation == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            return f"the package xformers is not installed or does not import ({error})"
    if attention.implementation == "sdpa" and not has("sdpa"):
        return missing("sdpa")
    if attention.own:
        reason: str | None = OWN_ATTENTION[attention.own].unavailable_reason(device)
        return reason
    if attention.implementation not in ATTENTION_WITH_KERNELS or not attention.restricted:
        return None
    if not has("sdpa"):
        return f"torch {torch.__version__} has no SDPA kernels to choose from (torch >= 2.0)"
    if device.type == "cuda":
        return missing("cudnn_sdpa") if attention.kernels == ("cudnn",) else None
    cpu_kernels = {"math", "flash"} if has("cpu_flash") else {"math"}
    if not cpu_kernels.intersection(attention.kernels):
        return (
            f"on {device.type}, this torch has only the kernels {', '.join(sorted(cpu_kernels))}: "
            "the others need an NVIDIA GPU"
        )
    if attention.implementation == "mha" and "math" not in attention.kernels:
        return f"on {device.type}, the fast path of nn.MultiheadAttention ignores every kernel choice but math"
    return None


@functools.cache
def _trial_failure(
    attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool
) -> str | None:
    """Run the backend on 16 tokens: the error as a reason, or None. An import that works does not prove that a kernel does."""
    q = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype, requires_grad=training)
    try:
        with torch.set_grad_enabled(training), allowed_kernels(attention):
            out = attention.function()(q, q, q)
            if training:
                out.sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        use = "no support for training in" if training else "no support for"
        return f"{use} {str(dtype)[6:]} with head size {head_dim} on {device.type}: {_one_line(error)}"
    return None


def _one_line(error: Exception) -> str:
    """The error in one line. xFormers lists all reasons of all operators: the first reason of each operator is enough."""
    operators_by_reason: dict[str, list[str]] = {}
    for operator, reason in re.findall(r"`(\S+)` is not supported because:\s*(.+)", str(error)):
        operators_by_reason.setdefault(reason.strip(), []).append(operator)
    if operators_by_reason:
        return "; ".join(f"{', '.join(operators)}: {reason}" for reason, operators in operators_by_reason.items())
    return " ".join(str(error).split())[:300]


def unavailable_reason(
    attention: Attention,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    training: bool = False,
) -> str | None:
    """None if `attention` runs on `device` with this dtype and head size, else the reason in one sentence.

    training: whether it must have a backward pass.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    if device.type == "meta":
        return None
    return _missing_requirement(attention, device) or _trial_failure(attention, device, dtype, head_dim, training)


def check(
    attention: Attention,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dims: Iterable[int],
    training: bool = False,
) -> None:
    """Raise Unavailable, with the reason and the available backends, unless `attention` supports every head size.

    training: whether it must have a backward pass.
    """
    for head_dim in sorted(set(head_dims)):
        arguments = (device, dtype, head_dim, training)
        reason = unavailable_reason(attention, *arguments)
        if reason:
            usable = [name for name in ATTENTION if not unavailable_reason(Attention(name), *arguments)]
            kernels = f" with kernels {','.join(attention.kernels)}" if attention.restricted else ""
            kernels = f" with {attention.own}_attention" if attention.own else kernels
            raise Unavailable(
                f"attention {attention.implementation}{kernels} cannot run here: {reason}. "
                f"Available here: {', '.join(usable)}"
            )


def for_head_dim(attention: Attention, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Attention:
    """`attention` if it supports this head size, else `sdpa` with all kernels, else `original`.

    For the VAE, whose single 512-wide head flash and cuDNN do not support. `autoencoder.attention` reports the result.
    """
    candidates = [attention]
    if has("sdpa") and attention.implementation != "original":
        candidates += [replace(attention, implementation="sdpa", kernels=SDPA_KERNELS, own="")]
    candidates += [Attention("original")]
    return next(choice for choice in candidates if not unavailable_reason(choice, device, dtype, head_dim))


def labels(choice: Attention) -> tuple[str, str]:
    """Implementation and kernel of an entry of CHOICES, as the tables print them."""
    if choice.implementation not in ATTENTION_WITH_KERNELS:
        return choice.implementation, "-"
    if choice.own:
        return choice.implementation, f"{choice.own}-{str(OWN_ATTENTION[choice.own].DTYPE)[6:]}"
    return choice.implementation, choice.kernels[0] if choice.restricted else "any"


def availability_table(device: torch.device | str, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Rows (implementation, kernel, "usable" or the reason) of CHOICES, at the head sizes of the UNet and the VAE."""
    rows = []
    for choice in CHOICES.values():
        own = OWN_ATTENTION[choice.own].DTYPE if choice.own else dtype
        status = unavailable_reason(choice, device, own)
        if status is None:
            unsupported = [str(size) for size in HEAD_DIMS if unavailable_reason(choice, device, own, size)]
            status = "usable" + (f", but not with head size {', '.join(unsupported)}" if unsupported else "")
        rows.append((*labels(choice), status))
    return rows
