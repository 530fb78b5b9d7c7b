"""Classification of GPU kernels and operators by name. Pure.

The names of NVIDIA's libraries, Inductor and ATen are not stable interfaces: unknown ones are classified as `other`. Kernels
of cuDNN, cuBLAS and CUTLASS are named after their operation, ATen's generic kernels contain it in their template arguments,
and Inductor's fused kernels list all fused operators, so that their prefix (pointwise or reduction) decides first.
"""

from __future__ import annotations

import re

COPIES = "to_copy|clone|cat|copy|view|transpose|permute|unsqueeze|expand|slice|constant_pad_nd"
# The first matching pattern decides. The matrix products of non-fused attention are `gemm`.
CLASSES = (
    # Inductor's templates: their names list the operators fused into the product, as well as copies before it.
    ("conv", r"triton_tem_fused\w*convolution"),
    ("gemm", r"triton_tem_fused\w*(?:addmm|_b?mm)"),
    ("attention", r"triton_tem_fused\w*attention"),
    # Inductor: pointwise (poi, foreach), then reductions (red, per), which are norms and softmax in these networks.
    ("copy", rf"(?:triton_poi|cpp)_fused_(?:_*(?:{COPIES})_*)+\d*$"),
    ("elementwise", r"triton_(?:poi|for)_fused"),
    ("attention", r"(?:triton_(?:red|per)|cpp)_fused_\w*softmax"),
    ("norm", r"(?:triton_(?:red|per)|cpp)_fused_\w*(?:norm(?!al_)|var_mean)"),
    ("elementwise", r"cpp_fused"),
    ("attention", r"flash|fmha|attention|attn|sdpa|softmax|efficient_attn"),
    # Before `copy`, since CUTLASS template arguments name the copies inside a product.
    ("conv", r"cutlass::conv|fprop|winograd"),
    ("gemm", r"cutlass::gemm|gemm_universal|gemmuniversal"),
    (
        "copy",
        r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|convert_?tensor|tensortransform|transpose_?kernel|"
        r"transpose_read|catarray|indexselect|index_elementwise|gather|"
        r"aten::(?:cat|clone|contiguous|to|_to_copy|pin_memory|index|index_select|embedding)(?!\w)",
    ),
    ("conv", r"conv(?!er)|implicit_gemm|dgrad|[sh]\d*cudnn|im2col|fft2d|computeoffsets|kern_precompute"),
    (
        "gemm",
        r"gemm|gemv|cublas|nvjet|splitk|matmul|mkl_linear|int_mm|scaled_mm|dot_kernel|fused_(?:add)?b?mm_|"
        r"aten::(?:mm|bmm|addmm|baddbmm|linear|einsum)",
    ),
    ("norm", r"norm(?!al_|al\b)|welford|rowwisemoments|fusedparams|aten::(?:var|std)"),
    (
        "elementwise",
        r"elementwise|silu|gelu|sigmoid|upsample|distribution|fill|aten::(?:add|sub|mul|div|exp|sin|cos|pow|sqrt|"
        r"rsub|neg|clamp|round|zero_|where|lerp|addcmul|normal_|randn?|arange|chunk)",
    ),
)
PATTERNS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CLASSES)


def kernel_class(name: str) -> str:
    """The class of a kernel or operator, `other` if unknown."""
    return next((label for label, pattern in PATTERNS if pattern.search(name)), "other")
