"""The img2img command: reading the image, options and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sd import img2img
from sd.cli.input_images import read_image
from sd.config.presets import PRESETS
from sd.errors import ConfigError, SDWarning
from sd.pipeline import Result, StableDiffusion
from sd.sampling.noise import OriginalNoise

CAPTION = "a green square on a white background"
OUT = Path("outputs/img2img-samples")


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.delenv("USE_XFORMERS", raising=False)
    monkeypatch.delenv("ATTN_PRECISION", raising=False)
    monkeypatch.chdir(tmp_path)
    gradient = torch.linspace(20, 230, 130).to(torch.uint8)[None, :, None].repeat(70, 1, 3)
    Image.frombytes("RGB", (130, 70), bytes(gradient.flatten().tolist())).save("init.png")


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call of StableDiffusion.img2img, replaced by a constant image."""
    recorded = []

    def record(self, prompts, image, **arguments):
        recorded.append({"prompts": prompts, "image": image, **arguments})
        images = torch.full((len(prompts), *image.shape[1:], 3), 99, dtype=torch.uint8)
        return Result(images, torch.zeros(len(prompts), 4, 8, 8), {"encode": 1.0, "unet": 2.0}, 1, 0)

    monkeypatch.setattr(StableDiffusion, "img2img", record)
    return recorded


def run(*argv) -> int:
    return img2img.main(["--device", "cpu", "--steps", "4", "--init-img", "init.png", *argv])


def read_png(path) -> torch.Tensor:
    image = Image.open(path)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


def test_images_seeds_and_png_text(capsys):
    assert run("--prompt", CAPTION, "--n_samples", "2", "--seed", "3") == 0
    out = capsys.readouterr().out
    assert out.startswith("CPU threads: ")
    assert out.splitlines()[1].startswith("no --ckpt: using the embedded tiny model")
    assert "encode" in out
    paths = sorted((OUT / "samples").iterdir())
    assert [path.name for path in paths] == ["00000.png", "00001.png"]
    assert (OUT / "grid-0000.png").exists()
    model, image = StableDiffusion.tiny(), read_image("init.png")
    expected = model.img2img(CAPTION, image, strength=0.8, steps=4, scale=4.0, seed=3, batch=2).images
    for path, image in zip(paths, expected):
        assert (read_png(path).int() - image.int()).abs().max() <= 1
    texts = Image.open(paths[1]).text
    assert {key: texts[key] for key in ("init_img", "strength", "seed", "size", "sampler", "scale", "config")} == {
        "init_img": "init.png",
        "strength": "0.8",
        "seed": "4",
        "size": "128x64",
        "sampler": "ddim",
        "scale": "4.0",
        "config": "tiny",
    }


def test_original_rng_and_warm_up():
    assert run("--rng", "original", "--seed", "3", "--n_iter", "2", "--skip_first", "--time_file", "t.txt") == 0
    model, noise, image = StableDiffusion.tiny(), OriginalNoise(3, "cpu"), read_image("init.png")
    assert float(Path("t.txt").read_text()) > 0
    for path in sorted((OUT / "samples").iterdir()):
        prompt = Image.open(path).text["prompt"]
        expected = model.img2img(prompt, image, strength=0.8, steps=4, scale=4.0, rng=noise).images[0]
        assert (read_png(path).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], {"strength": 0.8, "steps": 4, "scale": 4.0, "eta": 0.0, "negative_prompt": ""}),
        (["--strength", "0.3"], {"strength": 0.3}),
        (["--strength", "1"], {"strength": 1.0}),
        (["--ddim_steps", "8"], {"steps": 8}),
        (["--scale", "2", "--ddim_eta", "1"], {"scale": 2.0, "eta": 1.0}),
        (["--negative-prompt", "red", "--C", "4", "--f", "8"], {"negative_prompt": "red"}),
        (["--prompt", "x", "--n_samples", "2"], {"prompts": ["x", "x"]}),
        (["--sampler", "ddim"], {"sampler": "ddim", "timestep_spacing": None, "sigmas": "schedule"}),
        (["--plms"], {"sampler": "plms"}),
        (["--sampler", "heun", "--sigmas", "karras"], {"sampler": "heun", "sigmas": "karras"}),
        (["--sampler", "euler", "--timestep-spacing", "trailing"], {"timestep_spacing": "trailing"}),
    ],
)
def test_options_reach_the_model(calls, argv, expected):
    assert run(*argv) == 0
    assert {key: calls[0][key] for key in expected} == expected


def test_prompts_from_a_file(calls):
    Path("prompts.txt").write_text("one\ntwo\nthree\n")
    assert run("--from-file", "prompts.txt", "--n_samples", "2") == 0
    assert [call["prompts"] for call in calls] == [["one", "two"], ["three"]]


