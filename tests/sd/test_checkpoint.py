"""Loading checkpoints: released files load, every other file is rejected with a reason."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import original, random_networks, same, small
from safetensors.torch import save_file
from selection import slow_or_nightly

from sd import StableDiffusion
from sd.checkpoint import layouts
from sd.checkpoint import load as checkpoint
from sd.checkpoint.file_formats import write_ckpt, write_safetensors
from sd.checkpoint.load import load, read
from sd.checkpoint.networks import _meta_empty, expected_shapes, factories, materialise
from sd.choices import EMBEDDED_WEIGHTS
from sd.config.presets import PRESETS
from sd.errors import CheckpointError, CheckpointWarning

KINDS = ("openclip", "clip")


def write(path: Path, state) -> Path:
    if path.suffix == ".safetensors":
        write_safetensors(path, state, {"format": "pt"})
    elif path.suffix == ".pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif path.suffix == ".bin":
        torch.save(state, path)
    else:
        write_ckpt(path, state, 470000)
    return path


def rejected(call, *args) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args)
    message = str(error.value)
    assert str(args[0]) in message and "\n" not in message and len(message) < 2500
    return message


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt", "a.bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_released_file_loads_exact_weights(tmp_path, kind, name):
    config = small(kind)
    path = write(tmp_path / name, original(config))
    assert same(read(path), original(config))
    loaded, networks = load(path, config)
    assert loaded == config
    for network, state in random_networks(config).items():
        assert same(networks[network], state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_half_precision_is_preserved(tmp_path, name, dtype):
    config = small()
    _, networks = load(write(tmp_path / name, original(config, dtype)), config)
    assert same(networks["unet"], random_networks(config, dtype)["unet"])


def test_format_is_detected_from_content(tmp_path):
    state = original(small())
    write(tmp_path / "a.ckpt", state).rename(tmp_path / "b.safetensors")
    assert same(read(tmp_path / "b.safetensors"), state)


def test_views_transposes_and_empty_tensors_are_read(tmp_path):
    base = torch.randn(6, 4)
    state = {"a": base[2:4], "b": base.t(), "c": base[:, 1], "d": torch.empty(0, 3), "e": torch.tensor(5.0), "f": base}
    torch.save(state, tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt"), state)


@pytest.mark.parametrize("kind", KINDS)
def test_text_model_prefix_may_be_absent(tmp_path, kind):
    config = small(kind)
    state = {name.replace("text_model.", ""): tensor for name, tensor in original(config).items()}
    _, networks = load(write(tmp_path / "a.safetensors", state), config)
    assert same(networks["text_encoder"], random_networks(config)["text_encoder"])


@pytest.mark.parametrize(
    ("kind", "released", "layers"), [("openclip", True, 2), ("openclip", False, 2), ("clip", True, 2)]
)
def test_number_of_text_layers_is_read_from_file(tmp_path, kind, released, layers):
    config = small(kind)
    path = write(tmp_path / "a.safetensors", original(config, released=released))
    loaded, _ = load(path, replace(config, text=replace(config.text, layers=0)))
    assert loaded.text.layers == layers


@pytest.mark.parametrize("name", ["sd1", "sd2", "tiny"])
def test_released_models_are_detected(monkeypatch, name):
    # All names and shapes of the released files; the weights are views of a single number.
    number, config = torch.zeros((), dtype=torch.float16), PRESETS[name]
    networks = {
        network: {key: number.expand(shape) for key, shape in shapes.items()}
        for network, shapes in expected_shapes(config).items()
    }
    state = layouts.join_networks(networks, config.text.kind)
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda *_, **__: checkpoint.Checkpoint(dict(state)))
    assert load("a.ckpt")[0] == config
    other = {"sd1": "sd2", "sd2": "sd1", "tiny": "sd1"}[name]
    message = rejected(load, "a.ckpt", PRESETS[other])
    assert f"config {other}" in message and (name == "tiny" or f"config='{name}'" in message)


def test_parameterization_is_taken_from_config(tmp_path):
    config = replace(small(), parameterization="v")
    assert load(write(tmp_path / "a.safetensors", original(config)), config)[0].parameterization == "v"


def test_materialise_reuses_tensors(tmp_path):
    config = small()
    _, networks = load(write(tmp_path / "a.ckpt", original(config)), config)
    for network, make in factories(config).items():
        pointers = {name: tensor.data_ptr() for name, tensor in networks[network].items()}
        module = materialise(make, networks[network], "cpu", torch.float32)
        assert not networks[network] and not module.training
        assert {name: weight.data_ptr() for name, weight in module.named_parameters()} == pointers
        assert same(dict(module.state_dict()), random_networks(config)[network])
        assert not any(weight.requires_grad for weight in module.parameters())
    assert torch.empty(1).device.type == "cpu"
    state = random_networks(config)["unet"]
    half = materialise(factories(config)["unet"], state, "cpu", torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_meta_device_of_old_torch_affects_only_its_thread():
    with _meta_empty(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: torch.empty(1).device.type).result() == "cpu"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert torch.empty(1).device.type == "cpu"


# --- rejections


def test_missing_and_wrong_shaped_weights_are_listed(tmp_path):
    config, path = small(), tmp_path / "a.safetensors"
    state = original(config)
    removed = [name for name in state if ".ff.net." in name]
    for name in removed:
        del state[name]
    state["first_stage_model.quant_conv.weight"] = torch.zeros(8, 8, 3, 3)
    message = rejected(load, write(path, state), config)
    assert f"{len(removed)} missing" in message and removed[0] in message and f"and {len(removed) - 10} more" in message
    assert "first_stage_model.quant_conv.weight (8, 8, 3, 3) instead of (8, 8, 1, 1)" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("openclip", "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.bias"),
        ("clip", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"),
        ("clip", "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.bias"),
        ("clip", "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.v_proj.weight"),
    ],
)
def test_missing_text_weight_has_its_name_in_the_file(tmp_path, kind, name):
    config = small(kind)
    state = original(config)
    del state[name]
    assert name.partition("transformer.")[2] in rejected(load, write(tmp_path / "a.safetensors", state), config)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.extra.weight",
        "first_stage_model.encoder.extra",
        "cond_stage_model.model.transformer.resblocks.7.ln_1.weight",
    ],
)
def test_unknown_weights_are_rejected(tmp_path, name):
    config = small()
    state = original(config)
    state[name] = torch.zeros(3)
    message = rejected(load, write(tmp_path / "a.safetensors", state), config)
    assert f"1 unknown: {name}" in message


def test_integer_weights_are_rejected(tmp_path):
    config = small()
    state = original(config)
    name = "model.diffusion_model.out.2.bias"
    state[name] = state[name].to(torch.int8)
    assert "not floating point" in rejected(load, write(tmp_path / "a.safetensors", state), config)


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoder_must_match_config(tmp_path, kind):
    other = "clip" if kind == "openclip" else "openclip"
    message = rejected(load, write(tmp_path / "a.safetensors", original(small(kind))), small(other))
    assert f"{kind} text encoder" in message and f"{other} text encoder" in message


def test_custom_size_needs_a_config(tmp_path):
    assert "give the config" in rejected(load, write(tmp_path / "a.safetensors", original(small())))


@pytest.mark.parametrize(
    ("channels", "model"),
    [(9, "an inpainting"), (5, "a depth-to-image"), (7, "upscaler"), (8, "pix2pix"), (6, "another")],
)
def test_other_input_channels_are_rejected_by_model_name(tmp_path, channels, model):
    config = small()
    path = write(tmp_path / "a.safetensors", original(replace(config, unet=replace(config.unet, in_channels=channels))))
    assert model in rejected(load, path, config)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("conditioner.embedders.0.transformer.weight", "XL"),
        ("model.diffusion_model.joint_blocks.0.weight", "Diffusion 3"),
        ("model.diffusion_model.label_emb.0.0.weight", "class embeddings"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("lora_unet_down_blocks_0.lora_down.weight", "LoRA"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("encoder.conv_in.weight", "autoencoder"),
        ("text_model.final_layer_norm.weight", "text encoder"),
        ("nothing.known", "no Stable Diffusion UNet"),
    ],
)
def test_other_models_are_rejected_by_name(tmp_path, name, model):
    path = write(tmp_path / "a.safetensors", {name: torch.zeros(2, 2)})
    assert model in rejected(load, path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Sign in</html>" * 20, "web page"),
        (b"\n\n<html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" * 8, "GGUF"),
        (b"\x80\x04\x95\x00\x00", "no torch file"),
        (bytes(range(256)) * 8, "neither"),
        (b"abc", "neither"),
        (b"PK\x03\x04", "download"),
        (struct.pack("<Q", 10**6) + b"{}", "download"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (struct.pack("<Q", 2) + b"{]", "download"),
    ],
)
def test_files_other_than_checkpoints_are_rejected(tmp_path, content, reason):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert reason in rejected(read, path)


def test_missing_files_and_folders_are_rejected(tmp_path, monkeypatch):
    assert "no such file" in rejected(read, tmp_path / "a.ckpt")
    assert "no diffusers folder" in rejected(read, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for repository in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "someone/sd-1.5"):  # as diffusers takes them
        assert rejected(read, repository).endswith(f": hf download {repository} FILE --local-dir .")
    for path in ("absent/v1-5.safetensors", "absent/v1-5.CKPT", "models/v1-5", "a/b/c", "a", tmp_path / "a"):
        assert "hf download" not in rejected(read, path)


def test_a_compressed_record_is_not_unpacked_to_any_size(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/byteorder", bytes(1 << 27))
    tracemalloc.start()
    rejected(read, path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_compressed_index_is_rejected_before_it_is_read(tmp_path):
    """A kilobyte of it could become gigabytes of objects."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "b.ckpt")
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(tmp_path / "b.ckpt") as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            archive.writestr(name, source.read(name), kind)
    assert "compression" in rejected(read, path)


