"""FLOPs against PyTorch's own counter and against the published models' known totals."""

from __future__ import annotations

import pytest
import torch

from perf import flops
from perf.configurations import Configuration
from sd.autoencoder import Autoencoder
from sd.config import preset
from sd.text_encoder import TextEncoder
from sd.unet import UNet

counter = pytest.importorskip("torch.utils.flop_counter", reason="this torch has no FlopCounterMode (torch >= 2.1)")


def _counted(call) -> int:
    with counter.FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


@pytest.mark.parametrize("name", ["tiny", "sd1", "sd2", "sd2-v"])
def test_equal_to_pytorchs_counter(name):
    config = preset(name)
    side = config.image_size // config.autoencoder.downsampling
    with torch.device("meta"):
        unet, autoencoder = UNet(config.unet), Autoencoder(config.autoencoder)
        text = TextEncoder(config.text)
        latents, tokens = torch.zeros(1, 4, side, side), torch.zeros(1, 77, dtype=torch.long)
        context = torch.zeros(1, 77, config.text.width)
        with torch.no_grad():
            assert _counted(lambda: unet(latents, torch.zeros(1), context)) == flops.unet(config.unet, side, side)
            assert _counted(lambda: autoencoder.decode(latents)) == flops.decoder(config.autoencoder, side, side)
            assert _counted(lambda: text(tokens)) == flops.text_encoder(config.text)


def test_known_totals():
    assert flops.unet(preset("sd2").unet, 64, 64) == pytest.approx(2 * 402.1e9, rel=1e-3)
    assert flops.unet(preset("sd1").unet, 64, 64) == pytest.approx(2 * 401.6e9, rel=1e-3)
    assert flops.unet(preset("sd2-v").unet, 96, 96) == pytest.approx(2 * 1074.6e9, rel=1e-3)
    image = flops.of_round(Configuration("sd2", precision="autocast"), preset("sd2"), unet_calls=51)
    assert image == pytest.approx(84.6e12, rel=2e-3)


def test_a_round_grows_with_its_batch_and_without_guidance_halves():
    config = preset("tiny")
    one = flops.of_round(Configuration(), config, 51)
    assert flops.of_round(Configuration(batch=3), config, 51) == 3 * one
    decoder = flops.decoder(config.autoencoder, 8, 8)
    assert 2 * (flops.of_round(Configuration(scale=1.0), config, 51) - decoder) == one - decoder
    stages = [flops.of_round(Configuration(workload=stage), config, 1) for stage in ("text", "unet", "vae")]
    assert stages[0] + 51 * stages[1] + stages[2] == one
