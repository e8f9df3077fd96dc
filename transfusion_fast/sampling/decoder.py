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
from transfusion_fast.model.inputs import as_document
from transfusion_fast.model.sequence import Document, Image, PackedBatch, Sequenced, Text, build_batch
from transfusion_fast.model.transfusion import Transfusion

CLEAN_TIMESTEP = 1.0  # of images given as context: the least noise that training shows


@dataclass(frozen=True)
class ImageSettings:
    """How images are drawn.

    steps: model evaluations; guidance: weight w of pred_uncond + w (pred_cond - pred_uncond), 1 turns it off;
    eta: 1 for DDPM sampling, 0 for DDIM; clip: bound of the predicted clean latents (1 for pixels), None for none.
    """

    steps: int = 250
    guidance: float = 3.0
    eta: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"diffusion steps must be at least 1, got {self.steps}")
        if not math.isfinite(self.guidance):
            raise InputError(f"the guidance weight must be finite, got {self.guidance}; 1 turns guidance off")


@dataclass
class _Stream:
    """A sequence being decoded: token ids with zeros at patches, and where its images stand."""

    tokens: list[int]
    images: list[tuple[int, Image, float]] = field(default_factory=list)  # start, latents as seen, timestep
    text: list[int] = field(default_factory=list)
    written: int = 0
    produced: list[Text | Image] = field(default_factory=list)
    done: bool = False

    def append_image(self, image: Image, timestep: float) -> None:
        self.images.append((len(self.tokens), image, timestep))
        self.tokens.extend([0] * image.latents[..., 0].numel())

    def close_text(self) -> None:
        if self.text:
            self.produced.append(Text(torch.tensor(self.text)))
            self.text = []


@torch.no_grad()
def sample(
    model: Transfusion,
    prompts: Sequence[Sequence[Any]],
    *,
    grids: Sequence[tuple[int, int]],
    max_text_tokens: int = 64,
    max_images: int = 1,
    temperature: float = 0.0,
    image: ImageSettings | None = None,
    generator: torch.Generator | None = None,
) -> list[Document]:
    """Continues each prompt until <eos>, `max_text_tokens` new ids, or one image more than `max_images`.

    Args:
        prompts: documents as for training, [ids, latents, (modality, latents), ...]; may be empty.
        grids: (rows, columns) of patches of an image, for each modality.
        temperature: of the text; 0 is greedy.
        generator: a CPU generator for text and noise.

    Returns:
        What was produced after each prompt: `Text` and `Image` pieces in order, images [rows, columns, C].

    Raises:
        ValueError: a prompt that does not fit the model.
    """
    streams = [_open(model, prompt, i) for i, prompt in enumerate(prompts)]
    while active := [s for s in streams if not s.done]:
        begun = _decode_text(model, active, max_text_tokens, temperature, generator)
        for modality in sorted(set(begun.values())):
            drawing = [s for s in active if begun.get(id(s)) == modality]
            for stream in drawing:
                stream.done = sum(isinstance(p, Image) for p in stream.produced) >= max_images
            drawing = [s for s in drawing if not s.done]
            if drawing:
                _draw(model, drawing, modality, grids[modality], image or ImageSettings(), generator)
    return [s.produced for s in streams]


