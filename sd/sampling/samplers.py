"""Samplers: functions from a grid of steps to a plan of denoiser calls, and their registry by name.

    plan = sampler("euler")(schedule, steps=4, timestep_spacing="trailing")

docs/samplers.md has the table of samplers. The steps end at alpha_0 where the original scripts end there, else at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sd.errors import ConfigError
from sd.sampling.grid import Grid, alpha_of, check_sigmas, karras_sigmas, lcm_grid, sigma_of, spaced_timesteps
from sd.sampling.plan import Evaluation, Plan
from sd.sampling.schedule import Schedule

# --- in the variables of DDPM, x = alpha x_0 + sqrt(1 - alpha^2) noise


def _ddim_coefficients(alpha: float, alpha_next: float, sigma_up: float = 0.0) -> tuple[float, float]:
    """(of x, of e) in DDIM's step: alpha_next x_0 + sigma_next e with x_0 = (x - sigma e) / alpha."""
    c_x = alpha_next / alpha
    return c_x, math.sqrt(1 - alpha_next**2 - sigma_up**2) - c_x * math.sqrt(1 - alpha**2)


def ddim(grid: Grid, eta: float = 0.0) -> Plan:
    """DDIM (arXiv 2010.02502); eta 1 is ancestral sampling.

    Raises ConfigError if eta makes the noise of a step exceed the noise level of its next timestep.
    """
    evaluations = []
    for t, alpha, alpha_next in zip(grid.timesteps, grid.alphas, grid.alphas[1:]):
        sigma_up = eta * math.sqrt((1 - alpha_next**2) / (1 - alpha**2) * (1 - alpha**2 / alpha_next**2))
        if sigma_up**2 > 1 - alpha_next**2:
            raise ConfigError(f"eta {eta:g} is too large for {len(grid)} steps: use 0 to 1")
        c_x, weight = _ddim_coefficients(alpha, alpha_next, sigma_up)
        evaluations.append(Evaluation(t, alpha, c_x, (weight,), sigma_up=sigma_up))
    return Plan(tuple(evaluations), draws_noise=True)


# Adams-Bashforth weights, newest prediction first, by the number of older predictions.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(grid: Grid) -> Plan:
    """PLMS (arXiv 2202.09778, as in CompVis/latent-diffusion): S steps, S + 1 UNet calls; the history holds raw predictions."""
    evaluations = []
    for i, (t, alpha, alpha_next) in enumerate(zip(grid.timesteps, grid.alphas, grid.alphas[1:])):
        c_x, weight = _ddim_coefficients(alpha, alpha_next)
        if i == 0:  # Heun's method: a trial step with e, then from the same x with (e + e') / 2
            evaluations.append(Evaluation(t, alpha, c_x, (weight,), ends_step=False))
            second = min(1, len(grid) - 1)
            evaluations.append(Evaluation(grid.timesteps[second], grid.alphas[second], 1.0, (weight / 2, -weight / 2)))
            continue
        weights = [weight * part for part in ADAMS_BASHFORTH[min(i, 3)]]
        if i <= 3:
            weights.insert(i, 0.0)  # the trial's prediction e' is not used again
        evaluations.append(Evaluation(t, alpha, c_x, tuple(weights)))
    return Plan(tuple(evaluations), draws_noise=True)


def _half_log_snr(alpha: float) -> float:
    return math.log(alpha / math.sqrt(1 - alpha**2))


def _predicting_x0(grid: Grid, i: int, c_x: float, weights: tuple[float, ...], sigma_up: float = 0.0) -> Evaluation:
    """The denoiser call of step i whose output is x_0 = (x - sigma e) / alpha."""
    alpha = grid.alphas[i]
    c_skip, c_out = 1 / alpha, -math.sqrt(1 - alpha**2) / alpha
    return Evaluation(grid.timesteps[i], alpha, c_x, weights, c_skip=c_skip, c_out=c_out, sigma_up=sigma_up)


