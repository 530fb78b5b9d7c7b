"""diffusers with our weights, converted in memory, as an engine: what this project is measured beside.

The timed region is ours: prompt in, uint8 pixels in host memory out, latents drawn as ours are.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from perf.configurations.configuration import Configuration, usual
from perf.worker.engines.output import Output
from perf.worker.engines.sd import load_model, optimisations
from sd.checkpoint import diffusers_folder, layouts
from sd.errors import Unavailable
from sd.sampling.noise import PerImageNoise

DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


class DiffusersEngine:
    """StableDiffusionPipeline of the installed diffusers."""

    def __init__(self, configuration: Configuration, device: str):
        try:
            import diffusers
            import transformers
        except ImportError as error:
            raise Unavailable(f"diffusers cannot be imported ({error}): pip install -e '.[peers]'") from None
        if configuration.workload != "txt2img" or configuration.sdpa_kernels:
            raise Unavailable("diffusers is measured by whole txt2img runs, with whatever SDPA kernel PyTorch chooses")
        if configuration.attention == "mha":
            raise Unavailable("diffusers has no nn.MultiheadAttention: choose original, xformers or sdpa")
        self.configuration, self.device = configuration, torch.device(device)
        self.autocast = configuration.precision == "autocast"
        plain = replace(usual(configuration.model), precision="full", attention="original")
        ours = load_model(
            replace(plain, checkpoint=configuration.checkpoint, config=configuration.config),
            device,
            optimisations(plain, device),
        )
        self.config = config = ours.config
        if configuration.sampler == "plms" and config.parameterization == "v":
            raise Unavailable(
                "diffusers' PNDM extrapolates v where the original PLMS extrapolates eps: not the same sampler; use ddim"
            )
        self.shape = ours.latent_shape(configuration.batch, configuration.height or None, configuration.width or None)

        unet = diffusers.UNet2DConditionModel.from_config(diffusers_folder.unet_config(config))
        unet.load_state_dict(layouts.unet_to_diffusers(ours.unet.state_dict()))
        vae = diffusers.AutoencoderKL.from_config(diffusers_folder.autoencoder_config(config))
        vae.load_state_dict(layouts.autoencoder_to_diffusers(ours.autoencoder.state_dict()))
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(diffusers_folder.text_config(config)))
        with tempfile.TemporaryDirectory() as folder:
            diffusers_folder.write_tokenizer(Path(folder), config)
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        state = layouts.openclip_text_to_hf(ours.text_encoder.state_dict())
        if not any(
            name.startswith("text_model.") for name in text.state_dict()
        ):  # newer releases have dropped the prefix
            state = layouts.with_prefix(state, "text_model.")
        text.load_state_dict(state, strict=False)  # position_ids, where it is a buffer, is not ours to give
        scheduler = getattr(diffusers, SCHEDULERS[configuration.sampler]).from_config(
            diffusers_folder.scheduler_config(config)
        )
        self.pipe = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(self.device, DTYPES[configuration.precision])
        self.pipe.set_progress_bar_config(disable=True)
        if configuration.attention == "xformers":
            self.pipe.enable_xformers_memory_efficient_attention()
        elif configuration.attention == "original":
            from diffusers.models.attention_processor import AttnProcessor

            self.pipe.unet.set_attn_processor(AttnProcessor())
        if configuration.compile != "none":
            self._compile(configuration.compile)

    def _compile(self, mode: str) -> None:
        """As the documentation of diffusers advises ("Accelerate inference", huggingface/diffusers docs/source/en)."""
        from torch._inductor import config

        config.conv_1x1_as_mm = True
        config.coordinate_descent_tuning = True
        config.coordinate_descent_check_all_directions = True
        config.epilogue_fusion = False
        self.pipe.fuse_qkv_projections()
        for part in (self.pipe.unet, self.pipe.vae):
            part.to(memory_format=torch.channels_last)
        self.pipe.unet = torch.compile(self.pipe.unet, mode=mode, fullgraph=True)
        self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode=mode, fullgraph=True)

    @torch.no_grad()
    def round(self, seed: int) -> Output:
        """One call of the pipeline and its decoder."""
        wanted = self.configuration
        latents = PerImageNoise(seed, wanted.batch).initial(self.shape, self.device)
        with torch.autocast(self.device.type, enabled=self.autocast):
            latents = self.pipe(
                [wanted.prompt] * wanted.batch,
                negative_prompt=[""] * wanted.batch,
                num_inference_steps=wanted.steps,
                guidance_scale=wanted.scale,
                latents=latents.to(self.pipe.unet.dtype),
                output_type="latent",
            ).images
            pixels = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu()
        calls = wanted.steps + (wanted.sampler == "plms")
        return Output(latents.float(), images, {}, calls)

    @property
    def precision(self) -> str:
        """As asked for."""
        return self.configuration.precision

    @property
    def compiles(self) -> bool:
        """As asked for."""
        return self.configuration.compile != "none"

    def kernels(self) -> dict[str, list[str]]:
        """Not observed: diffusers' modules are not ours to wrap."""
        return {}
