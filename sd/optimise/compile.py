"""torch.compile of the networks and of the sampling step: modes, scopes and inductor's options, in one place."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from sd.attention.functions import Attention, allowed_kernels
from sd.attention.observation import ObservedCall
from sd.choices import COMPILE_BACKENDS
from sd.choices import INDUCTOR_OPTIONS as INDUCTOR_NAMES
from sd.errors import ConfigError, Unavailable
from sd.features import has, require
from sd.sampling.denoiser import predict_noise
from sd.sampling.samplers import HISTORY_LENGTH, Plan

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # these record CUDA graphs by themselves
# By the name under which each can be measured alone: the setting of torch._inductor.config that it is.
INDUCTOR_OPTIONS = {
    "conv_1x1_as_mm": ("conv_1x1_as_mm", True),
    "coordinate_descent_tuning": ("coordinate_descent_tuning", True),
    "coordinate_descent_check_all_directions": ("coordinate_descent_check_all_directions", True),
    "no_epilogue_fusion": ("epilogue_fusion", False),
    "shape_padding": ("shape_padding", True),
    "freezing": ("freezing", True),
}
assert tuple(INDUCTOR_OPTIONS) == INDUCTOR_NAMES, "sd.choices has the same names, for what imports no torch"
# Graphs that one piece of code may have: sizes and batches of the UNet, or its 14 kinds of block at several sizes.
GRAPHS_PER_CODE = 128


@dataclass(frozen=True)
class Compiler:
    """How functions are compiled. mode: one of COMPILE_MODES but none; inductor: names of INDUCTOR_OPTIONS.

    kernels: of SDPA, those that what is compiled may use, or empty for all. The keys under which PyTorch stores what it
    compiled do not have them, though the kernel is chosen when it compiles.
    """

    mode: str
    backend: str = "inductor"
    inductor: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = [name for name in self.inductor if name not in INDUCTOR_OPTIONS]
        if unknown:
            raise ConfigError(f"inductor options {unknown}: choose from {', '.join(INDUCTOR_OPTIONS)}")
        if self.backend not in COMPILE_BACKENDS:
            raise ConfigError(f"compile backend {self.backend!r}: choose one of {', '.join(COMPILE_BACKENDS)}")
        if self.inductor and self.backend != "inductor":
            raise ConfigError(f"inductor options {list(self.inductor)}: compile backend {self.backend} has none")

    def require(self, device: torch.device) -> None:
        """Raise Unavailable for what this torch, or for a CPU this machine, lacks."""
        require("compile", f"compile mode {self.mode}")
        if self.backend == "inductor" and device.type == "cpu":
            require_cpp_compiler(f"compile mode {self.mode}")
        if self.backend == "inductor" and self.inductor:
            from torch._inductor import config  # brings the compiler with it: seconds, and only some torch have it
        for name in self.inductor:
            if not hasattr(config, INDUCTOR_OPTIONS[name][0]):
                raise Unavailable(f"inductor option {name}: torch {torch.__version__} has none of that name")

    def __call__(self, function):
        """`function` compiled as one graph for each shape that it is called with; a graph break is an error."""
        compiled = self._compiled(function)
        if not self.kernels:
            return compiled

        def stored_apart(*arguments):
            with stored_under("sdpa " + ",".join(self.kernels)):
                return compiled(*arguments)

        return stored_apart

    def _compiled(self, function):
        how = {"fullgraph": True, "dynamic": False, "backend": self.backend}
        if has("recompile_limit"):
            how.update(recompile_limit=GRAPHS_PER_CODE)
        if self.backend != "inductor":
            return torch.compile(function, **how)
        if self.inductor:  # torch.compile takes a mode or options
            options = torch._inductor.list_mode_options(self.mode) if self.mode != "default" else {}
            options = {**options, **dict(INDUCTOR_OPTIONS[name] for name in self.inductor)}
            return torch.compile(function, options=options, **how)
        return torch.compile(function, mode=self.mode, **how)

    def keepable(self, function):
        """The same, with a result that is safe to keep: CUDA graphs write to the same memory at their next call."""
        call = self(function)
        if self.mode not in GRAPH_MODES or self.backend != "inductor":
            return call

        def cloned(*arguments):
            out = call(*arguments)
            return tuple(part.clone() for part in out) if isinstance(out, tuple) else out.clone()

        return cloned


def stored_under(tag: str):
    """Context in which what is compiled is stored under `tag` too, or, where this torch has no tags, not at all."""
    if has("cache_key_tag"):
        return torch.compiler.config.patch(
            cache_key_tag=f"{torch.compiler.config.cache_key_tag} {tag}"
        )  # the user's too
    from torch._functorch import config

    return config.patch(enable_autograd_cache=False) if hasattr(config, "enable_autograd_cache") else nullcontext()


def cpp_compiler() -> str | None:
    """The C++ compiler that inductor starts for a CPU, or None where it is not there."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def require_cpp_compiler(asked_by: str) -> None:
    """Raise Unavailable, naming the option that asked, where inductor would find no C++ compiler."""
    if cpp_compiler() is None:
        raise Unavailable(f"{asked_by}: needs a C++ compiler on a CPU; install g++, or name one in CXX")


