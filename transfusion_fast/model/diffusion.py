"""The two diffusion objectives: cosine DDPM with noise prediction, and flow matching.

Timesteps are fp32 in (0, 1000] for both objectives: 0 is a clean image, 1000 is noise. An objective defines how a
uniform number becomes a timestep, how noise is added, what the model predicts, and how a sampler takes one step towards
the clean image. A new schedule or objective is a class beside these, with a name in `OBJECTIVES`. Symbols as in the
papers: x_0 clean, x_t noisy, eps noise, t timestep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class CosineDDPM:
    """DDPM (arXiv 2006.11239), cosine schedule (arXiv 2102.09672, equation 17), predicting eps.

    t broadcasts against x_0 and eps.
    """

    s: float = 0.008
    max_beta: float = 0.999

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        """Return the fraction of signal variance at t, fp64.

        It is f(t) / f(0) with f(t) = cos^2((t/T + s) / (1 + s) * pi/2), but at least
        (1 - max_beta) f(T - 1) / f(0), so that no beta exceeds `max_beta`.
        """
        t = torch.as_tensor(t, dtype=torch.float64)
        start, last = (math.cos(self._angle(t)) ** 2 for t in (0, NUM_TIMESTEPS - 1))
        return (torch.cos(self._angle(t)).square() / start).clamp_min(last / start * (1 - self.max_beta))

    def _angle(self, t: Any) -> Any:
        return (t / NUM_TIMESTEPS + self.s) / (1 + self.s) * (math.pi / 2)

    def timesteps(self, u: Tensor, cap: Tensor | float = NUM_TIMESTEPS) -> Tensor:
        """Map u in [0, 1) to timesteps that are uniform over the integers from 1 to the cap (at least 1); fp32."""
        return torch.floor(u.double() * torch.as_tensor(cap, dtype=torch.float64).floor()).float() + 1

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (arXiv 2006.11239, equation 4)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt().to(x_0.dtype) * x_0 + (1 - alpha_bar).sqrt().to(x_0.dtype) * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return eps, which `ops.diffusion_mse_from_noise` computes for training."""
        return eps

    def first_timestep(self) -> float:
        """Return T - 1: at T the signal is 2e-9 of the variance, and dividing by its root amplifies every error."""
        return NUM_TIMESTEPS - 1

    def step(
        self,
        x_t: Tensor,
        prediction: Tensor,
        t: float,
        t_next: float,
        *,
        eta: float = 1.0,
        noise: Tensor | None = None,
        clip: float | None = None,
    ) -> Tensor:
        """Return x at t_next (arXiv 2010.02502, equations 12 and 16): eta 1 is ancestral DDPM sampling, eta 0 is DDIM.

        The step replaces a part of the noise in x_t by `noise`, standard normal in x_t's shape, which is needed unless
        eta is 0. A larger eta replaces more, and at most all of it. `clip` bounds the predicted x_0.
        """
        now, after = self.alpha_bar(t).item(), self.alpha_bar(t_next).item()
        x_0 = (x_t - math.sqrt(1 - now) * prediction) / math.sqrt(now)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
        eps = (x_t - math.sqrt(now) * x_0) / math.sqrt(1 - now)
        variance = min(eta * eta * (1 - after) / (1 - now) * (1 - now / after), 1 - after)
        mean = math.sqrt(after) * x_0 + math.sqrt(1 - after - variance) * eps
        if variance == 0:
            return mean
        if noise is None:
            raise ValueError("noise must be given unless eta is 0, got None; draw it in x_t's shape")
        return mean + math.sqrt(variance) * noise


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x_t = (1 - t) x_0 + t eps, t in (0, 1), predicting eps - x_0 (arXiv 2210.02747, 2403.03206).

    Timesteps are logit-normal, shifted towards noise if shift > 1 (arXiv 2403.03206, section 3.1 and equation 23).
    """

    shift: float = 1.0

    def timesteps(self, u: Tensor, cap: Tensor | float = NUM_TIMESTEPS) -> Tensor:
        """Map u in [0, 1) to logit-normal timesteps with shift, conditioned on being at most cap; fp32 in (0, 1000]."""
        cap = torch.as_tensor(cap, dtype=torch.float64) / NUM_TIMESTEPS
        unshifted_cap = cap / (self.shift + (1 - self.shift) * cap)
        below_cap = torch.special.ndtr(torch.logit(unshifted_cap))
        t = torch.sigmoid(torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7) * below_cap))
        shifted = self.shift * t / (1 + (self.shift - 1) * t)
        return (torch.minimum(shifted, cap) * NUM_TIMESTEPS).float().clamp_min(torch.finfo(torch.float32).tiny)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return (1 - t) x_0 + t eps."""
        return torch.lerp(x_0, eps, (t / NUM_TIMESTEPS).to(x_0.dtype).expand_as(x_0))

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the velocity, eps - x_0, which `ops.diffusion_mse_from_noise` computes for training."""
        return eps - x_0

    def first_timestep(self) -> float:
        """Return the timestep of pure noise."""
        return NUM_TIMESTEPS

    def step(
        self,
        x_t: Tensor,
        prediction: Tensor,
        t: float,
        t_next: float,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
        clip: float | None = None,
    ) -> Tensor:
        """Return x at t_next, an Euler step. `clip` bounds the predicted x_0; eta and noise are unused."""
        velocity = prediction
        if clip is not None:
            x_0 = (x_t - t / NUM_TIMESTEPS * prediction).clamp(-clip, clip)
            velocity = (x_t - x_0) * (NUM_TIMESTEPS / t)
        return x_t + (t_next - t) / NUM_TIMESTEPS * velocity


Objective = CosineDDPM | FlowMatching
OBJECTIVES: dict[str, Objective] = {"ddpm": CosineDDPM(), "flow": FlowMatching()}
