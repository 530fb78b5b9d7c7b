"""The txt2img command: its options and its output."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from txt2img_runs import CAPTION, calls_fixture, checkpoints_fixture, clean_fixture, close, run, samples  # noqa: F401

from sd import __version__, txt2img
from sd.attention.functions import DEFAULT_ATTENTION
from sd.config.presets import PRESETS
from sd.config.yaml_reader import CONFIGS
from sd.pipeline import StableDiffusion
from sd.sampling.noise import OriginalNoise

# --- output


def test_defaults_generate_one_image_with_the_tiny_model(capsys):
    assert run() == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("CPU threads: ")
    assert "tiny model" in lines[1]
    assert "--ckpt" in lines[1]
    assert str(Path("outputs/txt2img-samples/samples/00000.png")) in lines
    assert str(Path("outputs/txt2img-samples/grid-0000.png")) in lines
    assert re.search(r"seconds: load [\d.]+, text [\d.]+, unet [\d.]+, vae [\d.]+, saving [\d.]+", out)
    assert re.search(r"attention kernels that ran: unet \w+; autoencoder \w+", out)
    assert re.search(r"peak memory: [\d.]+ GiB", out)
    assert "iteration 1/1: 100%" in err
    assert "2/2" in err
    (image,) = samples()
    assert image.shape == (64, 64, 3)
    assert sorted(p.name for p in Path("outputs/txt2img-samples").iterdir()) == ["grid-0000.png", "samples"]


def test_png_text_holds_the_settings():
    assert (
        run("--prompt", "ein Kreis, 円", "--negative-prompt", "blue", "--seed", "7", "--n_samples", "2", "--plms") == 0
    )
    texts = Image.open("outputs/txt2img-samples/samples/00001.png").text
    kernels = texts.pop("kernels")
    assert re.fullmatch(r"unet \S+; autoencoder \S+", kernels)
    assert texts.pop("parameters").startswith("ein Kreis, 円\nNegative prompt: blue\nSteps: 2, Sampler: PLMS, ")
    assert texts == {
        "prompt": "ein Kreis, 円",
        "negative_prompt": "blue",
        "seed": "8",
        "steps": "2",
        "sampler": "plms",
        "eta": "0.0",
        "scale": "4.0",
        "size": "64x64",
        "rng": "per-image",
        "prompt_chunks": "1",
        "config": "tiny",
        "checkpoint": "tiny (embedded)",
        "attention": DEFAULT_ATTENTION if DEFAULT_ATTENTION != "original" else "original in fp32",
        "precision": "full",
        "compile": "none",
        "optimisations": "none",
        "device": "cpu",
        "torch": torch.__version__,
    }
    assert Image.open("outputs/txt2img-samples/grid-0000.png").text["sampler"] == "plms"


def test_numbering_continues_after_the_highest_and_overwrites_nothing(calls):
    folder = Path("out/samples")
    folder.mkdir(parents=True)
    (folder / "00007.png").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    Path("out/grid-0011.png").write_text("mine")
    for _ in range(2):
        assert run("--outdir", "out") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["00007.png", "00008.png", "00009.png", "notes.txt"]
    assert sorted(path.name for path in Path("out").glob("grid*")) == [f"grid-00{n}.png" for n in (11, 12, 13)]
    assert (folder / "00007.png").read_text() == Path("out/grid-0011.png").read_text() == "mine"


def test_skip_options_write_no_files(calls, capsys):
    assert run("--skip_save", "--outdir", "a") == 0
    assert [path.name for path in Path("a").iterdir()] == ["grid-0000.png"]
    assert run("--skip_grid", "--outdir", "b") == 0
    assert [path.name for path in Path("b").iterdir()] == ["samples"]
    assert run("--skip_grid", "--skip_save", "--outdir", "c") == 0
    assert not Path("c").exists()
    assert "1 image in" in capsys.readouterr().out


@pytest.mark.parametrize("argv, size", [([], (2, 2)), (["--n_rows", "3"], (3, 2)), (["--n_rows", "1"], (1, 4))])
def test_grid_contains_all_iterations(calls, argv, size):
    assert run("--n_samples", "2", "--n_iter", "2", *argv) == 0
    columns, rows = size
    assert Image.open("outputs/txt2img-samples/grid-0000.png").size == (columns * 66 + 2, rows * 66 + 2)


@pytest.mark.slow
def test_dropped_text_is_one_line_on_stderr(capsys):
    assert run("--prompt", "word " * 75 + "tail of it", "--n_iter", "2", "--skip_first") == 0
    err = capsys.readouterr().err
    assert err.count("warning: prompt of 78 tokens: the last 3 are not used: 'tail of it'") == err.count("warning") == 1
    assert "of it'; prompt_chunks auto uses all (--prompt-chunks auto)\n" in err


def test_random_seed_is_printed_and_saved(calls, capsys):
    seeds = []
    for _ in range(2):
        assert run("--seed", "-1", "--n_samples", "2") == 0
        seeds.append(int(re.search(r"--seed -1: the random seed (\d+)\n", capsys.readouterr().out)[1]))
    texts = [Image.open(path).text for path in sorted(Path("outputs/txt2img-samples/samples").iterdir())]
    assert [int(text["seed"]) for text in texts] == [seeds[0], seeds[0] + 1, seeds[1], seeds[1] + 1]
    assert f"Seed: {seeds[0]}, " in texts[0]["parameters"]
    assert seeds[0] != seeds[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"txt2img of sd-perf {__version__}, torch {torch.__version__}\n"


# --- noise and iterations


def test_image_k_uses_seed_plus_k_at_any_batch_size():
    assert run("--prompt", CAPTION, "--seed", "5", "--n_samples", "2", "--n_iter", "2", "--outdir", "a") == 0
    assert run("--prompt", CAPTION, "--seed", "8", "--outdir", "b") == 0
    images = samples("a")
    assert close(images[3], samples("b")[0])
    assert not close(images[0], images[1])
    assert not close(images[0], images[2])


def test_original_rng_continues_over_iterations():
    argv = ["--prompt", CAPTION, "--rng", "original", "--seed", "5", "--n_samples", "2", "--n_iter", "2"]
    assert run(*argv, "--outdir", "a") == 0
    model, noise = StableDiffusion.tiny(), OriginalNoise(5, "cpu")
    for n in range(2):
        expected = model.txt2img([CAPTION] * 2, steps=2, sampler="ddim", scale=4.0, rng=noise).images
        assert close(torch.stack(samples("a")[2 * n : 2 * n + 2]), expected)
    assert run(*argv, "--skip_first", "--outdir", "b") == 0  # the warm-up has a generator of its own
    assert all(torch.equal(a, b) for a, b in zip(samples("a"), samples("b")))


@pytest.mark.slow
@pytest.mark.parametrize("rng", ["per-image", "original"])
def test_fixed_code_starts_every_iteration_from_the_same_noise(rng):
    argv = ["--rng", rng, "--fixed_code", "--n_iter", "2"]
    assert run(*argv, "--outdir", "a") == 0
    first, second = samples("a")
    assert close(first, second)
    assert run(*argv, "--ddim_eta", "1", "--outdir", "b") == 0  # the later noise still differs
    first, second = samples("b")
    assert not close(first, second)


def test_fixed_code_keeps_the_first_batch_and_reuses_no_noise():
    argv = ["--ddim_eta", "1", "--n_samples", "2"]
    assert run(*argv, "--outdir", "a") == 0
    assert run(*argv, "--fixed_code", "--outdir", "b") == 0
    assert all(close(a, b) for a, b in zip(samples("a"), samples("b")))


def test_prompts_from_a_file(calls):
    Path("prompts.txt").write_bytes("\ufeffone\r\nzwei\u2028ü\n".encode())  # as a Windows editor writes it
    argv = ["--from-file", "prompts.txt", "--repeat", "2", "--n_samples", "3", "--n_iter", "2", "--fixed_code"]
    assert run(*argv) == 0
    assert [call["prompts"] for call in calls] == [["one", "one", "zwei\u2028ü"], ["zwei\u2028ü"]] * 2
    assert [len(call["latents"]) for call in calls] == [3, 1] * 2
    texts = [Image.open(path).text for path in sorted(Path("outputs/txt2img-samples/samples").iterdir())]
    assert [text["prompt"] for text in texts] == ["one", "one", "zwei\u2028ü", "zwei\u2028ü"] * 2
    assert [int(text["seed"]) for text in texts] == list(range(42, 50))


def test_blank_lines_of_a_file_are_skipped(calls, capsys):
    Path("prompts.txt").write_text("one\n\n \t\ntwo\n\n")
    assert run("--from-file", "prompts.txt") == 0
    assert [call["prompts"] for call in calls] == [["one"], ["two"]]
    assert "warning: --from-file prompts.txt: blank lines are skipped: 2, 3, 5\n" in capsys.readouterr().err


def test_time_file_gets_one_line_per_run(calls):
    Path("t.txt").write_text("12.5\n")
    assert run("--time_file", "t.txt", "--n_iter", "2") == 0
    assert run("--time_file", "t.txt", "--skip_first") == 0
    assert len(calls) == 4
    lines = Path("t.txt").read_text().splitlines()
    assert lines[0] == "12.5"
    assert len(lines) == 3
    assert all(0 < float(line) < 60 for line in lines)
    assert len(samples()) == 3  # the warm-up is not saved


def test_time_covers_iterations_and_saving_but_not_the_warm_up(calls, monkeypatch, capsys):
    ticks = iter(range(10_000))
    monkeypatch.setattr("sd.cli.run.time.perf_counter", lambda: float(next(ticks)))
    assert run("--time_file", "t.txt", "--skip_first") == 0
    assert run("--time_file", "t.txt") == 0
    with_warm_up, without = Path("t.txt").read_text().split()
    assert with_warm_up == without  # the same number of clock ticks
    assert "warm-up 1.000" in capsys.readouterr().out


# --- options


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], {"steps": 2, "sampler": "ddim", "scale": 4.0, "eta": 0.0, "height": None, "width": None, "latents": None}),
        (["--steps", "5"], {"steps": 5}),
        (["--ddim_steps", "5"], {"steps": 5}),
        (["--plms"], {"sampler": "plms"}),
        (["--dpm"], {"sampler": "dpm_solver"}),
        (["--dpm_solver"], {"sampler": "dpm_solver"}),
        (["--sampler", "euler"], {"sampler": "euler", "timestep_spacing": None, "sigmas": "schedule"}),
        (["--sampler", "euler", "--timestep-spacing", "trailing"], {"timestep_spacing": "trailing"}),
        (["--sampler", "unipc", "--sigmas", "karras"], {"sampler": "unipc", "sigmas": "karras"}),
        (["--plms", "--sampler", "plms"], {"sampler": "plms"}),
        (["--ddim_eta", "0.5"], {"eta": 0.5}),
        (["--scale", "1"], {"scale": 1.0}),
        (["--H", "128", "--W", "64"], {"height": 128, "width": 64}),
        (["--C", "4", "--f", "8"], {}),
        (["--negative-prompt", "red"], {"negative_prompt": "red"}),
        (["--prompt", "x", "--n_samples", "2"], {"prompts": ["x", "x"], "prompt_chunks": 1}),
        (["--prompt-chunks", "2"], {"prompt_chunks": 2}),
        (["--prompt-chunks", "auto"], {"prompt_chunks": "auto"}),
    ],
)
def test_options_reach_the_model(calls, argv, expected):
    assert run(*argv) == 0
    assert {key: calls[0][key] for key in expected} == expected


def test_default_scale_matches_the_original_script():
    scales = {name: txt2img.default_scale(config) for name, config in PRESETS.items() if config.unet.in_channels == 4}
    assert scales == {"sd1": 7.5, "sd2": 9.0, "sd2-v": 9.0, "tiny": 4.0}
    assert txt2img.default_scale(replace(PRESETS["sd1"], name="mine")) == 7.5


@pytest.mark.slow
def test_config_without_checkpoint_may_be_tiny(calls, capsys):
    for config in ("tiny", str(CONFIGS / "tiny.yaml")):
        assert run("--config", config) == 0
        assert "\nno --ckpt" in capsys.readouterr().out


def test_packaged_yaml_replaces_a_missing_published_path(checkpoints, capsys):
    argv = ["--config", "configs/stable-diffusion/tiny.yaml", "--ckpt", str(checkpoints / "model.ckpt")]
    assert run(*argv) == 0
    _, first, *rest = capsys.readouterr().out.splitlines()
    assert first == "no file configs/stable-diffusion/tiny.yaml: using the packaged tiny.yaml"
    assert any("checkpoint model.ckpt" in line for line in rest)


def test_config_is_detected_from_the_weights(checkpoints, capsys):
    assert run("--ckpt", str(checkpoints / "model.ckpt")) == 0
    assert "model.ckpt is tiny" in capsys.readouterr().out
