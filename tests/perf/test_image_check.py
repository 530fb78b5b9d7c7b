"""Image checks: bounds, suspicious outputs, and names and content of reference images."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from perf.configurations.configuration import Configuration
from perf.session.image_check import BOUNDS, computing_type, image_failure, repeated_output
from perf.session.references import image_seeds, reference_path
from perf.worker import images
from perf.worker.engines.interface import Output

RIGHT = {"sha256": "0", "finite": True, "constant": False, "latent_relative_error": 1e-6, "psnr_db": 90.0}


def output(batch: int = 1, seed: int = 0, with_images: bool = True):
    """Latents and images of noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((batch, 4, 8, 8), generator=generator)
    drawn = torch.randint(0, 256, (batch, 16, 16, 3), generator=generator).to(torch.uint8)
    return Output(latents, drawn if with_images else None, {}, 0)


@pytest.fixture
def references(tmp_path):
    """(output of three images, their references)"""
    made, paths = output(3), [str(tmp_path / f"{i}.npz") for i in range(3)]
    for i, path in enumerate(paths):
        images.write(Output(made.latents[i : i + 1], made.images[i : i + 1], {}, 0), path)
    return made, paths


def test_reference_round_trip(references, tmp_path):
    made, paths = references
    found = images.examine(made, paths)
    assert (found["latent_relative_error"], found["psnr_db"]) == (0.0, images.IDENTICAL_DB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "1.npz", "2.npz"]  # nothing else is left
    assert images.examine(made, None)["latent_relative_error"] is None


def test_the_worst_image_counts(references):
    made, paths = references
    made.latents[1] *= 1.25
    made.images[2, 0, 0, 0] = made.images[2, 0, 0, 0] ^ 128
    found = images.examine(made, paths)
    assert found["latent_relative_error"] == pytest.approx(0.25, rel=1e-5)
    assert found["psnr_db"] == pytest.approx(10 * math.log10(255**2 / (128**2 / (16 * 16 * 3))))
    assert images.examine(made, paths[::-1])["latent_relative_error"] > 1


def test_hash_is_of_the_images_or_else_the_latents():
    made = output()
    before = images.examine(made, None)["sha256"]
    made.latents[0, 0, 0, 0] += 1
    assert images.examine(made, None)["sha256"] == before
    made.images[0, 0, 0, 0] = made.images[0, 0, 0, 0] ^ 1
    assert images.examine(made, None)["sha256"] != before
    stage = output(with_images=False)
    before = images.examine(stage, None)["sha256"]
    stage.latents[0, 0, 0, 0] += 1
    assert images.examine(stage, None)["sha256"] != before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("image", [0, 2])
def test_one_non_finite_number_is_detected_in_any_image(references, value, image):
    made, paths = references
    made.latents[image, 3, 7, 7] = value
    found = images.examine(made, paths)
    assert not found["finite"]
    assert all(not isinstance(one, float) or math.isfinite(one) for one in found.values())  # JSON has no other
    assert image_failure(found, "full", "cpu").startswith("not_finite: ")


def test_large_finite_latents_are_compared(references):
    """Their squares overflow in fp32."""
    made, paths = references
    made.latents[0] = 1e30
    found = images.examine(made, paths)
    assert found["finite"] and image_failure(found, "full", "cpu").startswith("latents: relative error")


@pytest.mark.parametrize("image", [0, 2])
def test_a_constant_image_is_detected_at_any_position(references, image):
    made, paths = references
    made.images[image] = 77
    found = images.examine(made, paths)
    assert found["constant"] and image_failure(found, "full", "cpu").startswith("constant: ")
    stage = output(3, with_images=False)
    stage.latents[image] = 0.5
    assert images.examine(stage, None)["constant"]


def test_reference_of_a_stage_has_no_image(tmp_path):
    stage, path = output(with_images=False), str(tmp_path / "stage.npz")
    images.write(stage, path)
    found = images.examine(stage, [path])
    assert (found["latent_relative_error"], found["psnr_db"]) == (0.0, None)
    assert image_failure(found, "full", "cpu") is None


