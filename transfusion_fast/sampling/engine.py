"""The passes of decoding: prefill, which fills a cache with contexts; step, of a token; and those of an image.

Letters as in model/sequence.py, and S streams. CPU libraries multiply few rows by other algorithms, so each kind of
token is padded to a multiple of `ROWS`: then the result of a row does not depend on the batch. (This was measured on
one CPU. A U-Net is not padded, and on GPUs the size of a product can change the rounding of its rows.)
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model.inputs import place_images
from transfusion_fast.model.packed_batch import CLEAN_TIMESTEP, ModalityBatch, PackedBatch
from transfusion_fast.model.sequence import TokenSequence, documents_of_images, positions_of, ranges
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.cache import (
    CachedAttention,
    KeyValueCache,
    LengthsAttention,
    PrefillAttention,
    lengths_of,
    rows_of,
    takes_lengths,
)

ROWS = 8
MIN_ROOM = 16  # positions beyond a context
Grid = tuple[int, ...]
Shape = tuple[int, int, int]
"""Frames, rows and columns."""
Branch = tuple[KeyValueCache, Sequence[int]]
"""A cache, and the numbers of streams in it, in ascending order."""


@dataclass(frozen=True, eq=False)
class Image:
    """A clean image [*grid, C] among the tokens of a context."""

    offset: int
    modality: int
    latents: Tensor


@dataclass(eq=False)
class Context:
    """The tokens and images of a stream before it is continued: ids, with zeros at patches, and clean images."""

    tokens: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    @property
    def content(self) -> Hashable:
        """A key that is equal for contexts of the same tokens and the same image tensors."""
        images = ((image.offset, image.modality, id(image.latents)) for image in self.images)
        return (*self.tokens, *images)

    def copy(self) -> Context:
        return Context([*self.tokens], [*self.images])

    def append_image(self, modality: int, latents: Tensor) -> None:
        self.images.append(Image(len(self.tokens), modality, latents))
        self.tokens.extend([0] * latents[..., 0].numel())

    def text_between_images(self) -> list[list[int]]:
        """Return the tokens before, between and behind the patches of the images: a list more than there are images."""
        starts = [0, *(image.offset + image.latents[..., 0].numel() for image in self.images)]
        ends = [*(image.offset for image in self.images), len(self.tokens)]
        return [self.tokens[start:end] for start, end in zip(starts, ends, strict=True)]

    def without_images(self, num_sizes: Sequence[int] | np.ndarray) -> Context:
        """Return the context without its images and the special tokens around them, `num_sizes` of each modality."""
        tokens, *others = self.text_between_images()
        for image, after_image in zip(self.images, others, strict=True):
            tokens = tokens[: -1 - num_sizes[image.modality]] + after_image[1:]
        return Context(tokens)

    def without_text(self, text: Container[int]) -> Context:
        """Return the context without the tokens that are in `text`."""
        context = Context()
        first, *others = ([token for token in part if token not in text] for part in self.text_between_images())
        context.tokens.extend(first)
        for image, after_image in zip(self.images, others, strict=True):
            context.append_image(image.modality, image.latents)
            context.tokens.extend(after_image)
        return context


class Engine:
    """The passes of decoding with one model."""

    def __init__(self, model: Transfusion):
        self.model, self.axes = model, max((one.axes for one in model.config.modalities), default=1)
        self.causal_images = model.config.image_attention == "causal"
        self.depth = model.config.transformer.depth
        self.no_layout = AttentionLayout.from_spans([], [])
        none = np.zeros(0, np.int64)
        self.no_images = [self._images(modality, none, [], [], 0) for modality in range(len(model.codecs))]

    def prefill(self, contexts: Sequence[Context], room: int = MIN_ROOM) -> tuple[KeyValueCache, Tensor]:
        """Return a cache that holds the contexts, none empty, and the hidden states of their last tokens, [S, E].

        The streams of the cache are the contexts in their order; it has room for so many more positions of each. A
        context that is repeated is run once.
        """
        contents = [context.content for context in contexts]
        distinct = dict(zip(contents, contexts, strict=True))
        if len(distinct) < len(contexts):
            cache, hidden = self.prefill([*distinct.values()], room)
            number = {content: i for i, content in enumerate(distinct)}
            streams = [number[content] for content in contents]
            return cache.select(streams), hidden.index_select(0, self._tensor(np.array(streams)))
        lengths = np.array([len(context.tokens) for context in contexts])
        sequence, positions, after = self._laid_out(contexts, lengths)
        cache = KeyValueCache(self.model, len(contexts), int(lengths.max()) + room)
        cache_rows = ranges(np.arange(len(contexts)) * cache.capacity, lengths)
        batch, latents = self._prefill_batch(sequence, positions, [i.latents for c in contexts for i in c.images])
        parts = self._parts(sequence)
        attentions = [
            PrefillAttention(cache, layer, parts, self._tensor(cache_rows), self.model.config.backend)
            for layer in range(self.depth)
        ]
        hidden, _ = self.model.hidden(batch, latents, attentions)
        cache.lengths, cache.next_position = lengths.tolist(), after.tolist()
        return cache, hidden.index_select(0, self._tensor(np.cumsum(lengths) - 1))

    def _laid_out(
        self, contexts: Sequence[Context], lengths: np.ndarray
    ) -> tuple[TokenSequence, np.ndarray, np.ndarray]:
        """Return the contexts one after another, their positions, and the position that follows each context."""
        starts = np.cumsum(lengths + 1) - lengths - 1
        images = [
            (start + image.offset, image.modality, image.latents)
            for start, context in zip(starts.tolist(), contexts, strict=True)
            for image in context.images
        ]
        tokens = np.array([token for context in contexts for token in (*context.tokens, 0)], dtype=np.int64)
        sequence = place_images(tokens, lengths + 1, images)  # with a token more in each, for its position
        positions, last = positions_of(sequence, self.model.config.modalities), starts + lengths
        start = sequence.start - documents_of_images(sequence)[0]
        sequence = replace(sequence, tokens=np.delete(tokens, last), document_lengths=lengths, start=start)
        return sequence, np.delete(positions, last, axis=0), positions[last].reshape(len(last), -1)[:, 0]

    def _prefill_batch(
        self, sequence: TokenSequence, positions: np.ndarray, latents: Sequence[Tensor]
    ) -> tuple[PackedBatch, list[Tensor]]:
        spans = np.stack([sequence.start, sequence.length], axis=1)
        used, rows, groups = len(sequence.tokens), len(sequence.tokens), []
        text = used - int(sequence.length.sum())
        for modality, settings in enumerate(self.model.config.modalities):
            own = np.flatnonzero(sequence.modality == modality)
            index = ranges(*spans[own].T)
            flat = [latents[i].float().reshape(-1, settings.dim_latent) for i in own.tolist()]
            shapes: list[Shape] = [(f, h, w) for f, h, w in sequence.shape[own].tolist()]
            images = self._images(modality, index, flat, shapes, rows)
            rows += len(images.latents) - len(index)
            groups.append(images)
        rows += -text % ROWS
        tokens, positions = (
            np.concatenate([x, np.zeros((rows - used, *x.shape[1:]), x.dtype)]) for x in (sequence.tokens, positions)
        )
        return self._batch(tokens, positions, groups), [images.latents for images in groups]

    def _parts(self, sequence: TokenSequence) -> list[AttentionLayout | tuple[int, int]]:
        """Return the parts of `PrefillAttention`: one layout of all contexts.

        On a CPU the op takes short documents together and would give a stream other bits in another batch, so there
        each context with images has a layout of its own, and neighbouring texts of one length are a part.
        """
        spans = np.stack([sequence.start, sequence.length], axis=1)[: 0 if self.causal_images else None]
        if self.model.device.type != "cpu":
            return [AttentionLayout.from_spans(sequence.document_lengths, spans, device=self.model.device)]
        document, bounds = documents_of_images(sequence)
        document = document[: len(spans)]
        parts: list[AttentionLayout | tuple[int, int]] = []
        with_images = set(document.tolist())
        for (is_text, length), group in groupby(
            enumerate(sequence.document_lengths.tolist()), key=lambda item: (item[0] not in with_images, item[1])
        ):
            numbers = [number for number, _ in group]
            if is_text:
                parts.append((len(numbers), length))
            else:
                own = (spans[document == number] - [bounds[number], 0] for number in numbers)
                parts += [AttentionLayout.from_spans([length], one) for one in own]
        return parts

    def step(self, cache: KeyValueCache, streams: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append a token to each of the streams, in ascending order; return their hidden states [S, E]."""
        count, padding = len(streams), -len(streams) % ROWS
        cache.reserve(max(cache.lengths[stream] for stream in streams) + 1)
        positions = self._spread(np.array([cache.next_position[s] for s in streams] + [0] * padding))
        batch = self._batch(np.array([*tokens, *[0] * padding]), positions, self.no_images)
        attentions = self._attentions([(cache, streams)], 1)
        hidden, _ = self.model.hidden(batch, [x.latents for x in batch.modalities], attentions)
        for stream in streams:
            cache.lengths[stream] += 1
            cache.next_position[stream] += 1
        return hidden[:count]

    def start_image(self, branches: Sequence[Branch], modality: int, grid: Grid) -> Drawing:
        """Return the passes over an image of the `grid` at the end of each stream of each branch.

        Each branch has the same number of streams.
        """
        return Drawing(self, branches, modality, grid)

    def _attentions(self, branches: Sequence[Branch], n: int) -> list[CachedAttention] | list[LengthsAttention]:
        if all(takes_lengths(cache) for cache, _ in branches):
            lengths = lengths_of(branches, n)
            return [LengthsAttention(lengths, layer, n, self.causal_images) for layer in range(self.depth)]
        rows = rows_of(branches, n)
        return [CachedAttention(rows, layer, n, self.causal_images) for layer in range(self.depth)]

    def _batch(self, tokens: np.ndarray, positions: np.ndarray, images: Sequence[ModalityBatch]) -> PackedBatch:
        """Return the batch of a pass, without labels and layout."""
        ids, none = self._tensor(tokens), self._tensor(np.zeros(0, np.int64))
        return PackedBatch(ids, ids, self._tensor(positions), none, self.no_layout, tuple(images), 0)

    def _images(
        self, modality: int, index: np.ndarray, latents: Sequence[Tensor], shapes: Sequence[Shape], end: int
    ) -> ModalityBatch:
        """Return clean images for a pass, at the positions `index` [P]; rows are added to their patches from `end` on.

        For a linear codec all patches are one image, since they have one timestep.
        """
        settings = self.model.config.modalities[modality]
        added = -len(index) % ROWS
        if settings.codec == "unet":
            added = 0
            order = sorted(range(len(shapes)), key=lambda i: shapes[i])
            grids = tuple((shapes.count(shape), *shape) for shape in sorted(set(shapes)))
            lengths = [math.prod(shape) for shape in shapes]
        else:
            lengths = [len(index) + added] if len(index) else []
            order, grids = [0] * len(lengths), ()
        device = self.model.device
        padding = torch.zeros(added, settings.dim_latent, device=device)
        patches = torch.cat([*(x.to(device) for x in latents), padding])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return ModalityBatch(
            latents=patches,
            noise=patches,
            timesteps=torch.full((len(lengths),), CLEAN_TIMESTEP, device=device),
            image_offsets=self._tensor(offsets),
            sequence_index=self._tensor(np.concatenate([index, np.arange(end, end + added)]).astype(np.int64)),
            weights=torch.ones(len(lengths), device=device),
            by_shape=self._tensor(np.array(order, dtype=np.int64)),
            shapes=grids,
        )

    def _spread(self, positions: np.ndarray) -> np.ndarray:
        """Return positions [T] of text for all axes, int32 [T] or [T, axes]."""
        positions = positions.astype(np.int32)
        return positions if self.axes == 1 else np.repeat(positions[:, None], self.axes, axis=1)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