def _dpm_solver(grid: Grid, stochastic: bool) -> Plan:
    steps, evaluations = len(grid), []
    for i in range(steps):
        alpha, alpha_next = grid.alphas[i : i + 2]
        if alpha_next == 1.0:  # to the image itself, where the half-log SNR is infinite: first order
            evaluations.append(_predicting_x0(grid, i, 0.0, (1.0,)))
            continue
        sigma, sigma_next = math.sqrt(1 - alpha**2), math.sqrt(1 - alpha_next**2)
        h = _half_log_snr(alpha_next) - _half_log_snr(alpha)
        shrink, sigma_up = (math.exp(-h), sigma_next * math.sqrt(-math.expm1(-2 * h))) if stochastic else (1.0, 0.0)
        weight = -alpha_next * math.expm1(-2 * h if stochastic else -h)
        weights: tuple[float, ...] = (weight,)
        if i > 0 and (i < steps - 1 or grid.whole >= 15):
            slope = h / (2 * (_half_log_snr(alpha) - _half_log_snr(grid.alphas[i - 1])))
            weights = (weight * (1 + slope), -weight * slope)
        evaluations.append(_predicting_x0(grid, i, sigma_next / sigma * shrink, weights, sigma_up))
    return Plan(tuple(evaluations), draws_noise=stochastic)


def dpm_solver(grid: Grid) -> Plan:
    """DPM-Solver++ 2M (arXiv 2211.01095) with the original's settings: linspace timesteps, midpoint, S UNet calls."""
    return _dpm_solver(grid, stochastic=False)


def dpm_solver_sde(grid: Grid) -> Plan:
    """SDE-DPM-Solver++ 2M (arXiv 2211.01095, section 4.3), midpoint; known as DPM++ 2M SDE."""
    return _dpm_solver(grid, stochastic=True)


def unipc(grid: Grid) -> Plan:
    """UniPC of order 2 (arXiv 2302.04867) with B_2(h) = e^h - 1, predicting x_0: S UNet calls.

    The corrector of a step uses the prediction at its end, which is that of the next step: it changes x by the difference
    of corrector's and predictor's weights, so that corrector and next predictor are one update.
    """
    evaluations, previous = [], None
    for i in range(len(grid)):
        order = min(2, i + 1, len(grid) - i)
        step = _UniPCStep(grid, i, order)
        correction = (0.0, 0.0, 0.0) if previous is None else previous.correction()
        predicted = (*step.predictor(), 0.0)
        weights = tuple(step.c_x * change + weight for change, weight in zip(correction, predicted))
        evaluations.append(_predicting_x0(grid, i, step.c_x, weights))
        previous = step
    return Plan(tuple(evaluations))


class _UniPCStep:
    """Coefficients of UniPC for step i of a grid, of order 1 or 2: x becomes c_x x + weights of the predictions of x_0."""

    def __init__(self, grid: Grid, i: int, order: int):
        alpha, alpha_next = grid.alphas[i : i + 2]
        last = alpha_next == 1.0
        self.order = order
        self.c_x = math.sqrt(1 - alpha_next**2) / math.sqrt(1 - alpha**2)
        self.minus_h = -math.inf if last else _half_log_snr(alpha) - _half_log_snr(alpha_next)
        self.scale = -alpha_next * math.expm1(self.minus_h)  # of x_0 in first order, and of B(h)
        self.ratio = 0.0  # of the previous step in the half-log SNR to this one, negative
        if order == 2:
            self.ratio = (_half_log_snr(grid.alphas[i - 1]) - _half_log_snr(alpha)) / -self.minus_h

    def predictor(self) -> tuple[float, float]:
        """Weights of the predictions at the start of the step and at the start of the step before."""
        if self.order == 1:
            return self.scale, 0.0
        difference = 0.5 / self.ratio
        return self.scale * (1 - difference), self.scale * difference

    def correction(self) -> tuple[float, float, float]:
        """Change of weights by the corrector: of the predictions at the end, at the start, and at the start of the step before."""
        rho_before, rho_end = 0.0, 0.5
        if (
            self.order == 2
        ):  # the solution of the paper's 2 x 2 system: sum of rho = b_1, rho_before ratio + rho_end = b_2
            phi_1 = math.expm1(self.minus_h)
            phi_2 = phi_1 / self.minus_h - 1
            b_1, b_2 = phi_2 / phi_1, 2 * (phi_2 / self.minus_h - 0.5) / phi_1
            rho_before = (b_1 - b_2) / (1 - self.ratio)
            rho_end = b_1 - rho_before
        before = 0.0 if self.order == 1 else rho_before / self.ratio
        start, earlier = self.predictor()
        corrected = self.scale * (1 - rho_end - before), self.scale * before
        return self.scale * rho_end, corrected[0] - start, corrected[1] - earlier


