"""Inpainting: against txt2img and diffusers, masks, draws, loading, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import original, small
from models import SMALL, each_kind_of_optimisation, widened
from PIL import Image
from safetensors.torch import save_file

from sd import CheckpointError, ConfigError, Optimisations, StableDiffusion, inpaint
from sd.checkpoint import diffusers_folder
from sd.checkpoint.load import load
from sd.checkpoint.networks import expected_shapes
from sd.choices import EMBEDDED_INPAINTING, EMBEDDED_WEIGHTS
from sd.config.presets import PRESETS, ModelConfig
from sd.errors import SDWarning
from sd.images import image_with_mask, latent_mask, mask_tensor
from sd.optimise import cuda_graphs
from sd.pipeline import Result
from sd.sampling.noise import OriginalNoise, PerImageNoise
from sd.sampling.samplers import SAMPLERS
from sd.tiny.train_inpaint import score

CAPTION = "a green star on a blue background"
OUT = Path("outputs/inpaint-samples")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    x = torch.linspace(-1, 1, 64)
    return torch.stack([x.expand(64, 64), x[:, None].expand(64, 64), torch.full((64, 64), 0.3)])


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    mask = torch.zeros(64, 64)
    mask[8:48, 16:64] = 1
    return mask


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion.tiny()


class OwnPosterior(PerImageNoise):
    """Noise whose draws for the posterior leave those of the steps as they are."""

    def posterior(self, shape, device):
        return PerImageNoise(99, shape[0]).initial(shape, device)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_input_planes_equal_txt2img_bit_for_bit(tiny, image, mask, sampler):
    options = {"steps": 5, "sampler": sampler, "scale": 4.0, "batch": 2}
    painted = widened(tiny, tiny.config.as_inpainting()).inpaint(
        CAPTION, image, mask, rng=OwnPosterior(3, 2), **options
    )
    expected = tiny.txt2img(CAPTION, rng=PerImageNoise(3, 2), **options)
    assert torch.equal(painted.latents, expected.latents)
    assert torch.equal(painted.images, expected.images)
    assert set(painted.seconds) == {"encode", "text", "unet", "vae"}


@pytest.fixture(scope="module")
def random_inpainting() -> StableDiffusion:
    return StableDiffusion.random("tiny-inpaint")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inpainting", "text-to-image"])
@each_kind_of_optimisation
def test_optimisations_change_nothing(request, image, mask, kind, changes):
    model = request.getfixturevalue("random_inpainting" if kind == "inpainting" else "tiny")
    options = {"steps": 2, "eta": 0.5}
    expected = model.inpaint(CAPTION, image, mask, **options).latents
    model.optimise(Optimisations(**changes))
    try:
        actual = model.inpaint(CAPTION, image, mask, **options).latents
    finally:
        model.optimise(Optimisations())
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", ["inpainting", "text-to-image"])
def test_a_recorded_loop_takes_condition_and_blend_as_arguments(monkeypatch, request, image, mask, kind):
    """With calls in place of recordings: a tensor of the first call must not be part of the recorded loop."""
    monkeypatch.setattr(cuda_graphs, "Graphed", lambda function, network: function)
    model = request.getfixturevalue("random_inpainting" if kind == "inpainting" else "tiny")
    calls, loop = model._calls, cuda_graphs.GraphedLoop(model.unet)
    for shown in (image, -image):
        expected = model.inpaint(CAPTION, shown, mask, steps=2).latents
        monkeypatch.setattr(model, "_calls", replace(calls, sample=loop))
        assert torch.equal(model.inpaint(CAPTION, shown, mask, steps=2).latents, expected)
        monkeypatch.setattr(model, "_calls", calls)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["inpainting", "text-to-image"])
@pytest.mark.parametrize("cuda_graph", ["unet", "networks", "loop"])
def test_cuda_graphs(image, mask, kind, cuda_graph):
    model = StableDiffusion.tiny("cuda", inpainting=kind == "inpainting")
    for shown in (image, -image):
        model.optimise(Optimisations())
        expected = model.inpaint(CAPTION, shown, mask, steps=4).latents
        model.optimise(Optimisations(cuda_graph=cuda_graph))
        actual = model.inpaint(CAPTION, shown, mask, steps=4).latents
        assert (actual - expected).norm() < 1e-3 * expected.norm()


def test_the_mask_and_the_image_reach_the_unet(random_inpainting, image, mask):
    def run(image, mask):
        return random_inpainting.inpaint(CAPTION, image, mask, steps=2).latents

    expected = run(image, mask)
    hidden = image + mask  # differs under the mask only
    assert torch.equal(run(hidden, mask), expected)
    assert not torch.equal(run(-image, mask), expected)
    assert not torch.equal(run(image, torch.ones_like(mask)), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image_models_keep_the_rest_of_the_image(tiny, image, mask, sampler):
    result = tiny.inpaint(CAPTION, image, mask, steps=6, sampler=sampler, seed=4, batch=2)
    noise = PerImageNoise(4, 2).initial((2, 4, 8, 8), "cpu")  # of the posterior, drawn first
    encoded = tiny.encode(image[None], noise)
    cells = latent_mask(mask, 8, 8).expand(2, 4, 8, 8) == 0
    assert torch.allclose(result.latents[cells], encoded[cells], atol=1e-6)
    assert not torch.allclose(result.latents[~cells], encoded[~cells], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_full_and_empty_masks_of_a_text_to_image_model(tiny, image, sampler):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"steps": 5, "sampler": sampler, "latents": latents}
    full = tiny.inpaint(CAPTION, image, torch.ones(64, 64), rng=OwnPosterior(2, 1), **options)
    assert torch.equal(full.latents, tiny.txt2img(CAPTION, seed=2, **options).latents)
    empty = tiny.inpaint(CAPTION, image, torch.zeros(64, 64), seed=2, **options)
    assert torch.equal(empty.latents, tiny.encode(image[None], PerImageNoise(2, 1).posterior((1, 4, 8, 8), "cpu")))


@pytest.mark.parametrize("kind", ["inpainting", "text-to-image"])
def test_one_seed_reproduces_everything_at_any_batch_size(request, image, mask, kind):
    model = request.getfixturevalue("random_inpainting" if kind == "inpainting" else "tiny")
    options = {"steps": 4, "eta": 1.0, "strength": 0.75}
    pair = model.inpaint(CAPTION, image, mask, seed=5, batch=2, **options)
    torch.manual_seed(99)
    assert torch.equal(model.inpaint(CAPTION, image, mask, seed=5, batch=2, **options).latents, pair.latents)
    alone = model.inpaint(CAPTION, image, mask, seed=6, **options).latents[0]
    assert torch.allclose(alone, pair.latents[1], atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_runs_the_last_steps_from_the_noised_image(tiny, image, sampler):
    full, calls = torch.ones(64, 64), {"plms": 5, "heun": 7, "lcm": 8}.get(sampler, 4)
    assert tiny.inpaint(CAPTION, image, full, strength=0.5, steps=8, sampler=sampler).unet_calls == calls
    steps = 1 if sampler == "lcm" else 40  # all steps of lcm run, at lower timesteps
    near = tiny.inpaint(CAPTION, image, full, scale=1.0, strength=0.05, steps=steps, sampler=sampler).latents
    encoded = tiny.encode(image[None])
    assert (near - encoded).norm() < 0.5 * encoded.norm()


def test_original_draws(random_inpainting, image, mask):
    """x_T from NumPy's RandomState, the posterior from the CPU, then one draw a step, in this order."""
    seed, shape = 7, (2, 4, 8, 8)
    result = random_inpainting.inpaint(CAPTION, image, mask, steps=4, eta=1.0, seed=seed, batch=2, rng="original")
    start = torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float()
    generator = torch.Generator().manual_seed(seed)

    class Draws(PerImageNoise):
        def inpainting_initial(self, shape, device):
            return start

        def initial(self, shape, device):
            return torch.randn(shape, generator=generator)

    expected = random_inpainting.inpaint(CAPTION, image, mask, steps=4, eta=1.0, batch=2, rng=Draws(0, 2))
    assert torch.equal(result.latents, expected.latents)
    with pytest.raises(ConfigError, match="below 2\\*\\*32"):
        OriginalNoise(2**32, "cpu").inpainting_initial(shape)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
    "channels, options",
    # With 4 channels diffusers draws the noise of a masked image that it does not use, before that of the steps.
    [
        (9, {}),
        (9, {"strength": 0.5}),
        (9, {"eta": 1.0, "scale": 1.0}),
        (9, {"sampler": "euler_ancestral"}),
        (9, {"sampler": "dpm_solver_sde", "strength": 0.5}),
        (4, {}),
        (4, {"strength": 0.5}),
        (4, {"sampler": "euler", "strength": 0.5}),
        (4, {"sampler": "unipc"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", SMALL)
def test_diffusers_pipeline(kind, channels, options, image, mask):
    """Equal latents from one generator, which both draw from in the same order."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    from perf.worker.engines.diffusers import pipeline

    config = SMALL[kind].as_inpainting() if channels == 9 else SMALL[kind]
    model = StableDiffusion.random(config, seed=1)
    sampler = {"sampler": options.get("sampler", "ddim")}
    settings = diffusers_folder.scheduler_config(config, sampler["sampler"])
    if "sampler" in options:  # timesteps that diffusers does not round
        sampler["timestep_spacing"] = settings["timestep_spacing"] = "trailing"
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    peer = pipeline(model, scheduler, "inpaint")
    peer.set_progress_bar_config(disable=True)
    options = {"scale": 5.0, "eta": 0.0, "strength": 1.0, **options}
    scale, _ = options.pop("scale"), options.pop("sampler", None)
    expected = peer(
        CAPTION,
        image=(image[None] + 1) / 2,
        mask_image=mask[None, None],
        height=64,
        width=64,
        num_inference_steps=10,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **options,
    ).images
    generator = torch.Generator().manual_seed(3)
    options.update(sampler, scale=scale, generator=generator)
    actual = model.inpaint(CAPTION, image, mask, steps=10, **options).latents
    assert (actual - expected).norm() < 2e-4 * expected.norm()


# --- images and masks


def test_a_diagonal_mask_is_sampled_at_the_corner_of_each_cell():
    mask = torch.ones(64, 64).tril()
    cells = latent_mask(mask, 8, 8)[0, 0]
    assert torch.equal(cells, torch.ones(8, 8).tril())
    assert torch.equal(latent_mask(torch.ones(64, 64).tril(-1), 8, 8)[0, 0], torch.ones(8, 8).tril(-1))


def test_masks_are_binarised_at_half_and_resized_by_the_nearest_pixel():
    gradient = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8) * 2, (70, 1)))
    mask = mask_tensor(gradient)
    assert mask.shape == (64, 128)
    assert torch.equal(mask[5], (torch.arange(128) * 2 >= 127.5).float())
    transparent = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    transparent.paste((255, 255, 255, 255), (0, 0, 64, 32))
    with pytest.warns(SDWarning, match="^mask: its transparent pixels are composited on black$"):
        assert torch.equal(mask_tensor(transparent), torch.cat([torch.ones(32, 64), torch.zeros(32, 64)]))


def test_images_and_masks_of_all_types_agree(image, mask):
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pil = Image.fromarray(pixels), Image.fromarray((mask.numpy() * 255).astype(np.uint8))
    expected = image_with_mask(*pil)
    for other in (mask, mask.bool(), mask[None], mask * 0.6):
        assert torch.equal(image_with_mask(pil[0], other)[1], expected[1])
    assert torch.equal(image_with_mask(image, pil[1])[1], mask)
    assert torch.equal(image_with_mask(image, pil[1])[0], image)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(64, 128), "mask has 128x64 pixels and the image 64x64"),
        (Image.new("L", (64, 65)), "mask has 64x65 pixels and the image 64x64"),
        (torch.zeros(2, 64, 64), "must be float or bool"),
        (torch.zeros(64, 64, dtype=torch.uint8), "must be float or bool"),
        (torch.full((64, 64), 255.0), "values from 0 to 1"),
        (torch.full((64, 64), torch.nan), "values from 0 to 1"),
        (torch.eye(64).roll(1, 0) - torch.eye(64).roll(1, 0).tril(), "thinner than a latent cell"),
    ],
    ids=["wide", "tall", "channels", "uint8", "255", "nan", "thin"],
)
def test_invalid_masks_raise(tiny, image, mask, message):
    with pytest.raises(ConfigError, match=message):
        tiny.inpaint(CAPTION, image, mask, steps=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0.0}, "strength 0.0: must be above 0"),
        ({"strength": 1.1}, "strength 1.1: must be above 0"),
        ({"strength": 0.1, "steps": 5}, "less than 1 step"),
        ({"latents": torch.zeros(1, 9, 8, 8)}, "the shape must be"),
        ({"sampler": "plms", "eta": 1.0}, "plms: eta"),
    ],
    ids=str,
)
def test_invalid_options_raise(tiny, image, mask, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny.inpaint(CAPTION, image, mask, **options)


def test_other_tasks_refuse_an_inpainting_model(random_inpainting, image):
    for task, arguments in ((random_inpainting.txt2img, ()), (random_inpainting.img2img, (image,))):
        with pytest.raises(ConfigError, match="is an inpainting model: call inpaint"):
            task(CAPTION, *arguments, steps=2)


# --- checkpoints


@pytest.mark.parametrize("name, parameters", [("sd1-inpaint", 859_535_364), ("sd2-inpaint", 865_925_124)])
def test_presets_have_the_released_sizes(name, parameters):
    assert sum(shape.numel() for shape in expected_shapes(PRESETS[name])["unet"].values()) == parameters


def test_inpainting_checkpoints_are_detected(tmp_path):
    config = PRESETS["tiny"].as_inpainting()
    config = replace(config, text=replace(config.text, vocab_size=49408))
    save_file(original(config, released=False), str(tmp_path / "a.safetensors"))
    detected, networks = load(tmp_path / "a.safetensors")
    assert (detected.name, detected.unet.in_channels) == ("tiny-inpaint", 9)
    assert networks["unet"]["input_blocks.0.0.weight"].shape[1] == 9


@pytest.mark.parametrize("channels, expected", [(9, 4), (4, 9)])
def test_a_config_of_the_other_task_is_rejected(tmp_path, channels, expected):
    def config(inputs: int) -> ModelConfig:
        return small(in_channels=inputs)

    save_file(original(config(channels)), str(tmp_path / "a.safetensors"))
    assert load(tmp_path / "a.safetensors", config(channels))[0].inpainting is (channels == 9)
    with pytest.raises(
        CheckpointError, match=f"takes {channels} channels, not {expected}.*pass the config of this model"
    ):
        load(tmp_path / "a.safetensors", config(expected))


def test_diffusers_folders_of_inpainting_models(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_folder, "write_tokenizer", lambda folder, config: None)  # slow, and not compared
    config = replace(PRESETS["tiny"].as_inpainting(), parameterization="v")
    save_file(original(config, released=False), str(tmp_path / "a.safetensors"))
    networks = load(tmp_path / "a.safetensors", config)[1]
    diffusers_folder.write_folder(tmp_path / "folder", networks, config)
    assert "StableDiffusionInpaintPipeline" in (tmp_path / "folder/model_index.json").read_text()
    detected, again = load(tmp_path / "folder")
    assert (detected.name, detected.parameterization) == ("tiny-inpaint", "v")
    assert torch.equal(again["unet"]["input_blocks.0.0.weight"], networks["unet"]["input_blocks.0.0.weight"])


# --- the embedded model


def test_the_embedded_model_fills_a_hole_as_its_prompt_says():
    """`score` counts the shape and the colour, and the rest unchanged."""
    assert score(StableDiffusion.tiny(inpainting=True), 4) == 4


@pytest.mark.nightly
def test_the_embedded_model_is_right_in_90_of_100():
    assert score(StableDiffusion.tiny(inpainting=True), 100) >= 90


def test_the_embedded_weights_are_small():
    assert EMBEDDED_INPAINTING.stat().st_size < 9e6
    assert EMBEDDED_INPAINTING.stat().st_size + EMBEDDED_WEIGHTS.stat().st_size < 20e6


def test_an_empty_hole_is_not_counted_as_filled(image):
    """The score of a model that returns the image unchanged is 0."""

    class Unchanged:
        def inpaint(self, caption, image, mask, **options):
            images = ((image + 1) * 127.5).to(torch.uint8).permute(1, 2, 0)[None]
            return Result(images, torch.zeros(1, 4, 8, 8), {}, 0, 0)

    assert score(Unchanged(), 3) == 0


# --- the command


@pytest.fixture
def files(monkeypatch, tmp_path, image, mask):
    monkeypatch.delenv("USE_XFORMERS", raising=False)
    monkeypatch.delenv("ATTN_PRECISION", raising=False)
    monkeypatch.chdir(tmp_path)
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save("init.png")
    Image.fromarray((mask.numpy() * 255).astype(np.uint8)).save("mask.png")
    Image.new("L", (128, 64)).save("wide.png")


def run(*argv) -> int:
    return inpaint.main(["--device", "cpu", "--steps", "4", "--init-img", "init.png", "--mask", "mask.png", *argv])


@pytest.mark.slow
def test_the_command_writes_the_images_of_the_api(files):
    assert run("--prompt", CAPTION, "--n_samples", "2", "--seed", "3", "--sampler", "euler", "--strength", "0.5") == 0
    paths = sorted((OUT / "samples").iterdir())
    image, mask = inpaint.read_image_with_mask("init.png", "mask.png")
    model = StableDiffusion.tiny(inpainting=True)
    options = {"steps": 4, "scale": 4.0, "seed": 3, "batch": 2, "sampler": "euler", "strength": 0.5}
    for path, expected in zip(paths, model.inpaint(CAPTION, image, mask, **options).images):
        assert np.array_equal(np.array(Image.open(path)), expected.numpy())
    texts = Image.open(paths[1]).text
    assert {key: texts[key] for key in ("init_img", "mask", "strength", "seed", "sampler")} == {
        "init_img": "init.png",
        "mask": "mask.png",
        "strength": "0.5",
        "seed": "4",
        "sampler": "euler",
    }


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--mask", "missing.png"], "--mask missing.png: cannot be read as an image"),
        (["--init-img", "missing.png"], "--init-img missing.png: cannot be read as an image"),
        (["--mask", "wide.png"], "mask has 128x64 pixels and the image 64x64"),
        (["--fixed_code"], "--fixed_code: inpainting has noise of its own"),
        (["--sampler", "lcm", "--steps", "8", "--strength", "0.1"], "lcm: 8 steps of 5 timesteps"),
        (["--plms", "--dpm"], "plms and dpm_solver contradict each other"),
    ],
)
def test_refusals_print_one_line(files, capsys, argv, message):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.splitlines()[-1].startswith("error: ")


def test_default_scales_are_those_of_the_original_scripts():
    defaults = {
        name: inpaint.default_strength_and_scale(config) for name, config in PRESETS.items() if config.inpainting
    }
    assert defaults == {"sd1-inpaint": (1.0, 7.5), "sd2-inpaint": (1.0, 10.0), "tiny-inpaint": (1.0, 4.0)}
