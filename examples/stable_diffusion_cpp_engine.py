"""stable-diffusion.cpp by its binding, with the noise and schedule of `--sampler euler`: see docs/your-pipeline.md."""

import torch
from stable_diffusion_cpp import StableDiffusion

import sd


class Engine:
    precision = "fp16"  # that of its convolutions, whatever the file

    def __init__(self, configuration):
        options = {"rng_type": "cpu", "sampler_rng_type": "cpu"}  # draws the noise of PyTorch
        options.update(n_threads=torch.get_num_threads(), vae_decode_only=True, verbose=False)
        self.model = StableDiffusion(configuration.checkpoint, **options)
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
        names = ("prompt", "scale", "sampler", "steps")
        options = {name: getattr(configuration, name) for name in names}
        options.update(width=configuration.width or 512, height=configuration.height or 512)
        return lambda seed: model.txt2img(**options, seed=seed).images
