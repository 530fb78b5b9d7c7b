"""Plans: all denoiser calls of a sampler run with their coefficients, computed before the first step.

    plan = sampler("plms")(schedule, steps)
    x_0 = run(plan, denoise, x, plan.noises(source, x))

All samplers are linear multistep methods with one update rule (see Evaluation), executed with Python floats here and as one
compiled graph in sd.optimise.compile. denoise(x, t, alpha) returns the noise prediction for x (see sd.sampling.denoiser).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sd.sampling.blend import Blend
from sd.sampling.noise import NoiseSource

HISTORY_LENGTH = 4  # older outputs that an update may use: Adams-Bashforth's three, and the trial of PLMS between them
Denoise = Callable[[Tensor, float, float], Tensor]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """A denoiser call and the update after it, in the terms of EDM (arXiv 2206.00364) and DDIM.

    e = denoise(c_in x, t, alpha) predicts the noise; the output h_0 = c_skip x + c_out e is stored before h_1, h_2, ...,
    those of earlier calls, newest first; then x becomes c_x x + sum_j weights[j] h_j + sigma_up z with unit noise z.
    """

    t: float
    alpha: float
    c_x: float
    weights: tuple[float, ...]
    c_in: float = 1.0
    c_skip: float = 0.0
    c_out: float = 1.0
    sigma_up: float = 0.0
    ends_step: bool = True


@dataclass(frozen=True)
class Plan:
    """All denoiser calls of a run.

    init_noise_sigma: scale of x_T. draws_noise: whether the original draws noise at every call, used or not.
    """

    evaluations: tuple[Evaluation, ...]
    init_noise_sigma: float = 1.0
    draws_noise: bool = False

    @property
    def steps(self) -> int:
        """Number of sampler steps; for PLMS one fewer than denoiser calls."""
        return sum(evaluation.ends_step for evaluation in self.evaluations)

    def noise_level(self, i: int) -> tuple[float, float]:
        """(alpha, c_in) at evaluation i; (1, 1), which is no noise, after the last."""
        return (self.evaluations[i].alpha, self.evaluations[i].c_in) if i < len(self.evaluations) else (1.0, 1.0)

    def noises(self, source: NoiseSource, x: Tensor) -> Tensor | None:
        """Noise of all evaluations [E, B, 4, h, w] on x's device, or None if none is used.

        Drawn before the first step in the order of the steps, so that no step waits for a copy to the device.
        """
        used = [evaluation.sigma_up > 0 for evaluation in self.evaluations]
        return source.steps(x, used) if self.draws_noise else None


def run(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noises: Tensor | None = None,
    on_step: OnStep | None = None,
    blend: Blend | None = None,
) -> Tensor:
    """x_T [B, 4, h, w] float32, unit Gaussian noise -> x_0. noises: from `Plan.noises`. on_step(i, count) after each step.

    blend: restores a part of the image after each step.

    Never synchronises with the device: every coefficient is a Python float, passed as an argument of its kernel.
    """
    x = x if plan.init_noise_sigma == 1.0 else plan.init_noise_sigma * x
    history: list[Tensor] = []  # newest first
    step = 0
    for i, evaluation in enumerate(plan.evaluations):
        scaled = x if evaluation.c_in == 1.0 else evaluation.c_in * x
        output = denoise(scaled, evaluation.t, evaluation.alpha)
        if (evaluation.c_skip, evaluation.c_out) != (0.0, 1.0):
            output = torch.add(evaluation.c_skip * x, output, alpha=evaluation.c_out)
        history = [output, *history[:HISTORY_LENGTH]]
        if evaluation.c_x != 1.0:
            x = evaluation.c_x * x
        for weight, past in zip(evaluation.weights, history):
            if weight:
                x = torch.add(x, past, alpha=weight)
        if evaluation.sigma_up:
            assert noises is not None, "this plan adds noise: pass Plan.noises"
            x = torch.add(x, noises[i], alpha=evaluation.sigma_up)
        if evaluation.ends_step:
            step += 1
            if blend is not None:
                x = blend(x, *plan.noise_level(i + 1))
            if on_step is not None:
                on_step(step, plan.steps)
    return x
