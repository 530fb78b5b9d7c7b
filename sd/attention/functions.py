"""Attention backends: the functions, their registry, and the choice of SDPA kernels.

An attention function takes q [B, S, H, D] and k, v [B, T, H, D] of one dtype and returns [B, S, H, D] in the dtype of v.
docs/add-attention.md shows how to add one; sd.attention.accuracy measures the error of each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.choices import ATTENTION, ATTENTION_PRECISIONS, ATTENTION_WITH_KERNELS, SDPA_KERNELS
from sd.errors import ConfigError
from sd.features import has
from sd.kernels import OWN_ATTENTION

# The torch version alone decides the default, never whether a package imports.
DEFAULT_ATTENTION = "sdpa" if has("sdpa") else "original"
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """Attention backend of a network. Raises ConfigError for unknown names.

    implementation: one of ATTENTION. kernels: the SDPA kernels allowed in `mha` and `sdpa`. precision, of `original`:
    `fp32` upcasts q and k before their product, the published default (ATTN_PRECISION); `input` does not, and overflows
    fp16 scores on SD 2.1, which gives black images. own: a kernel
    of OWN_ATTENTION, `avx2` or `avx512`, instead of those of `sdpa`; empty for none.
    """

    implementation: str = DEFAULT_ATTENTION
    kernels: tuple[str, ...] = SDPA_KERNELS
    precision: str = "fp32"
    own: str = ""

    def __post_init__(self) -> None:
        if self.implementation not in ATTENTION:
            raise ConfigError(f"attention {self.implementation!r}: choose one of {', '.join(ATTENTION)}")
        unknown = [kernel for kernel in self.kernels if kernel not in SDPA_KERNELS]
        if unknown or not self.kernels:
            raise ConfigError(f"SDPA kernels {list(self.kernels)}: allow at least one of {', '.join(SDPA_KERNELS)}")
        if self.precision not in ATTENTION_PRECISIONS:
            raise ConfigError(
                f"attention precision {self.precision!r}: choose one of {', '.join(ATTENTION_PRECISIONS)}"
            )
        if self.own and (self.implementation != "sdpa" or self.restricted):
            raise ConfigError(
                f"{self.own}_attention: replaces every kernel of sdpa; choose attention sdpa with all of them"
            )
        # A fixed order, so that equal choices compare equal.
        object.__setattr__(self, "kernels", tuple(kernel for kernel in SDPA_KERNELS if kernel in self.kernels))

    @property
    def restricted(self) -> bool:
        """Whether an SDPA kernel is forbidden."""
        return self.kernels != SDPA_KERNELS

    def function(self) -> AttentionFunction:
        """The attention function; for `mha`, the SDPA function that replaces the module in the VAE."""
        if self.own:
            kernel: AttentionFunction = OWN_ATTENTION[self.own].attention
            return kernel
        if self.implementation == "original" and self.precision == "input":
            return functools.partial(original, upcast=False)
        return FUNCTIONS[self.implementation]


def original(q: Tensor, k: Tensor, v: Tensor, upcast: bool = True) -> Tensor:
    """softmax(QK^T / sqrt(D)) V with all scores in memory (CompVis/stable-diffusion; the upcast is Stability-AI's)."""
    batch, _, heads, head_dim = q.shape
    # A list, since torch 2.0 cannot compile a generator that is unpacked.
    q, k, v = [x.transpose(1, 2).reshape(batch * heads, -1, head_dim) for x in (q, k, v)]  # [B*H, S, D]
    scale = head_dim**-0.5
    if upcast:
        with torch.autocast(device_type=q.device.type, enabled=False):
            scores = torch.einsum("bid,bjd->bij", q.float(), k.float()) * scale
    else:
        scores = torch.einsum("bid,bjd->bij", q, k) * scale
    out = torch.einsum("bij,bjd->bid", scores.softmax(dim=-1).to(v.dtype), v)
    return out.reshape(batch, heads, -1, head_dim).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers.ops.memory_efficient_attention, whose layout is [B, S, H, D] too."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(_dense_heads(q), _dense_heads(k), _dense_heads(v))
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """F.scaled_dot_product_attention; PyTorch selects the kernel among those that `allowed_kernels` leaves."""
    q, k, v = [_dense_heads(x).transpose(1, 2) for x in (q, k, v)]  # [B, H, S, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


ALIGNMENT = 8  # elements: 16 bytes in half precision, 32 in fp32


def _dense_heads(x: Tensor) -> Tensor:
    """x [B, S, H, D], copied unless D has stride 1 and S an aligned one, as the fused kernels require.

    The VAE's q, k and v come from convolutions and have another stride: without the copy PyTorch would fall back to `math`,
    or raise where `math` is forbidden. A single token of them has stride 1 twice, which `mem_efficient` of a GPU refuses.
    """
    if x.stride(-1) == 1 and (x.stride(1) % ALIGNMENT == 0 or x.shape[-1] % ALIGNMENT):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps the strides of dimensions of size 1


# The registry: one line and a name in sd.choices for each backend. `mha` is a module (sd.attention.modules.NativeAttention);
# its function here is for the VAE, whose projections that module cannot hold.
FUNCTIONS: dict[str, AttentionFunction] = {
    "original": original,
    "xformers": xformers,
    "mha": sdpa if has("sdpa") else original,
    "sdpa": sdpa,
}
assert tuple(FUNCTIONS) == ATTENTION, "sd.choices must list the same names in the same order"

# By name: every backend, followed by each of its SDPA kernels alone and those of our own.
CHOICES: dict[str, Attention] = {}
for _name in ATTENTION:
    CHOICES[_name] = Attention(_name)
    if _name in ATTENTION_WITH_KERNELS:
        CHOICES.update({f"{_name}-{kernel}": Attention(_name, (kernel,)) for kernel in SDPA_KERNELS})
CHOICES.update({f"sdpa-{name}": Attention("sdpa", own=name) for name in OWN_ATTENTION})


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal self-attention of the text encoder: SDPA where torch has it, else softmax in fp32. [B, T, H, D] each."""
    if has("sdpa"):
        return sdpa(q, k, v, causal=True)
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def allowed_kernels(attention: Attention) -> AbstractContextManager[Any]:
    """Context in which SDPA uses only the kernels of `attention`; a null context when all are allowed."""
    if not attention.restricted or attention.implementation not in ATTENTION_WITH_KERNELS or not has("sdpa"):
        return contextlib.nullcontext()
    try:  # torch >= 2.3
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.0 to 2.2
        allowed = {f"enable_{kernel}": kernel in attention.kernels for kernel in ("math", "flash", "mem_efficient")}
        return torch.backends.cuda.sdp_kernel(**allowed)
    names = {
        "math": "MATH",
        "mem_efficient": "EFFICIENT_ATTENTION",
        "flash": "FLASH_ATTENTION",
        "cudnn": "CUDNN_ATTENTION",
    }
    backends = [getattr(SDPBackend, names[kernel], None) for kernel in attention.kernels]
    return sdpa_kernel([backend for backend in backends if backend is not None])
