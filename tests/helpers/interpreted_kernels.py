"""Tests of the Triton kernels by Triton's interpreter on a CPU; tests/sd/test_kernels.py runs them with TRITON_INTERPRET=1.

triton reads the variable at import, so this needs a separate process. The programs of a grid run one after another in
numpy: sizes are small and chosen to cover every path, tail and mask.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BOUNDS, geglu_error, group_norm_bound, group_norm_error
from models import relative_error

from sd import Optimisations, StableDiffusion
from sd.optimise.triton_kernels import geglu, group_norm, splits_of, whole_group_tile

BOTH = {"channels_last": True, "triton_group_norm": True, "triton_geglu": True}
WHOLE = [
    ((2, 320, 8, 8), 32),
    ((1, 2560, 8, 8), 32),
    ((2, 960, 5, 7), 32),
    ((1, 1920, 3, 3), 32),
    ((1, 128, 9, 16), 32),
    ((2, 16, 8, 8), 8),
    ((3, 32, 1, 1), 32),
]
SPLIT = [
    ((1, 320, 33, 33), 32),  # the last split has one row
    pytest.param((1, 640, 26, 26), 32, marks=pytest.mark.slow),
    ((2, 40, 41, 29), 4),  # channels do not fill a tile
    pytest.param((1, 64, 130, 130), 32, marks=pytest.mark.slow),  # several tiles in a split
]


@pytest.mark.parametrize("shape, groups", WHOLE + SPLIT)
def test_group_norm(shape, groups):
    whole = whole_group_tile(shape[2] * shape[3], shape[1] // groups)
    assert (whole is not None) == ((shape, groups) in WHOLE)
    assert group_norm_error(group_norm, shape, groups, torch.float32, add=1) <= BOUNDS[torch.float32]


def test_one_case_has_several_tiles_in_a_split():
    rows, splits = splits_of(130 * 130, 64)
    assert rows > 32 and rows * (splits - 1) < 130 * 130 <= rows * splits


@pytest.mark.parametrize("shape, groups", [WHOLE[2], SPLIT[2]])
@pytest.mark.parametrize(
    "dtype, add, conv_bias, silu",
    [
        (torch.float32, None, False, False),
        (torch.float32, None, True, True),
        (torch.float32, 1, False, True),
        (torch.float32, 2, True, False),
        (torch.float16, 2, True, True),
        (torch.bfloat16, 2, True, True),
    ],
)
def test_group_norm_options(shape, groups, dtype, add, conv_bias, silu):
    error = group_norm_error(group_norm, shape, groups, dtype, add=add, conv_bias=conv_bias, silu=silu)
    assert error <= BOUNDS[dtype]


@pytest.mark.parametrize("mean", [30.0, 3000.0])
@pytest.mark.parametrize("shape, groups", [WHOLE[0], SPLIT[2], SPLIT[3]])
def test_a_large_mean_causes_no_cancellation(shape, groups, mean):
    """E[x^2] - E[x]^2 in fp32 would have no correct digit here."""
    error = group_norm_error(group_norm, shape, groups, torch.float32, mean=mean, add=1)
    assert error <= group_norm_bound(torch.float32, mean)


@pytest.mark.parametrize("shape, groups", [WHOLE[0], SPLIT[2]])
def test_a_first_row_that_differs_from_the_rest(shape, groups):
    """Deviations are taken from the mean of a split's first rows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    x[:, :, 0] += 1000.0
    ones, zeros = torch.ones(shape[1]), torch.zeros(shape[1])
    exact = torch.nn.functional.group_norm(x.double(), groups)
    assert relative_error(group_norm(x, ones, zeros, groups, 1e-5), exact) <= 1e-6


def test_an_image_has_the_same_bits_in_any_batch():
    for shape, groups in (WHOLE[3], SPLIT[2]):
        x = torch.randn(2, *shape[1:]).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, shape[1]).unbind()
        batched = group_norm(x, weight, bias, groups, 1e-5, silu=True)
        assert torch.equal(batched, group_norm(x, weight, bias, groups, 1e-5, silu=True))
        assert torch.equal(batched[1:], group_norm(x[1:], weight, bias, groups, 1e-5, silu=True))


def test_other_layouts_are_accepted():
    x, (weight, bias) = torch.randn(2, 64, 8, 8), torch.randn(2, 64).unbind()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(group_norm(x, weight, bias, 32, 1e-5), group_norm(nhwc, weight, bias, 32, 1e-5))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 2 * 1280), (1, 7, 2 * 300), (3, 2)])
def test_geglu(shape, dtype):
    assert geglu_error(geglu, shape, dtype) <= BOUNDS[dtype]


@torch.no_grad()
def _unet(model):
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 32)))
    x = x.contiguous(memory_format=model.optimisations.memory_format())
    with model.optimisations.autocast(model.device):
        return model.unet(x, torch.full((2,), 501.0), context)


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.tiny(optimisations=Optimisations(attention="original"))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"channels_last": True, "triton_group_norm": True}, {"triton_geglu": True}, BOTH])
def test_the_unet_with_kernels_equals_the_plain_code(model, fields):
    model.optimise(Optimisations(attention="original"))
    reference, keys = _unet(model), list(model.unet.state_dict())
    model.optimise(Optimisations(attention="original", **fields))
    error = relative_error(_unet(model), reference)
    print(f"UNet of the embedded model, {', '.join(fields)}: {error:.1e}")
    assert error <= 1e-5
    assert list(model.unet.state_dict()) == keys


@pytest.mark.slow
def test_autocast(model):
    """One kernel takes half activations and fp32 weights."""
    model.optimise(Optimisations(attention="original"))
    reference = _unet(model)
    model.optimise(Optimisations(attention="original", precision="autocast", **BOTH))
    assert relative_error(_unet(model).float(), reference) <= 0.03


@pytest.mark.slow
def test_an_image_with_kernels_and_then_without(model):
    def run():
        return model.txt2img("a red star on a white background", steps=2, sampler="ddim", scale=4.0, seed=2)

    plain = Optimisations(attention="original", channels_last=True)
    model.optimise(plain)
    before = run()
    model.optimise(Optimisations(attention="original", **BOTH))
    ours = run()
    assert relative_error(ours.latents, before.latents) <= 1e-4
    assert (ours.images.int() - before.images.int()).abs().max() <= 1
    assert not torch.equal(ours.latents, before.latents), "the kernels did not run"
    model.optimise(plain)
    after = run()
    assert torch.equal(after.latents, before.latents) and torch.equal(after.images, before.images)
