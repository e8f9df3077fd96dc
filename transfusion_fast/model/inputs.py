"""What people hand to the model, checked and packed: ragged documents, or rows of token ids with modality spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.config import ModelConfig
from transfusion_fast.model.diffusion import NUM_TIMESTEPS, OBJECTIVES
from transfusion_fast.model.sequence import (
    TEXT,
    Document,
    Image,
    PackedBatch,
    Segments,
    Sequenced,
    Text,
    Vocabulary,
    build_batch,
    frame,
    patch_mask,
    precedes_text,
)

NOISE_CAP = NUM_TIMESTEPS / 2  # largest timestep of an image that text follows (arXiv 2408.11039, section 4.1)


def as_document(pieces: Sequence[Any], config: ModelConfig, number: int = 0) -> Document:
    """Reads [ids, latents, (modality, latents), ...]: integer tensors are text, float tensors images of modality 0.

    Raises:
        ValueError: naming the document, by its number, and the piece whose dtype, shape or values do not fit.
    """
    return [_as_segment(piece, f"document {number}, piece {i}", config) for i, piece in enumerate(pieces)]


def pack_documents(
    documents: Sequence[Document], config: ModelConfig, generator: torch.Generator | None = None
) -> PackedBatch:
    """Lays documents out one after another and draws noise and timesteps; ValueError for a document without pieces."""
    for i, document in enumerate(documents):
        if not len(document):
            raise ValueError(f"document {i} must hold at least one piece, got none; leave it out")
    rows = [_table_row(i, segment) for i, document in enumerate(documents) for segment in document]
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    number, kind, length, grid_rows, grid_columns = table.T
    segments = Segments(number, kind, length, grid_rows, grid_columns, framed=np.ones(len(documents), dtype=bool))
    flat = [segment for document in documents for segment in document]
    ids = [s.ids.cpu().numpy() for s in flat if isinstance(s, Text)]
    vocabulary = Vocabulary(config.num_text_tokens, len(config.dim_latent))
    sequenced = frame(segments, np.concatenate([np.zeros(0, np.int64), *ids]), vocabulary)
    return _with_noise(sequenced, [(s.modality, s.latents) for s in flat if isinstance(s, Image)], config, generator)


def pack_rows(
    text_ids: Tensor,
    modality_tokens: Sequence[Sequence[Tensor]],
    modality_positions: Sequence[Sequence[tuple[int, ...]]],
    config: ModelConfig,
    generator: torch.Generator | None = None,
) -> PackedBatch:
    """Packs rows that are already laid out: row b of text_ids [B, T] is one document, ids at modality spans ignored.

    modality_positions[b][i] = (offset, length) or (modality, offset, length) says where modality_tokens[b][i] stands.
    """
    if text_ids.ndim != 2 or text_ids.is_floating_point():
        raise ValueError(f"text_ids must be integers [B, T], got {text_ids.dtype} {tuple(text_ids.shape)}")
    rows, length = text_ids.shape
    if len(modality_tokens) != rows or len(modality_positions) != rows:
        raise ValueError(
            f"modality_tokens and modality_positions must have an entry for each of the {rows} rows, "
            f"got {len(modality_tokens)} and {len(modality_positions)}"
        )
    tokens = text_ids.cpu().numpy().astype(np.int64)  # a copy, which the patches' places are cleared in
    spans, images = [], []
    for row, (latents_of_row, positions) in enumerate(zip(modality_tokens, modality_positions, strict=True)):
        if len(latents_of_row) != len(positions):
            raise ValueError(f"row {row} has {len(latents_of_row)} modality tensors but {len(positions)} positions")
        placed = [_place(row, x, p, length, config) for x, p in zip(latents_of_row, positions, strict=True)]
        for modality, offset, image in sorted(placed, key=lambda p: p[1]):
            grid = _grid(image.latents)
            tokens[row, offset : offset + math.prod(grid)] = 0
            spans.append((row * length + offset, math.prod(grid), *grid, modality))
            images.append((modality, image.latents))
    size = Vocabulary(config.num_text_tokens, len(config.dim_latent)).size
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        raise ValueError(f"text_ids must lie in [0, {size}), got {tokens.min()} to {tokens.max()}")
    columns = np.array(spans, dtype=np.int64).reshape(-1, 5).T
    sequenced = Sequenced(tokens.reshape(-1), np.full(rows if length else 0, length, dtype=np.int64), *columns)
    return _with_noise(sequenced, images, config, generator)


def _with_noise(
    sequenced: Sequenced, images: Sequence[tuple[int, Tensor]], config: ModelConfig, generator: torch.Generator | None
) -> PackedBatch:
    """Draws timesteps and noise, in sequence order, and builds the batch. `images` are (modality, latents)."""
    objective = OBJECTIVES[config.objective]
    vocabulary = Vocabulary(config.num_text_tokens, len(config.dim_latent))
    capped = torch.from_numpy(precedes_text(sequenced, vocabulary, patch_mask(sequenced)))
    caps = torch.where(capped, NOISE_CAP, float(NUM_TIMESTEPS))
    timesteps = objective.timesteps(torch.rand(len(images), generator=generator), caps)
    modalities = []
    for modality, width in enumerate(config.dim_latent):
        own = [x.detach().float().cpu().reshape(-1, width) for m, x in images if m == modality]
        latents = torch.cat([torch.zeros(0, width), *own])
        noise = torch.randn(latents.shape, generator=generator)
        modalities.append((latents, noise, timesteps[torch.from_numpy(sequenced.modality == modality)]))
    return build_batch(sequenced, vocabulary, modalities, config.positions)


def _table_row(document: int, segment: Text | Image) -> tuple[int, int, int, int, int]:
    """A row of `Segments`: document, kind, length, rows, columns."""
    if isinstance(segment, Text):
        return document, TEXT, len(segment.ids), 0, 0
    rows, columns = _grid(segment.latents)
    return document, 1 + segment.modality, rows * columns, rows, columns


def _as_segment(piece: Any, what: str, config: ModelConfig) -> Text | Image:
    modality, tensor = piece if isinstance(piece, tuple) and len(piece) == 2 else (0, piece)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what} must be a tensor or (modality, tensor), got {_kind(piece)}")
    if tensor.is_floating_point():
        return _checked_image(tensor, modality, what, config)
    if isinstance(piece, tuple):
        raise ValueError(f"{what}: a modality tensor must be floating point, got {tensor.dtype}")
    if tensor.ndim != 1:
        raise ValueError(f"{what}: text ids must be [n], got {tuple(tensor.shape)}")
    if len(tensor) and (tensor.min() < 0 or tensor.max() >= config.num_text_tokens):
        raise ValueError(
            f"{what}: text ids must lie in [0, {config.num_text_tokens}), "
            f"got {tensor.min().item()} to {tensor.max().item()}"
        )
    return Text(tensor.long())


def _kind(value: Any) -> str:
    """The types in a value, for a message."""
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def _checked_image(latents: Tensor, modality: int, what: str, config: ModelConfig) -> Image:
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        got = latents.dtype if isinstance(latents, Tensor) else _kind(latents)
        raise ValueError(f"{what}: latents must be a floating point tensor, got {got}")
    if not isinstance(modality, int) or not 0 <= modality < len(config.dim_latent):
        raise ValueError(f"{what}: modality must be in [0, {len(config.dim_latent)}), got {modality!r}")
    width = config.dim_latent[modality]
    if latents.ndim not in (2, 3) or latents.shape[-1] != width or not latents.numel():
        raise ValueError(
            f"{what}: latents of modality {modality} must be [patches, {width}] or [rows, columns, {width}], "
            f"not empty, got {tuple(latents.shape)}"
        )
    return Image(latents, modality)


def _place(
    row: int, latents: Tensor, place: tuple[int, ...], row_length: int, config: ModelConfig
) -> tuple[int, int, Image]:
    """(modality, offset, image) of one modality span of a row."""
    what = f"row {row}, span {tuple(place)}"
    if len(place) not in (2, 3):
        raise ValueError(f"{what}: must be (offset, length) or (modality, offset, length)")
    modality, offset, length = place if len(place) == 3 else (0, *place)
    image = _checked_image(latents, modality, what, config)
    if math.prod(_grid(latents)) != length:
        raise ValueError(f"{what}: length must be the patches of its tensor, got {tuple(latents.shape)}")
    if offset < 0 or offset + length > row_length:
        raise ValueError(f"{what}: must lie inside the row of {row_length}")
    return modality, offset, image


def _grid(latents: Tensor) -> tuple[int, int]:
    """Rows and columns of patches; latents without a grid are one row."""
    return (latents.shape[0], latents.shape[1]) if latents.ndim == 3 else (1, latents.shape[0])