class Drawing:
    """The passes over an image at the end of each stream; what does not change between them is made once."""

    def __init__(self, engine: Engine, branches: Sequence[Branch], modality: int, grid: Grid):
        self.engine, self.branches, self.modality = engine, branches, modality
        self.streams, self.n = len(branches[0][1]), math.prod(grid)
        frames, rows, columns = (1, 1, 1, *grid)[-3:]
        for cache, streams in branches:
            cache.reserve(max(cache.lengths[stream] for stream in streams) + self.n)
        relative, self.advance = self._relative_positions((frames, rows, columns))
        first = np.array([cache.next_position[stream] for cache, streams in branches for stream in streams])
        count, width = len(first) * self.n, engine.model.config.dim_latent[modality]
        shapes, latents = [(frames, rows, columns)] * len(first), torch.zeros(count, width)
        images = list(engine.no_images)
        images[modality] = engine._images(modality, np.arange(count), [latents], shapes, count)
        positions = np.zeros((len(images[modality].latents), *relative.shape[1:]), np.int32)
        positions[:count] = np.concatenate([relative + start for start in first])
        self.batch = engine._batch(np.zeros(len(positions), np.int64), positions, images)
        self.attentions = engine._attentions(branches, self.n)

    def _relative_positions(self, shape: Shape) -> tuple[np.ndarray, int]:
        """Return the positions of an image that begins at 0, and that of the token after it."""
        with_token = TokenSequence(
            tokens=np.zeros(self.n + 1, np.int64),
            document_lengths=np.array([self.n + 1]),
            start=np.array([0]),
            length=np.array([self.n]),
            shape=np.array([shape]),
            modality=np.array([self.modality]),
        )
        positions = positions_of(with_token, self.engine.model.config.modalities)
        return positions[: self.n], int(positions[self.n].flat[0])

    def predict(self, x_t: Tensor, t: float) -> Tensor:
        """Return the predictions fp32 [branches, S, *grid, C] for x_t [S, *grid, C] at timestep t, on its device."""
        hidden, batch, encoded = self._run(x_t, t)
        prediction = self.engine.model.prediction(hidden, batch, self.modality, encoded[self.modality])
        count = len(self.branches) * self.streams * self.n
        return prediction[:count].float().to(x_t.device).view(len(self.branches), *x_t.shape)

    def finish(self, x: Tensor) -> None:
        """Append the images x [S, *grid, C], clean, to the streams of every branch."""
        self._run(x, CLEAN_TIMESTEP)
        for cache, streams in self.branches:
            for stream in streams:
                cache.lengths[stream] += self.n
                cache.next_position[stream] += self.advance

    def _run(self, x: Tensor, t: float) -> tuple[Tensor, PackedBatch, list[Any]]:
        images, device = self.batch.modalities[self.modality], self.engine.model.device
        patches = torch.zeros_like(images.latents)
        flat = x.to(device).reshape(-1, patches.shape[1])
        patches[: len(self.branches) * len(flat)] = flat.repeat(len(self.branches), 1)
        images = replace(images, timesteps=torch.full_like(images.timesteps, t))
        modalities = [images if m == self.modality else other for m, other in enumerate(self.batch.modalities)]
        batch = replace(self.batch, modalities=tuple(modalities))
        x_t = [patches if m == self.modality else other.latents for m, other in enumerate(modalities)]
        hidden, encoded = self.engine.model.hidden(batch, x_t, self.attentions)
        return hidden, batch, encoded
