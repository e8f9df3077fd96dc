"""Drawing: one image at the end of each stream, by diffusion under classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.sampling.engine import Branch, Context, Engine, Grid
from transfusion_fast.sampling.samplers import draw, num_intervals, sampler_of
from transfusion_fast.sampling.settings import ImageSettings

OnImages = Callable[[Tensor], None]
"""Called after each evaluation of the model with the clean images that it predicts, fp32 [S, *grid, C]."""


@dataclass(frozen=True, eq=False)
class Given:
    """Tensors that images are drawn from, each [S, *grid, C].

    noise: the initial noise, in place of that of the seed; start: images that noise is added to; keep: bool, where
    `start` is kept.
    """

    noise: Tensor | None = None
    start: Tensor | None = None
    keep: Tensor | None = None

    def select(self, index: Tensor) -> Given:
        """Return those of some images."""
        return Given(*(None if x is None else x[index] for x in (self.noise, self.start, self.keep)))


def check_given(shape: tuple[int, ...], noise: Tensor | None, start: Tensor | None, keep: Tensor | None) -> Given:
    """Return the tensors for images of `shape` [images, *grid, C]; `keep` may lack the last axis.

    Raises:
        InputError: a tensor of another shape or type, or that is not finite; `keep` without `start`.
    """
    for name, given in (("noise", noise), ("start", start)):
        if given is None:
            continue
        if not isinstance(given, Tensor) or not given.is_floating_point() or tuple(given.shape) != shape:
            rule = f"{name} must be a tensor of floating-point numbers of shape {shape}"
            raise InputError(f"{rule}, got {_kind(given)}; correct it")
        if not given.isfinite().all():
            raise InputError(f"{name} must be finite, got NaN or infinity; correct it")
    if keep is None:
        return Given(noise, start)
    if start is None:
        raise InputError("keep must come with the images that it keeps a part of, got none; give start")
    fits = isinstance(keep, Tensor) and keep.dtype == torch.bool and tuple(keep.shape) in (shape, shape[:-1])
    if not fits:
        rule = f"keep must be a bool tensor of shape {shape[:-1]} or {shape}"
        raise InputError(f"{rule}, got {_kind(keep)}; correct it")
    return Given(noise, start, (keep if keep.ndim == len(shape) else keep.unsqueeze(-1)).expand(shape))


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class Drawer:
    """Draws images with the settings of one decoding."""

    def __init__(self, engine: Engine, settings: ImageSettings, negative: Context | None = None):
        if negative is not None and settings.image_guidance is not None:
            raise InputError("image_guidance must be None with a negative document, got both; leave one out")
        self.engine, self.settings, self.negative = engine, settings, negative
        self.model = engine.model
        self.sampler = sampler_of(settings.sampler, self.model.diffusion) if self.model.codecs else ""

    def draw(
        self,
        branch: Branch,
        contexts: Sequence[Context],
        modality: int,
        grid: Grid,
        generators: Sequence[torch.Generator],
        given: Given,
        on_images: OnImages | None = None,
    ) -> Tensor:
        """Return an image for each stream of a branch, whose contexts end in <boi>: fp32 [S, *grid, C] on the CPU.

        Raises:
            InputError: the images are not finite, or there is a strength but no image to start from.
        """
        settings, diffusion, config = self.settings, self.model.diffusion, self.model.config.modalities[modality]
        if given.start is None and settings.strength != 1:
            raise InputError(f"strength must come with an image to start from, got {settings.strength}; give one")
        clip = config.bound if settings.clip == "auto" else settings.clip
        shape = (*grid, config.dim_latent)
        start, keep = (None if x is None else x.to(self.model.device) for x in (given.start, given.keep))
        alone = self.engine.start_image([branch], modality, grid)
        intervals = num_intervals(self.sampler, settings.steps)
        timesteps = diffusion.sampling_timesteps(intervals, alone.n, settings.strength)
        if any(settings.guided(t) for t in timesteps[:-1]):
            together = self.engine.start_image([branch, *self._others(contexts, modality, grid)], modality, grid)

        def denoise(x: Tensor, t: float) -> Tensor:
            if settings.guided(t):
                prediction = guided(together.predict(x, t), settings)
            else:
                [prediction] = alone.predict(x, t)
            x_0 = diffusion.denoised(x, prediction, t)
            x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
            x_0 = x_0 if keep is None or start is None else torch.where(keep, start, x_0)
            if on_images is not None:
                on_images(x_0)
            return x_0

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.model.device)

        x = noise()
        x = x if given.noise is None else given.noise.to(x)
        if start is not None:
            x = diffusion.add_noise(start, x, torch.full((1,) * x.ndim, timesteps[0], device=x.device))
        x = draw(self.sampler, diffusion, x, timesteps, denoise, settings.steps, eta=settings.eta, noise=noise)
        if not x.isfinite().all():
            rule = "a drawn image must be finite"
            raise InputError(f"{rule}, got NaN or infinity; check the model's weights, or lower eta and guidance")
        return x.cpu()

    def _others(self, contexts: Sequence[Context], modality: int, grid: Grid) -> list[Branch]:
        """Return the branches of guidance beside that of the whole contexts.

        With one weight it is the image alone after <boi> and its size, as in training, or after the negative document.
        With two, the contexts without their text, and without their images.
        """
        vocabulary = self.model.vocabulary
        opening = Context(vocabulary.opening(modality, grid))
        if self.settings.image_guidance is not None:
            text_and_bos = range(vocabulary.eos)
            without_text = [context.without_text(text_and_bos) for context in contexts]
            without_images = [context.without_images(vocabulary.num_sizes) for context in contexts]
            parts = [without_text, without_images]
        elif self.negative is not None:
            parts = [[Context([*self.negative.tokens, *opening.tokens], self.negative.images)] * len(contexts)]
        else:
            parts = [[opening] * len(contexts)]
        return [(self.engine.prefill(part, math.prod(grid))[0], range(len(part))) for part in parts]


def guided(predictions: Tensor, settings: ImageSettings) -> Tensor:
    """Return one prediction for those of all branches, [branches, S, *grid, C], the one with the whole context first.

    With one weight the other is unconditional (arXiv 2207.12598). With two weights the others are without text and
    without images; guidance leads away from the first and then from the second, as in BAGEL (arXiv 2505.14683).
    """
    conditional, *others = predictions
    weights = [settings.guidance, settings.image_guidance]
    result = conditional
    for weight, other in zip(weights, others, strict=False):
        assert weight is not None
        result = other + weight * (result - other)
    if settings.guidance_rescale == 0:
        return result
    axes = tuple(range(1, result.ndim))
    wanted, own = (x.std(axes, correction=0, keepdim=True) for x in (conditional, result))
    return torch.lerp(result, torch.where(own > 0, result * wanted / own, result), settings.guidance_rescale)
