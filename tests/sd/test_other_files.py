"""Files and folders that are no model of Stable Diffusion 1 or 2: one line names what they are and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import original, random_networks, small, stack_global, write_pickle

from sd.checkpoint import diffusers_folder, layouts
from sd.checkpoint.diffusers_folder import write_folder
from sd.checkpoint.file_formats import write_ckpt, write_safetensors
from sd.checkpoint.load import load
from sd.errors import CheckpointError

SD2 = small("openclip")
STATE = original(SD2)
UNET = layouts.UNET


def refused(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path, SD2, **options)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "trust" not in message
    return message.replace(str(path), "")


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "AnimateDiff"),
        ("image_proj.proj.weight", "IP-Adapter"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("body.0.in_conv.weight", "T2I-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "T2I-Adapter"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k_custom_diffusion.weight", "Custom Diffusion"),
        ("decoder.layers.0.weight", "TAESD"),
        ("encoder.0.weight", "TAESD"),
        ("concept_embeds", "safety checker"),
        ("lora_unet_down_blocks_0.lokr_w1", "LoKr"),
        ("oft_unet_down_blocks_0.oft_blocks", "OFT"),
        ("lora_unet_mid.lora_up.weight", "LoRA, which modifies a model (--lora FILE)"),
        ("emb_params", "textual inversion embedding, which extends a prompt (--embedding FILE)"),
        ("lora_controlnet", "ControlNet"),
        ("model_ema.diffusion_modelinput_blocks00weight", "averages of its weights"),
        ("unet.add_embedding.linear_1.weight", "Stable Diffusion XL"),
    ],
)
def test_other_networks_are_named(tmp_path, name, contents):
    write_safetensors(tmp_path / "a.safetensors", {name: torch.zeros(3, 3)}, {})
    message = refused(tmp_path / "a.safetensors")
    assert contents in message and "only whole Stable Diffusion 1 and 2 models can be loaded" in message


def test_model_without_unet_is_no_autoencoder_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {n: w for n, w in STATE.items() if not n.startswith((UNET, "model_ema."))}
    write_safetensors(path, state, {})
    assert "has no Stable Diffusion UNet" in refused(path)
    averages = {f"model_ema.{n[len('model.') :].replace('.', '')}": w for n, w in STATE.items() if n.startswith(UNET)}
    write_safetensors(path, {**state, **averages}, {})
    assert "averages of its weights (model_ema)" in refused(path)


def test_state_dict_inside_a_state_dict_is_read(tmp_path):
    torch.save({"state_dict": {"state_dict": STATE}}, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt", SD2)[0] == SD2


@pytest.mark.parametrize("entry", ["module", "model", "ip_adapter"])
def test_weights_in_another_entry_are_named(tmp_path, entry):
    torch.save({entry: STATE, "step": 1}, tmp_path / "a.ckpt")
    assert f"in the entries {entry}," in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("module", "name", "contents"),
    [
        ("torch._utils", "_rebuild_qtensor", "a quantised tensor"),
        ("torch", "QInt8Storage", "a quantised tensor"),
        ("torch._utils", "_rebuild_sparse_tensor", "a sparse tensor"),
        ("torch", "ComplexFloatStorage", "complex numbers"),
        ("torchao.dtypes.affine_quantized_tensor", "AffineQuantizedTensor", "quantised weights"),
        ("bitsandbytes.nn.modules", "Params4bit", "quantised weights"),
    ],
)
def test_tensors_that_are_not_dense_floats_are_named(tmp_path, module, name, contents):
    write_pickle(tmp_path / "a.ckpt", stack_global(module, name) + b").")
    assert f"contains {contents} ({module}.{name})" in refused(tmp_path / "a.ckpt")


def test_sparse_tensors_are_named(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(2).to_sparse()}}, tmp_path / "a.ckpt")
    assert "contains a sparse tensor" in refused(tmp_path / "a.ckpt")


def test_objects_of_libraries_beside_the_weights_are_ignored(tmp_path):
    data = b"\x80\x04}(" + b"\x8c\x06config" + stack_global("diffusers.configuration_utils", "FrozenDict")[2:] + b")Ru."
    write_pickle(tmp_path / "a.ckpt", data)
    assert "contains no tensors" in refused(tmp_path / "a.ckpt")


def test_parameter_with_attributes_is_read(tmp_path):
    state = dict(STATE)
    state[f"{UNET}out.2.bias"] = parameter = torch.nn.Parameter(STATE[f"{UNET}out.2.bias"])
    parameter.note = "x"
    torch.save(state, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt", SD2)[0] == SD2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_folder, "write_tokenizer", lambda *_: None)  # takes seconds, and is not read
    write_folder(tmp_path / "folder", random_networks(SD2), SD2)
    return tmp_path / "folder"


def test_settings_are_no_model(folder, tmp_path):
    assert "give the folder of the model" in refused(folder / "model_index.json")
    (tmp_path / "v1-inference.yaml").write_text("model:\n")
    assert "pass it as --config" in refused(tmp_path / "v1-inference.yaml")


def test_other_folders_are_named(folder, tmp_path):
    assert "the folder around it" in refused(folder / "unet")
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    folder.rename(tmp_path / "cache" / "snapshots" / "0123")
    assert "snapshots" in refused(tmp_path / "cache")
    assert load(tmp_path / "cache" / "snapshots" / "0123", SD2)[0] == SD2
    (tmp_path / "models").mkdir()
    assert "give a folder with unet" in refused(tmp_path / "models")
    for name in ("b.ckpt", "a.safetensors", "notes.txt"):
        (tmp_path / "models" / name).touch()
    assert refused(tmp_path / "models").endswith("give one of its files: a.safetensors, b.ckpt")


@pytest.mark.parametrize("name", ["diffusion_flax_model.msgpack", "model.onnx"])
def test_folders_of_other_frameworks_are_named(folder, name):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / name)
    assert f"unet/{name} is of another framework" in refused(folder)


def test_folders_without_the_part_are_named(folder, tmp_path):
    write_ckpt(tmp_path / "a.ckpt", STATE, None)
    for option, wrong, noun in (("vae", "text_encoder", "autoencoder"), ("text_encoder", "vae", "text encoder")):
        with pytest.raises(CheckpointError, match=f"{wrong}: contains no {noun}"):
            load(tmp_path / "a.ckpt", SD2, **{option: folder / wrong})
