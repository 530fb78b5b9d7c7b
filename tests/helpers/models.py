"""Small configurations with the topologies of the released models, and networks with seeded weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sd import Optimisations, StableDiffusion
from sd.config.presets import PRESETS, AutoencoderConfig, ModelConfig, TextConfig, UNetConfig
from sd.features import has
from sd.models.unet import UNet

# Every variant of head count and projection, at sizes that run in milliseconds.
UNETS = {
    "sd1": UNetConfig(
        context_dim=24,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2, 1),
        num_heads=4,
    ),
    "sd1-full-topology": UNetConfig(context_dim=24, model_channels=32, channel_mult=(1, 1, 2, 2), num_heads=8),
    "sd2": UNetConfig(
        context_dim=32,
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(2, 1),
        num_head_channels=16,
        use_linear_in_transformer=True,
    ),
    "sd2-groups-of-8": UNetConfig(
        context_dim=32,
        model_channels=24,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2, 1),
        num_head_channels=8,
        use_linear_in_transformer=True,
        norm_groups=8,
    ),
}
AUTOENCODERS = {
    "released-topology": AutoencoderConfig(channels=64, channel_mult=(1, 2, 4, 4)),
    "tiny-topology": AutoencoderConfig(channels=16, channel_mult=(1, 2, 2, 3), num_res_blocks=1, norm_groups=8),
}


# Models of SD1 and SD2 kind with the autoencoder of `tiny`, whose latents are an eighth of the image.
SMALL = {
    "sd1": ModelConfig("small-1", UNETS["sd1"], TextConfig("clip", 24, 2), PRESETS["tiny"].autoencoder),
    "sd2": ModelConfig("small-2", UNETS["sd2-groups-of-8"], TextConfig("openclip", 32, 2), PRESETS["tiny"].autoencoder),
}


def widened(model: StableDiffusion, config: ModelConfig) -> StableDiffusion:
    """`model` with the input channels of `config`: its weights, and zeros for the further channels."""
    result = StableDiffusion(config, UNet(config.unet), model.autoencoder, model.text_encoder)
    state, name = model.unet.state_dict(), "input_blocks.0.0.weight"
    first = torch.zeros(state[name].shape[0], config.unet.in_channels, 3, 3)
    first[:, :4] = state[name]
    result.unet.load_state_dict({**state, name: first})
    return result


# The smallest model with every block type, for torch.compile, whose time grows with the number of kernels.
SMALLEST = replace(
    PRESETS["tiny"],
    name="smallest",
    unet=UNetConfig(
        context_dim=32,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=8,
        use_linear_in_transformer=True,
        norm_groups=8,
    ),
    autoencoder=AutoencoderConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=8),
)


def smallest(optimisations: Optimisations = Optimisations()) -> StableDiffusion:
    """A model of SMALLEST with seeded random weights; its images are noise."""
    return StableDiffusion.random(SMALLEST, optimisations=optimisations)


def seeded(factory, config, seed: int = 0) -> nn.Module:
    """The network of `config` in eval mode; norms and biases are random too, so that a dropped one changes the output."""
    torch.manual_seed(seed)
    module = factory(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm."""
    return ((actual - expected).norm() / expected.norm()).item()


# Optimisations that the sampling loop, the UNet's inputs or its compiled step see; the argument is `changes`.
each_kind_of_optimisation = pytest.mark.parametrize(
    "changes",
    [
        {"original_steps": True},
        {"channels_last": True},
        {"cache_context_kv": True, "cache_time_embeddings": True, "fused_qkv": True},
        {"shared_guidance": True},
        {"attention": "mha"},
        pytest.param(
            {"compile": "default", "compile_scope": "step", "compile_backend": "eager"},
            marks=[pytest.mark.compile, pytest.mark.skipif(not has("compile"), reason="torch >= 2.0")],
        ),
    ],
    ids=lambda changes: "-".join(changes),
)
