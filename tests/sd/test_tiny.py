"""The embedded model follows its prompts, and the shape recogniser is accurate."""

from __future__ import annotations

import random

import pytest
import torch

from sd import StableDiffusion
from sd.choices import EMBEDDED_WEIGHTS
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


@pytest.mark.slow
def test_follows_its_prompts():
    """100 fixed prompts and seeds, a third of them combinations held out from training."""
    generator = random.Random(0)
    subjects = [*HELD_OUT, *generator.sample(TRAINED, 100 - len(HELD_OUT))]
    model = StableDiffusion.tiny()
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
