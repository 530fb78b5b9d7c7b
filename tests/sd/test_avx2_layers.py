"""Layers by the AVX2 kernel against double precision: geometries, sizes around its blocks, threads, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import relative_error
from torch import nn

from sd.kernels import avx2
from sd.kernels.avx2 import PANEL
from sd.optimise import avx2_layers, packed

REASON = avx2.unavailable_reason(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BOUND = 2e-6  # of sums of up to 12000 products in fp32
TILES_BOUND = 2.0  # error of large tiles over that of direct products


def _layers(network):
    return [layer for layer in network.modules() if isinstance(layer, packed.Packed)]


def _error(layer, x):
    """Relative error of the packed layer; the plain one in double precision is exact."""
    exact = copy.deepcopy(layer).double()(x.double())
    avx2_layers.pack(layer)
    assert _layers(layer) == [layer]
    out = layer(x)
    assert out.shape == exact.shape and out.dtype == torch.float32
    return relative_error(out.double(), exact)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kernel, stride, padding, channels, out_channels, size",
    [
        (3, 1, 1, 64, 64, (2, 16, 16)),
        (3, 2, 1, 40, 40, (1, 9, 7)),
        (3, 1, 1, 4, 320, (3, 5, 31)),  # all taps in one chunk
        (3, 1, 1, 513, 4, (1, 6, 4)),  # two chunks of channels, and less than a panel
        (3, 1, 1, 1290, 24, (1, 3, 3)),
        (3, 1, 1, 8, 16, (2, 4, 4)),  # from here by tiles of 2 x 2 outputs
        (3, 1, 1, 200, 17, (1, 6, 7)),  # cut by the image's edges, and less than a panel
        (3, 1, 1, 16, 16, (1, 2, 200)),  # several blocks
        (3, 1, 1, 24, 16, (1, 8, 8)),  # from here by tiles of 4 x 4: fewer than the rows of a product
        (3, 1, 1, 200, 17, (2, 21, 35)),  # cut by the image's edges, several blocks, and less than a panel
        (3, 1, 1, 296, 40, (1, 9, 22)),  # several chunks of channels
        (3, 1, 0, 170, 33, (2, 12, 21)),  # three taps in a chunk
        (3, 2, 0, 16, 16, (1, 3, 3)),
        (1, 1, 0, 72, 48, (2, 13, 11)),
        (1, 2, 0, 8, 16, (1, 6, 5)),
        (5, 3, 2, 3, 17, (1, 20, 8)),
    ],
)
def test_convolutions(kernel, stride, padding, channels, out_channels, size, bias):
    torch.manual_seed(channels)
    layer = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=bias)
    batch, height, width = size
    x = torch.randn(batch, channels, height, width)
    assert _error(copy.deepcopy(layer), x) <= BOUND
    assert _error(layer, x.contiguous(memory_format=torch.channels_last)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("size, bound", [(6, 1.0), (16, TILES_BOUND)], ids=["2x2", "4x4"])
@pytest.mark.parametrize("channels", [64, 320])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.SiLU()], ids=["normal", "silu"])
def test_the_error_of_tiles_against_that_of_direct_products(channels, activation, size, bound):
    torch.manual_seed(channels)
    by_tiles, direct = nn.Conv2d(channels, 64, 3, padding=1), nn.Conv2d(channels, 64, 3)
    direct.load_state_dict(by_tiles.state_dict())
    x = activation(torch.randn(2, channels, size, size))
    assert 0 < _error(by_tiles, x) <= bound * _error(direct, F.pad(x, (1, 1, 1, 1)))
    assert not torch.equal(by_tiles(x), direct(F.pad(x, (1, 1, 1, 1))))  # they are two algorithms


@torch.no_grad()
@pytest.mark.parametrize("rows", [*range(1, 15), 239, 240, 241, 487])
def test_numbers_of_rows(rows):
    torch.manual_seed(rows)
    assert _error(nn.Linear(40, 80), torch.randn(rows, 40)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("channels, out_channels", [(1, 1), (512, 512), (600, 250), (1281, 15), (5120, 1280)])
def test_widths_of_linear_layers(channels, out_channels):
    torch.manual_seed(channels)
    x = torch.randn(2, 3, channels)
    assert _error(nn.Linear(channels, out_channels, bias=False), x) <= BOUND
    assert _error(nn.Linear(channels, out_channels), x[:, ::2]) <= BOUND  # with gaps


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1], ids=["direct", "by-tiles"])
def test_the_number_of_threads_changes_nothing(padding):
    layer, x = nn.Conv2d(64, 72, 3, padding=padding), torch.randn(2, 64, 17, 23)
    avx2_layers.pack(layer)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@torch.no_grad()
@pytest.mark.parametrize(
    "size, padding, reached", [(8, 0, (0, 3)), (6, 1, (1, 4)), (8, 1, (0, 4))], ids=["direct", "2x2", "4x4"]
)
def test_a_value_that_is_not_finite_reaches_outputs_that_depend_on_it_or_its_tile_of_4x4(size, padding, reached):
    layer, x = nn.Conv2d(16, 16, 3, padding=padding), torch.zeros(1, 16, size, size)
    avx2_layers.pack(layer)
    x[0, 3, 2, 2] = float("nan")
    out = layer(x)
    expected = torch.ones_like(out, dtype=torch.bool)
    expected[..., slice(*reached), slice(*reached)] = False
    assert torch.equal(out.isfinite(), expected)


def test_other_layers_stay_plain():
    """Those that the kernel does not compute, and time embeddings."""
    network = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(16, 16, 3, groups=2),
            "dilated": nn.Conv2d(16, 16, 3, dilation=2),
            "oblong": nn.Conv2d(16, 16, (1, 3)),
            "uneven": nn.Conv2d(16, 16, 3, padding=(1, 0)),
            "by_name": nn.Conv2d(16, 16, 3, padding="same"),
            "reflecting": nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            "time_embed": nn.Linear(16, 16),
        }
    )
    avx2_layers.pack(network)
    assert not _layers(network)


@torch.no_grad()
def test_unpacked_bit_for_bit():
    network = nn.Sequential(nn.Conv2d(20, 36, 3), nn.Conv2d(36, 5, 1), nn.Linear(7, 19))
    weights = copy.deepcopy(network.state_dict())
    avx2_layers.pack(network)
    assert len(_layers(network)) == 3
    for _ in range(2):
        state = network.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())
        packed.unpack(network)
    assert not _layers(network)


def test_wrong_inputs_are_refused():
    """The operator can be called by itself: it must not read beyond a tensor."""
    avx2.define_operators()
    layer = torch.ops.sd.avx2_layer
    x, weight, bias = torch.zeros(2, 8, 8, 20), torch.zeros(2, 9, 20, PANEL), torch.zeros(32)
    assert layer(x, weight, bias, 32, 3, 1, 1).shape == (2, 8, 8, 32)
    for arguments in (
        (x[..., :19], weight, bias, 32, 3, 1, 1),
        (x, weight[:1], bias, 32, 3, 1, 1),
        (x, weight, bias[:31], 32, 3, 1, 1),
        (x, weight, bias, 32, 5, 1, 1),
        (x[0], weight, bias, 32, 3, 1, 1),
        (x[:, :2, :2], weight, bias, 32, 3, 1, 0),
        (x[..., :0], weight[:, :, :0], bias, 32, 3, 1, 1),
        (x, weight, torch.ones(1).expand(32), 32, 3, 1, 1),
        (x, weight, torch.zeros(64)[::2], 32, 3, 1, 1),
        (x[0, 0, 0, 0], weight[:, :1, :1], bias, 32, 1, 1, 0),
    ):
        with pytest.raises(RuntimeError, match="do not match"):
            layer(*arguments)
    for arguments in ((x.double(), weight, bias), (x, weight.half(), bias), (x, weight, bias.bfloat16())):
        with pytest.raises(RuntimeError, match="computes in fp32"):
            layer(*arguments, 32, 3, 1, 1)
    assert layer(x[:0], weight, bias, 32, 3, 1, 1).shape == (0, 8, 8, 32)
