"""Convolutions, linear layers, group norms and attention by the instructions of AVX2, kernels of our own for a CPU (avx2.cpp).

They compute in fp32, by AVX-512 where the processor has it; with avx512_bf16 layers and norms also compute in bf16. oneDNN's
and MKL's operators spend up to 50 us a call outside of the product and reach less of the processor's rate at the sizes of
small images. Inductor's group norms of NHWC images have a vector for each group, whose lanes a narrow group does not fill. The
operators are in C++ too, since one in Python costs 18 us a call.
"""

from __future__ import annotations

import functools
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor, library

from sd.errors import SDWarning
from sd.features import processor_has
from sd.kernels.build import compiled, missing_requirement

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPE = torch.float32
# By their names in sd.features.
INSTRUCTIONS = {"avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx512f",), "avx512_bf16": ("-mavx512bf16",)}
PANEL = 32 if processor_has("avx512") else 16  # channels that share a read of the input: two vectors
LARGEST_HEAD = 512  # up to which its blocks stay in the caches
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno")
SIZES = (f"-DPANEL={PANEL}", f"-DLARGEST_HEAD={LARGEST_HEAD}")
_DEFINING = threading.Lock()


def unavailable_reason(device: torch.device) -> str | None:
    """None where the kernels run, which compiles them at the first call; else the reason."""
    return _missing(device) or _problem()


def bf16_unavailable_reason(device: torch.device) -> str | None:
    """None where layers and norms compute in bf16 too, else the reason."""
    return _missing(device, "avx512_bf16") or _problem()


def _missing(device: torch.device, instructions: str = "avx2") -> str | None:
    return missing_requirement("AVX2" if instructions == "avx2" else "AVX-512", device, "avx2", instructions)


def run_here(instructions: str = "avx2") -> bool:
    """Whether the kernels run on a processor with these instructions. Warns where they should and do not compile."""
    if _missing(torch.device("cpu"), instructions) is not None:
        return False
    problem = _problem()
    if problem is not None:
        # Of one place, so shown once.
        warnings.warn(f"fast is without the AVX2 kernels: {problem}", SDWarning, stacklevel=1)
    return problem is None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(D)) V of fp32 tensors q [B, S, H, D] and k, v [B, T, H, D]; [B, S, H, D] in fp32.

    Raises NotImplementedError for another dtype, a D above LARGEST_HEAD, or where a backward pass is needed, ValueError for
    shapes that do not match, and RuntimeError where the kernel cannot be compiled.
    """
    if not (q.dtype == k.dtype == v.dtype == DTYPE) or q.shape[-1] > LARGEST_HEAD:
        raise NotImplementedError(f"computes in fp32 with head sizes of at most {LARGEST_HEAD}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or not k.numel():
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise NotImplementedError("has no backward pass")
    if not torch.compiler.is_compiling():
        define_operators()
    out: Tensor = torch.ops.sd.avx2_attention.default(q, k, v)
    return out


def define_operators() -> None:
    """Define torch.ops.sd.avx2_layer, avx2_group_norm and avx2_attention; no gradients.

    avx2_layer: x [..., C] or, for a convolution, [B, H, W, C]; weight [panels, taps, C, PANEL], bias [C'] -> [..., C']. In
    bf16, weight [panels, taps, C / 2, PANEL, 2], with pairs of neighbouring channels.
    avx2_group_norm: x [B, ..., C] with C from PANEL / 2, weight and bias [C] -> [B, ..., C]; then SiLU if `silu`.
    avx2_attention: softmax(QK^T / sqrt(D)) V of q [B, S, H, D] and k, v [B, T, H, D] -> [B, S, H, D].
    Raises RuntimeError with the reason where the kernels cannot be compiled or loaded.
    """
    problem = _problem()
    if problem is not None:
        raise RuntimeError(problem)


def _problem() -> str | None:
    with _DEFINING:  # operators can be defined once in a process
        return _defined()


@functools.cache
def _defined() -> str | None:
    """None after the operators are defined, or the reason why they cannot be."""
    torch_folder = Path(torch.__file__).parent
    includes = (torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include")
    instructions = (flag for name, flags in INSTRUCTIONS.items() if processor_has(name) for flag in flags)
    options = (*FLAGS, *instructions, *SIZES, *(f"-I{folder}" for folder in includes))
    libraries = (f"-L{torch_folder / 'lib'}", "-ltorch_cpu")
    try:
        # The library gives the operators their code when it is loaded; they need not be defined before.
        compiled(SOURCE, f"avx2-torch{torch.__version__}", options, libraries, torch.ops.load_library)
    except RuntimeError as error:
        return str(error)
    geometry = "int channels, int kernel, int stride, int padding"
    library.define("sd::avx2_layer", f"(Tensor x, Tensor weight, Tensor? bias, {geometry}) -> Tensor")
    library.register_fake("sd::avx2_layer")(_layer)
    library.define("sd::avx2_attention", "(Tensor q, Tensor k, Tensor v) -> Tensor")
    library.register_fake("sd::avx2_attention")(lambda q, k, v: q.new_empty(q.shape))
    affine = "Tensor weight, Tensor bias, int groups, float eps, bool silu"
    library.define("sd::avx2_group_norm", f"(Tensor x, {affine}) -> Tensor")
    library.register_fake("sd::avx2_group_norm")(lambda x, *affine: x.new_empty(x.shape))
    return None


def _layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, kernel: int, stride: int, padding: int
) -> Tensor:
    sizes = x.shape[:-1]
    if (kernel, stride, padding) != (1, 1, 0):
        sizes = torch.Size([len(x), *((size + 2 * padding - kernel) // stride + 1 for size in x.shape[1:3])])
    return x.new_empty(*sizes, channels)
