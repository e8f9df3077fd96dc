"""Settings of the diffusion of images, which `model.diffusion` holds."""

from __future__ import annotations

from typing import Any, Literal

from transfusion_fast.settings import Positive, PositiveFloat, Settings, model_validator

DEFAULTS = {
    "ddpm": {"schedule": "cosine", "prediction": "eps", "timesteps": "uniform"},
    "flow": {"prediction": "velocity", "timesteps": "logit_normal"},
}


class DiffusionConfig(Settings):
    """How images are noised, what the model predicts, and the loss. docs/model.md has the equations."""

    process: Literal["ddpm", "flow"] = "ddpm"
    """How x_t is mixed from the clean x_0 and the noise eps: "ddpm" preserves the variance (the paper), "flow" is the
    straight line (1 - t) x_0 + t eps."""
    schedule: Literal["cosine", "linear"] | None = None
    """Noise levels of ddpm: the cosine schedule (default), or DDPM's linear betas. Flow has none."""
    prediction: Literal["eps", "v", "x0", "velocity"] | None = None
    """Output of the diffusion head: the noise (default of ddpm), v = alpha eps - sigma x_0, the clean image, or the
    velocity (default of flow), which is eps - x_0 for flow and equal to v for ddpm."""
    loss: Literal["eps", "v", "x0", "velocity"] | None = None
    """Space in which the squared error is taken, by weighting that of the prediction; default: the prediction's own.
    Predicting x0 with a loss of velocity is JiT (arXiv 2511.13720)."""
    timesteps: Literal["uniform", "logit_normal"] | None = None
    """Distribution of training timesteps: uniform (default of ddpm), or the sigmoid of a normal (default of flow)."""
    shift: PositiveFloat = 1.0
    """Factor s of the shift of timesteps, t -> s t / (1 + (s - 1) t), in training and sampling; above 1 is noisier."""
    shift_patches: Positive | None = None
    """Number of patches B for which `shift` holds; an image of P patches has the shift s sqrt(P / B). Default: `shift`
    holds for every image."""
    weighting: Literal["none", "min_snr"] = "none"
    """Weight of each image's error beyond `loss`: none; or min(SNR, 5) in the space of x0 (arXiv 2303.09556), which
    replaces the weight of `loss`, since the space does not matter then."""

    @model_validator(mode="after")
    def _check_schedule(self) -> DiffusionConfig:
        if self.process == "flow" and self.schedule is not None:
            raise ValueError(f"schedule must be left out with process=flow, which has none, got {self.schedule}")
        return self

    def with_defaults(self) -> dict[str, Any]:
        """Return all settings, with the defaults of the process in place of None."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        settings = {"schedule": None, "shift_patches": None, **DEFAULTS[self.process], **given}
        return {"loss": settings["prediction"], **settings}
