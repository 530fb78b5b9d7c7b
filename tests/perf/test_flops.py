"""FLOPs against PyTorch's own counter, weights against the modules', and both against the published models' known totals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counting import Counting, needs_counting

from perf.analysis import flops
from perf.configurations.configuration import Configuration
from sd.config.presets import preset
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet


def _counted(call) -> int:
    counter = pytest.importorskip("torch.utils.flop_counter", reason="this torch has no FlopCounterMode (torch >= 2.1)")
    with counter.FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


def _networks(config):
    """(UNet, autoencoder, text encoder) without numbers, and latents, tokens and context to call them with."""
    if not has("device_context"):
        pytest.skip("torch.device as a context: torch >= 2.0")
    side = config.image_size // config.autoencoder.downsampling
    with torch.device("meta"):
        networks = UNet(config.unet), Autoencoder(config.autoencoder), TextEncoder(config.text)
        inputs = torch.zeros(1, 4, side, side), torch.zeros(1, 77, dtype=torch.long)
        return (*networks, *inputs, torch.zeros(1, 77, config.text.width))


@pytest.mark.parametrize("name, percent", [("sd2", 2.5), ("sd2-v", 3.5)])
def test_what_shared_guidance_saves(name, percent):
    """The share of a UNet call that both halves of guidance have in common, in docs/optimisations.md."""
    config = preset(name)
    unet, *_, latents, _, context = _networks(config)
    context = torch.cat([context, context])
    with torch.no_grad():
        both = _counted(lambda: unet(torch.cat([latents, latents]), torch.zeros(2, device="meta"), context))
        shared = _counted(lambda: unet(latents, torch.zeros(1, device="meta"), context))
    assert round(100 * (1 - shared / both), 1) == percent
    text = (Path(__file__).parents[2] / "docs" / "optimisations.md").read_text(encoding="utf-8")
    assert f"{percent} % {'fewer FLOPs in a call of SD2 at 512 pixels' if name == 'sd2' else 'at 768 |'}" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "sd1", "sd2", "sd2-v"])
def test_equal_to_pytorchs_counter(name):
    config = preset(name)
    side = config.image_size // config.autoencoder.downsampling
    unet, autoencoder, text, latents, tokens, context = _networks(config)
    times = torch.zeros(1, device="meta")
    with torch.no_grad():
        assert _counted(lambda: unet(latents, times, context)) == flops.total(flops.unet(config.unet, side, side))
        assert _counted(lambda: autoencoder.decode(latents)) == flops.total(
            flops.decoder(config.autoencoder, side, side)
        )
        pixels = torch.zeros(1, 3, 8 * side, 8 * side, device="meta")
        assert _counted(lambda: autoencoder.encode(pixels)) == flops.total(
            flops.encoder(config.autoencoder, side, side)
        )
        assert _counted(lambda: text(tokens)) == flops.total(flops.text_encoder(config.text))


@pytest.mark.parametrize("name", ["tiny", "sd1", "sd2", "sd2-v"])
def test_weights_are_those_of_the_modules(name):
    config = preset(name)
    unet, autoencoder, text, *_ = _networks(config)

    def held(*modules):
        return sum(one.numel() for module in modules for one in module.parameters())

    assert flops.weights(flops.unet(config.unet, 8, 8)) == held(unet)
    decoding = (autoencoder.decoder, autoencoder.post_quant_conv)
    assert flops.weights(flops.decoder(config.autoencoder, 8, 8)) == held(*decoding)
    assert flops.weights(flops.encoder(config.autoencoder, 8, 8)) == held(autoencoder.encoder, autoencoder.quant_conv)
    table = (config.text.vocab_size - config.text.context_length) * config.text.width  # rows that no prompt needs
    assert flops.weights(flops.text_encoder(config.text)) == held(text) - table


def test_known_totals():
    def unet(name, side):
        return flops.total(flops.unet(preset(name).unet, side, side))

    assert unet("sd2", 64) == pytest.approx(2 * 402.1e9, rel=1e-3)
    assert unet("sd1", 64) == pytest.approx(2 * 401.6e9, rel=1e-3)
    assert unet("sd2-v", 96) == pytest.approx(2 * 1074.6e9, rel=1e-3)
    image = flops.of_round(Configuration("sd2", precision="autocast"), preset("sd2"), unet_calls=51)
    assert image == pytest.approx(84.6e12, rel=2e-3)


@pytest.mark.parametrize("name, gigabytes", [("sd1", 1.72), ("sd2", 1.73), ("sd2-v", 1.73)])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_known_bytes_of_a_unet_call_in_half_precision(name, gigabytes, batch):
    """Counted for the published models (weights and I/O once), and all but free of the batch."""
    call = Configuration(name, workload="unet", batch=batch, precision="fp16")
    assert flops.minimum_bytes_of_round(call, preset(name), 1, item_bytes=2) == pytest.approx(gigabytes * 1e9, rel=4e-3)


@needs_counting
@pytest.mark.parametrize("name", ["tiny", "sd1", "sd2"])
def test_no_network_moves_less_than_the_minimum(name):
    """Every aten op's inputs and outputs, counted on tensors without numbers: the minimum is under them, and is not nothing."""
    config = preset(name)
    unet, autoencoder, text, latents, tokens, context = _networks(config)
    pair = latents.expand(2, -1, -1, -1), torch.zeros(2, device="meta"), context.expand(2, -1, -1)
    calls = {
        "unet": lambda: unet(*pair),
        "vae": lambda: autoencoder.decode(latents),
        "text": lambda: text(tokens.expand(2, -1)),
    }
    for workload, call in calls.items():
        with torch.no_grad(), Counting() as counting:
            call()
        configuration = Configuration(name, workload=workload, precision="full")
        minimum = flops.minimum_bytes_of_round(configuration, config, 1, item_bytes=4)
        assert 0.01 * counting.bytes < minimum <= counting.bytes, workload