def lcm(grid: Grid) -> Plan:
    """Multistep sampling of latent consistency models (arXiv 2310.04378): predict the image, add fresh noise.

    The boundary condition's weights are of sigma_data 0.5 and timesteps scaled by 10.
    """
    evaluations = []
    for i, t in enumerate(grid.timesteps):
        alpha, alpha_next = grid.alphas[i : i + 2]
        scaled = 10 * t
        boundary_skip = 0.25 / (scaled**2 + 0.25)
        boundary_out = scaled / math.sqrt(scaled**2 + 0.25)
        c_skip, c_out = boundary_skip + boundary_out / alpha, -boundary_out * math.sqrt(1 - alpha**2) / alpha
        sigma_up = math.sqrt(1 - alpha_next**2)
        evaluations.append(Evaluation(t, alpha, 0.0, (alpha_next,), c_skip=c_skip, c_out=c_out, sigma_up=sigma_up))
    return Plan(tuple(evaluations), draws_noise=True)


# --- in k-diffusion's variables, x / alpha = x_0 + sigma noise


def euler(grid: Grid) -> Plan:
    """Euler's method (arXiv 2206.00364, algorithm 2 without churn)."""
    evaluations = []
    for t, alpha, sigma, sigma_next in zip(grid.timesteps, grid.alphas, grid.sigmas, grid.sigmas[1:]):
        evaluations.append(Evaluation(t, alpha, 1.0, (sigma_next - sigma,), c_in=alpha))
    return Plan(tuple(evaluations), init_noise_sigma=grid.init_noise_sigma)


def euler_ancestral(grid: Grid) -> Plan:
    """Euler's method to a lower noise level, then fresh noise (k-diffusion's sample_euler_ancestral with eta 1)."""
    evaluations = []
    for t, alpha, sigma, sigma_next in zip(grid.timesteps, grid.alphas, grid.sigmas, grid.sigmas[1:]):
        sigma_up = sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
        sigma_down = sigma_next**2 / sigma
        evaluations.append(Evaluation(t, alpha, 1.0, (sigma_down - sigma,), c_in=alpha, sigma_up=sigma_up))
    return Plan(tuple(evaluations), init_noise_sigma=grid.init_noise_sigma, draws_noise=True)


def heun(grid: Grid) -> Plan:
    """Heun's method (arXiv 2206.00364, algorithm 1): a trial step, then the mean of both slopes; S steps, 2 S - 1 UNet calls."""
    evaluations = []
    for i, (t, sigma, sigma_next) in enumerate(zip(grid.timesteps, grid.sigmas, grid.sigmas[1:])):
        dt, alpha = sigma_next - sigma, grid.alphas[i]
        last = i == len(grid) - 1
        evaluations.append(Evaluation(t, alpha, 1.0, (dt,), c_in=alpha, ends_step=last))
        if not last:  # from the end of the trial step, whose slope counts half
            t_next, alpha_next = grid.timesteps[i + 1], grid.alphas[i + 1]
            evaluations.append(Evaluation(t_next, alpha_next, 1.0, (dt / 2, -dt / 2), c_in=alpha_next))
    return Plan(tuple(evaluations), init_noise_sigma=grid.init_noise_sigma)


