"""The UNet: sizes of the released models, and equality with diffusers' UNet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import UNETS, relative_error, seeded

from sd.checkpoint import diffusers_folder, layouts
from sd.checkpoint.networks import meta_device
from sd.config.presets import TextConfig, preset
from sd.models.layers import timestep_embedding
from sd.models.unet import UNet


@pytest.mark.parametrize("name, parameters", [("sd1", 859_520_964), ("sd2", 865_910_724), ("sd2-v", 865_910_724)])
def test_released_size(name, parameters):
    with meta_device():
        unet = UNet(preset(name).unet)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == 686


def test_inpainting_size():
    with meta_device():
        unet = UNet(replace(preset("sd2").unet, in_channels=9))
    assert sum(p.numel() for p in unet.parameters()) == 865_925_124


def test_timestep_embedding_has_cosines_first_and_accepts_fractions():
    at_zero = timestep_embedding(torch.tensor([0]), 320)
    assert torch.equal(at_zero, torch.cat([torch.ones(1, 160), torch.zeros(1, 160)], dim=1))
    half = timestep_embedding(torch.tensor([0.5]), 320)
    assert half[0, 0].item() == pytest.approx(0.8775825619, abs=1e-6)  # cos(0.5)
    assert half[0, 160].item() == pytest.approx(0.4794255386, abs=1e-6)  # sin(0.5)


@pytest.mark.peers
@pytest.mark.parametrize("name", UNETS)
def test_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    unet = seeded(UNet, UNETS[name])
    config = replace(preset("sd2"), unet=unet.config, text=TextConfig("openclip", unet.config.context_dim, 2))
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config)).eval()
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    x, t = torch.randn(3, 4, 16, 24), torch.tensor([1.0, 500.5, 999.0])
    context = torch.randn(3, 77, unet.config.context_dim)
    with torch.no_grad():
        assert relative_error(unet(x, t, context), peer(x, t, context).sample) < 1e-5