def compile_blocks(unet, compiler: Compiler) -> None:
    """Regional compilation: every ResBlock and transformer block by itself; those of one shape share their code."""
    for block in (*unet.res_blocks, *unet.transformer_blocks()):
        block.forward = compiler(block.forward)


def restore(unet, autoencoder, text_encoder) -> None:
    """Undo every compilation of the networks."""
    for owner, name in (
        (unet, "denoise"),
        (unet, "denoise_with_features"),
        (autoencoder, "to_pixels"),
        (text_encoder, "forward"),
        *((block, "forward") for block in (*unet.res_blocks, *unet.transformer_blocks())),
    ):
        vars(owner).pop(name, None)


# Columns of a plan's table (see sd.sampling.samplers.Evaluation), then the weights of the history. sigma: sqrt(1 - alpha^2).
COLUMNS = ("t", "c_in", "c_x", "alpha", "sigma", "c_skip", "c_out", "sigma_up", "guidance")


def plan_table(plan: Plan, guidance: float | None, device, dtype=torch.float32):
    """Coefficients of a plan [evaluations, 16] on `device`: COLUMNS, then 1 + HISTORY_LENGTH weights, then zeros."""
    rows = []
    for call in plan.evaluations:
        weights = [*call.weights, *[0.0] * (1 + HISTORY_LENGTH - len(call.weights))]
        sigma = (1 - call.alpha**2) ** 0.5
        coefficients = [call.t, call.c_in, call.c_x, call.alpha, sigma, call.c_skip, call.c_out, call.sigma_up]
        rows.append([*coefficients, guidance or 0.0, *weights])
    # 16 numbers: a row then starts where inductor's kernels need no copy to align it.
    padding = [0.0] * (16 - len(rows[0]))
    return torch.tensor([[*row, *padding] for row in rows], dtype=torch.float64).to(device, dtype)


class CompiledStep:
    """The sampling loop with one compiled graph for a step: UNet, guidance and sampler update.

    Every coefficient is a tensor, so that no step, no sampler, no guidance scale and no prompt compiles again; only a
    new shape does, and whether there is guidance and noise. It is the open problem of the published experiment.
    """

    def __init__(self, unet, compiler: Compiler, attention: Attention):
        self.unet, self.attention = unet, attention
        self.call = ObservedCall(compiler.keepable(self._step))
        self.tables = {}

    def _step(self, x, timesteps, context, row, history, noise, guided: bool, predicts_v: bool):
        """(x, output) after one evaluation. row [16]: of the plan's table; history: HISTORY_LENGTH outputs, newest first."""
        size = len(COLUMNS) + 1 + HISTORY_LENGTH
        t, c_in, c_x, alpha, sigma, c_skip, c_out, sigma_up, guidance, *weights = row[:size]
        if timesteps is None:
            timesteps = t.expand(len(x) * (2 if guided else 1))
        alpha_sigma = (alpha, sigma) if predicts_v else None
        e = predict_noise(self.unet.denoise, c_in * x, timesteps, context, guidance if guided else None, alpha_sigma)
        output = c_skip * x + c_out * e
        x = c_x * x
        for weight, past in zip(weights, (output, *history)):
            x = x + weight * past
        return x if noise is None else x + sigma_up * noise, output

    def __call__(self, plan: Plan, denoise, x, noises=None, on_step=None):
        """As sd.sampling.samplers.run."""
        if not plan.evaluations:  # img2img of a strength that leaves no step: there is no table to make
            return plan.init_noise_sigma * x
        key = (plan, denoise.guidance, x.device, x.dtype)
        if key not in self.tables:  # copied to the device at the first run alone
            self.tables[key] = plan_table(plan, denoise.guidance, x.device, x.dtype)
        table = self.tables[key]
        x = plan.init_noise_sigma * x
        history = tuple(torch.zeros_like(x) for _ in range(HISTORY_LENGTH))
        step = 0
        for i, evaluation in enumerate(plan.evaluations):
            timesteps = None if denoise.time_table is None else denoise.timesteps(evaluation.t, x)
            noise = None if noises is None else noises[i]
            guided = denoise.guidance is not None
            with allowed_kernels(self.attention):
                x, output = self.call(
                    x, timesteps, denoise.context, table[i], history, noise, guided, denoise.predicts_v
                )
            history = (output, *history[:-1])
            if evaluation.ends_step:
                step += 1
                if on_step is not None:
                    on_step(step, plan.steps)
        return x