# --- the registry


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, with the grid that it needs.

    build: function of the grid, and of eta if takes_eta. spacing: default timestep spacing; None for a grid of its own.
    endpoint: see sd.sampling.grid.spaced_timesteps. ends_at_zero: the last step ends without noise, not at timestep 0.
    karras: whether it accepts Karras sigmas.
    """

    name: str
    build: Callable[..., Plan]
    spacing: str | None
    endpoint: bool = False
    ends_at_zero: bool = False
    karras: bool = False
    takes_eta: bool = False
    minimum: int = 1

    def __call__(
        self,
        schedule: Schedule,
        steps: int,
        eta: float = 0.0,
        timestep_spacing: str | None = None,
        sigmas: str = "schedule",
        strength: float | None = None,
    ) -> Plan:
        """Plan of `steps` steps. Raises ConfigError, naming the sampler, for what it does not have.

        timestep_spacing: one of sd.choices.TIMESTEP_SPACINGS, None for the sampler's own. sigmas: `schedule` or `karras`.
        strength: None from noise; for img2img the fraction of the steps, the last ones, from x at the noise level of the first.
        """
        if not (math.isfinite(eta) and eta >= 0):
            raise ConfigError(f"{self.name}: eta {eta}: must be a finite number of at least 0")
        if eta and not self.takes_eta:
            raise ConfigError(f"{self.name}: eta must be 0; use the ddim sampler for another")
        if steps > len(schedule):
            raise ConfigError(
                f"{self.name}: {steps} steps are more than the {len(schedule)} timesteps of the noise schedule: use fewer"
            )
        if steps < self.minimum:
            raise ConfigError(f"{self.name}: needs at least {self.minimum} steps")
        check_sigmas(sigmas)
        if sigmas != "schedule" and not self.karras:
            having = ", ".join(name for name, other in SAMPLERS.items() if other.karras)
            raise ConfigError(f"{self.name}: has no {sigmas} sigmas; choose one of {having}")
        if self.spacing is None:
            if timestep_spacing is not None:
                raise ConfigError(
                    f"{self.name}: has timesteps of its own; leave out timestep spacing {timestep_spacing}"
                )
            grid = lcm_grid(schedule, steps, 1.0 if strength is None else strength)
        else:
            grid = self.grid(schedule, steps, timestep_spacing or self.spacing, sigmas)
            if strength is not None:
                grid = grid.last(min(int(strength * steps), len(grid)))
        return self.build(grid, eta) if self.takes_eta else self.build(grid)

    def grid(self, schedule: Schedule, steps: int, spacing: str, sigmas: str = "schedule") -> Grid:
        """The steps of a run from noise."""
        if spacing == "leading" and self.spacing == "leading":  # the original's, which may be one more
            timesteps = [float(t) for t in reversed(schedule.uniform_timesteps(steps))]
        else:
            timesteps = spaced_timesteps(schedule, spacing, steps, self.endpoint)
        if sigmas == "karras":
            # Of Euler's and Heun's methods between the timesteps of the spacing, else over the whole schedule.
            high, low = (timesteps[0], timesteps[-1]) if self.endpoint else (len(schedule) - 1, 0)
            levels = karras_sigmas(schedule.sigma(high), schedule.sigma(low), steps)
            timesteps = [schedule.timestep(sigma) for sigma in levels]
        elif self.endpoint:
            levels = [schedule.sigma(t) for t in timesteps]
        else:
            levels = []
        alphas = [alpha_of(sigma) for sigma in levels] or [schedule.alpha(t) for t in timesteps]
        alphas.append(1.0 if self.ends_at_zero or sigmas == "karras" else schedule.alpha(0))
        levels = [*levels, 0.0] if levels else [sigma_of(alpha) for alpha in alphas]
        from_sigma = spacing in ("linspace", "trailing")  # as in diffusers; else x_T has the variance of data and noise
        init_noise_sigma = levels[0] if from_sigma else math.sqrt(1 + levels[0] ** 2)
        return Grid(tuple(timesteps), tuple(alphas), tuple(levels), init_noise_sigma, len(timesteps))


_DEFINITIONS = (
    Sampler("ddim", ddim, "leading", takes_eta=True),
    Sampler("plms", plms, "leading"),
    Sampler("dpm_solver", dpm_solver, "linspace", karras=True, minimum=2),
    Sampler("euler", euler, "linspace", endpoint=True, ends_at_zero=True, karras=True),
    Sampler("euler_ancestral", euler_ancestral, "linspace", endpoint=True, ends_at_zero=True, karras=True),
    Sampler("heun", heun, "linspace", endpoint=True, ends_at_zero=True, karras=True),
    Sampler("dpm_solver_sde", dpm_solver_sde, "linspace", ends_at_zero=True, karras=True),
    Sampler("unipc", unipc, "linspace", ends_at_zero=True, karras=True),
    Sampler("lcm", lcm, None),
)
SAMPLERS = {definition.name: definition for definition in _DEFINITIONS}


def sampler(name: str) -> Sampler:
    """The sampler `name`. Raises ConfigError, with the known names, for others."""
    try:
        return SAMPLERS[name]
    except KeyError:
        raise ConfigError(f"no sampler {name!r}: choose one of {', '.join(SAMPLERS)}") from None
