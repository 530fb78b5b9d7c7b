"""Option values of `sd`, without importing torch, so that `perf` can validate them before it measures."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

EMBEDDED_WEIGHTS = Path(__file__).parent / "tiny" / "tiny.safetensors"  # of the model `tiny`
EMBEDDED_INPAINTING = EMBEDDED_WEIGHTS.with_name("tiny-inpaint.safetensors")  # the UNet of `tiny-inpaint` alone

MODELS = (  # sd.config.presets.PRESETS
    "tiny",
    "sd1",
    "sd2",
    "sd2-v",
    "sd1-inpaint",
    "sd2-inpaint",
    "tiny-inpaint",
    "sd2-depth",
)
ATTENTION = (  # sd.attention.functions.FUNCTIONS, in the same order
    "original",
    "xformers",
    "mha",
    "sdpa",
)
ATTENTION_WITH_KERNELS = ("mha", "sdpa")  # implementations that accept a kernel choice
SDPA_KERNELS = ("math", "mem_efficient", "flash", "cudnn")  # torch.nn.attention.SDPBackend
ATTENTION_PRECISIONS = ("fp32", "input")  # dtype of QK^T in `original`
PRECISIONS = ("full", "autocast", "fp16", "bf16")
SAMPLERS = (  # sd.sampling.samplers.SAMPLERS, in the same order
    "ddim",
    "plms",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_solver_sde",
    "unipc",
    "lcm",
)
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "sgm_turbo")  # the default is the sampler's own
SIGMAS = ("schedule", "karras")
RNGS = ("per-image", "original")

COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_SCOPES = ("unet", "blocks", "step")
RUNTIMES = ("openvino", "onnxrt")  # sd.optimise.runtimes
COMPILE_BACKENDS = ("inductor", "aotinductor", *RUNTIMES, "tensorrt", "cudagraphs", "aot_eager", "eager")
DEBUGGING_BACKENDS = ("aot_eager", "eager")  # generate no code
INDUCTOR_OPTIONS = (  # settings in sd.optimise.compile.INDUCTOR_OPTIONS
    "conv_1x1_as_mm",
    "coordinate_descent_tuning",
    "coordinate_descent_check_all_directions",
    "no_epilogue_fusion",
    "no_shape_padding",
    "no_split_reductions",
    "persistent_tma_matmul",
    "programmatic_launch",
    "freezing",
)
OPTIMISERS = ("auto", "fused", "foreach", "loop")  # implementations of AdamW
CUDA_GRAPHS = ("none", "unet", "networks", "loop")

OPTIMISE_PRESETS = ("none", "original", "fast")  # of --optimise
QUANTISATIONS = ("none", "int8", "fp8")
# Techniques of --optimise that change the image; they are measured but never reported as the fastest.
APPROXIMATE = ("token_merging", "feature_caching", "int8", "fp8")


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that inductor calls for a CPU, or None."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def why_no_inductor() -> str | None:
    """Why inductor can compile nothing for a CPU here, or None: its C++ includes Python's headers."""
    if cpp_compiler() is None:
        return "needs a C++ compiler on a CPU; install g++, or name one in CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "needs Python's headers on a CPU; install them, such as the package python3-dev"
    return None
