"""Engine of diffusers with our weights, converted in memory: a peer in the same session.

The timed region is that of our engine: prompt in, uint8 pixels in host memory out, from the same initial latents.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from perf.worker.engines import compat
from perf.worker.engines.interface import Output
from perf.worker.engines.sd import gradient_with_hole, initial_latents, load_model
from sd import Optimisations
from sd.errors import Unavailable

DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class DiffusersEngine:
    """StableDiffusionPipeline of the installed diffusers."""

    def __init__(self, configuration: Any):
        diffusers = _require_diffusers()
        if configuration.workload not in ("txt2img", "inpaint") or configuration.sdpa_kernels:
            raise Unavailable("diffusers is measured by whole images, with the SDPA kernel that PyTorch chooses")
        ours = {"optimise": "", "compile_scope": "unet", "compile_backend": "inductor"}
        chosen = [name for name, default in ours.items() if getattr(configuration, name) != default]
        if chosen:
            raise Unavailable(f"the engine diffusers has its own recipe, without {', '.join(chosen)}: leave it out")
        if configuration.lora_rank:
            raise Unavailable("the engine diffusers is measured without LoRA: leave out --lora-rank, or use engine sd")
        if configuration.attention == "mha":
            raise Unavailable("diffusers has no nn.MultiheadAttention: choose original, xformers or sdpa")
        self.configuration, self.device = configuration, torch.device(configuration.device)
        self.precision, self.compiles = configuration.precision, configuration.compile != "none"
        plain = Optimisations(attention="original", precision="full")
        self.model = load_model(configuration, configuration.device, plain)
        self.config = self.model.config
        if configuration.sampler == "plms" and self.config.parameterization == "v":
            raise Unavailable(
                "diffusers' PNDM extrapolates v where the original PLMS extrapolates eps: another sampler; use ddim"
            )
        if configuration.sampler not in SCHEDULERS:
            raise Unavailable(
                f"diffusers draws the noise of {configuration.sampler} in another order: choose {', '.join(SCHEDULERS)}"
            )
        scheduler = getattr(diffusers, SCHEDULERS[configuration.sampler])
        config = compat.load("diffusers_folder").scheduler_config(self.config)
        config["clip_sample"] = False  # which DDIM, alone of the schedulers, does by default
        config.update(_steps(configuration, scheduler))
        self.pipe = pipeline(self.model, scheduler.from_config(config), configuration.workload)
        self.pipe = self.pipe.to(self.device, DTYPES[self.precision])
        self.pipe.set_progress_bar_config(disable=True)
        # Their memory is not the peer's. `_calls` holds functions of them.
        self.model.unet = self.model.autoencoder = self.model.text_encoder = self.model._calls = None
        _use_attention(self.pipe.unet, configuration.attention)
        if self.compiles:
            self._compile(configuration.compile)

    def _compile(self, mode: str) -> None:
        """Compile by diffusers' own recipe ("Accelerate inference", huggingface/diffusers docs/source/en).

        Its coordinate descent, which tunes for minutes, belongs to the modes of max-autotune, as in PyTorch itself.
        """
        from torch._inductor import config

        config.conv_1x1_as_mm = True
        config.coordinate_descent_tuning = mode.startswith("max-autotune")
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
        configuration = self.configuration
        inputs = self._inpainting(seed) if configuration.workload == "inpaint" else self._initial(seed)
        with torch.autocast(self.device.type, enabled=self.precision == "autocast"):
            latents = self.pipe(
                [configuration.prompt] * configuration.batch,
                negative_prompt=[""] * configuration.batch,
                num_inference_steps=configuration.steps,
                guidance_scale=configuration.scale,
                output_type="latent",
                **inputs,
            ).images
            pixels = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu()
        extra = {"plms": 1, "heun": configuration.steps - 1}
        calls = configuration.steps + extra.get(configuration.sampler, 0)
        return Output(latents.float(), images, {}, calls)

    def _initial(self, seed: int) -> dict[str, Any]:
        return {"latents": initial_latents(self.model, self.configuration, seed).to(self.pipe.unet.dtype)}

    def _inpainting(self, seed: int) -> dict[str, Any]:
        """Image and mask as tensors of the batch, and the generators of our engine, in whose order diffusers draws."""
        batch, config = self.configuration.batch, self.config
        height, width = self.configuration.height or config.image_size, self.configuration.width or config.image_size
        image, mask = gradient_with_hole(height, width)
        return {
            "image": (image.expand(batch, -1, -1, -1) + 1) / 2,
            "mask_image": mask.expand(batch, 1, -1, -1),
            "height": height,
            "width": width,
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(batch)],
        }


def _steps(configuration: Any, scheduler: type) -> dict[str, Any]:
    """Settings of a scheduler for timestep spacing and sigmas. Raises Unavailable for those that it does not have."""
    settings: dict[str, Any] = {}
    if configuration.timestep_spacing is not None:
        settings["timestep_spacing"] = configuration.timestep_spacing
    if configuration.sigmas == "karras":
        settings["use_karras_sigmas"] = True
    missing = [
        f"{name} {value}" for name, value in settings.items() if name not in scheduler().config or value == "sgm_turbo"
    ]
    if missing:
        raise Unavailable(f"diffusers' {scheduler.__name__} has no {missing[0]}: leave it out, or use engine sd")
    return settings


def training_unet(unet, config, configuration: Any, device: torch.device):
    """(diffusers' UNet with the weights of ours, its call), prepared as examples/text_to_image/train_text_to_image.py does."""
    diffusers = _require_diffusers()
    if configuration.attention == "mha" or configuration.sdpa_kernels:
        raise Unavailable(
            "diffusers has no nn.MultiheadAttention and no kernel choice: choose original, xformers or sdpa"
        )
    layouts, folder = compat.load("layouts"), compat.load("diffusers_folder")
    peer = diffusers.UNet2DConditionModel.from_config(folder.unet_config(config))
    peer.load_state_dict(layouts.unet_to_diffusers(unet.state_dict()))
    peer.to(device).train()
    _use_attention(peer, configuration.attention)
    if configuration.checkpointing:
        peer.enable_gradient_checkpointing()
    forward = peer
    if configuration.compile != "none":
        forward = torch.compile(peer, mode=configuration.compile, fullgraph=True, dynamic=False)
    return peer, lambda x, timesteps, context: forward(x, timesteps, context, return_dict=False)[0]


def _require_diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise Unavailable(f"diffusers cannot be imported ({error}): pip install -e '.[peers]'") from None
    return diffusers


def _use_attention(unet, attention: str) -> None:
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif attention == "original":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())


