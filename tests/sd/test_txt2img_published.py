"""The command lines of the published experiment."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import torch
from txt2img_runs import ROOT, checkpoints_fixture, clean_fixture, close, samples  # noqa: F401

from sd import txt2img
from sd.features import has

COMMON = "--prompt 'A photo' --seed 1 --plms --n_samples 1 --n_iter 2 --skip_first --time_file t.txt --steps 2 "
ORIGINAL = COMMON + "--config configs/stable-diffusion/v2-inference.yaml --ckpt model.ckpt "
NATIVE = COMMON + "--config configs/stable-diffusion/v2-inference_native_mha.yaml --ckpt model_native_mha.ckpt "
NO_KERNELS = "has no SDPA kernels to choose from"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environ, line, refusal",
    [
        ({"USE_XFORMERS": "False"}, ORIGINAL, None),
        ({"USE_XFORMERS": "True"}, ORIGINAL, "attention xformers cannot run here: "),
        ({}, NATIVE + "--disable_mem_efficient --disable_flash", None if has("sdpa") else NO_KERNELS),
        ({}, NATIVE + "--disable_math --disable_flash", "NVIDIA GPU" if has("sdpa") else NO_KERNELS),
        ({}, NATIVE + "--disable_math --disable_flash --compile", "torch" if not has("compile") else "NVIDIA GPU"),
    ],
    ids=["original", "original-xformers", "mha-math", "mha-mem_efficient", "mha-mem_efficient-compile"],
)
def test_published_command_lines(checkpoints, tmp_path, monkeypatch, capsys, environ, line, refusal):
    """On a CPU: supported configurations save images, the others are refused with the reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(checkpoints)
    outdir = tmp_path / "out"
    status = txt2img.main([*shlex.split(line), "--outdir", str(outdir)])
    out, err = capsys.readouterr()
    if refusal and "xformers" in refusal and status == 0:
        pytest.skip("xformers runs on this CPU")  # releases before 0.0.22 do
    if refusal:
        assert status == 2
        assert refusal in err
        assert not list(outdir.rglob("*.png"))
    else:
        assert status == 0
        assert len(samples(outdir)) == 2
        assert ("attention mha with kernels math" if "native" in line else "attention original in fp32") in out


def test_native_and_original_checkpoints_give_the_same_image(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoints)
    for number, line in enumerate((ORIGINAL, NATIVE)):
        assert txt2img.main(["--device", "cpu", *shlex.split(line), "--outdir", str(tmp_path / str(number))]) == 0
    assert close(torch.stack(samples(tmp_path / "0")), torch.stack(samples(tmp_path / "1")))


@pytest.mark.slow
def test_run_as_module(checkpoints, tmp_path):
    argv = [sys.executable, "-m", "sd.txt2img", "--device", "cpu", *shlex.split(ORIGINAL), "--outdir", str(tmp_path)]
    environ = {**os.environ, "USE_XFORMERS": "False", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(argv, cwd=checkpoints, env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(samples(tmp_path)) == 2
    assert "attention original in fp32" in process.stdout