@torch.no_grad()
def generate_images(
    model: Transfusion,
    prompts: Sequence[Sequence[Any]],
    grid: tuple[int, int],
    *,
    modality: int = 0,
    image: ImageSettings | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one image after each prompt, whether or not the model would begin one: fp32 [prompts, rows, columns, C]."""
    if not prompts or not 0 <= modality < len(model.codecs):
        raise ValueError(f"needs a prompt and a modality below {len(model.codecs)}, got {len(prompts)} and {modality}")
    streams = [_open(model, prompt, i) for i, prompt in enumerate(prompts)]
    for stream in streams:
        stream.tokens.append(model.vocabulary.boi(modality))
    _draw(model, streams, modality, grid, image or ImageSettings(), generator)
    return torch.stack([s.images[-1][1].latents for s in streams])


def _open(model: Transfusion, prompt: Sequence[Any], number: int) -> _Stream:
    stream, vocabulary = _Stream([model.vocabulary.bos]), model.vocabulary
    for piece in as_document(prompt, model.config, number):
        if isinstance(piece, Text):
            stream.tokens.extend(piece.ids.tolist())
        else:
            stream.tokens.append(vocabulary.boi(piece.modality))
            stream.append_image(piece, CLEAN_TIMESTEP)
            stream.tokens.append(vocabulary.eoi(piece.modality))
    return stream


def _decode_text(
    model: Transfusion, streams: Sequence[_Stream], limit: int, temperature: float, generator: torch.Generator | None
) -> dict[int, int]:
    """Appends tokens to each stream until it ends or begins an image; returns id(stream) -> modality of that image."""
    vocabulary, begun = model.vocabulary, {}
    for stream in streams:
        stream.done = stream.written >= limit
    while writing := [s for s in streams if not s.done and id(s) not in begun]:
        hidden, batch = _run(model, writing)
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
    grid: tuple[int, int],
    settings: ImageSettings,
    generator: torch.Generator | None,
) -> None:
    """Diffuses one image at the end of each stream, then closes it with <eoi>.

    The unconditional branch of guidance is the image alone after <boi>, as training shows it.
    """
    width = model.config.dim_latent[modality]
    shape = (len(streams), *grid, width)
    x = torch.randn(shape, generator=generator)
    objective = model.objective
    schedule = np.linspace(objective.first_timestep(), 0, settings.steps + 1).tolist()
    for t, t_next in pairwise(schedule):
        drawing = [
            _with_image(s.tokens, s.images, Image(image, modality), t) for s, image in zip(streams, x, strict=True)
        ]
        if settings.guidance != 1:
            alone = [model.vocabulary.boi(modality)]
            drawing += [_with_image(alone, [], Image(image, modality), t) for image in x]
        prediction = _predict_last(model, drawing, modality, grid)
        if settings.guidance != 1:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + settings.guidance * (conditional - unconditional)
        noise = torch.randn(shape, generator=generator) if settings.eta > 0 else None
        x = objective.step(x, prediction, t, t_next, eta=settings.eta, noise=noise, clip=settings.clip)
    for stream, latents in zip(streams, x, strict=True):
        stream.append_image(Image(latents, modality), CLEAN_TIMESTEP)
        stream.tokens.append(model.vocabulary.eoi(modality))
        stream.produced.append(Image(latents, modality))


def _with_image(tokens: list[int], images: list, image: Image, timestep: float) -> _Stream:
    stream = _Stream(list(tokens), list(images))
    stream.append_image(image, timestep)
    return stream


def _predict_last(model: Transfusion, streams: Sequence[_Stream], modality: int, grid: tuple[int, int]) -> Tensor:
    """The model's prediction for the image at the end of each stream: fp32 [streams, rows, columns, C] on the CPU."""
    hidden, batch = _run(model, streams)
    prediction = model.prediction(hidden, batch, modality).float().cpu()
    own = torch.tensor([image.modality == modality for s in streams for _, image, _ in s.images])
    count = torch.tensor([len(s.images) for s in streams])
    last_of_all = count.cumsum(0) - 1
    last = own.long().cumsum(0)[last_of_all] - 1  # among the images of this modality
    start = batch.modalities[modality].image_offsets.cpu()[last]
    patches = start[:, None] + torch.arange(grid[0] * grid[1])
    return prediction[patches].unflatten(1, grid)


def _run(model: Transfusion, streams: Sequence[_Stream]) -> tuple[Tensor, PackedBatch]:
    """The last hidden states [T, E] of the streams, packed one after another, and the batch that they are packed in."""
    lengths = np.array([len(s.tokens) for s in streams], dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths
    tokens = np.fromiter((t for s in streams for t in s.tokens), dtype=np.int64, count=int(lengths.sum()))
    images = [
        (offset + start, image, timestep)
        for offset, s in zip(offsets.tolist(), streams, strict=True)
        for start, image, timestep in s.images
    ]
    grids = [image.latents.shape[:2] if image.latents.ndim == 3 else (1, len(image.latents)) for _, image, _ in images]
    columns = [
        (start, rows * columns, rows, columns, image.modality)
        for (start, image, _), (rows, columns) in zip(images, grids, strict=True)
    ]
    sequenced = Sequenced(tokens, lengths, *np.array(columns, dtype=np.int64).reshape(-1, 5).T)
    modalities, x_t = [], []
    for number, width in enumerate(model.config.dim_latent):
        own = [(image.latents.float().reshape(-1, width), t) for _, image, t in images if image.modality == number]
        latents = torch.cat([torch.zeros(0, width), *(x for x, _ in own)])
        modalities.append((latents, torch.zeros_like(latents), torch.tensor([t for _, t in own])))
        x_t.append(latents.to(model.device))
    batch = build_batch(sequenced, model.vocabulary, modalities, model.config.positions).to(model.device)
    return model.hidden(batch, x_t), batch


Transfusion.sample = sample
