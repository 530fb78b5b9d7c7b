"""The embedded model follows its prompts, and the shape recogniser is accurate."""

from __future__ import annotations

import random

import pytest
import torch

from sd import Optimisations, StableDiffusion
from sd.choices import EMBEDDED_WEIGHTS
from sd.features import computes_slowly
from sd.tiny import train, train_inpaint
from sd.tiny.shapes import HELD_OUT, SUBJECTS, TRAINED, Subject, draw, recognise

SCALE, STEPS = 4.0, 25


def _as_images(pixels):
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.slow
def test_recogniser_reads_drawn_images():
    subjects = SUBJECTS[::7]
    images = _as_images(draw(subjects, torch.Generator().manual_seed(0)))
    assert [recognise(image) for image in images] == list(subjects)


def test_recogniser_reads_the_colours_of_altered_images():
    image = _as_images(draw([Subject("red", "circle", "blue")]))[0]
    assert recognise(image) == Subject("red", "circle", "blue")
    assert recognise(image.flip(-1)) == Subject("blue", "circle", "red")  # red and blue exchanged
    assert recognise(torch.full_like(image, 245)) is None  # all white


def test_held_out_subjects_were_not_trained_on():
    assert not set(HELD_OUT) & set(TRAINED)
    assert len(HELD_OUT) + len(TRAINED) == len(SUBJECTS) == 8 * 6 * 7


def test_weights_are_at_most_8_mb():
    assert EMBEDDED_WEIGHTS.stat().st_size <= 8_000_000


@pytest.mark.parametrize(
    "optimisations",
    [
        pytest.param(Optimisations(), marks=pytest.mark.slow),
        pytest.param(
            Optimisations(precision="bf16"),
            marks=[
                pytest.mark.nightly,
                pytest.mark.skipif(computes_slowly(torch.bfloat16), reason="this processor emulates bf16"),
            ],
        ),
    ],
    ids=["full", "bf16"],
)
def test_follows_its_prompts(optimisations):
    """100 fixed prompts and seeds, a third of them combinations held out from training."""
    generator = random.Random(0)
    subjects = [*HELD_OUT, *generator.sample(TRAINED, 100 - len(HELD_OUT))]
    model = StableDiffusion.tiny()
    model.optimise(optimisations)
    images = model.txt2img([s.caption() for s in subjects], steps=STEPS, sampler="ddim", scale=SCALE, seed=1000).images
    recognised = [recognise(image) for image in images]
    correct = {
        attribute: sum(
            s is not None and getattr(s, attribute) == getattr(t, attribute) for s, t in zip(recognised, subjects)
        )
        for attribute in ("background", "colour", "shape")
    }
    assert correct["background"] >= 95, correct
    assert correct["colour"] >= 95, correct
    assert correct["shape"] >= 85, correct


def test_negative_prompt_and_unknown_words():
    model = StableDiffusion.tiny()
    plain = model.txt2img("a red star on a blue background", steps=5, sampler="ddim", seed=3).images
    negative = model.txt2img(
        "a red star on a blue background",
        steps=5,
        sampler="ddim",
        seed=3,
        negative_prompt="a green ring on a white background",
    ).images
    assert not torch.equal(plain, negative)
    assert model.txt2img("A photo", steps=5, sampler="ddim", seed=3).images.float().std() > 5


@pytest.fixture
def few_subjects(monkeypatch):
    """Three subjects with two images each, and no images to judge the result by."""
    for module in (train, train_inpaint):
        monkeypatch.setattr(module, "TRAINED", TRAINED[:3])
    monkeypatch.setattr(train, "LATENT_BANK", 2)
    monkeypatch.setattr(train_inpaint, "BANK", 2)
    monkeypatch.setattr(train, "score", lambda *_, **__: "not judged")
    monkeypatch.setattr(train_inpaint, "score", lambda *_: 0)


@pytest.mark.slow
def test_the_stages_of_its_training_run_and_resume(few_subjects, tmp_path, capsys):
    steps = ("--autoencoder-steps", "2", "--text-steps", "2", "--unet-steps", "2")
    output = ("--work", str(tmp_path), "--output", str(tmp_path / "model.safetensors"))
    train.main([*output, *steps])
    first = capsys.readouterr().out
    assert all(f"{stage} 2/2 loss" in first for stage in ("autoencoder", "text", "unet"))
    made = StableDiffusion.from_checkpoint(tmp_path / "model.safetensors", "tiny").state_dict()
    train.main([*output, *steps])
    assert "loss" not in capsys.readouterr().out
    again = StableDiffusion.from_checkpoint(tmp_path / "model.safetensors", "tiny").state_dict()
    assert all(torch.equal(weight, made[name]) for name, weight in again.items())


def test_the_inpainting_model_is_tuned_from_it(few_subjects, tmp_path, capsys):
    unet = train_inpaint.train(tmp_path, 2)
    assert "unet-inpaint 2/2 loss" in capsys.readouterr().out
    first = unet.input_blocks[0][0].weight
    assert first.shape[1] == 9 and first[:, 4:].abs().max() > 0  # the new channels are trained
