"""Samplers: from noise to a clean image, by as many evaluations of the model as are asked for.

With levels alpha and sigma of x_t = alpha x_0 + sigma eps (model/diffusion.py), each sampler follows

    d(x / alpha) = eps d(sigma / alpha)     for ddpm        arXiv 2010.02502, equation 14
    dx = (eps - x_0) d(sigma)               for flow        arXiv 2209.03003

where x_0 and eps are the model's predictions at x. The samplers differ in how they step from t to t_next:

    ddim, euler  with the prediction at t. This is Euler's method for both equations, and DDIM for ddpm.
    ddpm         as ddim, but a part of the noise in x is replaced by new noise. It is there for ddpm alone.
    heun         with the mean of the derivatives at t and at the end of Euler's step (arXiv 2206.00364, algorithm 1).
    dpm++        with x_0, as a function of log(alpha / sigma), extrapolated from the last two evaluations:
                 DPM-Solver++(2M), arXiv 2211.01095, algorithm 2.

They are written here because timesteps may lie between whole ones, and the schedules of libraries are tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.model.diffusion import Diffusion

Denoise = Callable[[Tensor, float], Tensor]
"""Returns the clean x_0 that the model predicts for x at a timestep."""


def sampler_of(name: str, diffusion: Diffusion) -> str:
    """Return the sampler that a setting names; "auto" is ddpm, and euler for flow.

    Raises:
        InputError: the sampler is not defined for flow.
    """
    if name == "auto":
        return "euler" if diffusion.is_flow else "ddpm"
    if diffusion.is_flow and name in ("ddpm", "ddim"):
        raise InputError(f"the sampler of a flow model must be euler, heun or dpm++, got {name}; take one of these")
    return name


def num_intervals(sampler: str, steps: int) -> int:
    """Return the number of intervals that `steps` evaluations of the model can cross.

    Heun's method takes two in each, but one in the last, where sigma becomes 0, and in the one before if steps is even.
    """
    return steps // 2 + 1 if sampler == "heun" else steps


def draw(
    sampler: str,
    diffusion: Diffusion,
    x: Tensor,
    timesteps: Sequence[float],
    denoise: Denoise,
    steps: int,
    *,
    eta: float = 1.0,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return the image at the last of the timesteps, which fall, for x at the first one.

    `timesteps` are the ends of `num_intervals(sampler, steps)` intervals. Only ddpm uses `eta` and `noise`, which
    returns new standard normal noise in x's shape.
    """
    if sampler == "dpm++":
        return _dpm_solver(diffusion, x, timesteps, denoise)
    if sampler == "heun":
        return _heun(diffusion, x, timesteps, denoise, steps - (len(timesteps) - 1))
    for t, t_next in pairwise(timesteps):
        eta_now = eta if sampler == "ddpm" and t_next > 0 else 0.0
        new = noise() if eta_now > 0 and noise is not None else None
        x = step(diffusion, x, denoise(x, t), t, t_next, eta=eta_now, noise=new)
    return x


def step(
    diffusion: Diffusion, x: Tensor, x_0: Tensor, t: float, t_next: float, *, eta: float = 0.0, noise: Tensor | None
) -> Tensor:
    """Return x at t_next: the predicted x_0 and its eps, mixed as at t_next (arXiv 2010.02502, equations 12 and 16).

    A part of eps is replaced by `noise`, standard normal in x's shape, which is needed unless eta is 0: with eta 0 none
    is, which is DDIM; with eta 1 as much as in ancestral sampling (DDPM); with more than 1 more, and at most all of it.

    Raises:
        ValueError: no noise where it is needed.
    """
    (alpha, sigma), (alpha_next, sigma_next) = diffusion.levels(t), diffusion.levels(t_next)
    eps = (x - alpha * x_0) / sigma
    ancestral = (sigma_next / sigma) ** 2 * (1 - (alpha / alpha_next) ** 2)
    variance = min(eta * eta * ancestral, sigma_next**2)
    mean = alpha_next * x_0 + math.sqrt(sigma_next**2 - variance) * eps
    if variance == 0:
        return mean
    if noise is None:
        raise ValueError("noise must be given unless eta is 0, got None; draw it in x's shape")
    return mean + math.sqrt(variance) * noise


def _heun(diffusion: Diffusion, x: Tensor, timesteps: Sequence[float], denoise: Denoise, corrected: int) -> Tensor:
    """Cross the intervals by Euler's method, and correct the first `corrected` ones."""

    def derivative(x: Tensor, x_0: Tensor, t: float) -> Tensor:
        alpha, sigma = diffusion.levels(t)
        return (x - x_0 if diffusion.is_flow else x - alpha * x_0) / sigma

    for number, (t, t_next) in enumerate(pairwise(timesteps)):
        x_0 = denoise(x, t)
        euler = step(diffusion, x, x_0, t, t_next, noise=None)
        if number < corrected:
            (alpha, sigma), (alpha_next, sigma_next) = diffusion.levels(t), diffusion.levels(t_next)
            length = sigma_next - (sigma if diffusion.is_flow else sigma * alpha_next / alpha)
            change = derivative(euler, denoise(euler, t_next), t_next) - derivative(x, x_0, t)
            euler = euler + 0.5 * length * change
        x = euler
    return x


def _dpm_solver(diffusion: Diffusion, x: Tensor, timesteps: Sequence[float], denoise: Denoise) -> Tensor:
    before: Tensor | None = None  # x_0 of the last interval
    length_before = 0.0  # of the last interval, in log(alpha / sigma); infinite where alpha is 0 at its start
    for t, t_next in pairwise(timesteps):
        (alpha, sigma), (alpha_next, sigma_next) = diffusion.levels(t), diffusion.levels(t_next)
        x_0 = estimate = denoise(x, t)
        length = math.inf
        if alpha > 0 and sigma_next > 0:
            length = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        if before is not None and sigma_next > 0:  # the last step is of first order, as it has no end to extrapolate to
            estimate = x_0 + (0.5 * length / length_before) * (x_0 - before)
        x = (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * estimate
        before, length_before = x_0, length
    return x
