"""`python -m sd.inspect`, the lines of sd-convert, and the options of txt2img that add parts to a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch

import sd.convert
import sd.inspect
import sd.txt2img
from sd.checkpoint import layouts
from sd.checkpoint.file_formats import write_ckpt, write_safetensors
from sd.checkpoint.load import read
from sd.choices import EMBEDDED_WEIGHTS

ARGUMENTS = ["--steps", "2", "--sampler", "euler", "--skip_grid", "--device", "cpu"]


@pytest.fixture(scope="module")
def state() -> dict:
    return read(EMBEDDED_WEIGHTS)


def test_contents_are_listed(tmp_path, state, capsys):
    path = tmp_path / "a.ckpt"
    state = {**state, "v_pred": torch.empty(0), "model_ema.decay": torch.zeros(1), "x\x1b[2J": torch.zeros(1)}
    write_ckpt(path, {n: w.float() if n.startswith("first_stage") else w for n, w in state.items()}, 470000)
    assert sd.inspect.main([str(path)]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["layout"] == "original" and lines["format"].startswith("torch file")
    assert "286 fp16" in lines["unet"] and "184 fp32" in lines["autoencoder"] and "28 fp16" in lines["text_encoder"]
    assert lines["predicts"] == "v, by its entry v_pred" and lines["training steps"] == "470000"
    assert r"x\x1b[2J" in lines["other entries"] and "\x1b" not in out + err
    assert lines["loads as"].startswith("tiny, 64x64 pixels, predicts v")
    assert err.startswith("warning: ") and "1 entries" in err


def test_unloadable_file_is_listed_with_the_reason(tmp_path, state, capsys):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {n: w for n, w in state.items() if not n.startswith(layouts.AUTOENCODER)}, {})
    assert sd.inspect.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert "autoencoder: none" in out and "pass --vae FILE" in err and err.count("\n") == 1
    assert sd.inspect.main([str(path), "--vae", str(EMBEDDED_WEIGHTS)]) == 0
    path.write_bytes(b"Entry not found")
    assert sd.inspect.main([str(path)]) == 2


def test_convert_prints_what_it_wrote(tmp_path, capsys):
    target = str(tmp_path / "tiny.ckpt")
    assert sd.convert.main(["tiny", target, "--to", "native-mha"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == target and "  layout: native-mha" in lines and any("unet: " in line for line in lines)
    assert sd.convert.main(["tiny", str(tmp_path / "b.ckpt"), "--to", "original", "--sampler", "ddim"]) == 2
    assert "--sampler ddim: is only for --to diffusers" in capsys.readouterr().err


def test_parts_and_unknown_weights_in_sd_convert(tmp_path, state, monkeypatch, capsys):
    monkeypatch.setattr("sd.checkpoint.diffusers_folder.write_tokenizer", lambda *_: None)
    path, tiny = tmp_path / "a.safetensors", str(EMBEDDED_WEIGHTS)
    incomplete = {n: w for n, w in state.items() if not n.startswith(layouts.AUTOENCODER)}
    write_safetensors(path, {**incomplete, f"{layouts.UNET}x": torch.zeros(1)}, {})
    parts = ["--vae", tiny, "--ignore-unknown-keys"]
    for command, arguments in (
        (sd.inspect.main, [str(path)]),
        (sd.convert.main, [str(path), str(tmp_path / "folder"), "--to", "diffusers"]),
    ):
        assert command(arguments) == 2 and "pass --vae FILE" in capsys.readouterr().err
        assert command([*arguments, *parts[:2]]) == 2 and "--ignore-unknown-keys" in capsys.readouterr().err
        assert command([*arguments, *parts]) == 0
    assert sd.convert.main([str(path), str(tmp_path / "b.ckpt"), "--to", "original", *parts]) == 0
    written = read(tmp_path / "b.ckpt")
    assert all(torch.equal(written[name], weight) for name, weight in state.items())


def test_parts_of_a_folder_are_those_of_the_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sd.checkpoint.diffusers_folder.write_tokenizer", lambda *_: None)
    sd.convert.convert("tiny", tmp_path / "folder", "diffusers")
    shutil.rmtree(tmp_path / "folder" / "vae")
    assert sd.inspect.main([str(tmp_path / "folder")]) == 2 and "pass --vae FILE" in capsys.readouterr().err
    assert sd.inspect.main([str(tmp_path / "folder"), "--vae", str(EMBEDDED_WEIGHTS)]) == 0


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sd.checkpoint.file_formats.write_ckpt", interrupt)
    assert sd.convert.main(["tiny", str(tmp_path / "a.ckpt"), "--to", "original"]) == 130
    assert capsys.readouterr().err == "interrupted\n" and not list(tmp_path.iterdir())


def test_v_of_a_folder_survives_in_a_file(tmp_path, state, monkeypatch):
    monkeypatch.setattr("sd.checkpoint.diffusers_folder.write_tokenizer", lambda *_: None)
    sd.convert.convert("tiny", tmp_path / "folder", "diffusers")
    sd.convert.convert(tmp_path / "folder", tmp_path / "a.safetensors", "safetensors")
    assert read(tmp_path / "a.safetensors")["v_pred"].numel() == 0


def test_parts_from_other_files_make_the_same_image(tmp_path, state, capsys):
    incomplete = tmp_path / "a.safetensors"
    unet = {n: w for n, w in state.items() if n.startswith(layouts.UNET)}
    write_safetensors(incomplete, unet, {})
    parts = ["--vae", str(EMBEDDED_WEIGHTS), "--text-encoder", str(EMBEDDED_WEIGHTS)]
    prompt = ["--prompt", "a red circle on a blue background", "--scale", "4"]
    for name, options in (("whole", ["--ckpt", str(EMBEDDED_WEIGHTS)]), ("parts", ["--ckpt", str(incomplete), *parts])):
        assert sd.txt2img.main([*options, *prompt, *ARGUMENTS, "--outdir", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "assumed to predict v, which the file does not record; if the images are noise, pass a YAML file" in out
    from PIL import Image

    images = [Image.open(tmp_path / name / "samples" / "00000.png").tobytes() for name in ("whole", "parts")]
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ckpt", ""], "is an empty path"),
        (["--ckpt", "https://example.org/a.ckpt"], "nothing is downloaded"),
        (["--vae", "a.safetensors"], "pass --ckpt FILE"),
        (["--ckpt", str(EMBEDDED_WEIGHTS), "--vae", ""], "is an empty path"),
    ],
)
def test_wrong_paths_are_refused_before_loading(tmp_path, capsys, options, reason):
    assert sd.txt2img.main([*options, "--outdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
