"""Converter: round trips of every layout are bit-identical, nothing is overwritten, no partial output remains."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import original, random_networks, same, small

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import index, write_ckpt, write_safetensors
from sd.checkpoint.load import load, read
from sd.config.presets import PRESETS
from sd.convert import convert, main
from sd.errors import CheckpointError, ConfigError

KINDS = ("openclip", "clip")


@pytest.fixture
def presets(monkeypatch):
    """Register the small models as presets for command lines."""
    for kind in KINDS:
        monkeypatch.setitem(PRESETS, f"small-{kind}", small(kind))


def make(path: Path, kind: str = "openclip", dtype=torch.float16, released: bool = True) -> Path:
    state = original(small(kind), dtype, released)
    if path.suffix == ".ckpt":
        write_ckpt(path, state, 470000)
    else:
        write_safetensors(path, state, {"format": "pt", "global_step": "470000"})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_native_mha_files_round_trip(tmp_path, kind, suffix):
    source = make(tmp_path / f"model{suffix}", kind)
    native, back = tmp_path / "model_native_mha.ckpt", tmp_path / f"back{suffix}"
    assert main([str(source), str(native), "--to", "native-mha"]) == 0
    assert layouts.is_native_mha(read(native))
    assert main([str(native), str(back), "--to", "original"]) == 0
    assert same(read(back), read(source)) and list(read(back)) == list(read(source))
    assert index(native).global_step == index(back).global_step == 470000
    assert torch.load(native)["global_step"] == 470000


def test_file_formats_round_trip(tmp_path):
    source = make(tmp_path / "a.ckpt")
    convert(source, tmp_path / "b.safetensors", "safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.ckpt", "original")
    assert same(read(tmp_path / "c.ckpt"), read(source)) and index(tmp_path / "c.ckpt").global_step == 470000
    convert(tmp_path / "c.ckpt", tmp_path / "d.ckpt", "native-mha")
    convert(tmp_path / "d.ckpt", tmp_path / "e.safetensors", "safetensors")
    assert same(read(tmp_path / "e.safetensors"), read(source))
    convert(tmp_path / "d.ckpt", tmp_path / "f.ckpt", "native-mha")
    assert same(read(tmp_path / "f.ckpt"), read(tmp_path / "d.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_folder_round_trip(tmp_path, presets, kind, capsys):
    config = small(kind)
    source = make(tmp_path / "a.safetensors", kind)
    folder = tmp_path / "folder"
    assert main([str(source), str(folder), "--to", "diffusers", "--config", f"small-{kind}"]) == 0
    err = capsys.readouterr().err
    assert "left out" in err and "betas" in err
    assert "first_stage_model.encoder" not in err and "model.diffusion_model" not in err
    back = tmp_path / "back.ckpt"
    assert main([str(folder), str(back), "--to", "original"]) == 0
    assert same(read(back), original(config, torch.float16, released=False))
    assert same(read(folder), read(back))
    for path in (folder, back):
        loaded, networks = load(path, config)
        assert loaded == config
        assert same(networks["text_encoder"], random_networks(config, torch.float16)["text_encoder"])
    convert(folder, tmp_path / "native.safetensors", "native-mha")
    assert convert(tmp_path / "native.safetensors", tmp_path / "again", "diffusers", f"small-{kind}") == []
    assert same(read(tmp_path / "again"), read(folder))


def test_embedded_model_is_converted_by_name(tmp_path, monkeypatch):
    config = PRESETS["tiny"]
    weights = tmp_path / "tiny.safetensors"
    write_safetensors(weights, layouts.join_networks(random_networks(config, torch.float16), "openclip"), {})
    monkeypatch.setattr("sd.convert.EMBEDDED_WEIGHTS", weights)
    assert main(["tiny", str(tmp_path / "tiny.ckpt"), "--to", "original"]) == 0
    assert same(read(tmp_path / "tiny.ckpt"), read(weights))
    assert main(["tiny", str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    assert load(tmp_path / "folder")[0] == config  # v, from the scheduler settings of the folder
    wrong = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    wrong.write_text(wrong.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(CheckpointError, match="predicts eps"):
        load(tmp_path / "folder", config)
    assert load(tmp_path / "folder")[0] == replace(config, parameterization="eps")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_and_transformers_load_the_folder(tmp_path, presets, kind):
    diffusers = pytest.importorskip("diffusers", reason="the folder is for diffusers")
    transformers = pytest.importorskip("transformers", reason="the folder is for transformers")
    from sd.checkpoint.networks import factories, materialise
    from sd.models.tokenizer import tokenize

    config = small(kind)
    convert(make(tmp_path / "a.safetensors", kind, torch.float32), tmp_path / "folder", "diffusers", f"small-{kind}")
    folder = str(tmp_path / "folder")
    _, networks = load(folder, config)
    ours = {
        name: materialise(factory, networks[name], "cpu", torch.float32) for name, factory in factories(config).items()
    }

    tokens = torch.randint(0, 50, (2, 77), generator=torch.Generator().manual_seed(0))
    text, report = transformers.CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", low_cpu_mem_usage=False)
    x, z, t = torch.randn(2, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([1, 500])
    with torch.no_grad():
        context = ours["text_encoder"](tokens)
        for actual, expected in (
            (text(tokens).last_hidden_state, context),
            (unet(x, t, context).sample, ours["unet"](x, t, context)),
            (vae.decode(z).sample, ours["autoencoder"].decode(z)),
        ):
            assert (actual - expected).norm() < 1e-4 * expected.norm()

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    # No exclamation mark: it is SD2's padding, which transformers removes from words, in released folders too.
    prompts = ["A photo of a red circle, on blue", "", "naïve café 123 isn't"]
    theirs = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(theirs, tokenize(prompts, kind))
    names = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert {name for name, value in names.items() if isinstance(value, list) and value[0]} == {
        path.name for path in (tmp_path / "folder").iterdir() if path.is_dir()
    }
    scheduler = diffusers.PNDMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert abs(float(scheduler.alphas_cumprod[999]) - 0.0046600985) < 1e-7


# --- rejections


def test_damaged_folders_are_rejected(tmp_path, presets):
    folder = tmp_path / "folder"
    convert(make(tmp_path / "a.safetensors"), folder, "diffusers", "small-openclip")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="download it again"):
        read(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model\.safetensors is missing"):
        read(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="shards"):
        read(folder)
    torch.save(
        {"conv_in.weight": torch.zeros(3), "surprise": torch.zeros(3)}, folder / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"conv_in\.weight|surprise"):
        read(folder)
    weights.write_bytes(data)
    (folder / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no readable JSON"):
        read(folder)
    (folder / "text_encoder_2").mkdir()
    with pytest.raises(CheckpointError, match="XL"):
        read(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
        ("text_encoder/config.json", "num_hidden_layers", 1),
        ("vae/config.json", "scaling_factor", 0.13025),
    ],
)
def test_settings_that_a_file_cannot_record_are_rejected(tmp_path, file, key, value):
    folder, target = tmp_path / "folder", tmp_path / "b.safetensors"
    convert("tiny", folder, "diffusers")
    convert(folder, target, "safetensors")
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, key: value}))
    for source, replaced in ((folder, {}), *([("tiny", {"vae": folder / "vae"})] if file.startswith("vae") else [])):
        with pytest.raises(CheckpointError, match=f"{key} '{value}' is not supported, only "):
            convert(source, tmp_path / "c.safetensors", "safetensors", **replaced)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "sample"),
        ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
        ("scheduler/scheduler_config.json", "beta_end", 0.5),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 500),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
        ("vae/config.json", "scaling_factor", 0.5),
    ],
)
def test_other_settings_in_a_folder_are_rejected(tmp_path, presets, file, key, value):
    folder = tmp_path / "folder"
    convert(make(tmp_path / "a.safetensors"), folder, "diffusers", "small-openclip")
    load(folder, PRESETS["small-openclip"])
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(CheckpointError, match=f"{file}: {key} '{value}' is not supported, only "):
        load(folder, PRESETS["small-openclip"])


@pytest.mark.parametrize(
    ("name", "to", "reason"),
    [
        ("b.pt", "original", "safetensors or .ckpt"),
        ("b.ckpt", "safetensors", "ends in .safetensors"),
        ("b", "native-mha", "safetensors or .ckpt"),
        ("b.ckpt", "diffusers", "is a folder"),
        ("b.ckpt", "original --config sd2", "--config sd2: is only for --to diffusers"),
        ("nowhere/b.ckpt", "original", "does not exist"),
        ("a.ckpt", "original", "--force"),
    ],
)
def test_invalid_outputs_are_rejected(tmp_path, capsys, name, to, reason):
    source = make(tmp_path / "a.ckpt")
    before = source.read_bytes()
    assert main([str(source), str(tmp_path / name), "--to", *to.split()]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_force_replaces_a_file_or_the_input(tmp_path):
    source = make(tmp_path / "a.ckpt")
    state = read(source)
    assert main([str(source), str(source), "--to", "native-mha", "--force"]) == 0
    assert same(read(source), layouts.original_to_native(state))


def test_force_replaces_only_a_diffusers_folder(tmp_path, presets):
    source = make(tmp_path / "a.ckpt")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "letters").touch()
    with pytest.raises(ConfigError, match="no diffusers model"):
        convert(source, folder, "diffusers", "small-openclip", force=True)
    (folder / "model_index.json").write_text("{}")
    convert(source, folder, "diffusers", "small-openclip", force=True)
    assert not (folder / "letters").exists() and (folder / "unet" / "config.json").exists()
    with pytest.raises(ConfigError, match="exists"):
        convert(source, folder, "diffusers", "small-openclip")


def test_an_interrupted_replacement_keeps_the_former_folder(tmp_path, presets, monkeypatch):
    source, folder = make(tmp_path / "a.ckpt"), tmp_path / "folder"
    convert(source, folder, "diffusers", "small-openclip")
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    replace, calls = os.replace, []

    def interrupt(*arguments):
        replace(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("sd.convert.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, folder, "diffusers", "small-openclip", force=True)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "folder"}


def test_no_partial_output_remains(tmp_path, monkeypatch):
    source = make(tmp_path / "a.ckpt")

    def fail(path, *_):
        path.write_bytes(b"partial")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd.checkpoint.file_formats.write_safetensors", fail)
    assert main([str(source), str(tmp_path / "b.safetensors"), "--to", "safetensors"]) == 2
    assert list(tmp_path.iterdir()) == [source]


def test_file_of_an_unknown_name_is_named(tmp_path, capsys):
    path = tmp_path / "unet.safetensors"
    write_safetensors(path, {"conv_in.weight": torch.zeros(3), "down_blocks.0.resnets.0.x.weight": torch.zeros(3)}, {})
    for target, to in (("folder", "diffusers"), ("b.ckpt", "original")):
        assert main([str(path), str(tmp_path / target), "--to", to]) == 2
        assert capsys.readouterr().err.startswith(f"{path}: down_blocks.0.resnets.0.x.weight is no part")


def test_invalid_inputs_are_rejected(tmp_path, capsys):
    for name, content in (("a.ckpt", None), ("b.ckpt", b"<html>"), ("c.ckpt", b"")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert main([str(tmp_path / name), str(tmp_path / "out.ckpt"), "--to", "original"]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err
    write_safetensors(tmp_path / "lora.safetensors", {"x.lora_up.weight": torch.zeros(3)}, {})
    assert main([str(tmp_path / "lora.safetensors"), str(tmp_path / "out.ckpt"), "--to", "native-mha"]) == 2
    assert "LoRA" in capsys.readouterr().err
    assert not (tmp_path / "out.ckpt").exists()


def test_entries_left_out_are_listed(tmp_path, capsys):
    state = original(small())
    torch.save({"state_dict": state, "global_step": 3, "optimizer_states": [1], "epoch": 2}, tmp_path / "a.ckpt")
    assert main([str(tmp_path / "a.ckpt"), str(tmp_path / "b.safetensors"), "--to", "safetensors"]) == 0
    assert "optimizer_states, epoch" in capsys.readouterr().err
    assert same(read(tmp_path / "b.safetensors"), state)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("sd-convert of sd-perf ")
