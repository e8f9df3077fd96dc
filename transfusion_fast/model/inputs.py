"""Inputs that people hand to the model, checked and packed: ragged documents, or rows of ids with image spans.

A document is a list of pieces, `[ids, latents, (modality, latents), ...]`. An integer tensor [n] is text, a float
tensor is an image of modality 0, and a tuple names another modality. Images are [rows, columns, C], or [patches, C] for
one row; other numbers of dimensions are [C], [length, C] and [frames, rows, columns, C]. With `channel_first` C comes
first. Special tokens are added. `sample` returns documents of the same form.
For training, `Weighted(piece, weight)` in place of a piece, or around a whole document, weighs its loss; 0 ignores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.config import NOISE_CAP, PROB_UNCOND, ModelConfig
from transfusion_fast.model.diffusion import NUM_TIMESTEPS, Diffusion
from transfusion_fast.model.loss_weights import MAX_WEIGHT, Weighted, check_weight
from transfusion_fast.model.packed_batch import PackedBatch, build_batch
from transfusion_fast.model.sequence import (
    TEXT,
    Segments,
    TokenSequence,
    Vocabulary,
    before_captions,
    lay_out,
    patch_mask,
    without_context,
    wrongly_sized,
)

Piece = Tensor | tuple[int, Tensor]
Document = Sequence[Piece]
TrainingDocument = Sequence[Piece | Weighted] | Weighted
Encode = Callable[[Sequence[Document]], Sequence[Document]]
Segment = tuple[int, Tensor]
"""(kind, tensor) of a checked piece: TEXT with ids int64 [n], or 1 + modality with latents."""
_AXES = ((), ("length",), ("rows", "columns"), ("frames", "rows", "columns"))


@dataclass(frozen=True)
class Randomness:
    """How a training batch is randomised.

    generator: source of the timesteps, the noise and the dropped conditions; noise_cap: largest timestep, in 1..1000,
    of an image that stands before its caption, if it is noised in place; prob_uncond: probability that an image is
    trained without what precedes it in its document; noised_copies: number of noised copies of each image, which itself
    stays clean then, or 0 to noise images in place.
    """

    generator: torch.Generator | None = None
    noise_cap: float = NOISE_CAP
    prob_uncond: float = PROB_UNCOND
    noised_copies: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.noise_cap <= NUM_TIMESTEPS:
            raise ValueError(
                f"noise_cap must be in 1..{NUM_TIMESTEPS}, got {self.noise_cap}; {NOISE_CAP} is the paper's"
            )
        if not 0 <= self.prob_uncond <= 1:
            raise ValueError(f"prob_uncond must be in 0..1, got {self.prob_uncond}; 0 drops no condition")
        copies = self.noised_copies
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 0:
            raise ValueError(f"noised_copies must be an integer from 0 on, got {copies!r}; 0 noises images in place")


def check_document(document: object, config: ModelConfig, name: str = "document 0") -> list[Segment]:
    """Return the pieces of a document with their kinds.

    Raises:
        ValueError: naming the document by its `name`, and the piece whose type, dtype, shape or values do not fit.
    """
    pieces = _a_list(document, f"{name} must be a list of pieces")
    return [_check_piece(piece, f"{name}, piece {i}", config) for i, piece in enumerate(pieces)]


def _a_list(value: object, rule: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{rule}, got {type(value).__name__}; give a list")
    return value


@torch.compiler.disable
def encode_pieces(
    documents: Sequence[Document], encoders: Mapping[int, Callable[[Tensor], Tensor]], device: torch.device
) -> list[list[Piece]]:
    """Replace the raw tensors of modalities that have an encoder by its latents, a batch for each shape of tensors."""
    encoded = [list(document) for document in documents]
    batches: dict[Any, list[tuple[int, int, Tensor]]] = {}
    for i, document in enumerate(documents):
        for j, piece in enumerate(document):
            modality, raw = piece if isinstance(piece, tuple) and len(piece) == 2 else (0, piece)
            if modality in encoders and isinstance(raw, Tensor) and (raw is not piece or raw.is_floating_point()):
                batches.setdefault((modality, raw.dtype, raw.shape), []).append((i, j, raw))
    for (modality, *_), raws in batches.items():
        latents = encoders[modality](torch.stack([raw for *_, raw in raws]).to(device))
        for (i, j, _), one in zip(raws, latents, strict=True):
            encoded[i][j] = (modality, one)
    return encoded


@torch.compiler.disable
def pack_documents(
    documents: Sequence[TrainingDocument],
    config: ModelConfig,
    randomness: Randomness = Randomness(),
    encode: Encode = lambda documents: documents,
) -> PackedBatch:
    """Lay documents out one after another, and draw timesteps and noise.

    `encode` maps documents with raw pieces to documents of latents.

    Raises:
        ValueError: as `check_document`, and for a document without pieces, or a weight out of its range.
    """
    plain, weights = _without_weights(documents)
    documents = encode(plain)
    for i, document in enumerate(documents):
        if not len(document):
            raise ValueError(f"document {i} must hold at least one piece, got none; leave it out")
    checked = [check_document(document, config, f"document {i}") for i, document in enumerate(documents)]
    for i, pieces in enumerate(checked):
        for j, (kind, x) in enumerate(pieces):
            if kind != TEXT:
                _refuse_doubtful(x, kind - 1, f"document {i}, piece {j}", config)
    rows = [
        (i, kind, len(x), 1, 1, 1) if kind == TEXT else (i, kind, *_size(x))
        for i, document in enumerate(checked)
        for kind, x in document
    ]
    number, kinds, lengths, *shape = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    segments = Segments(number, kinds, lengths, np.stack(shape, axis=1), np.array(weights, np.float32))
    flat = [segment for document in checked for segment in document]
    ids = [x.cpu().numpy() for kind, x in flat if kind == TEXT]
    vocabulary = Vocabulary.of(config)
    sequence = lay_out(segments, np.concatenate([np.zeros(0, np.int64), *ids]), vocabulary)
    return _with_noise(sequence, [(kind - 1, x) for kind, x in flat if kind != TEXT], config, randomness)


def _without_weights(documents: Sequence[TrainingDocument]) -> tuple[list[list[Any]], list[float]]:
    """Return the pieces of each document, and the weight of each piece of all documents, one after another."""
    plain, weights = [], []
    for i, document in enumerate(_a_list(documents, "documents must be a list of documents")):
        around = 1.0
        if isinstance(document, Weighted):
            document, around = document.content, check_weight(document.weight, f"document {i}")
        _a_list(document, f"document {i} must be a list of pieces")
        plain.append([piece.content if isinstance(piece, Weighted) else piece for piece in document])
        for j, piece in enumerate(document):
            own = check_weight(piece.weight, f"document {i}, piece {j}") if isinstance(piece, Weighted) else 1.0
            weights.append(around * own)
    return plain, weights


@torch.compiler.disable
def pack_rows(
    text_ids: Tensor,
    modality_tokens: Sequence[Sequence[Tensor]] | None,
    modality_positions: Sequence[Sequence[tuple[int, ...]]] | None,
    config: ModelConfig,
    randomness: Randomness = Randomness(),
    encode: Encode = lambda documents: documents,
    text_weights: Tensor | None = None,
) -> PackedBatch:
    """Pack rows that are laid out already: each row of text_ids [B, T] is one document; ids at image spans are ignored.

    Args:
        modality_tokens: the latents of the images of each row; default: none.
        modality_positions: (offset, length) or (modality, offset, length) of each of these images; default: none.
        encode: maps documents of raw pieces, one for each row, to documents of latents.
        text_weights: [B, T], the weight in 0..`MAX_WEIGHT` of the loss of each token, wherever it is predicted; 0 is no
            loss. Those at image spans are ignored, as images have the weight 1. Default: 1 everywhere.

    Raises:
        ValueError: naming the row, and the span or the position, that does not fit.
    """
    if text_ids.ndim != 2 or not _is_integer(text_ids):
        got = f"{text_ids.dtype} {tuple(text_ids.shape)}"
        raise ValueError(f"text_ids must be integers [B, T], got {got}; give one row for each document")
    rows, row_length = text_ids.shape
    latents = [()] * rows if modality_tokens is None else modality_tokens
    given = [()] * rows if modality_positions is None else modality_positions
    positions = [[_integers(row, span) for span in spans] for row, spans in enumerate(given)]
    if len(latents) != rows or len(positions) != rows:
        rule = f"modality_tokens and modality_positions must have an entry for each of the {rows} rows"
        raise ValueError(f"{rule}, got {len(latents)} and {len(positions)}; give [] for a row without images")
    for row, (of_row, spans) in enumerate(zip(latents, positions, strict=True)):
        if len(of_row) != len(spans):
            rule = f"row {row} must have a position for each modality tensor"
            raise ValueError(f"{rule}, got {len(of_row)} tensors and {len(spans)} positions; give as many")
    raw = [
        [(span[0] if len(span) == 3 else 0, x) for x, span in zip(of_row, spans, strict=True)]
        for of_row, spans in zip(latents, positions, strict=True)
    ]
    images: list[tuple[int, int, Tensor]] = []
    for row, (pieces, spans) in enumerate(zip(encode(raw), positions, strict=True)):
        spanned = [_check_span(row, x, span, row_length, config) for (_, x), span in zip(pieces, spans, strict=True)]
        spanned.sort(key=lambda image: image[0])
        for (start, _, before), (offset, _, _) in pairwise(spanned):
            if offset < (end := start + _size(before)[0]):
                rule = f"an image must not begin before {end - row * row_length}, where the one before it ends"
                raise ValueError(f"row {row}: {rule}, got {offset - row * row_length}; move it")
        images += spanned
    lengths = np.full(rows if row_length else 0, row_length, dtype=np.int64)
    sequence = place_images(text_ids.cpu().numpy().astype(np.int64).reshape(-1), lengths, images)
    vocabulary, tokens = Vocabulary.of(config), sequence.tokens
    size = vocabulary.size
    if len(wrong := np.flatnonzero((tokens < 0) | (tokens >= size))):
        where = "row {}, position {}".format(*divmod(wrong[0].item(), row_length))
        raise ValueError(f"{where}: text ids must lie in [0, {size}), got {tokens[wrong[0]]}; check the tokenizer")
    for image in wrongly_sized(sequence, vocabulary)[:1].tolist():
        where = "row {}, position {}".format(*divmod(sequence.start[image].item(), row_length))
        raise ValueError(f"{where}: an image must follow the size tokens of its grid, got others; put them before it")
    if text_weights is not None:
        weights = np.where(patch_mask(sequence), np.float32(1), _row_weights(text_weights, text_ids))
        sequence = replace(sequence, weights=weights)
    return _with_noise(sequence, [(modality, x) for _, modality, x in images], config, randomness)


def _row_weights(given: Tensor, text_ids: Tensor) -> np.ndarray:
    """Return the weights of the tokens of all rows, fp32 [B T]."""
    weights = torch.as_tensor(given, dtype=torch.float32).detach().cpu().numpy()
    if weights.shape != text_ids.shape:
        rule = f"text_weights must be {tuple(text_ids.shape)} like text_ids"
        raise ValueError(f"{rule}, got {weights.shape}; give one for each token")
    for row, position in np.argwhere(~((weights >= 0) & (weights <= MAX_WEIGHT)))[:1].tolist():
        check_weight(weights[row, position].item(), f"row {row}, position {position}")
    return weights.flatten()


def place_images(
    tokens: np.ndarray, document_lengths: np.ndarray, images: Sequence[tuple[int, int, Tensor]]
) -> TokenSequence:
    """Return a sequence of tokens int64 [T] that are laid out already, zero at its images.

    `images` are (offset, modality, latents) with absolute offsets, in ascending order.
    """
    table = [(offset, *_size(latents), modality) for offset, modality, latents in images]
    start, length, *shape, modality = np.array(table, dtype=np.int64).reshape(-1, 6).T
    tokens = tokens.copy()
    for first, count in zip(start.tolist(), length.tolist(), strict=True):
        tokens[first : first + count] = 0
    return TokenSequence(tokens, document_lengths, start, length, np.stack(shape, axis=1), modality)


def draw_timesteps(
    sequence: TokenSequence, vocabulary: Vocabulary, diffusion: Diffusion, uniform: Tensor, noise_cap: float
) -> Tensor:
    """Turn uniform numbers [..., N] into timesteps, fp32 [..., N], at most `noise_cap` in image-first pairs.

    Captions then see an image that is not too noisy (arXiv 2408.11039, section 4.1). In other documents a cap would
    leave images untrained at the noise that drawing begins with.
    """
    capped = torch.from_numpy(before_captions(sequence, vocabulary))
    caps = torch.tensor([NUM_TIMESTEPS, noise_cap], dtype=torch.float64)
    return diffusion.training_timesteps(uniform, torch.from_numpy(sequence.length), caps[capped.long()])


def flat_latents(images: Sequence[tuple[int, Tensor]], widths: Sequence[int]) -> list[Tensor]:
    """Return fp32 [P, C] of each modality on the CPU, from (modality, latents) of images in sequence order."""
    flat: list[list[Tensor]] = [[torch.zeros(0, width)] for width in widths]
    for modality, latents in images:
        flat[modality].append(latents.float().cpu().reshape(-1, widths[modality]))
    return [torch.cat(latents) for latents in flat]


def _with_noise(
    sequence: TokenSequence,
    images: Sequence[tuple[int, Tensor]],
    config: ModelConfig,
    randomness: Randomness,
) -> PackedBatch:
    """Draw all that is random, in sequence order, and build the batch. `images` are (modality, latents)."""
    vocabulary, generator = Vocabulary.of(config), randomness.generator
    copies, causal = randomness.noised_copies, config.image_attention == "causal"
    if copies and causal:
        rule = "noised_copies must be 0 with image_attention=causal, as attention within copies is bidirectional"
        raise ValueError(f"{rule}, got {copies}; set one of them")
    uniform, drop = torch.rand(2, len(images), generator=generator)
    if copies:
        uniform = torch.cat([uniform[None], torch.rand(copies - 1, len(images), generator=generator)])
    cap = NUM_TIMESTEPS if copies else randomness.noise_cap
    timesteps = draw_timesteps(sequence, vocabulary, Diffusion(config.diffusion), uniform, cap)
    sequence = without_context(sequence, (drop < randomness.prob_uncond).numpy(), vocabulary)
    latents = flat_latents(images, config.dim_latent)
    repeated = (copies,) if copies else ()
    noisy = [(x, torch.randn(*repeated, *x.shape, generator=generator)) for x in latents]
    return build_batch(sequence, noisy, timesteps, config.modalities, causal_images=causal)


def _size(latents: Tensor) -> tuple[int, int, int, int]:
    """Return the number of patches, and the frames, rows and columns of their grid."""
    frames, rows, columns = (1, 1, 1, *latents.shape[:-1])[-3:]
    return frames * rows * columns, frames, rows, columns


def _check_piece(piece: Piece, what: str, config: ModelConfig) -> Segment:
    modality, tensor = piece if isinstance(piece, tuple) and len(piece) == 2 else (0, piece)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what} must be a tensor or (modality, tensor), got {_type_names(piece)}; convert it")
    if tensor.is_floating_point():
        latents = _check_image(tensor, modality, what, config)
        return 1 + modality, latents
    if isinstance(piece, tuple):
        raise ValueError(f"{what}: a modality tensor must be floating point, got {tensor.dtype}; call its float()")
    if tensor.ndim != 1 or not _is_integer(tensor):
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{what}: text ids must be integers [n], got {got}; give one for each token")
    if len(wrong := tensor[(tensor < 0) | (tensor >= config.num_text_tokens)]):
        rule = f"{what}: text ids must lie in [0, {config.num_text_tokens})"
        raise ValueError(f"{rule}, got {wrong[0].item()}; special tokens are added, do not give them")
    return TEXT, tensor.long()


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _type_names(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def _check_image(latents: Tensor, modality: int, what: str, config: ModelConfig) -> Tensor:
    """Return latents that fit the model, channels last; ValueError naming `what` if they do not fit."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        got = latents.dtype if isinstance(latents, Tensor) else _type_names(latents)
        raise ValueError(f"{what}: latents must be a floating point tensor, got {got}; convert them")
    if not isinstance(modality, int) or isinstance(modality, bool) or not 0 <= modality < len(config.modalities):
        rule = f"{what}: modality must be an integer in [0, {len(config.modalities)})"
        raise ValueError(f"{rule}, got {modality!r}; the model has no other")
    settings = config.modalities[modality]
    shape, width, axes = tuple(latents.shape), settings.dim_latent, _AXES[settings.dims]
    channels_last = latents.movedim(0, -1) if settings.channel_first and latents.ndim == len(axes) + 1 else latents
    one_row = settings.dims == 2 and latents.ndim == 2
    if not (latents.ndim == len(axes) + 1 or one_row) or channels_last.shape[-1] != width or not latents.numel():
        grid = ", ".join(map(str, (width, *axes) if settings.channel_first else (*axes, width)))
        rows = f"[patches, {width}] or " if settings.dims == 2 else ""
        rule = f"latents of modality {modality} must be {rows}[{grid}], not empty"
        raise ValueError(f"{what}: {rule}, got {shape}; reshape them")
    if not latents.float().isfinite().all():
        raise ValueError(f"{what}: latents must be finite in fp32, got NaN or infinity; check the encoder")
    return channels_last


