"""Layouts: round trips are bit-identical, and the names are those of the other libraries."""

from __future__ import annotations

import pytest
import torch
from checkpoints import original, random_networks, same, small

from sd.attention.modules import CrossAttention, to_native
from sd.checkpoint import layouts
from sd.config.presets import PRESETS
from sd.errors import CheckpointError

KINDS = ("openclip", "clip")
SHAPES = {
    "small": {},
    "two blocks": {"num_res_blocks": 2, "channel_mult": (1, 2, 2)},
    "attention at one level": {"attention_resolutions": (2,), "channel_mult": (1, 2, 2)},
    "released": {
        "num_res_blocks": 2,
        "channel_mult": (1, 2, 4, 4),
        "attention_resolutions": (4, 2, 1),
        "model_channels": 16,
    },
    "deep": {"transformer_depth": 2},
    "one level": {"channel_mult": (1,)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_native_mha_round_trip(kind, dtype):
    state = original(small(kind), dtype)
    native = layouts.original_to_native(state)
    assert layouts.is_native_mha(native) and not layouts.is_native_mha(state)
    assert same(layouts.native_to_original(native), state)
    assert not any("in_proj_bias" in name for name in native if name.startswith(layouts.UNET))
    assert same(layouts.original_to_native(native), native) and same(layouts.native_to_original(state), state)


def test_native_mha_names_match_the_module():
    for context in (16, 12):
        separate = CrossAttention(16, context, 2, 8)
        prefix = f"{layouts.UNET}middle_block.1.transformer_blocks.0.attn1."
        converted = layouts.original_to_native(layouts.add_prefix(separate.state_dict(), prefix))
        expected = dict(to_native(separate).state_dict())
        assert not expected.pop("mha.in_proj_bias").any()
        assert same(layouts.with_prefix(converted, prefix), expected)


def test_zero_native_mha_bias_is_dropped_and_others_rejected():
    state = original(small())
    native = layouts.original_to_native(state)
    name = f"{layouts.UNET}middle_block.1.transformer_blocks.0.attn1.mha.in_proj_bias"
    native[name] = torch.zeros(192)
    assert same(layouts.native_to_original(native), state)
    native[name][3] = 1e-8
    with pytest.raises(CheckpointError, match="not zero"):
        layouts.native_to_original(native)
    native[name.replace("in_proj_bias", "bias_k")] = native.pop(name)
    with pytest.raises(CheckpointError, match="bias_k"):
        layouts.native_to_original(native)


def test_incomplete_attention_is_rejected():
    state = original(small())
    del state[f"{layouts.UNET}middle_block.1.transformer_blocks.0.attn1.to_k.weight"]
    with pytest.raises(CheckpointError, match=r"to_k\.weight is missing"):
        layouts.original_to_native(state)


def test_matrices_of_different_shape_are_rejected():
    name = f"{layouts.UNET}middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    for wrong in (torch.zeros(3, 3), torch.zeros(())):
        with pytest.raises(CheckpointError, match="differs"):
            layouts.original_to_native({**original(small()), name: wrong})
    name = f"{layouts.CLIP}text_model.encoder.layers.0.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match="differs"):
        layouts.split_networks({**original(small("clip")), name: torch.zeros(3)})


def test_matrices_of_different_dtypes_are_joined_in_the_widest():
    name = f"{layouts.UNET}middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    state = original(small())
    half = state[name].half()
    native = layouts.original_to_native({**state, name: half})
    joined = native[name.replace("to_v.weight", "mha.in_proj_weight")]
    assert joined.dtype == torch.float32 and torch.equal(joined.chunk(3)[2], half.float())


def test_shapes_without_data_are_joined_like_tensors():
    parts = [torch.zeros(4, 6, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float16)]
    joined, shapes = (layouts._join("x", *(part.to(device) for part in parts)) for device in ("cpu", "meta"))
    assert shapes.is_meta and (shapes.shape, shapes.dtype) == (joined.shape, joined.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [False, True])
def test_networks_round_trip(kind, native):
    config = small(kind)
    state = original(config, released=False)
    networks, rest = layouts.split_networks(layouts.original_to_native(state) if native else state)
    assert not rest
    for network, expected in random_networks(config).items():
        assert same(networks[network], expected)
    assert same(layouts.join_networks(networks, kind), state)


def test_names_of_the_released_text_encoders():
    sd1 = original(small("clip"))
    for name in (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "embeddings.position_ids",
        "encoder.layers.1.self_attn.q_proj.weight",
        "encoder.layers.1.self_attn.v_proj.bias",
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layers.0.layer_norm1.weight",
        "encoder.layers.0.mlp.fc2.bias",
        "final_layer_norm.weight",
    ):
        assert f"cond_stage_model.transformer.text_model.{name}" in sd1
    sd2 = original(small("openclip"))
    for name in (
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
        "transformer.resblocks.1.attn.in_proj_weight",
        "transformer.resblocks.2.attn.out_proj.bias",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.0.ln_2.weight",
        "ln_final.bias",
    ):
        assert f"cond_stage_model.model.{name}" in sd2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_unet_round_trip(kind, shape):
    unet = random_networks(small(kind, **SHAPES[shape]), torch.float16)["unet"]
    converted = layouts.unet_to_diffusers(unet)
    assert len(converted) == len(unet)
    assert same(layouts.unet_from_diffusers(converted), unet)


def test_diffusers_autoencoder_round_trip():
    ours = random_networks(small(), torch.float16)["autoencoder"]
    theirs = layouts.autoencoder_to_diffusers(ours)
    assert theirs["encoder.mid_block.attentions.0.to_q.weight"].dim() == 2
    assert same(layouts.autoencoder_from_diffusers(theirs), ours)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in theirs.items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        renamed[name] = tensor
    assert renamed.keys() != theirs.keys()
    assert same(layouts.autoencoder_from_diffusers(renamed), ours)


@pytest.mark.parametrize(
    "convert",
    [
        layouts.unet_to_diffusers,
        layouts.unet_from_diffusers,
        layouts.autoencoder_to_diffusers,
        layouts.autoencoder_from_diffusers,
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "extra.weight",
        "conv_in",
        "input_blocks.1.0.extra.weight",
        "down_blocks.0.resnets.0.extra.weight",
        pytest.param(f"down_blocks.{'1' * 5000}.resnets.0.norm1.weight", id="a block number of 5000 digits"),
    ],
)
def test_unknown_names_are_rejected(convert, name):
    with pytest.raises(CheckpointError, match=f"^{name} is no part of"):
        convert({name: torch.zeros(1)})


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_match_diffusers(preset):
    diffusers = pytest.importorskip("diffusers", reason="compares the names with diffusers")
    from sd.checkpoint.diffusers_folder import autoencoder_config, unet_config
    from sd.checkpoint.networks import expected_shapes, meta_device

    config = PRESETS[preset]
    shapes = expected_shapes(config)
    ours = {name: {key: torch.empty(shape, device="meta") for key, shape in shapes[name].items()} for name in shapes}
    with meta_device():
        unet = diffusers.UNet2DConditionModel.from_config(unet_config(config))
        autoencoder = diffusers.AutoencoderKL.from_config(autoencoder_config(config))
    for module, converted in (
        (unet, layouts.unet_to_diffusers(ours["unet"])),
        (autoencoder, layouts.autoencoder_to_diffusers(ours["autoencoder"])),
    ):
        assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {
            name: tensor.shape for name, tensor in converted.items()
        }
