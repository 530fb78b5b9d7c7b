"""depth2img: against img2img, the original loop and diffusers, depth maps, loading, conversion, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from checkpoints import original
from models import SMALL, each_kind_of_optimisation, widened
from PIL import Image
from safetensors.torch import load_file, save_file
from selection import slow_or_nightly

from sd import ConfigError, Optimisations, StableDiffusion, depth2img
from sd.checkpoint import diffusers_folder
from sd.checkpoint.load import load
from sd.checkpoint.networks import expected_shapes
from sd.config.presets import PRESETS
from sd.config.yaml_reader import CONFIGS, read_yaml
from sd.convert import convert
from sd.images import image_with_depth, latent_depth
from sd.sampling.samplers import SAMPLERS

CAPTION = "a red circle on a blue background"
CONFIG = SMALL["sd2"].as_depth_to_image()
OUT = Path("outputs/depth2img-samples")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    x = torch.linspace(-1, 1, 64)
    return torch.stack([x.expand(64, 64), x[:, None].expand(64, 64), torch.full((64, 64), 0.3)])


@pytest.fixture(scope="module")
def depth() -> torch.Tensor:
    """A sphere before a plane, in arbitrary units."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    return 3 + 7 * (0.6 - x**2 - y**2).clamp(min=0).sqrt()


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return StableDiffusion.random(CONFIG, seed=1)


# --- images


def zero_planes_equal_img2img(image, depth, sampler, strength):
    tiny = StableDiffusion.tiny()
    options = {"steps": 5, "sampler": sampler, "scale": 4.0, "batch": 2, "seed": 3, "strength": strength}
    deep = widened(tiny, tiny.config.as_depth_to_image()).depth2img(CAPTION, image, depth, **options)
    expected = tiny.img2img(CAPTION, image, **options)
    assert torch.equal(deep.latents, expected.latents)
    assert torch.equal(deep.images, expected.images)
    assert set(deep.seconds) == {"encode", "text", "unet", "vae"}


def test_a_zero_input_plane_equals_img2img_bit_for_bit(image, depth):
    zero_planes_equal_img2img(image, depth, "ddim", 0.6)


@pytest.mark.parametrize(
    "sampler", slow_or_nightly(SAMPLERS, lambda sampler: sampler in ("dpm_solver", "euler_ancestral", "lcm"))
)
def test_zero_input_planes_equal_img2img_with_every_sampler(image, depth, sampler):
    for strength in (0.0, 0.8):
        zero_planes_equal_img2img(image, depth, sampler, strength)


def original_script(model, image, depth, strength, steps, eta, scale=5.0, seed=7, batch=2):
    """The sampling of the original depth2img script on one generator, written out: DDIM's encoding and decoding."""
    generator, shape = torch.Generator().manual_seed(seed), (batch, 4, 8, 8)
    z = model.encode(image.expand(batch, -1, -1, -1), torch.randn(shape, generator=generator))
    cells = F.interpolate(depth[None, None], size=(8, 8), mode="bicubic", align_corners=False)
    cells = (2 * (cells - cells.min()) / (cells.max() - cells.min()) - 1).expand(2 * batch, -1, -1, -1)
    context = model.encode_prompts([""] * batch + [CAPTION] * batch)
    timesteps = model.schedule.uniform_timesteps(steps)
    alphas = model.schedule.alphas_cumprod[timesteps].double().tolist()
    previous = [float(model.schedule.alphas_cumprod[0]), *alphas]
    encoded = min(int(strength * steps), steps - 1)
    x = torch.randn(shape, generator=generator)
    if strength < 1:
        x = alphas[encoded] ** 0.5 * z + (1 - alphas[encoded]) ** 0.5 * x
    for i in reversed(range(encoded)):
        inputs = torch.cat([torch.cat([x, x]), cells], dim=1)
        with torch.no_grad():
            unconditional, conditional = model.unet(inputs, torch.full((2 * batch,), timesteps[i]), context).chunk(2)
        e = unconditional + scale * (conditional - unconditional)
        x_0 = (x - (1 - alphas[i]) ** 0.5 * e) / alphas[i] ** 0.5
        sigma = eta * ((1 - previous[i]) / (1 - alphas[i]) * (1 - alphas[i] / previous[i])) ** 0.5
        x = previous[i] ** 0.5 * x_0 + (1 - previous[i] - sigma**2) ** 0.5 * e
        x = x + sigma * torch.randn(shape, generator=generator)
    return x


