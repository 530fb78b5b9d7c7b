"""YAML files in the original layout: packaged files equal the presets, other keys and values are read or rejected."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import yaml

from sd.config.presets import PRESETS
from sd.config.yaml_reader import CONFIGS, read_yaml
from sd.errors import ConfigError

UNET = "model.params.unet_config.params"
DDCONFIG = "model.params.first_stage_config.params.ddconfig"
TEXT = "model.params.cond_stage_config"


@pytest.fixture(scope="module")
def released():
    """The contents of the packaged v2-inference.yaml."""
    return yaml.safe_load((CONFIGS / "v2-inference.yaml").read_text())


def changed(contents: dict, dotted: str, value) -> dict:
    """A copy with the value at a dotted path replaced, or removed if it is `...`."""
    result = copy.deepcopy(contents)
    *path, last = dotted.split(".")
    mapping = result
    for key in path:
        mapping = mapping[key]
    if value is ...:
        del mapping[last]
    else:
        mapping[last] = value
    return result


def write(folder, contents):
    path = folder / "model.yaml"
    path.write_text(contents if isinstance(contents, str) else yaml.safe_dump(contents))
    return path


def test_packaged_file_of_sd1_for_v():
    config = read_yaml(CONFIGS / "v1-inference-v.yaml")
    assert config == replace(read_yaml(CONFIGS / "v1-inference.yaml"), name="v1-inference-v", parameterization="v")


@pytest.mark.parametrize(
    "name, preset, native_mha",
    [
        ("v1-inference", "sd1", False),
        ("v1-inference_native_mha", "sd1", True),
        ("v2-inference", "sd2", False),
        ("v2-inference_native_mha", "sd2", True),
        ("v2-inference-v", "sd2-v", False),
        ("v1-inpainting-inference", "sd1-inpaint", False),
        ("v2-inpainting-inference", "sd2-inpaint", False),
        ("v2-midas-inference", "sd2-depth", False),
        ("tiny", "tiny", False),
    ],
)
def test_packaged_files_equal_the_presets(name, preset, native_mha):
    config, expected = read_yaml(CONFIGS / f"{name}.yaml"), PRESETS[preset]
    assert config.name == name
    assert config.text.layers == 0  # determined by the checkpoint
    text = replace(config.text, layers=expected.text.layers)
    assert replace(config, name=expected.name, text=text) == replace(expected, native_mha=native_mha)


def test_every_packaged_file_is_tested():
    assert len(list(CONFIGS.glob("*.yaml"))) == 10


@pytest.mark.parametrize(
    "dotted, value",
    [
        ("model.base_learning_rate", 1.0),
        ("model.params.monitor", "loss"),
        ("model.params.log_every_t", 1),
        ("model.params.num_timesteps_cond", 1),
        ("model.params.first_stage_key", "image"),
        ("model.params.cond_stage_key", "caption"),
        ("model.params.cond_stage_trainable", True),
        ("model.params.use_ema", True),
        ("model.params.scheduler_config", {"target": "os.system", "params": {"command": "false"}}),
        ("model.params.ckpt_path", "x.ckpt"),
        (f"{UNET}.use_checkpoint", False),
        (f"{UNET}.use_fp16", False),
        (f"{UNET}.dropout", 0.1),
        (f"{UNET}.image_size", 7),
        ("model.params.first_stage_config.params.monitor", "loss"),
        ("model.params.first_stage_config.params.lossconfig", ...),
        (f"{DDCONFIG}.resolution", 512),
        (f"{DDCONFIG}.dropout", 0.5),
        (f"{TEXT}.params.freeze", False),
        ("data", {"target": "some.dataset"}),
        ("lightning", {"trainer": {"benchmark": True}}),
    ],
)
def test_training_keys_are_ignored(tmp_path, released, dotted, value):
    config = read_yaml(write(tmp_path, changed(released, dotted, value)))
    assert replace(config, name="v2-inference") == read_yaml(CONFIGS / "v2-inference.yaml")


@pytest.mark.parametrize(
    "dotted, value, message",
    [
        # unknown, at every level
        ("models", {}, "unknown key models"),
        ("model.param", {}, "unknown key model.param:"),
        ("model.params.paramaterization", "v", "unknown key model.params.paramaterization"),
        (f"{UNET}.num_head", 8, f"unknown key {UNET}.num_head:"),
        (f"{DDCONFIG}.channels", 8, f"unknown key {DDCONFIG}.channels"),
        (f"{TEXT}.params.width", 8, f"unknown key {TEXT}.params.width"),
        ("model.params.unet_config.parameters", {}, "unknown key model.params.unet_config.parameters"),
        # missing
        ("model", ..., "model: is missing"),
        ("model.params.linear_start", ..., "model.params.linear_start: is missing"),
        (f"{UNET}.context_dim", ..., f"{UNET}.context_dim: is missing"),
        (f"{DDCONFIG}.ch_mult", ..., f"{DDCONFIG}.ch_mult: is missing"),
        (f"{TEXT}.target", ..., f"{TEXT}.target: is missing"),
        # of a wrong type
        ("model.params", [1], "model.params is [1] where keys and values are needed"),
        (f"{UNET}.model_channels", "320", f"{UNET}.model_channels: must be a whole number"),
        (f"{UNET}.model_channels", True, "must be a whole number"),
        (f"{UNET}.model_channels", 0, "at least 1"),
        (f"{UNET}.channel_mult", [1, 2.5], f"{UNET}.channel_mult: must be a list of positive whole numbers"),
        (f"{UNET}.channel_mult", [], "must be a list"),
        (f"{UNET}.use_linear_in_transformer", "yes", "must be True or False"),
        ("model.params.scale_factor", -1, "model.params.scale_factor: must be a positive number"),
        ("model.params.scale_factor", float("nan"), "must be a positive number"),
        # contradictory
        (f"{UNET}.num_heads", 8, f"{UNET}.num_head_channels: contradicts num_heads"),
        (f"{UNET}.num_head_channels", ..., f"{UNET}.num_heads: is missing, and so is num_head_channels"),
        (f"{UNET}.num_head_channels", -1, "num_heads: is missing"),
        (f"{UNET}.num_head_channels", 77, f"{UNET}.num_head_channels: 77 does not divide the 320 channels"),
        (f"{UNET}.context_dim", 768, f"{TEXT}.target: contradicts unet_config's context_dim 768"),
        (f"{UNET}.out_channels", 8, f"{UNET}.out_channels: must be in_channels, 4"),
        (f"{UNET}.attention_resolutions", [3], "[3] are not all among [1, 2, 4, 8]"),
        (f"{UNET}.norm_groups", 33, "is no multiple of norm_groups, 33"),
        (f"{DDCONFIG}.norm_groups", 33, f"{DDCONFIG}.ch: 128 is no multiple of norm_groups, 33"),
        ("model.params.channels", 3, "model.params.channels: must be the same number of latent channels"),
        ("model.params.first_stage_config.params.embed_dim", 8, "embed_dim 8"),
        ("model.params.linear_end", 0.0001, "model.params.linear_end: 0.0001 must lie between"),
        # unsupported
        (f"{UNET}.use_spatial_transformer", False, f"{UNET}.use_spatial_transformer: is False"),
        (f"{UNET}.use_spatial_transformer", ..., "is missing"),
        (f"{UNET}.legacy", True, f"{UNET}.legacy: is True and can only be False"),
        (f"{UNET}.num_classes", "sequential", "class embeddings"),
        (f"{UNET}.in_channels", 9, f"{UNET}.in_channels: 9 contradicts model.target: use LatentInpaintDiffusion"),
        (f"{UNET}.in_channels", 5, f"{UNET}.in_channels: 5 contradicts model.target: use LatentDepth2ImageDiffusion"),
        (f"{UNET}.in_channels", 7, "an upscaler model, which is unsupported"),
        (f"{DDCONFIG}.attn_resolutions", [16], f"{DDCONFIG}.attn_resolutions: is [16] and can only be []"),
        (f"{DDCONFIG}.double_z", False, f"{DDCONFIG}.double_z: is False and can only be True"),
        (f"{DDCONFIG}.double_z", 1, "can only be True"),
        (f"{DDCONFIG}.in_channels", 1, f"{DDCONFIG}.out_ch: must be in_channels, 1"),
        (f"{TEXT}.params.layer", "last", f"{TEXT}.params.layer: is 'last' and can only be 'penultimate'"),
        (f"{TEXT}.params", ..., f"{TEXT}.params.layer: is missing"),
        (f"{TEXT}.params.arch", "ViT-L-14", "can only be 'ViT-H-14'"),
        (f"{TEXT}.params.max_length", 32, "77 tokens"),
        ("model.params.parameterization", "x0", "model.params.parameterization: is 'x0'"),
        ("model.params.beta_schedule", "cosine", "can only be 'linear'"),
        ("model.params.conditioning_key", "hybrid", "can only be 'crossattn'"),
        # targets
        ("model.target", "ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "in_channels: 4 contradicts model.target"),
        (
            "model.target",
            "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion",
            "in_channels: 4 contradicts model.target",
        ),
        ("model.target", "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion", "is an upscaler"),
        ("model.target", "os.system", "model.target: 'os.system' is unknown"),
        ("model.params.unet_config.target", "os.system", "is 'os.system' and can only be"),
        ("model.params.first_stage_config.target", "ldm.models.autoencoder.VQModelInterface", "can only be"),
        (f"{TEXT}.target", "ldm.modules.encoders.modules.FrozenT5Embedder", "no other text encoder"),
        (f"{TEXT}.target", {"target": 1}, "is a mapping and can only be"),
    ],
)
def test_invalid_values_are_rejected(tmp_path, released, dotted, value, message):
    path = write(tmp_path, changed(released, dotted, value))
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_sd1_embedder_contradictions_are_rejected(tmp_path):
    contents = yaml.safe_load((CONFIGS / "v1-inference.yaml").read_text())
    for dotted, value, message in [
        (f"{UNET}.context_dim", 1024, "contradicts unet_config's context_dim 1024, which is FrozenOpenCLIPEmbedder's"),
        (f"{TEXT}.params", {"layer": "penultimate"}, "can only be 'last'"),
        (f"{TEXT}.params", {"version": "openai/clip-vit-base-patch32"}, "can only be 'openai/clip-vit-large-patch14'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_yaml(write(tmp_path, changed(contents, dotted, value)))


def test_a_small_model_keeps_the_released_structure(tmp_path, released):
    """The text width follows context_dim; only the released width of the other text encoder is a contradiction."""
    config = read_yaml(write(tmp_path, changed(released, f"{UNET}.context_dim", 128)))
    assert (config.text.kind, config.text.width) == ("openclip", 128)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [1,", "is not YAML"),
        ("a: 1\na: 2", "is not YAML"),  # a key twice
        ("model: \x00", "is not YAML"),
        ("[" * 100_000, "is nested more than 50 deep"),
        ("!!python/object/apply:os.system ['touch called']", "is not YAML"),
        ("- model", "is a list"),
        ("5", "is not YAML"),
        ("", "model: is missing"),
        ("model", "model is None where keys and values are needed"),
        ("model: ${oc.env:HOME}", "has an interpolation"),
        ("model: ${model", "has an interpolation"),
        ("a: &a [1, 1]\nmodel: [*a, *a]", "has an alias"),
        ("x" * (1 << 20) + "x", "has more than"),
    ],
)
def test_file_errors_name_the_file(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "called").exists()


def test_unreadable_files_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_yaml(path)


def test_environment_is_never_read(tmp_path, monkeypatch, released):
    monkeypatch.setenv("SECRET", "ldm.models.diffusion.ddpm.LatentDiffusion")
    with pytest.raises(ConfigError) as error:
        read_yaml(write(tmp_path, changed(released, "model.target", "${oc.env:SECRET}")))
    assert "ddpm" not in str(error.value)