def _refuse_doubtful(latents: Tensor, modality: int, what: str, config: ModelConfig) -> None:
    """Raise ValueError for [rows, columns, C] that could be [C, rows, columns], unless a setting says which it is."""
    shape, settings = tuple(latents.shape), config.modalities[modality]
    if settings.channel_first is None and len(shape) == settings.dims + 1 > 1 and shape[0] == shape[-1] > 1:
        rule = f"{what}: latents must be [{', '.join(_AXES[settings.dims])}, channels]"
        raise ValueError(f"{rule}, got {shape}, which could be channels first; set channel_first to True or False")


def _integers(row: int, span: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return the numbers of a span; raise ValueError unless they are integers."""
    try:
        return tuple(map(index, span))
    except TypeError:
        rule = f"row {row}: a position must be integers, (offset, length) or (modality, offset, length)"
        raise ValueError(f"{rule}, got {span!r:.60}; convert it") from None


def _check_span(
    row: int, latents: Tensor, span: tuple[int, ...], row_length: int, config: ModelConfig
) -> tuple[int, int, Tensor]:
    """Return (absolute offset, modality, latents) of one image span of a row."""
    what = f"row {row}, span {tuple(span)}"
    if len(span) not in (2, 3):
        rule = f"{what}: a position must be (offset, length) or (modality, offset, length)"
        raise ValueError(f"{rule}, got {len(span)} numbers; correct it")
    modality, offset, length = span if len(span) == 3 else (0, *span)
    latents = _check_image(latents, modality, what, config)
    _refuse_doubtful(latents, modality, what, config)
    if (patches := _size(latents)[0]) != length:
        raise ValueError(f"{what}: length must be {patches}, the patches of its tensor, got {length}; correct it")
    if offset < 0 or offset + length > row_length:
        raise ValueError(f"{what}: an image must lie in [0, {row_length}), got {offset}..{offset + length}; move it")
    return row * row_length + offset, modality, latents
