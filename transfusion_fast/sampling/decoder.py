"""Decoding (arXiv 2408.11039, section 3.3): text token by token; at <boi> an image by diffusion; then text again.

Every step runs the whole sequences, all prompts in one packed batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.model.diffusion import NUM_TIMESTEPS
from transfusion_fast.model.inputs import Document, Piece, check_document, flat_latents, place_images
from transfusion_fast.model.packed_batch import CLEAN_TIMESTEP, PackedBatch, build_batch
from transfusion_fast.model.sequence import TEXT
from transfusion_fast.model.transfusion import Transfusion

Noise = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class ImageSettings:
    """Settings of image generation.

    steps: number of model evaluations; guidance: weight w of pred_uncond + w (pred_cond - pred_uncond), 1 turns it off;
    eta: 1 for DDPM sampling, 0 for DDIM, above 1 to add more noise in each step, which corrects errors of earlier
    steps, unused by flow matching; clip: bound of the predicted clean latents (1 for pixels), None for no bound.
    """

    steps: int = 250
    guidance: float = 3.0
    eta: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= NUM_TIMESTEPS:
            raise InputError(f"diffusion steps must be in 1..{NUM_TIMESTEPS}, got {self.steps}; give another number")
        if not math.isfinite(self.guidance):
            raise InputError(f"the guidance weight must be finite, got {self.guidance}; 1 turns guidance off")
        if not 0 <= self.eta < math.inf:
            raise InputError(f"eta must be at least 0 and finite, got {self.eta}; 1 is DDPM sampling")


@dataclass(frozen=True, eq=False)
class _Image:
    """An image in a stream: its offset among the tokens, and the latents [.., C] that the model sees."""

    offset: int
    modality: int
    latents: Tensor
    timestep: float


@dataclass
class _Stream:
    """A sequence that is being decoded: token ids, with zeros at patches, and its images."""

    tokens: list[int]
    images: list[_Image] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    written: int = 0
    produced: list[Piece] = field(default_factory=list)
    num_drawn: int = 0
    done: bool = False

    def append_image(self, modality: int, latents: Tensor, timestep: float) -> None:
        self.images.append(_Image(len(self.tokens), modality, latents, timestep))
        self.tokens.extend([0] * latents[..., 0].numel())

    def close_text(self) -> None:
        if self.text:
            self.produced.append(torch.tensor(self.text))
            self.text = []


@torch.no_grad()
def sample(
    model: Transfusion,
    prompts: Sequence[Document],
    *,
    grids: Sequence[tuple[int, ...]] | None = None,
    max_text_tokens: int = 64,
    max_images: int = 1,
    temperature: float = 0.0,
    image: ImageSettings | None = None,
    generator: torch.Generator | None = None,
) -> list[list[Piece]]:
    """Continue each prompt until <eos>, `max_text_tokens` new ids, or the image after `max_images` of them.

    Args:
        prompts: documents as for training, [ids, latents, (modality, latents), ...]; may be empty.
        grids: for each modality the size in patches of what is drawn, (rows, columns) of an image; default: its
            `shape`.
        temperature: divisor of the text logits; 0 is greedy.
        generator: a CPU generator for text and noise.

    Returns:
        The continuation of each prompt, a document of the same form: ids int64 [n], and images fp32
        [rows, columns, C], alone for modality 0, else as (modality, latents); with channel_first [C, rows, columns].
        Where the model has a decoder for a modality, what it returns takes the place of latents.

    Raises:
        ValueError: a prompt that does not fit the model, or a size that does not fit a modality.
    """
    streams = [_open(model, prompt, i) for i, prompt in enumerate(model.encoded(prompts))]
    while active := [s for s in streams if not s.done]:
        begun = _decode_text(model, active, max_text_tokens, temperature, generator)
        for modality in sorted(set(begun.values())):
            drawing = [s for s in active if begun.get(id(s)) == modality]
            for stream in drawing:
                stream.done = stream.num_drawn >= max_images
            drawing = [s for s in drawing if not s.done]
            if drawing:
                if grids is not None and modality >= len(grids):
                    rule = f"grids must have a size for modality {modality}, which the model begins"
                    raise InputError(f"{rule}, got {len(grids)} sizes; give one for each modality")
                grid = None if grids is None else grids[modality]
                drawn = _draw(model, drawing, modality, grid, image or ImageSettings(), generator)
                for stream, latents in zip(drawing, model.decoded(drawn, modality), strict=True):
                    stream.produced.append(latents if modality == 0 else (modality, latents))
    return [s.produced for s in streams]


@torch.no_grad()
def generate_images(
    model: Transfusion,
    prompts: Sequence[Document],
    grid: tuple[int, ...] | None = None,
    *,
    modality: int = 0,
    image: ImageSettings | None = None,
    generator: Noise = None,
) -> Tensor:
    """Draw one image after each prompt, whether or not the model would begin one: fp32 [prompts, rows, columns, C].

    These are latents, also where the model has a decoder.

    Args:
        grid: size in patches, (rows, columns) of an image; default: the modality's `shape`.
        generator: a CPU generator; or one for each prompt, so that no image depends on the others.
    """
    if not prompts or not 0 <= modality < len(model.codecs):
        rule = f"prompts must be 1 or more and the modality below {len(model.codecs)}"
        raise ValueError(f"{rule}, got {len(prompts)} and {modality}")
    streams = [_open(model, prompt, i) for i, prompt in enumerate(model.encoded(prompts))]
    for stream in streams:
        stream.tokens.append(model.vocabulary.boi(modality))
    return _draw(model, streams, modality, grid, image or ImageSettings(), generator)


def _open(model: Transfusion, prompt: Document, number: int) -> _Stream:
    stream, vocabulary = _Stream([model.vocabulary.bos]), model.vocabulary
    for kind, tensor in check_document(prompt, model.config, number):
        if kind == TEXT:
            stream.tokens.extend(tensor.tolist())
        else:
            stream.tokens.append(vocabulary.boi(kind - 1))
            stream.append_image(kind - 1, tensor, CLEAN_TIMESTEP)
            stream.tokens.append(vocabulary.eoi(kind - 1))
    return stream


def _decode_text(
    model: Transfusion, streams: Sequence[_Stream], limit: int, temperature: float, generator: torch.Generator | None
) -> dict[int, int]:
    """Append tokens to each stream until it ends or begins an image; return id(stream) -> modality of that image."""
    vocabulary, begun = model.vocabulary, {}
    for stream in streams:
        stream.done = stream.written >= limit
    while writing := [s for s in streams if not s.done and id(s) not in begun]:
        hidden, batch, _ = _run(model, writing)
        last = (batch.layout.document_offsets[1:] - 1).to(model.device)
        logits = model.head(hidden.index_select(0, last)).float().cpu()
        logits[:, vocabulary.bos] = float("-inf")
        for modality in range(len(model.codecs)):
            logits[:, vocabulary.eoi(modality)] = float("-inf")
        for stream, token in zip(writing, _choose(logits, temperature, generator), strict=True):
            if token < vocabulary.num_text_tokens:
                stream.tokens.append(token)
                stream.text.append(token)
                stream.written += 1
                stream.done = stream.written >= limit
            elif token == vocabulary.eos:
                stream.done = True
            else:
                stream.tokens.append(token)
                begun[id(stream)] = (token - vocabulary.boi()) // 2
            if stream.done or id(stream) in begun:
                stream.close_text()
    return begun


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> list[int]:
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0].tolist()


def _draw(
    model: Transfusion,
    streams: Sequence[_Stream],
    modality: int,
    grid: tuple[int, ...] | None,
    settings: ImageSettings,
    generator: Noise,
) -> Tensor:
    """Diffuse one image at the end of each stream, and close it with <eoi>; return them, fp32 [streams, *grid, C].

    The unconditional branch of guidance is the image alone after <boi>, as in training.
    """
    config = model.config.modalities[modality]
    grid = (() if config.dims == 0 else config.shape) if grid is None else grid
    if grid is None or len(grid) != config.dims or any(size < 1 for size in grid):
        rule = f"the size of what is drawn must be {config.dims} numbers of at least 1 for modality {modality}"
        raise InputError(f"{rule}, got {grid}; give it, or set the modality's shape")
    shape = (len(streams), *grid, config.dim_latent)
    x = _noise(shape, generator)
    for t, t_next in pairwise(model.diffusion.sampling_timesteps(settings.steps, math.prod(grid))):
        drawing = [_with_image(s, modality, latents, t) for s, latents in zip(streams, x, strict=True)]
        if settings.guidance != 1:
            alone = _Stream([model.vocabulary.boi(modality)])
            drawing += [_with_image(alone, modality, latents, t) for latents in x]
        prediction = _predict_last(model, drawing, modality, grid)
        if settings.guidance != 1:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + settings.guidance * (conditional - unconditional)
        noise = _noise(shape, generator) if settings.eta > 0 else None
        x = model.diffusion.step(x, prediction, t, t_next, eta=settings.eta, noise=noise, clip=settings.clip)
    for stream, latents in zip(streams, x, strict=True):
        stream.append_image(modality, latents, CLEAN_TIMESTEP)
        stream.tokens.append(model.vocabulary.eoi(modality))
        stream.num_drawn += 1
    return x


def _noise(shape: tuple[int, ...], generator: Noise) -> Tensor:
    if isinstance(generator, Sequence):
        return torch.stack([torch.randn(shape[1:], generator=one) for one in generator])
    return torch.randn(shape, generator=generator)


def _with_image(stream: _Stream, modality: int, latents: Tensor, timestep: float) -> _Stream:
    copy = _Stream(list(stream.tokens), list(stream.images))
    copy.append_image(modality, latents, timestep)
    return copy


def _predict_last(model: Transfusion, streams: Sequence[_Stream], modality: int, grid: tuple[int, ...]) -> Tensor:
    """Return the prediction for the image at the end of each stream, fp32 [streams, *grid, C] on the CPU."""
    hidden, batch, encoded = _run(model, streams)
    prediction = model.prediction(hidden, batch, modality, encoded[modality]).float().cpu()
    # Every stream ends in its image, so the image's last patch is the last position of the document.
    patch_after_last = torch.searchsorted(
        batch.modalities[modality].sequence_index.cpu(), batch.layout.document_offsets[1:]
    )
    patches = patch_after_last[:, None] + torch.arange(-math.prod(grid), 0)
    return prediction[patches].view(len(streams), *grid, -1)


def _run(model: Transfusion, streams: Sequence[_Stream]) -> tuple[Tensor, PackedBatch, list[Any]]:
    """Run all streams in one packed batch; return the last hidden states [T, E], the batch, and what codecs keep."""
    lengths = np.array([len(s.tokens) for s in streams], dtype=np.int64)
    starts = (np.cumsum(lengths) - lengths).tolist()
    tokens = np.fromiter((t for s in streams for t in s.tokens), dtype=np.int64, count=int(lengths.sum()))
    images = [
        (start + image.offset, image.modality, image.latents)
        for start, stream in zip(starts, streams, strict=True)
        for image in stream.images
    ]
    timesteps = torch.tensor([i.timestep for s in streams for i in s.images], dtype=torch.float32)
    latents = flat_latents([(modality, x) for _, modality, x in images], model.config.dim_latent)
    clean = [(x, torch.zeros_like(x)) for x in latents]
    sequence, causal = place_images(tokens, lengths, images), model.config.image_attention == "causal"
    batch = build_batch(sequence, clean, timesteps, model.config.modalities, causal_images=causal)
    batch = batch.to(model.device)
    hidden, encoded = model.hidden(batch, [x.to(model.device) for x in latents])
    return hidden, batch, encoded


Transfusion.sample = sample
