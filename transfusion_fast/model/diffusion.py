"""Diffusion of images: how noise is added, what the model predicts, and the loss of the prediction.

Timesteps t are fp32 in (0, T], T = 1000: 0 is a clean image, T is noise. With x_0 clean, eps standard normal noise and
two levels alpha and sigma, which depend on t,

    x_t = alpha x_0 + sigma eps
    ddpm: alpha^2 = alpha_bar(t), sigma^2 = 1 - alpha_bar(t)                               arXiv 2006.11239, equation 4
    flow: alpha = 1 - t / T, sigma = t / T                                                 arXiv 2210.02747, 2403.03206

Every prediction is a x_0 + b eps:

    eps                            arXiv 2006.11239, equation 14
    x0        x_0                  arXiv 2511.13720
    v         alpha eps - sigma x_0                                                        arXiv 2202.00512, section 4
    velocity  dx_t / dt: eps - x_0 for flow (t from 0 to 1); v for ddpm, the derivative by the angle atan(sigma / alpha)

Given x_t, an error e of x_0 is one of -e alpha / sigma of eps. So with d = b alpha - a sigma, the error of one
prediction is that of another times the ratio of their d, and the loss in any space is that of the prediction with a
weight for each image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.diffusion_config import DiffusionConfig
from transfusion_fast.model import ops

NUM_TIMESTEPS = 1000
MIN_DIVISOR = 0.05
"""Least d that the loss of another space divides by (arXiv 2511.13720: t, where x0 is predicted): weights are at most
400, where they would be infinite at one end of the timesteps."""
MIN_SIGNAL = 2.0**-8
"""Least alpha at which sampling asks for eps: the distance of bf16 numbers near 1."""
SNR_GAMMA = 5.0
"""Largest weight of min-SNR in the space of x0 (arXiv 2303.09556)."""
WIDE_PATCH = 256
"""Values of a patch above which it is doubtful to predict noise or a velocity: both fail in arXiv 2511.13720 at 768."""

Level = TypeVar("Level", float, Tensor)


def cosine_alpha_bar(t: Tensor | float, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Return alpha_bar of the cosine schedule (arXiv 2102.09672, equation 17), fp64.

    It is f(t) / f(0) with f(t) = cos^2((t/T + s) / (1 + s) * pi/2), but at least (1 - max_beta) f(T - 1) / f(0), so
    that no beta exceeds `max_beta`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    quarter = math.pi / 2
    start, last = (math.cos((t / NUM_TIMESTEPS + s) / (1 + s) * quarter) ** 2 for t in (0, NUM_TIMESTEPS - 1))
    angle = (t / NUM_TIMESTEPS + s) / (1 + s) * quarter
    return (torch.cos(angle).square() / start).clamp_min(last / start * (1 - max_beta))


def linear_alpha_bar(t: Tensor | float, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Return the product of 1 - beta over the steps up to t, with linear betas (arXiv 2006.11239, section 4), fp64.

    The factors fall by `delta`, so the product is delta^t Gamma(m + 1) / Gamma(m + 1 - t) with m = (1 - first) / delta,
    which is smooth between whole steps.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    delta = (last - first) / (NUM_TIMESTEPS - 1)
    end = (1 - first) / delta + 1
    return (t * math.log(delta) + math.lgamma(end) - torch.lgamma(end - t)).clamp_max(0).exp()


SCHEDULES: dict[str, Callable[..., Tensor]] = {"cosine": cosine_alpha_bar, "linear": linear_alpha_bar}


class Diffusion:
    """The diffusion that settings describe; a value without parameters, which data workers use too."""

    def __init__(self, config: DiffusionConfig):
        self.settings = settings = config.with_defaults()
        self.is_flow: bool = settings["process"] == "flow"
        self.alpha_bar = SCHEDULES[settings["schedule"] or "cosine"]  # of ddpm
        self.prediction: str = settings["prediction"]

    def warn_of_wide_patches(self, widths: Sequence[int]) -> None:
        """Warn where a prediction holds the noise of so many values that a model can hardly pass it on."""
        if self.prediction != "x0" and max(widths, default=0) > WIDE_PATCH:
            warnings.warn(
                f"{self.prediction} should be predicted for patches of at most {WIDE_PATCH} values, got {max(widths)}; "
                "set model.diffusion.prediction=x0 and model.diffusion.loss=velocity, or make patches smaller",
                stacklevel=1,  # one place for all models, so that Python shows it once in a process
            )

    def variances(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha^2 and sigma^2 at t, fp64."""
        if self.is_flow:
            fraction = torch.as_tensor(t, dtype=torch.float64) / NUM_TIMESTEPS
            return (1 - fraction).square(), fraction.square()
        alpha_bar = self.alpha_bar(t)
        return alpha_bar, 1 - alpha_bar

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t. t broadcasts against x_0 and eps."""
        if self.is_flow:
            return torch.lerp(x_0, eps, (t / NUM_TIMESTEPS).to(x_0.dtype).expand_as(x_0))
        alpha, sigma = (x.sqrt().to(x_0.dtype) for x in self.variances(t))
        return alpha * x_0 + sigma * eps

    def training_timesteps(self, u: Tensor, patches: Tensor | int, cap: Tensor | float = NUM_TIMESTEPS) -> Tensor:
        """Map u in [0, 1) to timesteps of images of `patches` patches, conditioned on being at most `cap`, fp32.

        Those of flow lie in (0, cap]. Those of ddpm are whole steps from 1 to the cap, which must be at least 1.
        """
        u, cap, shift = u.double(), torch.as_tensor(cap, dtype=torch.float64), self._shift(patches)
        cap = cap if self.is_flow else cap.floor()
        unshifted_cap = _shifted(cap, 1 / shift).clamp_max(NUM_TIMESTEPS)  # rounding could exceed it
        if self.settings["timesteps"] == "uniform":
            t = u * unshifted_cap
        else:  # arXiv 2403.03206, section 3.1
            below_cap = torch.special.ndtr(torch.logit(unshifted_cap / NUM_TIMESTEPS))
            t = torch.sigmoid(torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7) * below_cap)) * NUM_TIMESTEPS
        t = _shifted(t, shift)
        if self.is_flow:
            return torch.minimum(t, cap).float().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.minimum(t.floor() + 1, cap).float()

    def sampling_timesteps(self, intervals: int, patches: int, strength: float = 1.0) -> list[float]:
        """Return the ends of a sampler's intervals, from the first timestep to 0, shifted as those of training.

        With a `strength` below 1 the first one is at most strength * T.
        """
        first = min(self.first_timestep(), strength * NUM_TIMESTEPS)
        even = torch.from_numpy(np.linspace(first, 0, intervals + 1))
        return _shifted(even, self._shift(patches), first).tolist()

    def first_timestep(self) -> float:
        """Return the timestep where sampling begins: T, or if eps is predicted the last one with a signal.

        An error of eps becomes one of x_0 that is 1 / alpha times as large. At T, where alpha is 0 for flow and 5e-5 on
        the cosine schedule, bf16 rounds the signal away. The other predictions divide by sigma or more, which is 1
        there.
        """
        if self.prediction != "eps":
            return NUM_TIMESTEPS
        signal, _ = self.variances(torch.arange(NUM_TIMESTEPS + 1))
        return int((signal >= MIN_SIGNAL**2).sum()) - 1

    def _shift(self, patches: Tensor | int) -> Tensor:
        """Return the factor of the shift of images of `patches` patches, fp64 (arXiv 2403.03206, equation 23)."""
        base, patches = self.settings["shift_patches"], torch.as_tensor(patches, dtype=torch.float64)
        return self.settings["shift"] * (torch.ones_like(patches) if base is None else (patches / base).sqrt())

    def losses(
        self,
        prediction: Tensor,
        x_0: Tensor,
        eps: Tensor,
        timesteps: Tensor,
        image_offsets: Tensor,
        backend: ops.Backend = "auto",
    ) -> Tensor:
        """Return the loss of each image, fp32 [N], from [P, C] and timesteps [N]: its mean squared error, weighted."""
        if self.prediction in ("eps", "x0"):
            target = eps if self.prediction == "eps" else x_0
            errors = ops.diffusion_mse(prediction, target, image_offsets, backend=backend)
        else:
            coefficients = None  # eps - x_0
            if not (self.is_flow and self.prediction == "velocity"):
                alpha, sigma = (x.sqrt() for x in self.variances(timesteps))
                coefficients = torch.stack(self._coefficients(self.prediction, alpha, sigma), dim=1).float()
            errors = ops.diffusion_mse_from_noise(prediction, x_0, eps, image_offsets, coefficients, backend=backend)
        weights = self.weights(timesteps)
        return errors if weights is None else errors * weights

    def weights(self, t: Tensor) -> Tensor | None:
        """Return the weight of the squared error of the prediction at each timestep, fp32; None where all are 1.

        It is (d of the loss / d of the prediction)^2. With min-SNR it is (d of x0 / d of the prediction)^2 times
        min(SNR, gamma), the weight of an error of x_0, and the space of the loss does not matter.
        """
        if self.settings["weighting"] == "min_snr":
            # Away from 0, where quotients of levels would be 0 / 0 instead of their limits.
            alpha, sigma = (x.sqrt().clamp_min(1e-6) for x in self.variances(t))
            own = self._scale(self.prediction, alpha, sigma)
            return (torch.minimum(alpha.square(), SNR_GAMMA * sigma.square()) / own.square()).float()
        if self.settings["loss"] == self.prediction:
            return None
        alpha, sigma = (x.sqrt() for x in self.variances(t))
        own = self._scale(self.prediction, alpha, sigma).abs().clamp_min(MIN_DIVISOR)
        return (self._scale(self.settings["loss"], alpha, sigma) / own).square().float()

    def _coefficients(self, space: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        """Return a and b of the prediction a x_0 + b eps."""
        zero = 0 * alpha
        one = zero + 1
        velocity = (-one, one) if self.is_flow else (-sigma, alpha)
        return {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "velocity": velocity}[space]

    def _scale(self, space: str, alpha: Level, sigma: Level) -> Level:
        """Return d, to which errors of a prediction of the same x_0 are proportional."""
        a, b = self._coefficients(space, alpha, sigma)
        return b * alpha - a * sigma

    def levels(self, t: float) -> tuple[float, float]:
        """Return alpha and sigma at a timestep."""
        signal, spread = self.variances(t)
        return math.sqrt(signal.item()), math.sqrt(spread.item())

    def denoised(self, x_t: Tensor, prediction: Tensor, t: float) -> Tensor:
        """Return the clean x_0 that a prediction says is in x_t, at one timestep t in (0, T]."""
        alpha, sigma = self.levels(t)
        _, b = self._coefficients(self.prediction, alpha, sigma)
        return (b * x_t - sigma * prediction) / self._scale(self.prediction, alpha, sigma)


def _shifted(t: Tensor, shift: Tensor, end: float = NUM_TIMESTEPS) -> Tensor:
    """Return s t / (1 + (s - 1) t) of timesteps, as fractions of `end`; the shift by 1 / s undoes it."""
    return shift * t / (1 + (shift - 1) * (t / end))
