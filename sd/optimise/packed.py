"""Weights of convolutions and linear layers in oneDNN's own blocked layout, not reordered at every call of a CPU.

The packed weights replace the plain ones, so that no second copy remains; `state_dict` and `unpack` return the plain ones bit
for bit. oneDNN reorders a weight in another layout than it wants at every call, for up to 300 times the product. Which one it
wants for a convolution depends on the processor, the threads, and the size and the number of the images, so a convolution's
weight is reordered again where these change. For a linear layer of more than one row it depends on the channels alone; 1x1
convolutions are computed as such.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library, nn

from sd.attention.modules import CrossAttention
from sd.features import has

# Channels in and out from which a layer is packed: a narrow layer loses more in oneDNN's call than it gains.
SMALLEST_PACKED = 128
ROWS = 1024  # oneDNN requires a number, which does not change the layout


@functools.cache
def _define_operators() -> None:
    """Define torch.ops.sd.packed_linear and packed_convolution.

    The first is oneDNN's own operator, which inductor compiles for constants only. Constants could not be replaced, as by a
    LoRA, without another compilation. The second is `_convolve`.
    """
    library.define("sd::packed_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("sd::packed_linear", "CompositeExplicitAutograd")(
        lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    )
    library.register_fake("sd::packed_linear")(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
    geometry = "int[] padding, int[] stride, int[] dilation, int groups"
    library.define("sd::packed_convolution", f"(Tensor x, Tensor weight, Tensor? bias, {geometry}) -> Tensor")
    library.impl("sd::packed_convolution", "CompositeExplicitAutograd")(_convolve)
    library.register_fake("sd::packed_convolution")(_convolution)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
    return out


def _convolve(x: Tensor, weight: Any, bias: Tensor | None, *geometry: Any) -> Tensor:
    """oneDNN's convolution; where images of this size want another layout of the weight, it is reordered first.

    That changes neither shape nor values, so that the operator need not declare it. One thread at a time for each weight.
    """
    use = (x.shape, torch.get_num_threads())
    if use not in vars(weight).setdefault("fits", set()):
        # Layers of one network often share their channels, so the layout is looked up before the weight is touched.
        wanted = _layout(weight.shape, weight.dtype, *use, *map(_hashable, geometry))
        with torch.inference_mode(weight.is_inference()), torch.no_grad():  # as set_data requires
            if _description(weight) != wanted:
                weight.data = _reordered(weight.to_dense().to_mkldnn(), geometry, x.shape)
                weight.fits.clear()
        weight.fits.add(use)
    return _convolution(x, weight, bias, *geometry)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


def _reordered(weight: Tensor, geometry: Sequence[Any], image: torch.Size) -> Tensor:
    reordered: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight, *geometry, image)
    return reordered


def _description(weight: Tensor) -> bytes:
    """oneDNN's description of a tensor: shape, dtype and layout."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(weight).tolist())


@functools.cache
def _layout(size: torch.Size, dtype: torch.dtype, image: torch.Size, threads: int, *geometry: Any) -> bytes:
    """The description that oneDNN wants of a convolution's weight; it decides only while it reorders one."""
    return _description(_reordered(torch.zeros(size, dtype=dtype).to_mkldnn(), geometry, image))


@functools.cache
def cache_code() -> None:
    """Let the compile cache hold code whose inputs include packed weights, for the rest of the process.

    Torch 2.15 refuses to store code with tensors of oneDNN, since their values cannot be pickled. A cache key holds the values
    of constants alone; of inputs, which are fake tensors at compile time, it holds shape, dtype and layout. Torch 2.5 to 2.11
    cache such code too.
    """
    if not has("cache_validator"):
        return
    from torch._inductor import codecache
    from torch._subclasses.fake_tensor import FakeTensor

    validator: Any = codecache.CacheabilityValidator
    check = validator.check_tensor

    def check_constant(tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor):
            check(tensor)

    validator.check_tensor = staticmethod(check_constant)


def refuse_gradients(x: Tensor, technique: str) -> None:
    """Raise NotImplementedError for an input that requires a gradient, which the technique's operators do not compute.

    A function, since compiled code has one more guard for each layer with a method.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(f"{technique}: has no backward pass; choose optimisations without it")


class Packed(nn.Module):
    """A layer with packed weights or by a kernel that needs none; its state dict has the plain weight."""

    plain: type[nn.Module]

    def _dense(self) -> Tensor:
        return self.get_parameter("weight").detach().to_dense()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._dense()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*arguments)  # of the plain class, which the layer has again

    def unpack(self) -> None:
        """Make it the plain layer again."""
        self.register_parameter("weight", nn.Parameter(self._dense(), requires_grad=False))
        self.__class__ = self.plain  # type: ignore[assignment]


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution with packed weights."""

    plain = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x, "packed")
        assert not isinstance(self.padding, str)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        out: Tensor = torch.ops.sd.packed_convolution.default(x, self.weight, self.bias, *geometry)
        return out


class PackedConv1x1(Packed, nn.Conv2d):
    """A 1x1 convolution of NHWC images as a linear layer over their positions."""

    plain = nn.Conv2d

    def _dense(self) -> Tensor:
        return super()._dense()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x, "packed")
        positions = torch.ops.sd.packed_linear.default(x.permute(0, 2, 3, 1), self.weight, self.bias)
        out: Tensor = positions.permute(0, 3, 1, 2)
        return out


class PackedLinear(Packed, nn.Linear):
    """A linear layer with packed weights."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x, "packed")
        out: Tensor = torch.ops.sd.packed_linear.default(x, self.weight, self.bias)
        return out


def pack(network: nn.Module) -> None:
    """Pack every wide convolution and linear layer of the network. Fused projections of that width are separated first."""
    _define_operators()
    for module in network.modules():
        if isinstance(module, CrossAttention) and module.fused is not None and _is_wide("", module.fused):
            module.fuse("")
    for name, module in network.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear) and _is_wide(name, module.weight):
            _pack(module)


def _is_wide(name: str, weight: Tensor) -> bool:
    # Time embeddings have one row a call, or run once.
    return "emb" not in name and min(weight.shape[:2]) >= SMALLEST_PACKED


def _pack(layer: nn.Module) -> None:
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight.detach()
    packed_class: type[nn.Module]
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        packed = weight.to_mkldnn()  # in a plain layout until the first call
        packed_class = PackedConv2d
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1), ROWS)
        packed_class = PackedConv1x1 if isinstance(layer, nn.Conv2d) else PackedLinear
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.__class__ = packed_class


def unpack(network: nn.Module) -> None:
    """Undo `pack`: the weights are plain again, bit for bit."""
    for module in network.modules():
        if isinstance(module, Packed):
            module.unpack()