def test_a_damaged_reference_is_named_with_the_remedy(references):
    """300 times: no other error, and no wrong number."""
    made, paths = references
    content = Path(paths[0]).read_bytes()
    named = 0
    for seed in range(300):
        draw, damaged = random.Random(seed), bytearray(content)
        if seed % 3 == 0:
            damaged = damaged[: draw.randrange(len(damaged))]
        else:
            for _ in range(draw.choice([1, 20, 300])):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        Path(paths[0]).write_bytes(damaged)
        try:
            found = images.examine(made, paths)
        except ValueError as error:
            named += 1
            assert str(error).startswith(f"{paths[0]} is not a reference image ("), f"seed {seed}: {error}"
            assert str(error).endswith("): delete it, and it is made again"), f"seed {seed}: {error}"
        else:  # in bytes that nothing reads
            assert (found["latent_relative_error"], found["psnr_db"]) == (0.0, images.IDENTICAL_DB), f"seed {seed}"
    assert named > 200
    with pytest.raises(ValueError, match=r"missing.npz is not a reference image .*No such file"):
        images.examine(made, ["missing.npz"] * 3)


def test_reference_is_written_atomically(references, tmp_path, monkeypatch):
    made, paths = references
    before = Path(paths[0]).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    import numpy

    monkeypatch.setattr(numpy, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        images.write(made, paths[0])
    assert Path(paths[0]).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


# --- rules


@pytest.mark.parametrize(
    "precision, device, computing",
    [
        ("full", "cpu", "fp32"),
        ("full", "cuda", "fp32"),
        ("autocast", "cpu", "bf16"),
        ("autocast", "cuda", "fp16"),
        ("fp16", "cpu", "fp16"),
        ("bf16", "cuda", "bf16"),
    ],
)
def test_bounds_follow_the_computing_dtype(precision, device, computing):
    assert computing_type(precision, device) == computing
    bounds = BOUNDS[computing]

    def judged(error: float, psnr: float | None) -> str | None:
        failure = image_failure({**RIGHT, "latent_relative_error": error, "psnr_db": psnr}, precision, device)
        return failure and failure.partition(":")[0]

    assert judged(bounds.latent_relative_error, bounds.psnr_db) is None
    assert judged(1.001 * bounds.latent_relative_error, bounds.psnr_db) == "latents"
    assert judged(bounds.latent_relative_error, bounds.psnr_db - 0.001) == "image"
    assert judged(bounds.latent_relative_error, None) is None
    assert judged(0.0, 100.0) == (None if computing == "fp32" else "suspiciously_equal")


def test_an_engine_of_the_users_own_may_equal_its_reference():
    """It may return a text, or run the same code in another way."""
    equal = {**RIGHT, "latent_relative_error": 0.0, "psnr_db": None}
    assert image_failure(equal, "bf16", "cpu", own=True) is None
    assert image_failure({**equal, "latent_relative_error": 0.3}, "bf16", "cpu", own=True).startswith("latents")


def test_bounds_are_wider_for_fewer_bits():
    assert (
        BOUNDS["fp32"].latent_relative_error
        < BOUNDS["fp16"].latent_relative_error
        < BOUNDS["bf16"].latent_relative_error
    )
    assert BOUNDS["fp32"].psnr_db > BOUNDS["fp16"].psnr_db > BOUNDS["bf16"].psnr_db


@pytest.mark.parametrize("precision", ["full", "fp16", "bf16"])
def test_approximate_images_have_their_own_bounds(precision):
    def judged(error: float) -> str:
        failure = image_failure(
            {**RIGHT, "latent_relative_error": error, "psnr_db": 5.0}, precision, "cpu", approximate=True
        )
        return str(failure).partition(":")[0]

    assert [judged(error) for error in (0.0, 9e-5, 0.02, 1.2, 1.5)] == [
        *("suspiciously_equal", "suspiciously_equal", "None", "None", "latents")
    ]
    assert image_failure({**RIGHT, "constant": True}, precision, "cpu", approximate=True).startswith("constant")


def test_without_a_reference_only_absolute_checks_apply():
    alone = {**RIGHT, "latent_relative_error": None, "psnr_db": None}
    assert image_failure(alone, "fp16", "cuda") is None
    assert image_failure({**alone, "finite": False}, "fp16", "cuda").startswith("not_finite")


def test_the_same_output_twice_is_suspicious():
    assert repeated_output([]) is None and repeated_output(["a"]) is None and repeated_output(["a", "b", "c"]) is None
    assert repeated_output(["a", "b", "a"]).startswith("repeated_output: ")


# --- names

TINY_WEIGHTS = {"kind": "tiny", "sha256": "1" * 64}
FILE = {"kind": "file", "sha256": "2" * 64}
RANDOM = {"kind": "random", "sha256": None}
ORIGIN = {"device": "cpu fake", "torch": "2.0"}
# Other values of what pixels depend on, and of what they do not: the same picture by another way.
MATTERS = {
    "model": "sd1", "workload": "unet", "steps": 7, "sampler": "ddim", "scale": 3.0, "height": 64, "width": 64,
    "prompt": "Another", "device": "cpu", "lora_rank": 4, "timestep_spacing": "trailing", "sigmas": "karras",
}  # fmt: skip
DOES_NOT = {
    "engine": "diffusers", "attention": "mha", "sdpa_kernels": ("math",), "compile": "default", "compile_scope": "blocks",
    "precision": "bf16", "optimise": "fast", "batch": 4, "interpreter": "torch112",
    "checkpointing": True, "compile_backend": "openvino",
}  # fmt: skip
BY_HASH = {"checkpoint": "elsewhere/model.ckpt", "config": "other.yaml"}  # their content is in the weights' hash
IS_THE_SEED = {"seed"}  # of the configuration: replaced by the image's own


def name(configuration: Configuration, seed: int = 1, weights=TINY_WEIGHTS, origin=ORIGIN) -> str:
    return reference_path(Path("folder"), configuration, seed, weights, origin).name


def test_every_field_is_accounted_for():
    assert {field.name for field in fields(Configuration)} == {*MATTERS, *DOES_NOT, *BY_HASH, *IS_THE_SEED}


@pytest.mark.parametrize("field", [*MATTERS, *DOES_NOT])
def test_reference_name_depends_on_pixel_inputs_only(field):
    """50 random configurations per field, each changed in that field only."""
    changes = {**MATTERS, **DOES_NOT}
    compiled = {"compile": "default"}
    needed = {"compile_scope": compiled, "compile_backend": compiled, "sdpa_kernels": {"attention": "mha"}}
    for seed in range(50):
        draw = random.Random(seed)
        others = [one for one in changes if one != field and draw.random() < 0.5]
        start = replace(Configuration(), **{**{one: changes[one] for one in others}, **needed.get(field, {})})
        changed = replace(start, **{field: changes[field]})
        assert (name(start) != name(changed)) == (field in MATTERS), f"seed {seed}"


def test_reference_name_depends_on_weights_and_seed_and_the_origin_of_random_ones():
    usual = Configuration()
    assert len({name(usual, seed, weights) for seed in (1, 2) for weights in (TINY_WEIGHTS, FILE, RANDOM)}) == 6
    assert name(usual, origin={}) == name(usual)
    assert name(usual, weights=RANDOM, origin={**ORIGIN, "torch": "2.1"}) != name(usual, weights=RANDOM)
    assert name(usual, weights=RANDOM, origin={**ORIGIN, "device": "cuda"}) != name(usual, weights=RANDOM)
    assert name(usual, weights=RANDOM, origin={**ORIGIN, "other": 1}) == name(usual, weights=RANDOM)


def test_reference_name_ignores_the_path_of_weights():
    here, there = (Configuration(checkpoint=path) for path in ("a/model.ckpt", "b/other.ckpt"))
    assert name(here, weights=FILE) == name(there, weights=FILE)


def test_image_i_of_a_batch_has_its_own_seed():
    assert image_seeds(Configuration(batch=3), 1001) == [1001, 1002, 1003]
    assert name(Configuration(batch=3), 2) == name(Configuration(batch=1), 2)
