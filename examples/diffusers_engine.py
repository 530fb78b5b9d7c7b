"""A pipeline of diffusers: `pytest perf --engine examples/diffusers_engine.py:Engine --ckpt FOLDER`."""

import torch
from diffusers import DiffusionPipeline

DTYPES = {"full": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Engine:
    def __init__(self, configuration, precision=None):
        dtype = DTYPES[precision or configuration.precision]
        self.pipe = DiffusionPipeline.from_pretrained(configuration.checkpoint, torch_dtype=dtype)
        self.pipe.to(configuration.device)
        self.options = {"prompt": configuration.prompt, "num_inference_steps": configuration.steps}
        self.options["num_images_per_prompt"] = configuration.batch

    def round(self, seed):
        return self.pipe(**self.options, generator=torch.Generator().manual_seed(seed)).images

    @classmethod
    def reference(cls, configuration):  # the images that are right: those of fp32
        return cls(configuration, precision="full")
