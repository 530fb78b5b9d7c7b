"""The autoencoder: released size, and equality with diffusers' AutoencoderKL."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import AUTOENCODERS, relative_error, seeded

from sd.checkpoint import diffusers_folder, layouts
from sd.checkpoint.networks import meta_device
from sd.config.presets import AutoencoderConfig, preset
from sd.models.autoencoder import Autoencoder


def test_released_size():
    with meta_device():
        autoencoder = Autoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
    assert sum(p.numel() for p in autoencoder.encoder.parameters()) == 34_163_592
    assert sum(p.numel() for p in autoencoder.decoder.parameters()) == 49_490_179
    assert len(autoencoder.state_dict()) == 248


def test_log_variance_is_clamped():
    autoencoder = seeded(Autoencoder, AUTOENCODERS["tiny-topology"])
    autoencoder.quant_conv.bias[4:] = 1e4
    assert autoencoder.encode(torch.randn(1, 3, 64, 64))[1].max() == 20.0


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    autoencoder = seeded(Autoencoder, AUTOENCODERS[name])
    config = replace(preset("sd2"), autoencoder=autoencoder.config)
    peer = diffusers.AutoencoderKL.from_config(diffusers_folder.autoencoder_config(config)).eval()
    peer.load_state_dict(layouts.autoencoder_to_diffusers(autoencoder.state_dict()))
    images, latents = torch.randn(2, 3, 64, 128).clamp(-1, 1), torch.randn(2, 4, 8, 16)
    with torch.no_grad():
        posterior = peer.encode(images).latent_dist
        mean, log_variance = autoencoder.encode(images)
        assert relative_error(mean, posterior.mean) < 1e-5
        assert relative_error(log_variance, posterior.logvar) < 1e-5
        assert relative_error(autoencoder.decode(latents), peer.decode(latents).sample) < 1e-5
