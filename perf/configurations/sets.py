"""Named sets of configurations, such as `published` and `ladder`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from perf.configurations.configuration import CHOICES, Configuration, usual, usual_precision
from sd.choices import APPROXIMATE, INDUCTOR_OPTIONS


def cross(configurations: list[Configuration], values: dict[str, list[Any]]) -> list[Configuration]:
    """Combine every configuration with every combination of field values, in order and without duplicates.

    `size` sets height and width: (pixels, pixels).
    """
    combinations = [dict(zip(values, choice)) for choice in itertools.product(*values.values())]
    crossed = [_with(configuration, choice) for configuration in configurations for choice in combinations]
    return list(dict.fromkeys(crossed))


def _with(configuration: Configuration, choice: dict[str, Any]) -> Configuration:
    if "size" in choice:
        height, width = choice["size"]
        choice = {**{name: value for name, value in choice.items() if name != "size"}, "height": height, "width": width}
    changed = replace(configuration, **choice)
    usual_before = configuration.precision == usual_precision(configuration.model)
    if "precision" not in choice and usual_before:  # keep the default precision with another model
        changed = replace(changed, precision=usual_precision(changed.model))
    return changed


def _variants(model: str, choices: Sequence[dict[str, Any]], batches: Sequence[int] = (1,)) -> list[Configuration]:
    return [replace(usual(model), batch=batch, **choice) for batch in batches for choice in choices]


GENERATIONS = ("txt2img", "inpaint")  # workloads with a sampler
PUBLISHED_FIVE: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "xformers"},
    {"attention": "mha", "sdpa_kernels": ("math",)},
    {"attention": "mha", "sdpa_kernels": ("mem_efficient",)},
    {"attention": "mha", "sdpa_kernels": ("mem_efficient",), "compile": "default"},
]
# A few minutes on two cores: every attention backend of a CPU, and torch.compile.
SMOKE: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "mha"},
    {"attention": "sdpa"},
    {"attention": "sdpa", "compile": "default"},
]
COMPILE_MODES = [{"compile": mode} for mode in CHOICES["compile"]]
# Recorded, so that the host's launches do not hide what an option changes. persistent_tma_matmul needs max-autotune.
INDUCTOR = [
    {"compile": "default", "optimise": ",".join(("cuda_graph_unet", *option)), "precision": "fp16"}
    for option in ((), *((name,) for name in INDUCTOR_OPTIONS if name != "persistent_tma_matmul"))
]
# The unit that is compiled and captured: the UNet (the preset's choice), its blocks, the step, the whole loop.
SCOPES = [
    {"optimise": "fast" + more} for more in ("", ",compile_blocks", ",cuda_graph_loop", ",compile_step,cuda_graph_loop")
]
# Techniques that change the image, each added to the preset.
APPROXIMATIONS = [{"optimise": ",".join(("fast", *more))} for more in ((), *((name,) for name in APPROXIMATE))]
# A merged LoRA must cost nothing, eager or compiled.
LORA: list[dict[str, Any]] = [
    {"optimise": optimise, "lora_rank": rank} for optimise in ("", "fast") for rank in (0, 16)
]
# Attention, then compile, precision and checkpointing with PyTorch's attention, and diffusers in the same step.
TRAINING: list[dict[str, Any]] = [
    *({"attention": attention} for attention in CHOICES["attention"]),
    {"compile": "default"},
    {"compile": "default", "checkpointing": True},
    {"checkpointing": True},
    {"precision": "full"},
    {"precision": "bf16"},
    {"precision": "bf16", "compile": "default"},
    {"engine": "diffusers"},
    {"engine": "diffusers", "compile": "default"},
]
# What a user of a CPU would pick instead; whole images of the embedded model, on which alone it takes minutes.
PEERS_CPU: list[dict[str, Any]] = [
    {"optimise": "none"},
    {"optimise": "fast"},
    {"optimise": "fast,bf16"},
    {"compile": "default", "compile_backend": "openvino"},
    {"compile": "default", "compile_backend": "openvino", "precision": "bf16"},
    {"compile": "default", "compile_backend": "onnxrt"},
    {"engine": "diffusers"},
    {"engine": "diffusers", "compile": "default"},
]
INPAINTING: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "sdpa"},
    {"optimise": "fast"},
    {"engine": "diffusers"},
]
FEW_STEPS: list[dict[str, Any]] = [
    {"optimise": "fast", "scale": 1.0, "steps": steps, **sampler}
    for sampler in ({"sampler": "euler", "timestep_spacing": "trailing"}, {"sampler": "lcm"})
    for steps in (1, 2, 4)
] + [
    {"engine": "diffusers", "scale": 1.0, "steps": steps, "sampler": "euler", "timestep_spacing": "trailing"}
    for steps in (1, 2, 4)
]
# From the original code's loop, each step adding one optimisation, to the preset.
EXACT = ("channels_last", "fused_qkv", "cache_context_kv", "cache_time_embeddings", "shared_guidance")
LADDER: list[dict[str, Any]] = [
    {"optimise": "original"},
    {"attention": "original"},
    {"attention": "sdpa"},
    {"attention": "sdpa", "precision": "fp16"},
    *({"attention": "sdpa", "precision": "fp16", "optimise": ",".join(EXACT[: n + 1])} for n in range(len(EXACT))),
    {"attention": "sdpa", "precision": "fp16", "optimise": ",".join(EXACT), "compile": "default"},
    {"optimise": "fast"},
]
# The first minutes on a GPU, without the minutes of a compiler, and which kernel of attention is the faster one. As CUDA
# graphs: launched one by one, a UNet call took 34 to 38 ms on an H200 in fp16, whatever its layout, kernels and caches.
HALF: dict[str, Any] = {"attention": "sdpa", "precision": "fp16"}
GPU_LADDER: list[dict[str, Any]] = [
    {"attention": "original"},
    HALF,
    {**HALF, "optimise": "cuda_graph_unet"},
    {**HALF, "optimise": "cuda_graph_unet,channels_last"},
    {**HALF, "optimise": "cuda_graph_unet,channels_last,cudnn_benchmark"},
    {**HALF, "optimise": "cuda_graph_unet,channels_last,cudnn_benchmark", "sdpa_kernels": ("flash",)},
    {**HALF, "optimise": "cuda_graph_unet,channels_last,cudnn_benchmark", "sdpa_kernels": ("cudnn",)},
    *(
        {**HALF, "optimise": ",".join((graph, *EXACT, "cudnn_benchmark"))}
        for graph in ("cuda_graph_unet", "cuda_graph_networks")
    ),
]
SETS: dict[str, list[Configuration]] = {
    # The article's five on SD2; the two rounds of a launch correspond to its --n_iter 2.
    "published": _variants("sd2", PUBLISHED_FIVE, batches=(1, 2, 4)),
    "published_sd1": _variants("sd1", [{"attention": "original"}, {"attention": "mha"}], batches=(2,)),
    # The two exercises that the article leaves to the reader.
    "sd1_compile": _variants("sd1", [PUBLISHED_FIVE[0], *PUBLISHED_FIVE[3:]]),
    "peers": _variants(
        "sd1",
        [
            {"attention": "original"},
            {"optimise": "fast"},
            {"engine": "diffusers", "attention": "xformers", "precision": "fp16"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "fp16"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "fp16", "compile": "reduce-overhead"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "fp16", "compile": "max-autotune"},
        ],
    ),
    "peers_cpu": [replace(usual("tiny"), sampler="ddim", steps=20, **choice) for choice in PEERS_CPU],
    "ladder": _variants("sd2", LADDER),
    "gpu_ladder": _variants("sd2", GPU_LADDER),
    "compile_modes": _variants("sd2", COMPILE_MODES),
    "scopes": _variants("sd2", SCOPES),
    "inductor": _variants("sd2", INDUCTOR),
    "approximate": _variants("sd2", APPROXIMATIONS),
    "lora": _variants("sd2", LORA),
    # SD-Turbo has SD2's shape and no guidance: the autoencoder and the host have most of the time.
    "few_step": _variants("sd2", FEW_STEPS),
    "smoke": [replace(usual("tiny"), steps=20, **choice) for choice in SMOKE],
    # Every attention backend at three batch sizes, the question of the published experiment.
    "batches": _variants("sd2", [{"attention": attention} for attention in CHOICES["attention"]], batches=(1, 2, 4)),
    # A model of nine input channels, txt2img with the model that it was tuned from, and blending with that model.
    "inpaint": [
        replace(usual(model), workload=workload, sampler="ddim", **choice)
        for choice in INPAINTING
        for model, workload in (("sd1", "txt2img"), ("sd1", "inpaint"), ("sd1-inpaint", "inpaint"))
    ],
    "inpaint_smoke": [
        replace(usual(model), workload=workload, sampler="ddim", steps=20, attention=attention)
        for attention in ("original", "sdpa")
        for model, workload in (("tiny", "txt2img"), ("tiny", "inpaint"), ("tiny-inpaint", "inpaint"))
    ],
    "training": _variants(
        "sd2", [{"workload": "train", "steps": 10, **choice} for choice in TRAINING], batches=(1, 4, 16)
    ),
    "training_smoke": [
        replace(usual("tiny"), workload="train", steps=4, batch=4, **choice)
        for choice in (*SMOKE[:3], {"checkpointing": True}, {"precision": "bf16"}, {"engine": "diffusers"})
    ],
    "stages": [
        replace(usual("tiny"), workload=workload, attention=attention)
        for workload in ("text", "unet", "vae")
        for attention in ("original", "sdpa")
    ],
}


SUMMARIES = {
    "published": "the article's five configurations on SD2, batch 1, 2 and 4",
    "published_sd1": "the companion article's two on SD1, batch 2",
    "sd1_compile": "compile on SD1, the article's first exercise",
    "peers": "SD1 in diffusers (xFormers, PyTorch's attention, compiled) compared with ours, the article's second exercise",
    "peers_cpu": "OpenVINO, ONNX Runtime and diffusers beside ours on a CPU, with the embedded model",
    "ladder": "one optimisation at a time on SD2",
    "gpu_ladder": "the first minutes on a GPU: precision, CUDA graphs, layout, cuDNN's algorithms, attention kernels",
    "compile_modes": "every mode of torch.compile",
    "scopes": "compile the blocks, the UNet, the step or the whole loop",
    "inductor": "Inductor's options, one at a time",
    "approximate": "techniques that change the image, one at a time added to the preset",
    "lora": "without and with a merged LoRA of rank 16, eager and with the preset fast",
    "few_step": "1, 2 and 4 steps without guidance, as SD-Turbo and LCM use them, with each stage, compared with diffusers",
    "smoke": "the embedded model, for a machine without a GPU",
    "batches": "every attention at batch 1, 2 and 4",
    "inpaint": "inpainting models and blending compared with txt2img on SD1",
    "inpaint_smoke": "the same on the embedded models, for a machine without a GPU",
    "training": "optimiser steps of SD2: attention, compile, precision, checkpointing and diffusers at three batch sizes",
    "training_smoke": "the same on the embedded model, for a machine without a GPU",
    "stages": "text encoder, one UNet call and VAE decoder separately",
}


def suiting(device: str) -> str:
    """The name of the default set of a device."""
    return "batches" if device == "cuda" else "smoke"


DESCRIBED = ("attention", "sdpa_kernels", "precision", "optimise", "compile", "batch", "steps", "sampler")


def describe(configuration: Configuration) -> str:
    """A sentence about a configuration, such as `sd2, sdpa attention, fp16, batch 4, 50 plms steps`."""
    if configuration.own:
        values = [f"{name} {getattr(configuration, name)}" for name in configuration.given]
        return ", ".join([f"engine {configuration.engine}", *values])
    parts = [configuration.model]
    parts += [name for name in (configuration.engine, configuration.workload) if name not in ("sd", "txt2img")]
    if configuration.preset is None or configuration.engine != "sd":  # which includes attention and precision
        kernels = f" with the kernel {' or '.join(configuration.sdpa_kernels)}" if configuration.sdpa_kernels else ""
        parts += [f"{configuration.attention} attention{kernels}", configuration.precision]
    parts += [f"optimisations {configuration.optimise}"] if configuration.optimise else []
    parts += [f"torch.compile in mode {configuration.compile}"] if configuration.compile != "none" else []
    others = [name for name in configuration.given if name not in DESCRIBED]
    parts += [f"{name.replace('_', ' ')} {getattr(configuration, name)}" for name in others]
    parts.append(f"batch {configuration.batch}")
    steps = {"train": "updates", **dict.fromkeys(GENERATIONS, f"{configuration.sampler} steps")}
    parts += [f"{configuration.steps} {steps[configuration.workload]}"] if configuration.workload in steps else []
    return ", ".join(parts)
