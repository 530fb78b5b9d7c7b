"""Layers and norms by the AVX2 kernel against double precision: geometries, sizes around its blocks, threads, refusals."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import relative_error
from torch import nn

from sd.kernels import avx2
from sd.kernels.avx2 import PANEL
from sd.models.layers import GroupNorm
from sd.optimise import avx2_layers, packed

REASON = avx2.unavailable_reason(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
NO_BF16 = avx2.bf16_unavailable_reason(torch.device("cpu"))
needs_bf16 = pytest.mark.skipif(NO_BF16 is not None, reason=str(NO_BF16))
BOUND = 2e-6  # of sums of up to 12000 products in fp32
BF16_BOUND = 2e-3  # of many results that are rounded once to bf16
TILES_BOUND = 2.0  # error of large tiles over that of direct products


def _layers(network):
    return [layer for layer in network.modules() if isinstance(layer, packed.Packed)]


def _error(layer, x):
    """Relative error of the packed layer; the plain one in double precision is exact."""
    exact = copy.deepcopy(layer).double()(x.double())
    avx2_layers.pack(layer)
    assert _layers(layer) == [layer]
    out = layer(x)
    assert out.shape == exact.shape and out.dtype == x.dtype
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
        (3, 1, 1, 16, 32, (2, 4, 4)),  # from here by tiles of 2 x 2 outputs
        (3, 1, 1, 208, 17, (1, 6, 7)),  # cut by the image's edges, and less than a panel
        (3, 1, 1, 16, 16, (1, 2, 800)),  # several blocks
        (3, 1, 1, 32, 32, (1, 8, 8)),  # from here by tiles of 4 x 4: fewer than the rows of a product
        (3, 1, 1, 208, 17, (2, 21, 35)),  # cut by the image's edges, several blocks, and less than a panel
        (3, 1, 1, 272, 40, (1, 9, 22)),  # several chunks of 91 channels, rounded up to 92
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


@needs_bf16
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels, out_channels", [(32, 32), (272, 40), (640, 320)])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 4, 4), (1, 6, 7), (2, 8, 8), (2, 21, 35)])
def test_convolutions_in_bf16_have_the_error_of_one_rounding(channels, out_channels, size, bias):
    """The smallest images by direct products of pairs, the others by tiles."""
    torch.manual_seed(channels)
    layer = nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias).bfloat16()
    batch, height, width = size
    x = torch.randn(batch, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
    assert _error(layer, x) <= BF16_BOUND


@needs_bf16
@torch.no_grad()
@pytest.mark.parametrize(
    "kernel, stride, padding, channels, out_channels, size",
    [
        (3, 2, 1, 40, 40, (1, 9, 7)),
        (3, 1, 1, 4, 320, (3, 5, 31)),  # all taps in one chunk
        (3, 1, 1, 1026, 4, (1, 6, 4)),  # two chunks of pairs, and less than a panel
        (3, 1, 0, 170, 33, (2, 12, 21)),
        (1, 1, 0, 72, 48, (2, 13, 11)),
        (5, 3, 2, 6, 17, (1, 20, 8)),
    ],
)
def test_direct_convolutions_in_bf16(kernel, stride, padding, channels, out_channels, size):
    torch.manual_seed(channels)
    layer = nn.Conv2d(channels, out_channels, kernel, stride, padding).bfloat16()
    batch, height, width = size
    assert _error(layer, torch.randn(batch, channels, height, width).bfloat16()) <= BF16_BOUND


@needs_bf16
@torch.no_grad()
def test_in_bf16_convolutions_with_tiles_and_narrow_layers_are_packed():
    chosen = {
        "tiled": nn.Conv2d(320, 320, 3, padding=1),
        "first": nn.Conv2d(4, 320, 3, padding=1),
        "last": nn.Conv2d(320, 4, 3, padding=1),
        "of_points": nn.Conv2d(256, 320, 1),
        "narrow": nn.Linear(320, 256),
    }
    others = {
        "strided": nn.Conv2d(320, 320, 3, stride=2, padding=1),
        "uneven": nn.Conv2d(322, 320, 3, padding=1),
        "wide": nn.Linear(320, 320),
        "odd": nn.Linear(63, 64),
    }
    network = nn.ModuleDict({**chosen, **others}).bfloat16()
    weights = copy.deepcopy(network.state_dict())
    avx2_layers.pack(network)
    assert _layers(network) == list(chosen.values())
    state = network.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


@needs_bf16
@torch.no_grad()
@pytest.mark.parametrize("rows", [13, 240, 253])
@pytest.mark.parametrize("channels, out_channels", [(2, 1), (40, 80), (254, 2048), (2048, 256), (1290, 33)])
def test_linear_layers_in_bf16_have_the_error_of_one_rounding(channels, out_channels, rows):
    torch.manual_seed(rows)
    assert _error(nn.Linear(channels, out_channels).bfloat16(), torch.randn(rows, channels).bfloat16()) <= BF16_BOUND


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
@pytest.mark.parametrize("rows", [*range(1, 27), 239, 240, 241, 487])
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
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "channels, groups, size",
    [
        (32, 8, (1, 64, 64)),
        (64, 32, (2, 5, 7)),
        (320, 32, (3, 27, 5)),  # blocks of 64 rows, the last of 7
        (1280, 32, (2, 1, 1)),
        (40, 8, (2, 9, 7)),  # no multiple of the lanes
        (17, 1, (1, 4, 4)),
        (2048, 2, (2, 10, 9)),  # the limit of rows
    ],
)
def test_group_norms(channels, groups, size, dtype, silu):
    """In fp32 with a mean of 1e4 deviations, where neither squares nor the mean may lose digits."""
    torch.manual_seed(channels)
    norm = GroupNorm(groups, channels, silu=silu)
    norm.weight.data, norm.bias.data = torch.rand(2, channels)
    batch, height, width = size
    x = torch.randn(batch, channels, height, width) + (1e4 if dtype == torch.float32 else 1)
    bound = BOUND if dtype == torch.float32 else BF16_BOUND
    norm, x = norm.to(dtype), x.to(dtype)
    assert _error(copy.deepcopy(norm), x) <= bound
    assert _error(norm, x.contiguous(memory_format=torch.channels_last)) <= bound


@torch.no_grad()
def test_group_norms_with_an_outlier_in_the_first_row_of_a_block():
    norm, x = GroupNorm(8, 32), torch.randn(2, 32, 40, 40)
    x[:, :, 0, 0] += 1e4
    expected = copy.deepcopy(norm).double()(x.double())
    avx2_layers.pack(norm)
    assert relative_error(norm(x)[:, :, 1:].double(), expected[:, :, 1:]) <= BOUND


@torch.no_grad()
def test_silu_of_large_values():
    norm = GroupNorm(1, PANEL, silu=True)
    norm.bias.data = torch.linspace(-200, 200, PANEL)
    assert _error(norm, torch.randn(1, PANEL, 5, 5)) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "alone"])
def test_group_norms_of_constants_and_of_values_that_are_not_finite(silu):
    norm = GroupNorm(2, PANEL, silu=silu)
    avx2_layers.pack(norm)
    x = torch.full((2, PANEL, 300, 9), 1e5)
    assert norm(x).abs().max() == 0
    x[1, 0, 299, 8] = float("nan")
    assert torch.equal(norm(x).isnan().any(3).any(2), torch.arange(2 * PANEL).reshape(2, PANEL) // (PANEL // 2) == 2)


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, size",
    [
        pytest.param(torch.float32, (17, 23), id="fp32-4x4"),
        pytest.param(torch.float32, (6, 6), id="fp32-2x2"),
        pytest.param(torch.float32, (3, 3), id="fp32-direct"),
        pytest.param(torch.bfloat16, (17, 23), id="bf16-4x4", marks=needs_bf16),
        pytest.param(torch.bfloat16, (6, 6), id="bf16-direct", marks=needs_bf16),
    ],
)
def test_the_number_of_threads_changes_nothing(dtype, size):
    layer = nn.Sequential(GroupNorm(32, 64, silu=True), nn.Conv2d(64, 72, 3, padding=1)).to(dtype)
    x = torch.randn(2, 64, *size).to(dtype)
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
            "narrow": GroupNorm(2, PANEL // 2 - 2),
        }
    )
    avx2_layers.pack(network)
    assert not _layers(network)


@torch.no_grad()
def test_unpacked_bit_for_bit():
    network = nn.Sequential(nn.Conv2d(20, 36, 3), nn.Conv2d(36, 5, 1), nn.Linear(7, 19), GroupNorm(8, 32))
    weights = copy.deepcopy(network.state_dict())
    avx2_layers.pack(network)
    assert len(_layers(network)) == 4
    for _ in range(2):
        state = network.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())
        packed.unpack(network)
    assert not _layers(network)


def test_wrong_inputs_are_refused():
    """The operator can be called by itself: it must not read beyond a tensor."""
    avx2.define_operators()
    layer = torch.ops.sd.avx2_layer
    channels = 2 * PANEL
    x, weight, bias = torch.zeros(2, 8, 8, 20), torch.zeros(2, 9, 20, PANEL), torch.zeros(channels)
    assert layer(x, weight, bias, channels, 3, 1, 1).shape == (2, 8, 8, channels)
    for arguments in (
        (x[..., :19], weight, bias, channels, 3, 1, 1),
        (x, weight[:1], bias, channels, 3, 1, 1),
        (x, weight, bias[:-1], channels, 3, 1, 1),
        (x, weight, bias, channels, 5, 1, 1),
        (x[0], weight, bias, channels, 3, 1, 1),
        (x[:, :2, :2], weight, bias, channels, 3, 1, 0),
        (x[..., :0], weight[:, :, :0], bias, channels, 3, 1, 1),
        (x, weight, torch.ones(1).expand(channels), channels, 3, 1, 1),
        (x, weight, torch.zeros(2 * channels)[::2], channels, 3, 1, 1),
        (x[0, 0, 0, 0], weight[:, :1, :1], bias, channels, 1, 1, 0),
    ):
        with pytest.raises(RuntimeError, match="do not match"):
            layer(*arguments)
    for arguments in ((x.double(), weight, bias), (x, weight.half(), bias), (x, weight, bias.bfloat16())):
        with pytest.raises(RuntimeError, match="computes in fp32"):
            layer(*arguments, channels, 3, 1, 1)
    assert layer(x[:0], weight, bias, channels, 3, 1, 1).shape == (0, 8, 8, channels)
    assert layer(x[:0, 0, 0], weight[:, :1].contiguous(), bias, channels, 1, 1, 0).shape == (0, channels)


def test_wrong_inputs_of_group_norms_are_refused():
    avx2.define_operators()
    norm = torch.ops.sd.avx2_group_norm
    x, weight, bias = torch.zeros(2, 3, PANEL), torch.ones(PANEL), torch.zeros(PANEL)
    assert norm(x, weight, bias, 2, 1e-5, True).shape == x.shape
    assert norm(x[:0], weight, bias, 2, 1e-5, True).shape == (0, 3, PANEL)
    assert norm(x[:, :0], weight, bias, 2, 1e-5, True).shape == (2, 0, PANEL)
    for arguments in (
        (x, weight[1:], bias, 2),
        (x, weight, bias[1:], 2),
        (x, weight, bias, 3),
        (x, weight, bias, 0),
        (x, torch.ones(1).expand(PANEL), bias, 2),
        (x[..., :2], weight[:2], bias[:2], 1),
        (x[..., :0], weight[:0], bias[:0], 1),
        (x[0, 0], weight, bias, 2),
    ):
        with pytest.raises(RuntimeError, match="do not match"):
            norm(*arguments, 1e-5, True)
    for arguments in ((x.double(), weight, bias), (x, weight.half(), bias), (x, weight, bias.bfloat16())):
        with pytest.raises(RuntimeError, match="computes in fp32"):
            norm(*arguments, 2, 1e-5, True)


@needs_bf16
def test_wrong_inputs_in_bf16_are_refused():
    avx2.define_operators()
    layer = torch.ops.sd.avx2_layer
    tensors = torch.zeros(2, 8, 8, 20), torch.zeros(1, 9, 10, PANEL, 2), torch.zeros(PANEL)
    x, weight, bias = (tensor.bfloat16() for tensor in tensors)
    assert layer(x, weight, bias, PANEL, 3, 1, 1).dtype == torch.bfloat16
    for arguments in ((x, weight[..., 0], bias), (x, weight[..., :1], bias), (x[..., :19], weight, bias)):
        with pytest.raises(RuntimeError, match="do not match"):
            layer(*arguments, PANEL, 3, 1, 1)
    for arguments in ((x.float(), weight, bias), (x, weight.float(), bias), (x, weight, bias.float())):
        with pytest.raises(RuntimeError, match="computes in fp32"):
            layer(*arguments, PANEL, 3, 1, 1)


@pytest.mark.slow
@pytest.mark.skipif(PANEL == 16, reason="the tests above are those of AVX2 here")
def test_by_avx2_on_a_processor_with_avx512(pytestconfig):
    """This file and the kernel's attention, in a process that is told of no AVX-512."""
    code = (
        "import sys, torch, pytest; "
        "torch.cpu._is_avx512_supported = torch.cpu._is_avx512_bf16_supported = lambda: False; "
        "from sd.kernels import avx2; "
        "assert avx2.PANEL == 16 and avx2.unavailable_reason(torch.device('cpu')) is None; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    files = ("tests/sd/test_avx2_layers.py", "tests/sd/test_kernels.py", "-k", "not by_avx2_on and not avx512")
    command = [sys.executable, "-c", code, *files, "-p", "no:cacheprovider", "-q"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=pytestconfig.rootpath)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 100
