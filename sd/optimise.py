"""How a model is run: one field per technique, and the one function that applies them to a loaded model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from sd.attention import ATTENTION_PRECISIONS, DEFAULT_ATTENTION, SDPA_KERNELS, Attention, check, for_head_dim
from sd.errors import ConfigError, Unavailable
from sd.features import require

PRECISIONS = ("full", "autocast", "fp16", "bf16")
COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WEIGHT_DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Optimisations:
    """What to run a model with. Everything is asked for by name; what cannot run here raises Unavailable.

    attention: `original`, `xformers`, `mha` or `sdpa`. sdpa_kernels: those allowed in `mha` and `sdpa`.
    attention_precision: `fp32` upcasts the original's q and k, `input` does not. precision: `full` (fp32),
    `autocast` (fp32 weights; fp16 on CUDA, bf16 on a CPU), `fp16` and `bf16` (pure half weights). compile: mode of
    torch.compile for the UNet.
    """

    attention: str = DEFAULT_ATTENTION
    sdpa_kernels: tuple[str, ...] = SDPA_KERNELS
    attention_precision: str = ATTENTION_PRECISIONS[0]
    precision: str = "full"
    compile: str = "none"

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.compile not in COMPILE_MODES:
            raise ConfigError(f"compile mode {self.compile!r}: choose one of {', '.join(COMPILE_MODES)}")
        self.attention_choice()  # validates its three fields

    def attention_choice(self) -> Attention:
        """The three attention fields as sd.attention takes them."""
        return Attention(self.attention, tuple(self.sdpa_kernels), self.attention_precision)

    def autocast(self, device: torch.device):
        """The context in which the networks run."""
        if self.precision == "autocast":
            return torch.autocast(device.type, dtype=autocast_dtype(device))
        return contextlib.nullcontext()

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """dtype in which attention is computed."""
        return autocast_dtype(device) if self.precision == "autocast" else WEIGHT_DTYPES[self.precision]


def autocast_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA, as published; bf16 on a CPU, where autocast has nothing else on every torch."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def apply(unet, autoencoder, text_encoder, device: torch.device, optimisations: Optimisations) -> None:
    """Make loaded networks run as `optimisations` says; may be called again with another choice.

    Raises Unavailable, before anything is changed, when a part of it cannot run here, and ConfigError when weights
    would have to gain precision that they have lost.
    """
    dtype = WEIGHT_DTYPES[optimisations.precision]
    if unet.dtype != dtype and unet.dtype in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"precision {optimisations.precision}: the weights were already rounded to {unet.dtype}; load the checkpoint again"
        )
    if dtype == torch.float16 and device.type == "cpu":
        require("cpu_fp16", "precision fp16 on the CPU")
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Unavailable("precision bf16: this GPU has no bf16; use fp16 or autocast")
    if optimisations.compile != "none":
        require("compile", f"compile mode {optimisations.compile}")
    compute_dtype = optimisations.compute_dtype(device)
    attention = optimisations.attention_choice()
    check(attention, device, compute_dtype, unet.head_dims())

    for network in (unet, autoencoder, text_encoder):
        network.to(device=device, dtype=dtype)
    unet.use_attention(attention)
    autoencoder.use_attention(for_head_dim(attention, device, compute_dtype, autoencoder.head_dim()))
    vars(unet).pop("denoise", None)  # a compiled one of an earlier choice
    if optimisations.compile != "none":
        unet.denoise = torch.compile(unet.denoise, mode=optimisations.compile, fullgraph=True, dynamic=False)
