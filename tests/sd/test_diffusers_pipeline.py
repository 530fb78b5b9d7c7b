"""A converted folder in diffusers' own pipeline, with each of its schedulers: the image is that of the sampler here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sd import StableDiffusion
from sd.checkpoint.diffusers_folder import SCHEDULERS, scheduler_config, write_folder
from sd.checkpoint.load import load
from sd.choices import EMBEDDED_WEIGHTS
from sd.config.presets import PRESETS
from sd.errors import ConfigError

# Step counts at which the timesteps of diffusers, which are rounded to integers, equal those of the original.
STEPS = {**dict.fromkeys(SCHEDULERS, 10), "dpm_solver": 9, "dpm_solver_sde": 9, "unipc": 9, "lcm": 4}
PROMPT, NEGATIVE = "a red circle on a blue background", "a green star"


def test_every_folder_disables_clipping():
    for sampler in SCHEDULERS:
        settings = scheduler_config(PRESETS["tiny"], sampler)
        assert settings["clip_sample"] is False and settings["set_alpha_to_one"] is False
        assert settings["steps_offset"] == 1 and settings["prediction_type"] == "v_prediction"


def test_scheduler_of_models_of_v(tmp_path, monkeypatch):
    monkeypatch.setattr("sd.checkpoint.diffusers_folder.write_tokenizer", lambda *_: None)
    config, networks = load(EMBEDDED_WEIGHTS, PRESETS["tiny"])
    write_folder(tmp_path / "v", networks, config)
    assert json.loads((tmp_path / "v" / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    with pytest.raises(ConfigError, match="plms"):
        write_folder(tmp_path / "plms", networks, config, "plms")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers", reason="diffusers' pipeline needs transformers")
    path = tmp_path_factory.mktemp("converted") / "tiny"
    config, networks = load(EMBEDDED_WEIGHTS, PRESETS["tiny"])
    write_folder(path, networks, config)  # in fp16
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    diffusers = pytest.importorskip("diffusers", reason="opens the folder with diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline, steps: int, latents: torch.Tensor) -> torch.Tensor:
    return pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=4.0,
        height=64,
        width=64,
        latents=latents.clone(),
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("own", [True, False], ids=["its own scheduler", "made from another scheduler"])
def test_pipeline_of_diffusers_generates_our_image(folder, pipeline, sampler, own):
    import diffusers

    # PNDMScheduler samples models of v differently, so the weights are then run as if they predicted noise.
    config = replace(PRESETS["tiny"], parameterization="eps") if sampler == "plms" else PRESETS["tiny"]
    ours = StableDiffusion.from_checkpoint(EMBEDDED_WEIGHTS, config)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    written = scheduler_config(config, sampler if own else "ddim" if sampler == "plms" else "plms")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(written))
    name = SCHEDULERS[sampler]["_class_name"]
    if own:
        pipeline.scheduler = getattr(diffusers, name).from_pretrained(str(folder), subfolder="scheduler")
    else:  # as people change it
        other = getattr(diffusers, written["_class_name"]).from_pretrained(str(folder), subfolder="scheduler").config
        changes = {key: value for key, value in SCHEDULERS[sampler].items() if key != "_class_name"}
        pipeline.scheduler = getattr(diffusers, name).from_config(other, **changes)
    steps = STEPS[sampler]
    expected = ours.txt2img(
        PROMPT, steps=steps, sampler=sampler, scale=4.0, latents=latents, negative_prompt=NEGATIVE, seed=4
    ).latents
    actual = latents_of(pipeline, steps, latents)
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < 1e-3, error
