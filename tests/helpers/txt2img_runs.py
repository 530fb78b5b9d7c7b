"""Runs of the txt2img command in an empty folder, and the images that they save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sd import txt2img
from sd.checkpoint import layouts
from sd.config.yaml_reader import CONFIGS
from sd.pipeline import Result, StableDiffusion

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--steps", "2"]
CAPTION = "a green square on a white background"


@pytest.fixture(name="_clean", autouse=True)
def clean_fixture(monkeypatch, tmp_path):
    monkeypatch.delenv("USE_XFORMERS", raising=False)
    monkeypatch.delenv("ATTN_PRECISION", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="calls")
def calls_fixture(monkeypatch):
    """Arguments of every call of StableDiffusion.txt2img, replaced by a constant image."""
    recorded = []

    def record(self, prompts, **arguments):
        recorded.append({"prompts": prompts, "model": self, **arguments})
        arguments["progress"](1, 1)
        images = torch.full((len(prompts), 64, 64, 3), 99, dtype=torch.uint8)
        return Result(images, torch.zeros(len(prompts), 4, 8, 8), {"text": 1.0, "unet": 2.0, "vae": 3.0}, 1, 0)

    monkeypatch.setattr(StableDiffusion, "txt2img", record)
    return recorded


@pytest.fixture(name="checkpoints", scope="module")
def checkpoints_fixture(tmp_path_factory):
    """The folder of the published experiment, two YAML files and two checkpoints, with the tiny model."""
    folder = tmp_path_factory.mktemp("published")
    model = StableDiffusion.tiny()
    networks = {"unet": model.unet, "autoencoder": model.autoencoder, "text_encoder": model.text_encoder}
    state = layouts.join_networks({name: network.state_dict() for name, network in networks.items()}, "openclip")
    torch.save({"state_dict": state}, folder / "model.ckpt")
    torch.save({"state_dict": layouts.original_to_native(state)}, folder / "model_native_mha.ckpt")
    configs = folder / "configs" / "stable-diffusion"
    configs.mkdir(parents=True)
    text = (CONFIGS / "tiny.yaml").read_text()
    (configs / "v2-inference.yaml").write_text(text)
    native = text.replace("use_checkpoint: False", "use_native_mha: True")
    (configs / "v2-inference_native_mha.yaml").write_text(native)
    return folder


def run(*argv) -> int:
    return txt2img.main([*QUICK, *argv])


def read_png(path) -> torch.Tensor:
    image = Image.open(path)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


def samples(outdir="outputs/txt2img-samples") -> list[torch.Tensor]:
    return [read_png(path) for path in sorted(Path(outdir, "samples").glob("*.png"))]


def close(a, b) -> bool:
    return (a.int() - b.int()).abs().max() <= 1
