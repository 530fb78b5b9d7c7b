"""Techniques that change the image, in no preset: feature caching, quantisation, and the switch for token merging.

The PSNR bound of each is in tests/sd/test_approximate.py; token merging itself is in sd.models.token_merging.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sd.attention.modules import ProjectedContext
from sd.errors import Unavailable
from sd.models.layers import BasicTransformerBlock
from sd.models.unet import UNet

# Features in and out. Below this width, conversion costs more than the product saves; SD's layers have 320 to 10240.
SMALLEST_QUANTISED = 128


def merge_tokens(unet: UNet, ratio: float) -> None:
    """Merge the fraction `ratio` of the tokens before self-attention, at full resolution only; 0 merges none."""
    for transformer in unet.transformers:
        for block in transformer.transformer_blocks:
            assert isinstance(block, BasicTransformerBlock)
            block.token_merging = ratio if transformer.downsampling == 1 else 0.0


class CachedFeatures:
    """A UNet for one sampler run whose deep part runs at every `interval`th call (DeepCache, arXiv 2312.00858).

    call: as UNet.forward_with_features. The other calls run only the first convolution and the last stage.
    """

    def __init__(self, call: Callable[..., tuple[Tensor, Any]], interval: int):
        self.call, self.interval, self.calls = call, interval, 0
        self.deep: Tensor | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor | ProjectedContext) -> Tensor:
        """As UNet.forward."""
        if self.calls % self.interval == 0:
            self.deep = None
        self.calls += 1
        out, self.deep = self.call(x, timesteps, context, self.deep)
        return out


def require_quantisation(quantisation: str, device: torch.device) -> None:
    """Raise Unavailable without torchao, or for fp8 on a device without fp8 products."""
    if quantisation == "none":
        return
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"quantisation {quantisation}: needs torchao, the extra `quant` ({error})") from None
    if quantisation == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise Unavailable(
            f"quantisation fp8: needs an NVIDIA GPU of compute capability 8.9, and the device is {device}"
        )


def require_wide_layers(unet: UNet, quantisation: str) -> None:
    """Raise Unavailable if quantisation would change no layer."""
    if quantisation != "none" and not any(_is_quantisable(module, name) for name, module in unet.named_modules()):
        raise Unavailable(
            f"quantisation {quantisation}: this model has no linear layer of {SMALLEST_QUANTISED} features or more, below "
            "which it loses time; leave it out"
        )


def quantise(unet: UNet, quantisation: str, smallest: int = SMALLEST_QUANTISED) -> None:
    """Quantise the UNet's linear layers in place, irreversibly: weights once, activations at every call.

    smallest: features in and out from which a layer is quantised.
    """
    if quantisation == unet.quantisation:
        return
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    int8 = quantisation == "int8"
    config = Int8DynamicActivationInt8WeightConfig() if int8 else Float8DynamicActivationFloat8WeightConfig()
    quantize_(unet, config, filter_fn=functools.partial(_is_quantisable, smallest=smallest))
    unet.quantisation = quantisation


def _is_quantisable(module: nn.Module, name: str, smallest: int = SMALLEST_QUANTISED) -> bool:
    return (
        isinstance(module, nn.Linear)
        and min(module.in_features, module.out_features) >= smallest
        and "emb" not in name  # time embeddings: one row a call, or once a run
    )