def pipeline(model, scheduler, workload: str = "txt2img"):
    """A pipeline of diffusers over the weights of a StableDiffusion, in fp32."""
    import diffusers
    import transformers

    layouts, folder = compat.load("layouts"), compat.load("diffusers_folder")
    unet = diffusers.UNet2DConditionModel.from_config(folder.unet_config(model.config))
    unet.load_state_dict(layouts.unet_to_diffusers(model.unet.state_dict()))
    vae = diffusers.AutoencoderKL.from_config(folder.autoencoder_config(model.config))
    vae.load_state_dict(layouts.autoencoder_to_diffusers(model.autoencoder.state_dict()))
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(folder.text_config(model.config)))
    state = layouts.openclip_text_to_hf(model.text_encoder.state_dict())
    if not any(name.startswith("text_model.") for name in text.state_dict()):  # newer releases drop the prefix
        state = layouts.with_prefix(state, "text_model.")
    text.load_state_dict(state, strict=False)  # position_ids is a buffer in some releases
    with tempfile.TemporaryDirectory() as path:
        folder.write_tokenizer(Path(path), model.config)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path)
    inpainting = workload == "inpaint"
    kind = diffusers.StableDiffusionInpaintPipeline if inpainting else diffusers.StableDiffusionPipeline
    return kind(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
