"""stable-diffusion.cpp by its binding, with the noise and schedule of `--sampler euler`: see docs/your-pipeline.md."""

import torch
from stable_diffusion_cpp import StableDiffusion

import sd


class Engine:
    precision = "fp16"  # that of its convolutions, whatever the file

    def __init__(self, configuration):
        self.model = StableDiffusion(
            configuration.checkpoint,
            rng_type="cpu",  # the noise of PyTorch
            sampler_rng_type="cpu",
            n_threads=torch.get_num_threads(),
            vae_decode_only=True,
            verbose=False,
        )
        self.options = {
            "prompt": configuration.prompt,
            "width": configuration.width or 512,
            "height": configuration.height or 512,
            "cfg_scale": configuration.scale,
            "sample_method": configuration.sampler,
            "sample_steps": configuration.steps,
            "scheduler": "discrete",
        }

    def round(self, seed):
        return self.model.generate_image(**self.options, seed=seed)

    @staticmethod
    def reference(configuration):  # the images that are right: ours of the same weights and noise
        model = sd.StableDiffusion.from_checkpoint(configuration.checkpoint)
        options = {
            "prompt": configuration.prompt,
            "width": configuration.width or 512,
            "height": configuration.height or 512,
            "scale": configuration.scale,
            "sampler": configuration.sampler,
            "steps": configuration.steps,
        }
        return lambda seed: model.txt2img(**options, seed=seed).images
