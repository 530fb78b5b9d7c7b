"""Convolutions, linear layers and group norms by the AVX2 kernels (sd.kernels.avx2).

In fp32 all of them, in bf16 the norms and the layers that oneDNN computes slower. The weights of layers, packed for the
kernel, replace the plain ones, so that no second copy remains; `state_dict` and `unpack` return the plain ones bit for bit.
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
from sd.models.layers import GroupNorm
from sd.optimise import packed
from sd.optimise.packed import Packed, refuse_gradients

PROBE_RATIO = 1.05  # of beat_packed
WIDEST_IN_BF16 = 256  # channels; a wider linear layer takes oneDNN 1 to 10 % less time


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


class Avx2GroupNorm(Packed, GroupNorm):
    """A group norm of NHWC images by the kernel, with plain weights."""

    plain = GroupNorm

    def _dense(self) -> Tensor:
        return self.get_parameter("weight").detach()

    def unpack(self) -> None:
        self.__class__ = self.plain  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        _require(x)
        positions, choice = x.permute(0, 2, 3, 1), (self.num_groups, self.eps, self.silu)
        out: Tensor = torch.ops.sd.avx2_group_norm.default(positions, self.weight, self.bias, *choice)
        return out.permute(0, 3, 1, 2)


def _require(x: Tensor) -> None:
    refuse_gradients(x, "avx2_layers" if x.dtype == torch.float32 else "avx512_layers")
    if not torch.compiler.is_compiling():
        define_operators()  # a network that was loaded by pickle in another process has not been packed there


def pack(network: nn.Module) -> None:
    """Let the kernels compute every layer and norm that they can, in bf16 those that they compute faster.

    Fused projections are separated.
    """
    define_operators()
    for module in network.modules():
        if isinstance(module, CrossAttention) and module.fused is not None and _computes_weight(module.fused):
            module.fuse("")
    for name, layer in network.named_modules():
        # Time embeddings have one row a call, or run once.
        if "emb" not in name and _computes(layer):
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            layer.weight = nn.Parameter(_packed(layer.weight.detach()), requires_grad=False)
            layer.__class__ = Avx2Conv2d if isinstance(layer, nn.Conv2d) else Avx2Linear
        if type(layer) is GroupNorm and layer.num_channels >= PANEL // 2:
            layer.requires_grad_(False).__class__ = Avx2GroupNorm


@functools.cache
def beat_packed(dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel takes less time than oneDNN with packed weights: a probe of 0.1 s with a convolution and a linear layer.

    Which of them does depends on the processor: oneDNN has kernels for AMX, which this one lacks.
    """
    image, rows = torch.ones(2, 128, 16, 16).contiguous(memory_format=torch.channels_last), torch.ones(512, 256)

    def layers(technique: Callable[[nn.Module], None]) -> Callable[[], object]:
        with torch.random.fork_rng(devices=[]):  # they draw weights
            network = nn.ModuleList([nn.Conv2d(128, 128, 3, padding=1), nn.Linear(256, 256)])
        technique(network.to(dtype).to(memory_format=torch.channels_last))
        (convolve, project), inputs = network, (image.to(dtype), rows.to(dtype))
        return lambda: (convolve(inputs[0]), project(inputs[1]))

    ours, theirs = fastest_calls(layers(pack), layers(packed.pack))
    return theirs >= PROBE_RATIO * ours


def _computes(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        is_plain = type(layer.weight.data) is Tensor  # and not of torchao's class of int8
        return is_plain and layer.in_features > 0 and _computes_weight(layer.weight)
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str):
        return False
    geometry = (layer.kernel_size, layer.stride, layer.padding)
    square = all(height == width for height, width in geometry)
    if not square or layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return False
    has_tiles = geometry == ((3, 3), (1, 1), (1, 1)) and layer.in_channels % (PANEL // 2) == 0
    return has_tiles or _computes_weight(layer.weight)


def _computes_weight(weight: Tensor) -> bool:
    """Whether direct products are computed: in bf16, where channels are read in pairs, those of narrow layers."""
    is_narrow = weight.shape[1] % 2 == 0 and min(weight.shape[:2]) <= WIDEST_IN_BF16
    return weight.dtype == torch.float32 or is_narrow


def _packed(weight: Tensor) -> Tensor:
    """[C', C, ...] -> [panels, taps, C, PANEL], with zeros behind the last channel; bf16 -> [panels, taps, C / 2, PANEL, 2]."""
    taps = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
    padded = F.pad(taps, (0, 0, 0, 0, 0, -len(weight) % PANEL))
    packed: Tensor = padded.unflatten(0, (-1, PANEL)).permute(0, 3, 2, 1)
    if weight.dtype == torch.bfloat16:
        packed = packed.unflatten(2, (-1, 2)).transpose(3, 4)
    return packed.contiguous()


def _unpacked(packed: Tensor, channels: int) -> Tensor:
    """The inverse of `_packed`, with the taps in one dimension: [C', C, taps]."""
    if packed.dtype == torch.bfloat16:
        packed = packed.transpose(3, 4).flatten(2, 3)
    return packed.detach().permute(0, 3, 2, 1).flatten(0, 1)[:channels].contiguous()