@pytest.mark.parametrize("strength, eta", [(0.5, 0.0), (0.9, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_original_script(model, image, depth, strength, eta):
    """Its loop and draws; at strength 1 it starts from noise, without the first step."""
    options = {"steps": 4, "scale": 5.0, "batch": 2, "strength": strength, "eta": eta}
    result = model.depth2img(CAPTION, image, depth, seed=7, rng="original", **options)
    expected = original_script(model, image, depth, strength, 4, eta)
    assert result.unet_calls == (3 if strength > 0.5 else 2)
    assert (result.latents - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "strength": 0.5, "eta": 1.0},
        {"sampler": "euler", "scale": 1.0},
        {"sampler": "euler_ancestral"},
        {"sampler": "unipc", "strength": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", SMALL)
def test_diffusers_pipeline(kind, options, image, depth):
    """Equal latents from one generator, which both draw from in the same order."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    from perf.worker.engines.diffusers import pipeline

    config = SMALL[kind].as_depth_to_image()
    model = StableDiffusion.random(config, seed=1)
    options = {"scale": 5.0, "strength": 0.8, **options}
    settings = diffusers_folder.scheduler_config(config, options["sampler"])
    settings["timestep_spacing"] = "trailing"  # timesteps that diffusers does not round
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    parts = pipeline(model, scheduler).components
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    peer = diffusers.StableDiffusionDepth2ImgPipeline(
        **{name: parts[name] for name in names}, depth_estimator=None, feature_extractor=None
    )
    peer.set_progress_bar_config(disable=True)
    expected = peer(
        CAPTION,
        image=(image[None] + 1) / 2,
        depth_map=depth[None],
        num_inference_steps=10,
        guidance_scale=options["scale"],
        strength=options["strength"],
        eta=options.get("eta", 0.0),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    generator = torch.Generator().manual_seed(3)
    options.update(generator=generator, timestep_spacing="trailing")
    actual = model.depth2img(CAPTION, image, depth, steps=10, **options).latents
    assert (actual - expected).norm() < 2e-4 * expected.norm()


def test_depth_and_image_reach_the_unet(model, image, depth):
    def run(image, depth, strength=0.8):
        return model.depth2img(CAPTION, image, depth, steps=2, strength=strength).latents

    expected = run(image, depth)
    assert torch.allclose(run(image, 100 * depth + 5), expected, atol=1e-4)  # its scale does not matter
    assert not torch.allclose(run(image, -depth), expected, atol=1e-2)
    assert not torch.allclose(run(-image, depth), expected, atol=1e-2)
    assert torch.equal(run(image, depth, 1.0), run(-image, depth, 1.0))  # from noise
    assert not torch.allclose(run(image, depth, 1.0), run(image, -depth, 1.0), atol=1e-2)


@pytest.mark.slow
@each_kind_of_optimisation
def test_optimisations_change_nothing(image, depth, changes):
    model = StableDiffusion.random(CONFIG, seed=1)
    for strength in (0.8, 1.0):
        options = {"steps": 4, "eta": 0.5, "strength": strength}
        model.optimise(Optimisations())
        expected = model.depth2img(CAPTION, image, depth, **options).latents
        model.optimise(Optimisations(**changes))
        actual = model.depth2img(CAPTION, image, depth, **options).latents
        assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_one_seed_reproduces_everything_at_any_batch_size(model, image, depth):
    options = {"steps": 4, "eta": 1.0, "strength": 0.75}
    pair = model.depth2img(CAPTION, image, depth, seed=5, batch=2, **options)
    alone = model.depth2img(CAPTION, image, depth, seed=6, **options)
    assert torch.allclose(alone.latents[0], pair.latents[1], atol=1e-4)


# --- depth maps


def test_depth_images_of_all_types_agree(image):
    levels = (torch.arange(64)[:, None] * 2 + torch.arange(64)).to(torch.uint8)  # up to 189
    expected = latent_depth(levels.float(), 8, 8)
    assert (expected.min(), expected.max()) == (-1, 1)
    array = levels.numpy()
    grey = Image.fromarray(array)
    images = [
        grey,
        grey.convert("RGB"),
        Image.fromarray(array.astype(np.uint16) * 257),
        Image.fromarray(array.astype(np.int32) * 1000),
        Image.fromarray(array.astype(np.float32) / 255),
        levels,
        levels[None].double(),
    ]
    for other in images:
        pixels, values = image_with_depth(image, other)
        assert torch.equal(pixels, image)
        assert torch.allclose(latent_depth(values, 8, 8), expected, atol=1e-5)


def test_images_and_depth_of_other_sizes_are_reduced_together():
    pixels, values = image_with_depth(Image.new("RGB", (130, 70)), torch.arange(130.0).expand(70, 130))
    assert (pixels.shape, values.shape) == ((3, 64, 128), (70, 130))
    cells = latent_depth(values, 8, 16)[0, 0]
    assert torch.allclose(cells[0], cells[7], atol=1e-6) and (cells[0].diff() > 0).all()


@pytest.mark.parametrize(
    "depth, message",
    [
        (None, r"depth: is missing, and no depth estimator \(MiDaS\) is included; give a depth image"),
        (
            torch.rand(64, 128),
            "depth image has 128x64 pixels and the image 64x64: give a depth image of the image's size",
        ),
        (Image.new("I;16", (64, 65)), "depth image has 64x65 pixels and the image 64x64"),
        (torch.rand(3, 64, 64), "must be float or integer"),
        (torch.rand(64), "must be float or integer"),
        (torch.rand(64, 64) > 0.5, "must be float or integer"),
        (torch.full((64, 64), 0.3), "depth: has one value everywhere"),
        (Image.new("L", (64, 64)), "depth: has one value everywhere"),
        (torch.rand(64, 64).log_().sub_(torch.inf), "not finite"),
        (torch.full((64, 64), torch.nan), "not finite"),
        (Image.new("RGB", (64, 64), "red"), "is in colour"),
    ],
    ids=["none", "wide", "tall", "channels", "vector", "bool", "flat", "black", "infinite", "nan", "colour"],
)
def test_invalid_depth_raises(model, image, depth, message):
    with pytest.raises(ConfigError, match=message):
        model.depth2img(CAPTION, image, depth, steps=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": -0.1}, r"strength -0.1: must be in \[0, 1\]"),
        ({"strength": 1.0, "steps": 1}, "strength 1: ddim leaves out its first step"),
        ({"sampler": "plms", "eta": 1.0}, "plms: eta"),
    ],
    ids=str,
)
def test_invalid_options_raise(model, image, depth, options, message):
    with pytest.raises(ConfigError, match=message):
        model.depth2img(CAPTION, image, depth, **options)


def test_methods_refuse_models_of_other_inputs(model, image, depth):
    for method, arguments in ((model.txt2img, ()), (model.img2img, (image,)), (model.inpaint, (image, image[0]))):
        with pytest.raises(ConfigError, match="small-2-depth is a depth-to-image model: call depth2img"):
            method(CAPTION, *arguments, steps=2)
    for inpainting, message in (
        (False, "a text-to-image model: call txt2img"),
        (True, "an inpainting model: call inpaint"),
    ):
        with pytest.raises(ConfigError, match=f"depth2img: .* is {message}"):
            StableDiffusion.tiny(inpainting=inpainting).depth2img(CAPTION, image, depth)


# --- checkpoints


def test_the_preset_has_the_released_size():
    assert sum(shape.numel() for shape in expected_shapes(PRESETS["sd2-depth"])["unet"].values()) == 865_913_604


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A depth-to-image model of the sizes of `tiny`, with an entry of the original's depth estimator."""
    path = tmp_path_factory.mktemp("depth") / "depth.safetensors"
    state = original(PRESETS["tiny"].as_depth_to_image(), released=False)
    save_file({**state, "depth_model.model.scratch.weight": torch.zeros(3)}, str(path))
    return path


def test_checkpoints_are_detected_without_the_estimator(checkpoint, recwarn):
    config, networks = load(checkpoint)
    assert (config.name, config.depth_to_image) == ("tiny-depth", True)
    assert networks["unet"]["input_blocks.0.0.weight"].shape[1] == 5
    assert not recwarn.list


def test_conversion_to_and_from_the_layout_of_diffusers(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_folder, "write_tokenizer", lambda folder, config: None)  # slow, and not compared
    convert(checkpoint, tmp_path / "folder", "diffusers")
    assert "StableDiffusionDepth2ImgPipeline" in (tmp_path / "folder/model_index.json").read_text()
    assert '"in_channels": 5' in (tmp_path / "folder/unet/config.json").read_text()
    assert load(tmp_path / "folder", shapes_only=True)[0].name == "tiny-depth"
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "original")
    before, after = load_file(str(checkpoint)), load_file(str(tmp_path / "back.safetensors"))
    assert before.keys() - after.keys() == {"depth_model.model.scratch.weight"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_the_folder(checkpoint, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    convert(checkpoint, tmp_path / "folder", "diffusers")
    pipe = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(
        tmp_path / "folder", depth_estimator=None, feature_extractor=None
    )
    expected = load_file(str(checkpoint))["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(pipe.unet.conv_in.weight, expected)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("concat_keys", ["depth"], "concat_keys: is .'depth'. and can only be .'midas_in'."),
        ("depth_stage_config", {"target": "os.system"}, "depth_stage_config.target: is 'os.system'"),
        ("conditioning_key", "crossattn", "conditioning_key: is 'crossattn' and can only be 'hybrid'"),
    ],
)
def test_yaml_files_of_other_models_are_rejected(tmp_path, key, value, message):
    contents = yaml.safe_load((CONFIGS / "v2-midas-inference.yaml").read_text())
    contents["model"]["params"][key] = value
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(contents))
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "a.yaml")


# --- the command


@pytest.fixture
def files(monkeypatch, tmp_path, image, depth):
    monkeypatch.delenv("USE_XFORMERS", raising=False)
    monkeypatch.delenv("ATTN_PRECISION", raising=False)
    monkeypatch.chdir(tmp_path)
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save("init.png")
    Image.fromarray((depth.numpy() * 5000).astype(np.uint16)).save("depth.png")
    Image.new("L", (128, 64)).save("wide.png")


def run(checkpoint, *argv) -> int:
    options = ["--ckpt", str(checkpoint)] if checkpoint else []
    return depth2img.main(["--device", "cpu", "--steps", "4", "--init-img", "init.png", *options, *argv])


def test_the_command_writes_the_images_of_the_api(files, checkpoint):
    argv = ["--depth", "depth.png", "--prompt", CAPTION, "--n_samples", "2", "--seed", "3", "--sampler", "euler"]
    assert run(checkpoint, *argv, "--strength", "0.5", "--scale", "2") == 0
    paths = sorted((OUT / "samples").iterdir())
    model = StableDiffusion.from_checkpoint(checkpoint, progress=False)
    inputs = depth2img.read_image_with_depth("init.png", "depth.png")
    options = {"steps": 4, "scale": 2.0, "seed": 3, "batch": 2, "sampler": "euler", "strength": 0.5}
    expected = model.depth2img(CAPTION, *inputs, **options).images
    for path, pixels in zip(paths, expected, strict=True):
        assert np.array_equal(np.array(Image.open(path)), pixels.numpy())
    texts = Image.open(paths[1]).text
    assert {key: texts[key] for key in ("init_img", "depth", "strength", "seed", "sampler")} == {
        "init_img": "init.png",
        "depth": "depth.png",
        "strength": "0.5",
        "seed": "4",
        "sampler": "euler",
    }


@pytest.mark.parametrize(
    "embedded, argv, message",
    [
        (False, [], "--depth: is missing, and no depth estimator (MiDaS) is included: pass --depth FILE"),
        (False, ["--depth", "missing.png"], "--depth missing.png: cannot be read as an image"),
        (False, ["--depth", "wide.png"], "depth image has 128x64 pixels and the image 64x64"),
        (False, ["--depth", "init.png"], "--depth init.png: depth image is in colour"),
        (False, ["--depth", "depth.png", "--fixed_code"], "--fixed_code: depth2img has noise of its own"),
        (True, ["--depth", "depth.png"], "no --ckpt: no model of this command is embedded; pass --ckpt FILE"),
        (True, ["--depth", "depth.png", "--config", "tiny"], "no --ckpt: no model of this command is embedded"),
    ],
)
def test_refusals_print_one_line(files, checkpoint, capsys, embedded, argv, message):
    assert run(None if embedded else checkpoint, *argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.splitlines()[-1].startswith("error: ")


def test_defaults_are_those_of_the_original_script(files, checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(StableDiffusion, "depth2img", lambda self, *inputs, **options: calls.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(checkpoint, "--depth", "depth.png")
    assert {key: calls[0][key] for key in ("strength", "scale", "eta", "sampler")} == {
        "strength": 0.9,
        "scale": 9.0,
        "eta": 0.0,
        "sampler": "ddim",
    }
