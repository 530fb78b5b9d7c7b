"""The txt2img command: refused options, errors and exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from txt2img_runs import clean_fixture, run  # noqa: F401

from sd.choices import SAMPLERS
from sd.cli import setup as options
from sd.config.yaml_reader import CONFIGS
from sd.errors import BadImage
from sd.pipeline import StableDiffusion


@pytest.mark.parametrize(
    "argv, environ, message",
    [
        (["--torchscript"], {}, "--torchscript: not supported: use --compile"),
        (["--ipex"], {}, "--ipex: not supported"),
        (["--laion400m"], {}, "--laion400m: another model"),
        (["--plms", "--dpm"], {}, "--sampler: plms and dpm_solver contradict each other"),
        (["--plms", "--sampler", "ddim"], {}, "--sampler: plms and ddim contradict each other"),
        (["--plms", "--ddim_eta", "1"], {}, "plms: eta must be 0"),
        (["--ddim_eta", "9"], {}, "eta 9 is too large for 2 steps: use 0 to 1"),
        (["--steps", "3"], {}, "3 steps cannot be spread"),
        (["--dpm", "--steps", "1"], {}, "at least 2 steps"),
        (["--sigmas", "karras"], {}, "ddim: has no karras sigmas; choose one of"),
        (["--sampler", "lcm", "--timestep-spacing", "trailing", "--steps", "4"], {}, "lcm: has timesteps of its own"),
        (["--C", "3"], {}, "--C 3 contradicts the model tiny, which has 4"),
        (["--f", "16"], {}, "--f 16 contradicts the model tiny, which has 8"),
        (["--bf16", "--precision", "full"], {}, "--precision: bf16 and full contradict each other"),
        (["--device", "tpu9"], {}, "--device tpu9: choose cpu"),
        (["--device", "meta"], {}, "--device meta: choose cpu"),
        (["--device", "cuda:99"], {}, "--device cuda:99: this machine has"),
        (["--enable_tf32"], {}, "--enable_tf32: tf32 is a mode of NVIDIA GPUs"),
        (["--config", "sd2"], {}, "--config sd2 needs its checkpoint"),
        (["--config", "configs/stable-diffusion/v2-inference.yaml"], {}, "needs its checkpoint"),
        (["--config", "sd9"], {}, "no preset 'sd9'"),
        (["--config", "missing.yaml"], {}, "missing.yaml: cannot be read"),
        (["--ckpt", "missing.ckpt"], {}, "missing.ckpt"),
        (["--from-file", "missing.txt"], {}, "--from-file missing.txt: cannot be read"),
        (["--from-file", "empty.txt"], {}, "--from-file empty.txt: is empty"),
        (["--from-file", "blank.txt"], {}, "--from-file blank.txt: is empty"),
        (["--from-file", "latin.txt"], {}, "--from-file latin.txt: is not UTF-8"),
        (["--prompt", "caf\udce9"], {}, "--prompt: is not UTF-8 text"),
        (["--negative-prompt", "caf\udce9"], {}, "--negative-prompt: is not UTF-8 text"),
        (["--from-file", "empty.txt", "--prompt", "x"], {}, "--prompt and --from-file contradict"),
        (["--outdir", "empty.txt"], {}, "--outdir: empty.txt"),
        (["--time_file", "missing/t.txt"], {}, "--time_file missing/t.txt: cannot be written"),
        (["--attention", "original", "--disable_math"], {}, "--disable_math: attention original has no SDPA kernels"),
        (["--disable_flash"], {"USE_XFORMERS": "True"}, "--disable_flash: attention xformers has no SDPA kernels"),
        (["--sdpa-kernels", "math"], {"USE_XFORMERS": "False"}, "--sdpa-kernels math: attention original"),
        (["--attention", "mha", "--disable_math", "--sdpa-kernels", "flash"], {}, "contradict each other"),
        (["--attention", "mha", "--disable_math", "--disable_flash", "--disable_mem_efficient"], {}, "leave no kernel"),
        (["--attention", "sdpa", "--sdpa-kernels", "fast"], {}, "SDPA kernels ['fast']"),
        (
            ["--attention", "sdpa", "--attention-precision", "input"],
            {},
            "--attention-precision: attention sdpa has none",
        ),
        (["--config", "native.yaml"], {"USE_XFORMERS": "True"}, "USE_XFORMERS=True contradicts the config's"),
        ([], {"USE_XFORMERS": "maybe"}, "USE_XFORMERS=maybe in the environment"),
        ([], {"ATTN_PRECISION": "fp64"}, "ATTN_PRECISION=fp64 in the environment"),
    ],
)
def test_refusals_print_one_line_and_write_nothing(monkeypatch, capsys, argv, environ, message):
    Path("empty.txt").write_text("")
    Path("blank.txt").write_text("\n  \n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    text = (CONFIGS / "tiny.yaml").read_text().replace("use_checkpoint: False", "use_native_mha: True")
    Path("native.yaml").write_text(text)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_samples", "0"], "--n_samples: 0: must be at least 1"),
        (["--n_iter", "-1"], "--n_iter: -1 is not in"),
        (["--steps", "0"], "--steps/--ddim_steps: 0: must be at least 1"),
        (["--seed", "-2"], "--seed: -2 is not in"),
        (["--prompt-chunks", "0"], "--prompt-chunks: 0: must be at least 1"),
        (["--prompt-chunks", "all"], "--prompt-chunks"),
        (["--seed", str(2**63)], "--seed: 9223372036854775808 is not in"),
        (["--H", "0"], "--H: 0: must be at least 1"),
        (["--H", "100"], "--H: size 100: must be a positive multiple of 64, such as 128"),
        (["--W", "65"], "--W: size 65: must be a positive multiple of 64, such as 64"),
        (["--ddim_eta", "nan"], "--ddim_eta: nan: must be a number of at least 0"),
        (["--scale", "inf"], "--scale: inf: must be a number of at least 0"),
        (["--scale", "much"], "--scale"),
        (["--precision", "fp8"], "--precision"),
        (["--compile", "fast"], "--compile"),
        (["--attention", "flash"], "--attention"),
        (["--sampler", "lms"], "--sampler"),
        (["--timestep-spacing", "cubic"], "--timestep-spacing"),
        (["--sigmas", "beta"], "--sigmas"),
        (["--prom", "x"], "--prom"),  # no abbreviations: a new option must not change the meaning of an old command
    ],
)
def test_invalid_values_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_of_every_sampler_are_limited(monkeypatch, capsys, sampler):
    monkeypatch.setattr(options.Setup, "load", lambda self: pytest.fail("loaded"))
    assert run("--sampler", sampler, "--steps", "5000") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "5000 steps" in err and "1000 timesteps" in err
    assert sampler in err.lower()


def test_unwritable_folder_is_rejected_before_the_model_is_loaded(monkeypatch, capsys):
    Path("file").write_text("")
    monkeypatch.setattr(options.Setup, "load", lambda self: pytest.fail("loaded"))
    assert run("--outdir", "file/deep") == 2
    assert "--outdir: " in capsys.readouterr().err


@pytest.mark.slow
def test_bad_image_is_an_error_and_not_saved(monkeypatch, capsys):
    decode = StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, latents: decode(self, latents) * float("nan"))
    assert run() == 2
    err = capsys.readouterr().err
    assert "error: image 1 of 1 is not a number" in err
    assert "lower the guidance scale, or load the weights" in err
    assert run("--precision", "bf16") == 2
    assert "try precision full or bf16" in capsys.readouterr().err
    assert not list(Path().rglob("*.png"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_closed_stdout_gives_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sd.txt2img", "--steps", "1", "--device", "cpu"]
    environ = {**os.environ, "PYTHONPATH": str(Path(options.__file__).parents[2])}
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environ, check=False)
    os.close(write)
    assert process.returncode == 141 and "Error" not in process.stderr


@pytest.mark.parametrize(
    "error, status, message",
    [
        (BadImage("black"), 2, "error: black"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "error: out of memory (peak "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            2,
            "use a smaller --n_samples, a smaller image (--H, --W), or --precision bf16",
        ),
        (MemoryError(), 2, "error: out of memory"),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(StableDiffusion, "txt2img", fail)
    assert run() == status
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*.png"))


def test_other_exceptions_propagate(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(StableDiffusion, "txt2img", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run()


def test_full_disk_leaves_no_partial_image(monkeypatch, capsys):
    def full(self, file, *arguments, **options):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run() == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in Path("outputs").rglob("*") if path.is_file()]