def test_a_round_grows_with_its_batch_and_without_guidance_halves():
    config = preset("tiny")
    one = flops.of_round(Configuration(), config, 51)
    assert flops.of_round(Configuration(batch=3), config, 51) == 3 * one
    decoder = flops.total(flops.decoder(config.autoencoder, 8, 8))
    assert 2 * (flops.of_round(Configuration(scale=1.0), config, 51) - decoder) == one - decoder
    for count in (flops.of_round, lambda *given: flops.minimum_bytes_of_round(*given, 4)):
        stages = [count(Configuration(workload=stage), config, 1) for stage in ("text", "unet", "vae")]
        assert stages[0] + 51 * stages[1] + stages[2] == count(Configuration(), config, 51)


def test_an_update_is_three_forward_passes_of_a_sample_without_guidance():
    config = preset("tiny")
    call, training = Configuration(workload="unet", batch=2), Configuration(workload="train", batch=2, steps=5)
    assert 2 * flops.of_round(training, config, 5) == 3 * 5 * flops.of_round(call, config, 1)
    weights = flops.weights(flops.unet(config.unet, 8, 8))
    assert flops.minimum_bytes_of_round(training, config, 5, 4) > 5 * 48 * weights


def test_inpainting_is_txt2img_with_one_encoding_and_a_wider_first_convolution():
    config, wide = preset("sd1"), preset("sd1-inpaint")
    txt2img, inpaint = (Configuration("sd1", workload=workload, batch=2) for workload in ("txt2img", "inpaint"))
    encoding = flops.total(flops.encoder(config.autoencoder, 64, 64))
    assert encoding == pytest.approx(2 * 558e9, rel=0.01)  # multiply-adds of the released encoder at 512 pixels
    assert flops.of_round(inpaint, config, 50) == flops.of_round(txt2img, config, 50) + encoding
    first = 2 * 9 * 5 * 320 * 64 * 64  # of the five further channels, for each sample of a call
    assert flops.of_round(inpaint, wide, 50) == flops.of_round(inpaint, config, 50) + 2 * 2 * 50 * first
    assert flops.minimum_bytes_of_round(inpaint, config, 50, 2) > flops.minimum_bytes_of_round(txt2img, config, 50, 2)


def test_weights_are_read_once_whatever_the_batch():
    config = preset("sd2")
    one, four = (
        flops.minimum_bytes_of_round(Configuration("sd2", batch=batch, precision="autocast"), config, 51, 2)
        for batch in (1, 4)
    )
    assert one == pytest.approx(51 * 1.732e9, rel=0.02) and one < four < 1.01 * one
