"""Techniques that change the picture, so that none is ever a default: each has its bound in tests/sd/test_approximate.py.

Token merging is in sd.models.token_merging; the deep features of DeepCache (arXiv 2312.00858) and dynamic quantisation here.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from sd.errors import Unavailable

# Features in and out: below, converting costs more than the product saves. SD's layers have 320 to 10240.
SMALLEST_QUANTISED = 128


def merge_tokens(unet, ratio: float) -> None:
    """Merge the part `ratio` of the tokens before self-attention where there are most of them, at full resolution."""
    for transformer in unet.transformers:
        for block in transformer.transformer_blocks:
            block.token_merging = ratio if transformer.downsampling == 1 else 0.0


class CachedFeatures:
    """A UNet for one run of a sampler, whose deep part runs at every `interval`th call (DeepCache, arXiv 2312.00858).

    call: as UNet.forward_with_features. In between, only the first convolution and the last stage run.
    """

    def __init__(self, call, interval: int):
        self.call, self.interval = call, interval
        self.calls, self.deep = 0, None

    def __call__(self, x, timesteps, context):
        """As UNet.forward."""
        if self.calls % self.interval == 0:
            self.deep = None
        self.calls += 1
        out, self.deep = self.call(x, timesteps, context, self.deep)
        return out


def require_quantisation(kind: str, device: torch.device) -> None:
    """Raise Unavailable where `kind` cannot run: the extra `quant` is absent, or the device has no such products."""
    if kind == "none":
        return
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"quantisation {kind}: needs torchao, the extra `quant` ({error})") from None
    if kind == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise Unavailable(
            f"quantisation fp8: needs an NVIDIA GPU of compute capability 8.9, and the device is {device}"
        )


def require_wide_layers(unet, kind: str) -> None:
    """Raise Unavailable where quantisation would leave every layer as it is."""
    if kind != "none" and not any(_is_worth_it(module, name) for name, module in unet.named_modules()):
        raise Unavailable(
            f"quantisation {kind}: this model has no linear layer of {SMALLEST_QUANTISED} features or more, below which it "
            "loses time; leave it out"
        )


def quantise(unet, kind: str, smallest: int = SMALLEST_QUANTISED) -> None:
    """Quantise the UNet's linear layers in place: weights once, activations at every call. It cannot be undone.

    smallest: features in and out from which a layer is quantised.
    """
    if kind == unet.quantisation:
        return
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    config = Int8DynamicActivationInt8WeightConfig() if kind == "int8" else Float8DynamicActivationFloat8WeightConfig()
    quantize_(unet, config, filter_fn=functools.partial(_is_worth_it, smallest=smallest))
    unet.quantisation = kind


def _is_worth_it(module: nn.Module, name: str, smallest: int = SMALLEST_QUANTISED) -> bool:
    return (
        isinstance(module, nn.Linear)
        and min(module.in_features, module.out_features) >= smallest
        and "emb" not in name  # computed for one row a call, or once a run
    )
