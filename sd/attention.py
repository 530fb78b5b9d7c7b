"""Attention implementations and the kernels behind them: the one place that names an attention kernel.

An attention function takes q [B, S, H, D], k and v [B, T, H, D], all of one dtype, and returns [B, S, H, D] of v's
dtype. To add one: write the function and add its line to FUNCTIONS (docs/add-attention.md). The command lines, the suite
and the tests then know it by that name. How far each is from the exact result is measured in sd.attention_errors.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sd.errors import ConfigError, Unavailable
from sd.features import FEATURES, has

# The implementation used when none is named: decided by the torch version alone, never by what happens to import.
DEFAULT_ATTENTION = "sdpa" if has("sdpa") else "original"
SDPA_KERNELS = ("math", "mem_efficient", "flash", "cudnn")
WITH_KERNELS = ("mha", "sdpa")  # the implementations that have those to choose from
HEAD_DIMS = (64, 40, 80, 160, 512)  # of SD2's UNet, SD1's UNet, and the VAE
ATTENTION_PRECISIONS = ("fp32", "input")  # dtype of the original's QK^T


@dataclass(frozen=True)
class Attention:
    """Which attention a network runs.

    implementation: one of IMPLEMENTATIONS. kernels: those that PyTorch may choose from in `mha` and `sdpa`.
    precision: `fp32` upcasts q and k before their product, as the original does by default (ATTN_PRECISION);
    `input` leaves them as they are, which overflows fp16 scores on SD 2.1 (the black-image bug).
    """

    implementation: str = DEFAULT_ATTENTION
    kernels: tuple[str, ...] = SDPA_KERNELS
    precision: str = "fp32"

    def __post_init__(self):
        if self.implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"attention {self.implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
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


# The registry: one line each. perf.configurations reads the names from this file, without importing it. `mha` is a module
# (sd.layers.NativeAttention); where there are no such projections to hold, as in the VAE, it stands for the SDPA kernels
# that the module would use.
FUNCTIONS = {
    "original": original,
    "xformers": xformers,
    "mha": sdpa if has("sdpa") else original,
    "sdpa": sdpa,
}
IMPLEMENTATIONS = tuple(FUNCTIONS)

# Every implementation, and those that have kernels to choose from with each of them alone.
CHOICES: dict[str, Attention] = {}
for _name in IMPLEMENTATIONS:
    CHOICES[_name] = Attention(_name)
    if _name in WITH_KERNELS:
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
    if not attention.restricted or attention.implementation not in WITH_KERNELS or not has("sdpa"):
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


def _cannot_exist(attention: Attention, device: torch.device) -> str | None:
    """Why no kernel of this choice exists for such a device in this torch, before anything is tried."""
    if attention.implementation == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            return f"the package xformers is not installed or does not import ({error})"
    if attention.implementation == "sdpa" and not has("sdpa"):
        return f"{FEATURES['sdpa'].what} needs {FEATURES['sdpa'].needs}, this is torch {torch.__version__}"
    if attention.implementation not in WITH_KERNELS or not attention.restricted:
        return None
    if not has("sdpa"):
        return f"torch {torch.__version__} has no SDPA kernels to choose from (torch >= 2.0)"
    if device.type == "cuda":
        if attention.kernels == ("cudnn",) and not has("cudnn_sdpa"):
            return (
                f"{FEATURES['cudnn_sdpa'].what} needs {FEATURES['cudnn_sdpa'].needs}, this is torch {torch.__version__}"
            )
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
            usable = [name for name in IMPLEMENTATIONS if why_not(Attention(name), device, dtype, head_dim) is None]
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


# Operator names that tell which kernel ran, as the profiler records them.
KERNEL_OPERATORS = {
    "aten::_scaled_dot_product_attention_math": "math",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "mem_efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_flash_attention_forward": "flash",
    "aten::_efficient_attention_forward": "mem_efficient",
    "aten::_native_multi_head_attention": "native_mha",
    "xformers::efficient_attention": "small_k",  # until 0.0.16
    "xformers::efficient_attention_forward_small_k": "small_k",
    "xformers::efficient_attention_forward_cutlass": "mem_efficient",
    "xformers_flash::flash_fwd": "flash",
}


def kernels_in(operators) -> tuple[str, ...]:
    """The attention kernels among profiled operator names; `softmax` when the scores were plain tensors, empty if compiled away."""
    operators = set(operators)
    kernels = {kernel for operator, kernel in KERNEL_OPERATORS.items() if operator in operators}
    if not kernels and operators & {"aten::softmax", "aten::_softmax"}:
        kernels = {"softmax"}
    return tuple(sorted(kernels))


class ObservedCall:
    """A network's call, one of which runs under the profiler to see which attention kernels it really uses.

    The second by default: under torch.compile the first one traces every candidate.
    """

    def __init__(self, call, observe_call: int = 2):
        self.call, self.observe_call = call, observe_call
        self.calls, self.kernels = 0, ()

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls != self.observe_call:
            return self.call(*arguments)
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # or the profiler writes a line to stderr at every start and stop
        # Not torch.profiler.profile, whose start imports inductor and dynamo: 4 s of everybody's first picture.
        with torch.autograd.profiler.profile() as profile:
            out = self.call(*arguments)
        self.kernels = kernels_in(event.key for event in profile.key_averages())
        return out


def described(choice: Attention) -> tuple[str, str]:
    """Implementation and kernel of one of CHOICES, as the tables name them."""
    if choice.implementation not in WITH_KERNELS:
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


def main(arguments: list[str] | None = None) -> None:
    """Print, for the CPU in fp32 and, where there is one, the GPU in fp16, what is usable; or how exact it is."""
    parser = argparse.ArgumentParser(prog="python -m sd.attention", description=main.__doc__)
    parser.add_argument(
        "--errors", action="store_true", help="largest error of each against `original` in float64, by dtype"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs of --errors")
    options = parser.parse_args(arguments)
    devices = [("cpu", torch.float32)] + [("cuda", torch.float16)] * torch.cuda.is_available()
    for device, dtype in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        if options.errors:
            from sd.attention_errors import error_table

            print(f"torch {torch.__version__}, {name}, largest error against original in float64, seed {options.seed}")
            print("\n".join(error_table(device, options.seed)))
        else:
            print(f"torch {torch.__version__}, {name}, {str(dtype)[6:]}")
            for implementation, kernel, verdict in table(device, dtype):
                print(f"  {implementation:<9} {kernel:<14} {verdict}")


if __name__ == "__main__":
    main()
