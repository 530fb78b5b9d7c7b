"""Few-step models: the guidance embedding of consistency models, unguided runs, and the scheduler of a diffusers folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import original, small
from models import SMALLEST, UNETS, relative_error, seeded, smallest

from sd import Optimisations, StableDiffusion
from sd.checkpoint import diffusers_folder, layouts
from sd.checkpoint.load import load
from sd.checkpoint.networks import meta_device
from sd.choices import SAMPLERS as NAMES
from sd.config.presets import TextConfig, preset
from sd.errors import ConfigError
from sd.models.layers import guidance_embedding
from sd.models.unet import UNet
from sd.sampling.plan import HISTORY_LENGTH
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import Schedule

PROMPT = "a red star on a blue background"


def test_names_match_the_registry():
    assert tuple(SAMPLERS) == NAMES


def test_no_sampler_needs_a_longer_history():
    for name in SAMPLERS:
        evaluations = SAMPLERS[name](Schedule(), 20).evaluations
        assert max(len(evaluation.weights) for evaluation in evaluations) <= 1 + HISTORY_LENGTH


def test_size_with_guidance_embedding():
    """SD1 and a projection of 256 channels: 81,920 weights more."""
    with meta_device():
        unet = UNet(replace(preset("sd1").unet, guidance_embedding=256))
    assert sum(p.numel() for p in unet.parameters()) == 859_602_884


@pytest.mark.slow  # imports every pipeline's dependencies
@pytest.mark.peers
def test_embedding_equals_diffusers():
    lcm = pytest.importorskip("diffusers", reason="the extra `peers` is not installed").LatentConsistencyModelPipeline
    for scale in (1.0, 7.5, 8.5):
        expected = lcm.get_guidance_scale_embedding(None, torch.tensor([scale - 1.0]), embedding_dim=256)
        assert torch.allclose(guidance_embedding(scale, 256), expected, atol=1e-3)  # of angles up to 7500 in fp32


@pytest.mark.peers
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_unet_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    unet = seeded(UNet, replace(UNETS[name], guidance_embedding=64))
    config = replace(preset("sd2"), unet=unet.config, text=TextConfig("openclip", unet.config.context_dim, 2))
    peer = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config)).eval()
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    x, context, scale = torch.randn(2, 4, 16, 16), torch.randn(2, 77, unet.config.context_dim), 8.5
    embedding = guidance_embedding(scale, 64)
    with torch.no_grad():
        expected = peer(x, 759, context, timestep_cond=embedding.expand(2, -1)).sample
        out = unet(x, unet.time_table(torch.tensor([759.0]), scale), context)
        other = unet(x, unet.time_table(torch.tensor([759.0]), 2.0), context)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(other, expected) > 1e-3  # the scale matters


def test_checkpoint_with_guidance_embedding(tmp_path):
    """Found from the weights, whatever the config says, and converted to diffusers' names and back."""
    config = small(guidance_embedding=32)
    state = original(config)
    assert f"{layouts.UNET}time_embedding.cond_proj.weight" in state
    torch.save(state, tmp_path / "lcm.ckpt")
    loaded, networks = load(tmp_path / "lcm.ckpt", small(), progress=False)
    assert loaded.unet.guidance_embedding == 32
    converted = layouts.unet_to_diffusers(networks["unet"])
    assert converted["time_embedding.cond_proj.weight"].shape == (32, 32)
    assert layouts.unet_from_diffusers(converted).keys() == networks["unet"].keys()


@pytest.fixture(scope="module")
def consistency():
    """A model of random weights that embeds its guidance scale."""
    return StableDiffusion.random(replace(SMALLEST, unet=replace(SMALLEST.unet, guidance_embedding=16)))


@pytest.fixture(scope="module")
def tiny():
    """The embedded model."""
    return StableDiffusion.tiny()


class Batches:
    """Batch sizes of a UNet's calls."""

    def __init__(self, unet):
        self.sizes: list[int] = []
        self.handle = unet.register_forward_pre_hook(lambda module, args: self.sizes.append(len(args[0])))


def test_embedded_guidance_is_one_call_a_step(consistency):
    batches = Batches(consistency.unet)
    result = consistency.txt2img(PROMPT, steps=4, sampler="lcm", scale=8.5, batch=2)
    batches.handle.remove()
    assert batches.sizes == [2] * 4 == [2] * result.unet_calls
    other = consistency.txt2img(PROMPT, steps=4, sampler="lcm", scale=2.0, batch=2)
    assert relative_error(other.latents, result.latents) > 1e-4
    consistency.optimise(Optimisations(cache_time_embeddings=True, cache_context_kv=True, fused_qkv=True))
    again = consistency.txt2img(PROMPT, steps=4, sampler="lcm", scale=8.5, batch=2)
    consistency.optimise(Optimisations())
    assert relative_error(again.latents, result.latents) < 1e-5


def test_embedded_guidance_refuses_a_negative_prompt(consistency):
    with pytest.raises(ConfigError, match="negative_prompt: this model embeds its guidance scale"):
        consistency.txt2img(PROMPT, steps=1, sampler="lcm", negative_prompt="blue")


def test_without_guidance_the_batch_is_half():
    model = smallest()
    sizes = {}
    for scale in (1.0, 4.0):
        batches = Batches(model.unet)
        model.txt2img(PROMPT, steps=2, sampler="euler", timestep_spacing="trailing", scale=scale, batch=2)
        batches.handle.remove()
        sizes[scale] = batches.sizes
    assert sizes == {1.0: [2, 2], 4.0: [4, 4]}


def test_original_steps_have_the_timesteps_of_the_original():
    model = smallest(Optimisations(attention="original", original_steps=True))
    with pytest.raises(ConfigError, match="original_steps: has the original's timesteps"):
        model.txt2img(PROMPT, steps=2, sampler="ddim", timestep_spacing="trailing")
    with pytest.raises(ConfigError, match="original_steps: sampler heun is not one of ddim, plms"):
        model.txt2img(PROMPT, steps=2, sampler="heun")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_img2img_starts_from_the_image(tiny, sampler):
    """At a strength without a step the result is the encoded image; noise is added for the steps that run."""
    image = torch.zeros(3, 64, 64)
    encoded = tiny.img2img(PROMPT, image, strength=0.0, steps=8).latents
    assert torch.equal(tiny.img2img(PROMPT, image, strength=0.0, steps=8, sampler=sampler).latents, encoded)
    result = tiny.img2img(PROMPT, image, strength=0.5, steps=8, sampler=sampler, scale=1.0)
    assert result.unet_calls == {"lcm": 8, "plms": 5, "heun": 7}.get(sampler, 4)
    assert 0.1 < result.latents.std() < 3.0


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_embedded_model_agrees_between_samplers(tiny, sampler):
    """All samplers of the same ODE or SDE reach an image of the prompt: a red star on blue."""
    steps = {"lcm": 4}.get(sampler, 20)
    pixels = tiny.txt2img(PROMPT, steps=steps, sampler=sampler, scale=4.0, seed=3).images[0].float()
    corners = torch.stack([pixels[i, j] for i in (2, 61) for j in (2, 61)]).mean(dim=0)
    assert corners[2] > corners[0] and corners[2] > corners[1], f"the background is {corners}"
