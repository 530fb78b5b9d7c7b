"""Attention in bf16 by the dot products of AVX-512 (avx512_bf16), a kernel of our own for a CPU.

Without AMX, PyTorch's attention multiplies bf16 on a CPU no faster than fp32. This kernel is flash attention too: blocks of
queries and keys, with scores and sums in fp32 and one rounding each of softmax weights and result. The C++ compiler that
inductor uses compiles it for each head size at the first use, and the user's cache folder keeps the result.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

from sd.errors import SDWarning
from sd.features import has, processor_has
from sd.kernels.build import compiled, missing_requirement

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPE = torch.bfloat16
KEYS, PANEL = 128, 64  # keys of a block, lanes of a product
LARGEST_HEAD = 512  # whose blocks fit the stack of a thread
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", f"-DKEYS={KEYS}", f"-DPANEL={PANEL}")
INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(D)) V of bf16 tensors q [B, S, H, D] and k, v [B, T, H, D]; [B, S, H, D] in bf16.

    Raises NotImplementedError for another dtype, an odd D or one above LARGEST_HEAD, or where a backward pass is needed,
    and ValueError for shapes that do not match.
    """
    _require(q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise NotImplementedError("has no backward pass")
    out: Tensor = torch.ops.sd.avx512_attention.default(q, k, v)
    return out


def _require(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16) or q.shape[-1] % 2 or q.shape[-1] > LARGEST_HEAD:
        raise NotImplementedError(f"computes in bf16 with even head sizes of at most {LARGEST_HEAD}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or not k.numel():
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match")


def unavailable_reason(device: torch.device) -> str | None:
    """None where the kernel should compile and run, else the reason."""
    return missing_requirement("AVX-512", device, "avx512_attention", "avx512_bf16")


def beats_sdpa() -> bool:
    """Whether `fast` uses it: it compiles here, and PyTorch's attention has no matrix instructions (AMX) to use instead.

    Warns where the kernel should run here and does not compile.
    """
    if unavailable_reason(torch.device("cpu")) is not None or processor_has("amx_tile"):
        return False
    try:
        _kernel(64)
    except RuntimeError as error:
        problem = f"fast is without avx512_attention: {error}"
        warnings.warn(problem, SDWarning, stacklevel=1)  # of one place, so shown once
        return False
    return True


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _require(q, k, v)  # the operator can be called by itself
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    pairs = (head_dim + -head_dim % PANEL + head_dim) // 2
    work = torch.empty(batch * heads * (keys + -keys % KEYS) * pairs, dtype=torch.int32)
    strides = (ctypes.c_int64 * 12)(*(size for x in (q, k, v, out) for size in x.stride()[:3]))
    tensors = (x.data_ptr() for x in (q, k, v, out, work))
    _kernel(head_dim)(*tensors, batch, heads, queries, keys, strides, torch.get_num_threads())
    return out


if has("avx512_attention"):
    library.define("sd::avx512_attention", "(Tensor q, Tensor k, Tensor v) -> Tensor")
    library.impl("sd::avx512_attention", "CPU")(_attention)
    library.register_fake("sd::avx512_attention")(lambda q, k, v: q.new_empty(q.shape))


@functools.cache
def _kernel(head_dim: int) -> Any:
    """The compiled function. Raises RuntimeError with the reason where it cannot be compiled or loaded."""
    # torch's own copy of GCC's OpenMP, where it has one: two copies would have two pools of threads.
    openmp = map(str, sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))
    options = (*FLAGS, *INSTRUCTIONS, f"-DHEAD={head_dim}")
    libraries = ("-Wl,--as-needed", *openmp)
    loaded = compiled(SOURCE, f"attention-{head_dim}", options, libraries, lambda file: ctypes.CDLL(file))
    function = loaded.attention
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4 + [ctypes.POINTER(ctypes.c_int64), ctypes.c_int]
    function.restype = None
    return function
