"""Attention implementations and the kernels behind them: the one place that names an attention kernel.

An attention function takes q [B, S, H, D], k and v [B, T, H, D], all of one dtype, and returns [B, S, H, D] of v's
dtype. To add one: write the function and add its line to FUNCTIONS (docs/add-attention.md). The command lines, the suite
and the tests then know it by that name. How far each is from the exact result is measured in sd.attention.accuracy.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sd.choices import ATTENTION, ATTENTION_PRECISIONS, ATTENTION_WITH_KERNELS, SDPA_KERNELS
from sd.errors import ConfigError
from sd.features import has

# The implementation used when none is named: decided by the torch version alone, never by what happens to import.
DEFAULT_ATTENTION = "sdpa" if has("sdpa") else "original"


@dataclass(frozen=True)
class Attention:
    """Which attention a network runs.

    implementation: one of ATTENTION. kernels: those that PyTorch may choose from in `mha` and `sdpa`.
    precision: `fp32` upcasts q and k before their product, as the original does by default (ATTN_PRECISION);
    `input` leaves them as they are, which overflows fp16 scores on SD 2.1 (the black-image bug).
    """

    implementation: str = DEFAULT_ATTENTION
    kernels: tuple[str, ...] = SDPA_KERNELS
    precision: str = "fp32"

    def __post_init__(self):
        if self.implementation not in ATTENTION:
            raise ConfigError(f"attention {self.implementation!r}: choose one of {', '.join(ATTENTION)}")
        unknown = [kernel for kernel in self.kernels if kernel not in SDPA_KERNELS]
        if unknown or not self.kernels:
            raise ConfigError(f"SDPA kernels {list(self.kernels)}: allow at least one of {', '.join(SDPA_KERNELS)}")
        if self.precision not in ATTENTION_PRECISIONS:
            raise ConfigError(
                f"attention precision {self.precision!r}: choose one of {', '.join(ATTENTION_PRECISIONS)}"
            )
        # One order, so that equal choices compare equal.
        object.__setattr__(self, "kernels", tuple(kernel for kernel in SDPA_KERNELS if kernel in self.kernels))

    @property
    def restricted(self) -> bool:
        """Whether some SDPA kernel is forbidden."""
        return self.kernels != SDPA_KERNELS

    def function(self):
        """The attention function of this choice; `mha` stands for its kernel where no module can be used."""
        if self.implementation == "original" and self.precision == "input":
            return functools.partial(original, upcast=False)
        return FUNCTIONS[self.implementation]


def original(q, k, v, upcast: bool = True):
    """softmax(QK^T / sqrt(D)) V with every score in memory (CompVis/stable-diffusion; the upcast is Stability-AI's)."""
    batch, _, heads, width = q.shape
    # A list, since torch 2.0 cannot compile a generator that is unpacked.
    q, k, v = [x.transpose(1, 2).reshape(batch * heads, -1, width) for x in (q, k, v)]
    scale = width**-0.5
    if upcast:
        with torch.autocast(device_type=q.device.type, enabled=False):
            scores = torch.einsum("bid,bjd->bij", q.float(), k.float()) * scale
    else:
        scores = torch.einsum("bid,bjd->bij", q, k) * scale
    out = torch.einsum("bij,bjd->bid", scores.softmax(dim=-1).to(v.dtype), v)
    return out.reshape(batch, heads, -1, width).transpose(1, 2)


def xformers(q, k, v):
    """xformers.ops.memory_efficient_attention, which takes [B, S, H, D] as it is."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(_whole_rows(q), _whole_rows(k), _whole_rows(v))


def sdpa(q, k, v, causal: bool = False):
    """F.scaled_dot_product_attention; the kernel is PyTorch's choice among those that `allowed_kernels` leaves."""
    q, k, v = [_whole_rows(x).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _whole_rows(x):
    """x, copied if the numbers of a head do not lie side by side: every fused kernel refuses that.

    They do not in the VAE, whose q, k and v come from convolutions: PyTorch would fall back to `math` there or, where
    that is forbidden, raise.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


# The registry: one line each, and the name in sd.choices. `mha` is a module
# (sd.attention.modules.NativeAttention); where there are no such projections to hold, as in the VAE, it stands for the SDPA kernels
# that the module would use.
FUNCTIONS = {
    "original": original,
    "xformers": xformers,
    "mha": sdpa if has("sdpa") else original,
    "sdpa": sdpa,
}
assert tuple(FUNCTIONS) == ATTENTION, "sd.choices has the same names, for what imports no torch"

# Every implementation, and those that have kernels to choose from with each of them alone.
CHOICES: dict[str, Attention] = {}
for _name in ATTENTION:
    CHOICES[_name] = Attention(_name)
    if _name in ATTENTION_WITH_KERNELS:
        CHOICES.update({f"{_name}-{kernel}": Attention(_name, (kernel,)) for kernel in SDPA_KERNELS})


def causal(q, k, v):
    """Causal self-attention of the text encoder: SDPA where torch has it, else plain softmax in fp32."""
    if has("sdpa"):
        return sdpa(q, k, v, causal=True)
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def allowed_kernels(attention: Attention):
    """Context in which SDPA may only use the kernels of `attention`; free of cost when all are allowed."""
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
    return sdpa_kernel(
        [getattr(SDPBackend, names[kernel]) for kernel in attention.kernels if hasattr(SDPBackend, names[kernel])]
    )
