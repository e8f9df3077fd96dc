"""Settings of decoding: how text is chosen and images are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from transfusion_fast.errors import InputError
from transfusion_fast.model.diffusion import NUM_TIMESTEPS

Sampler = Literal["auto", "ddpm", "ddim", "euler", "heun", "dpm++"]


def is_integer(value: object) -> bool:
    """Return whether a value is an integer, of Python or numpy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check(holds: bool, rule: str, got: object, advice: str) -> None:
    if not holds:
        raise InputError(f"{rule}, got {got}; {advice}")


def _number(value: object) -> float:
    """Return a number of Python or numpy as a float, and NaN, which lies in no range, for anything else."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


@dataclass(frozen=True)
class TextSettings:
    """How text is chosen.

    max_tokens: most new ids of a continuation, in all its texts together; temperature: divisor of the logits, 0 takes
    the likeliest id; top_k: the likeliest ids to choose from, 0 for all; top_p: least probability that they have
    together (arXiv 1904.09751); min_p: least probability of an id, as a fraction of the likeliest one's; the ids that
    are left are then drawn in proportion. repetition_penalty: divisor of positive logits, and factor of negative ones,
    of ids that are in the stream already (arXiv 1909.05858), 1 for none; stop: given the ids of the text so far, says
    whether the continuation ends.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Callable[[Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("top_k", self.top_k)):
            _check(is_integer(value) and value >= 0, f"{name} must be an integer from 0 on", value, "correct it")
        temperature, penalty = self.temperature, self.repetition_penalty
        _check(0 <= _number(temperature) < math.inf, "temperature must be in 0..inf", temperature, "0 is greedy")
        _check(0 < _number(self.top_p) <= 1, "top_p must be in (0, 1]", self.top_p, "1 keeps all ids")
        _check(0 <= _number(self.min_p) <= 1, "min_p must be in [0, 1]", self.min_p, "0 keeps all ids")
        _check(0 < _number(penalty) < math.inf, "repetition_penalty must be above 0 and finite", penalty, "1 is none")
        callable_or_none = self.stop is None or callable(self.stop)
        _check(callable_or_none, "stop must be a function of the ids of a text", repr(self.stop), "decode them in it")


@dataclass(frozen=True)
class ImageSettings:
    """How images are drawn.

    steps: number of model evaluations.
    sampler: "ddpm", "ddim", "euler", "heun" or "dpm++" (samplers.py); "auto" is ddpm, and euler for flow matching.
    guidance: weight w of pred_uncond + w (pred_cond - pred_uncond) (arXiv 2207.12598), 1 turns it off.
    image_guidance: a weight of its own for the images of a prompt; `guidance` is then that of its text. A third
    evaluation has the text alone, in place of nothing (arXiv 2505.14683); None is one weight for both.
    guidance_interval: timesteps (from, to) in 0..1000 at which there is guidance (arXiv 2404.07724).
    guidance_rescale: fraction of the way from the guided prediction to it with the standard deviation of the
    conditional one (arXiv 2305.08891, section 3.4).
    eta: for the sampler ddpm, how much of the noise each step replaces: 1 is DDPM sampling, 0 is DDIM, and more than 1
    corrects more errors of earlier steps. The other samplers are deterministic, and refuse any eta but 1.
    strength: where there are images to start from, how much noise they get, as a fraction of the timesteps
    (arXiv 2108.01073).
    clip: bound of the predicted clean latents; "auto" is that of the modality's `bound`, None is no bound.
    """

    steps: int = 250
    guidance: float = 3.0
    eta: float = 1.0
    clip: float | Literal["auto"] | None = "auto"
    guidance_interval: tuple[float, float] = (0.0, float(NUM_TIMESTEPS))
    guidance_rescale: float = 0.0
    image_guidance: float | None = None
    sampler: Sampler = "auto"
    strength: float = 1.0

    def __post_init__(self) -> None:
        steps, interval, clip = self.steps, self.guidance_interval, self.clip
        whole = is_integer(steps) and 1 <= steps <= NUM_TIMESTEPS
        _check(whole, f"diffusion steps must be an integer in 1..{NUM_TIMESTEPS}", steps, "give another number")
        for name, weight in (("guidance", self.guidance), ("image_guidance", self.image_guidance)):
            unused = weight is None and name == "image_guidance"
            _check(unused or math.isfinite(_number(weight)), f"{name} must be finite", weight, "1 turns guidance off")
        _check(
            self.sampler in get_args(Sampler),
            f"sampler must be one of {', '.join(get_args(Sampler))}",
            self.sampler,
            "correct it",
        )
        _check(0 < _number(self.strength) <= 1, "strength must be in (0, 1]", self.strength, "1 is noise alone")
        _check(0 <= _number(self.eta) < math.inf, "eta must be at least 0 and finite", self.eta, "1 is DDPM sampling")
        stochastic, got = self.sampler in ("auto", "ddpm"), f"{self.eta} with {self.sampler}"
        _check(stochastic or self.eta == 1, "eta must come with the sampler ddpm", got, "leave it out")
        bounded = clip is None or clip == "auto" or 0 < _number(clip) < math.inf
        _check(bounded, "clip must be above 0 and finite", clip, "None is no bound")
        rule = f"guidance_interval must be two timesteps in 0..{NUM_TIMESTEPS}, the lower first"
        pair = isinstance(interval, tuple | list) and len(interval) == 2
        start, end = map(_number, interval if pair else (math.nan, math.nan))
        _check(0 <= start <= end <= NUM_TIMESTEPS, rule, interval, "correct it")
        rescale = self.guidance_rescale
        _check(0 <= _number(rescale) <= 1, "guidance_rescale must be in 0..1", rescale, "0 is none")

    def guided(self, t: float) -> bool:
        """Return whether the prediction at a timestep needs the unconditional branch."""
        weights = (self.guidance, self.guidance if self.image_guidance is None else self.image_guidance)
        return weights != (1, 1) and self.guidance_interval[0] <= t <= self.guidance_interval[1]
