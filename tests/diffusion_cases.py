"""Noises, exact predictions and images, shared by the tests of diffusion."""

import math

import pytest
import torch
from small_models import seeded

from transfusion_fast.diffusion_config import DiffusionConfig
from transfusion_fast.model.diffusion import Diffusion

NOISES = {
    "cosine": {},
    "linear": {"schedule": "linear"},
    "flow": {"process": "flow"},
}
SPACES = ("eps", "v", "x0", "velocity")
each_noise = pytest.mark.parametrize("noise", NOISES)
each_prediction = pytest.mark.parametrize("prediction", SPACES)


def make(noise="cosine", **settings):
    return Diffusion(DiffusionConfig(**NOISES[noise], **settings))


DDPM, FLOW = make(), make("flow")


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def levels(noise, t):
    """Return alpha and sigma at t as floats, of the processes as they are published."""
    if noise == "flow":
        return 1 - t / 1000, t / 1000
    betas = [min(1 - cosine(i) / cosine(i - 1), 0.999) for i in range(1, int(t) + 1)]
    if noise == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(int(t))]
    alpha_bar = math.prod(1 - beta for beta in betas)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def cosine(t):
    return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2


def predict(space, noise, x_0, eps, t):
    """Return what an exact model predicts at t."""
    alpha, sigma = levels(noise, t)
    v = alpha * eps - sigma * x_0
    return {"eps": eps, "v": v, "x0": x_0, "velocity": eps - x_0 if noise == "flow" else v}[space]


def images(width=6, seed=0):
    """Return clean patches, noise and another estimate of the clean patches, of two images of 2 and 3 patches."""
    return torch.randn(3, 5, width, generator=seeded(seed), dtype=torch.float64)