def test_other_zip_files_are_rejected(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip file" in rejected(read, path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in rejected(read, path)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "b.ckpt")
    with zipfile.ZipFile(tmp_path / "b.ckpt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert "compression" in rejected(read, path)
    torch.save([torch.zeros(3)], path)
    assert "no state dict" in rejected(read, path)
    torch.save({"epoch": 3}, path)
    assert "no tensors" in rejected(read, path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4]},
        [1],
    ],
)
def test_damaged_safetensors_headers_are_rejected(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    rejected(read, path)


def test_overlapping_tensors_do_not_multiply_memory(tmp_path):
    header = json.dumps(
        {f"x{i}": {"dtype": "U8", "shape": [900 + i], "data_offsets": [0, 900 + i]} for i in range(90)}
    ).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1000))
    assert "damaged" in rejected(read, path)


def sample_file(path: Path) -> bytes:
    generator = torch.Generator().manual_seed(0)
    state = {f"model.{i}.weight": torch.randn(4, 4 + i, generator=generator) for i in range(12)}
    return write(path, state).read_bytes()


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
def test_file_truncated_anywhere_is_rejected(tmp_path, name):
    data, path = sample_file(tmp_path / name), tmp_path / f"cut-{name}"
    for length in sorted({*range(0, len(data), max(1, len(data) // 150)), len(data) - 1, len(data) - 40}):
        path.write_bytes(data[:length])
        rejected(read, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
def test_mutated_files_load_or_are_rejected(tmp_path, name):
    data, path, random_numbers = sample_file(tmp_path / name), tmp_path / f"mutated-{name}", random.Random(0)
    outcomes = set()
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(random_numbers.choice([1, 1, 2, 8])):
            position = random_numbers.randrange(len(mutated))
            action = random_numbers.random()
            if action < 0.6:
                mutated[position] = random_numbers.randrange(256)
            elif action < 0.8:
                del mutated[position : position + random_numbers.randrange(1, 30)]
            else:
                mutated[position:position] = random_numbers.randbytes(random_numbers.randrange(1, 30))
        path.write_bytes(mutated)
        try:
            read(path)
            outcomes.add("loaded")
        except CheckpointError as error:
            assert str(path) in str(error)
            outcomes.add("rejected")
    assert outcomes == {"loaded", "rejected"}


# --- memory

_MEASURE = """
import pathlib, re, sys
sys.path[:0] = sys.argv[2:4]
import torch
from checkpoints import small
from sd.checkpoint.load import load
from sd.checkpoint.networks import factories, materialise

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

config = small(model_channels=160)
for make in factories(small()).values():
    make()
before = peak()
config, networks = load(sys.argv[1], config)
modules = [materialise(make, networks[name], "cpu", torch.float32) for name, make in factories(config).items()]
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a process is read from /proc")
@pytest.mark.parametrize("name", slow_or_nightly(["a.safetensors", "a.ckpt"], lambda name: name == "a.safetensors"))
def test_peak_memory_is_the_size_of_the_file(tmp_path, name):
    config = small(model_channels=160)
    path = write(tmp_path / name, original(config, released=False))
    size = path.stat().st_size
    assert size > 100e6
    folders = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])]
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), *folders], check=True, capture_output=True, text=True
    )
    path.unlink()
    assert int(out.stdout) < 1.2 * size + 20e6


def test_ema_weights_are_not_read(tmp_path, monkeypatch):
    read_names = []

    def spy(file_index, names, progress):
        read_names.extend(names)
        return read_tensors(file_index, names, progress)

    read_tensors = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", spy)
    config = small()
    load(write(tmp_path / "a.ckpt", original(config)), config)
    assert read_names and not any(name.startswith("model_ema") for name in read_names)


def test_progress_bar_is_on_stderr_and_optional(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1000)}, str(path))
    read(path)
    assert capsys.readouterr().err == ""
    read(path, progress=True)
    assert "a.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("prediction", [None, "v"])
def test_sd2_without_a_record_is_loaded_as_eps_with_a_warning(monkeypatch, prediction):
    """A model of v, such as SD2 at 768 pixels, would make noise without a word."""
    from sd.checkpoint.contents import Prediction

    config, states = load(EMBEDDED_WEIGHTS, progress=False)
    monkeypatch.setattr("sd.networks.load", lambda *_, **__: (replace(config, name="sd2"), states))
    monkeypatch.setattr("sd.networks.prediction_of", lambda path: prediction and Prediction(prediction, "entry v_pred"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StableDiffusion.from_checkpoint("sd2.safetensors")
    messages = [str(each.message) for each in caught if issubclass(each.category, CheckpointWarning)]
    assert len(messages) == (prediction is None)
    assert all("taken for a model of eps" in message and "config='sd2-v'" in message for message in messages)
