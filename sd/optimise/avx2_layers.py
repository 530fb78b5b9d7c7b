"""Convolutions and linear layers in fp32 by the AVX2 kernel (sd.kernels.avx2).

The weights, packed for the kernel, replace the plain ones, so that no second copy remains; `state_dict` and `unpack` return
the plain ones bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention.modules import CrossAttention
from sd.features import fastest_calls
from sd.kernels.avx2 import PANEL, define_operators
from sd.optimise import packed
from sd.optimise.packed import Packed, refuse_gradients

PROBE_RATIO = 1.05  # of beat_packed


class Avx2Conv2d(Packed, nn.Conv2d):
    """A convolution of NHWC images by the kernel."""

    plain = nn.Conv2d

    def _dense(self) -> Tensor:
        weight: Tensor = _unpacked(self.get_parameter("weight"), self.out_channels).unflatten(2, self.kernel_size)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        _require(x)
        geometry = (self.out_channels, self.kernel_size[0], self.stride[0], int(self.padding[0]))
        out: Tensor = torch.ops.sd.avx2_layer.default(x.permute(0, 2, 3, 1), self.weight, self.bias, *geometry)
        return out.permute(0, 3, 1, 2)


class Avx2Linear(Packed, nn.Linear):
    """A linear layer by the kernel."""

    plain = nn.Linear

    def _dense(self) -> Tensor:
        return _unpacked(self.get_parameter("weight"), self.out_features).squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        _require(x)
        out: Tensor = torch.ops.sd.avx2_layer.default(x, self.weight, self.bias, self.out_features, 1, 1, 0)
        return out


def _require(x: Tensor) -> None:
    refuse_gradients(x, "avx2_layers")
    if not torch.compiler.is_compiling():
        define_operators()  # a network that was loaded by pickle in another process has not been packed there


def pack(network: nn.Module) -> None:
    """Let the kernel compute every layer that it can. Fused projections are separated first."""
    define_operators()
    for module in network.modules():
        if isinstance(module, CrossAttention):
            module.fuse("")
    for name, layer in network.named_modules():
        # Time embeddings have one row a call, or run once.
        if "emb" not in name and _computes(layer):
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            layer.weight = nn.Parameter(_packed(layer.weight.detach()), requires_grad=False)
            layer.__class__ = Avx2Conv2d if isinstance(layer, nn.Conv2d) else Avx2Linear


@functools.cache
def beat_packed() -> bool:
    """Whether the kernel takes less time than oneDNN with packed weights: a probe of 0.1 s with a convolution and a linear layer.

    oneDNN uses AVX-512 where the processor has it, at the rate of AVX2 on some processors and at twice that on others.
    """
    image, rows = torch.ones(2, 128, 16, 16).contiguous(memory_format=torch.channels_last), torch.ones(512, 256)

    def layers(technique: Callable[[nn.Module], None]) -> Callable[[], object]:
        with torch.random.fork_rng(devices=[]):  # they draw weights
            convolve, project = nn.Conv2d(128, 128, 3, padding=1), nn.Linear(256, 256)
        for layer in (convolve, project):
            technique(layer.to(memory_format=torch.channels_last))
        return lambda: (convolve(image), project(rows))

    ours, theirs = fastest_calls(layers(pack), layers(packed.pack))
    return theirs >= PROBE_RATIO * ours


def _computes(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        return layer.in_features > 0
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str):
        return False
    square = all(height == width for height, width in (layer.kernel_size, layer.stride, layer.padding))
    return square and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def _packed(weight: Tensor) -> Tensor:
    """[C', C, ...] -> [panels, taps, C, PANEL], with zeros behind the last channel."""
    taps = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
    padded = F.pad(taps, (0, 0, 0, 0, 0, -len(weight) % PANEL))
    packed: Tensor = padded.unflatten(0, (-1, PANEL)).permute(0, 3, 2, 1).contiguous()
    return packed


def _unpacked(packed: Tensor, channels: int) -> Tensor:
    """The inverse of `_packed`, with the taps in one dimension: [C', C, taps]."""
    return packed.detach().permute(0, 3, 2, 1).flatten(0, 1)[:channels].contiguous()