def test_defaults_match_the_original_script():
    defaults = {
        name: img2img.default_strength_and_scale(config)
        for name, config in PRESETS.items()
        if config.unet.in_channels == config.unet.out_channels
    }
    assert defaults == {"sd1": (0.75, 5.0), "sd2": (0.8, 9.0), "sd2-v": (0.8, 9.0), "tiny": (0.8, 4.0)}


def test_image_is_read_like_the_original_script():
    image = read_image("init.png")
    assert image.shape == (3, 64, 128)
    assert image.dtype == torch.float32
    expected = Image.open("init.png").resize((128, 64), Image.Resampling.LANCZOS)
    pixels = torch.tensor(list(expected.tobytes())).reshape(64, 128, 3).permute(2, 0, 1)
    assert torch.allclose(image, pixels / 127.5 - 1, atol=1e-6)


@pytest.mark.filterwarnings("ignore::sd.SDWarning")
@pytest.mark.parametrize("mode, colour", [("L", 255), ("RGBA", (255, 255, 255, 0)), ("P", 0)])
def test_other_modes_are_converted_to_rgb(mode, colour):
    Image.new(mode, (64, 64), colour).save("other.png")
    image = read_image("other.png")
    assert image.shape == (3, 64, 64)
    assert image.abs().max() <= 1


def test_out_of_memory_advice_names_own_options(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(StableDiffusion, "img2img", fail)
    assert run() == 2
    advice = capsys.readouterr().err.partition("error: out of memory")[2]
    assert advice.endswith("use a smaller --n_samples, a smaller --init-img, or --precision bf16\n")


def test_opaque_images_are_not_reported(recwarn):
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save("opaque.png")
    read_image("opaque.png")
    assert not [warning for warning in recwarn if warning.category is SDWarning]


def test_changed_images_are_reported_in_one_line(calls, capsys):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save("clear.png")
    assert run("--init-img", "clear.png") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["warning: initial image: its transparent pixels are composited on white"]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise for display
    source = Image.new("RGB", (128, 64), "black")
    source.paste("white", (0, 0, 64, 64))  # the left half, which is displayed at the top
    source.save("turned.png", exif=exif)
    with pytest.warns(SDWarning, match="its EXIF orientation, 6, is applied"):
        image = read_image("turned.png")
    assert image.shape == (3, 128, 64)
    assert image[:, :60].min() == 1 and image[:, 68:].max() == -1


def test_transparent_pixels_are_composited_on_white():
    source = Image.new("RGBA", (128, 64), (255, 0, 0, 255))
    source.paste((0, 0, 0, 0), (0, 0, 64, 64))
    source.save("transparent.png")
    with pytest.warns(SDWarning, match="transparent pixels are composited on white"):
        image = read_image("transparent.png")
    assert image[:, :, :60].min() == 1
    assert image[:, 0, -1].tolist() == [1, -1, -1]
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save("palette.png", transparency=0)
    with pytest.warns(SDWarning, match="transparent pixels"):
        assert read_image("palette.png").min() == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.png", "cannot be read as an image"),
        ("text.png", "cannot be read as an image"),
        ("half.png", "cannot be read as an image"),
        ("small.png", "fewer than 64 pixels a side"),
        ("large.png", "more than 67108864 pixels"),
        ("deep.png", "more than 8 bits a channel"),
        ("float.tiff", "more than 8 bits a channel"),
        (".", "cannot be read as an image"),
    ],
)
def test_unreadable_images_are_named(name, message):
    Path("text.png").write_text("no image")
    Path("half.png").write_bytes(Path("init.png").read_bytes()[:-60])
    Image.new("RGB", (640, 63)).save("small.png")
    Image.new("1", (8193, 8192)).save("large.png")
    Image.new("I;16", (64, 64), 65535).save("deep.png")
    Image.new("F", (64, 64), 0.5).save("float.tiff")
    with pytest.raises(ConfigError, match=message) as error:
        read_image(name)
    assert f"--init-img {name}: " in str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--plms", "--dpm"], "--sampler: plms and dpm_solver contradict each other"),
        (["--fixed_code"], "--fixed_code: img2img starts from the image"),
        (["--torchscript"], "--torchscript: not supported: use --compile"),
        (["--steps", "3"], "3 steps cannot be spread"),
        (["--ddim_eta", "5"], "eta 5 is too large"),
        (["--C", "3"], "--C 3 contradicts"),
        (["--init-img", "missing.png"], "--init-img missing.png: cannot be read"),
        (["--config", "sd1"], "--config sd1 needs its checkpoint"),
    ],
)
def test_refusals_print_one_line_and_write_nothing(capsys, argv, message):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not OUT.exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sampler", "lms"], "--sampler"),
        (["--H", "64"], "--H"),
        (["--strength", "1.5"], "--strength: 1.5: must be in [0, 1]"),
        (["--strength", "nan"], "--strength: nan: must be in [0, 1]"),
    ],
)
def test_unsupported_options_are_usage_errors(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_image_is_required():
    with pytest.raises(SystemExit):
        img2img.main([])
