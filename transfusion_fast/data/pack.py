"""Documents, and packs of documents: the unit that is stored, shuffled and counted.

A document is a tuple of text and image segments, which occupies `<bos> ids <boi> patches <eoi> ids ... <eos>` of a
sequence. A pack holds documents that together occupy at most `sequence_length` positions. Special tokens are never
stored: the loader adds them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np

from transfusion_fast.errors import InputError

KIND_TEXT = 0  # an image of modality m has kind 1 + m
SEGMENT_COLUMNS = ("document", "kind", "offset", "length", "height", "width")
MAX_LENGTH = 1 << 24
"""Largest sequence length; it bounds the memory that a damaged index can make a reader allocate."""
DOCUMENT_TOKENS = 2  # <bos> <eos>
IMAGE_TOKENS = 2  # <boi> <eoi>
_IDS = np.dtype(np.int32)
_STORED_AS: dict[str, np.dtype] = {"pixels": np.dtype(np.uint8), "latents": np.dtype(np.float16)}


@dataclass(frozen=True)
class ModalityInfo:
    """Storage of one modality's images: uint8 `pixels` or float16 `latents`, cut into square patches."""

    name: str
    channels: int
    patch_size: int
    encoding: Literal["pixels", "latents"]
    autoencoder: str = ""
    """Fingerprint of the autoencoder or vision encoder that made the latents, 64 hexadecimal digits; empty for pixels
    or if unknown."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of a vision encoder's features; latents are (feature - mean) / std. Empty for others."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel of a vision encoder's features."""

    def __post_init__(self) -> None:
        digits = "([0-9a-f]{64})?" if self.encoding == "latents" else ""
        for field, good, rule in (
            ("channels", 1 <= self.channels <= 65535, "in 1..65535"),
            ("patch_size", 1 <= self.patch_size <= 65535, "in 1..65535"),
            ("name", re.fullmatch(r"\w[\w .-]{0,99}", self.name), "letters, digits, _ . - and spaces, 100 at most"),
            ("encoding", self.encoding in _STORED_AS, "pixels or latents"),
            ("autoencoder", re.fullmatch(digits, self.autoencoder), "64 hexadecimal digits for latents, or empty"),
            ("mean", np.isfinite(self.mean).all(), "finite"),
            ("std", all(0 < std < math.inf for std in self.std), "positive"),
            ("mean", len(self.mean) in (0, self.channels), f"{self.channels} numbers, one a channel, or none"),
            ("std", len(self.std) == len(self.mean), f"{len(self.mean)} numbers, as many as the means"),
        ):
            if not good:
                got = f"{getattr(self, field)!r:.80}"
                raise InputError(f"{field} of modality {self.name!r:.80} must be {rule}, got {got}; correct it")

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON, without the mean and deviation that other latents than features do not have."""
        return {name: value for name, value in asdict(self).items() if value != ()}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """Return the modality that `describe` described, after a passage through JSON."""
        return cls(**fields | {name: tuple(fields[name]) for name in ("mean", "std") if name in fields})


@dataclass(frozen=True, eq=False)
class TextSegment:
    """Text ids, int32 [n], n >= 1, and the weight of their loss."""

    ids: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """An image, uint8 (pixels) or float16 (latents) [height, width, channels], the number of its modality, and the
    weight of its loss."""

    values: np.ndarray
    modality: int = 0
    weight: float = 1.0


Segment = TextSegment | ImageSegment
Document = tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class Pack:
    """Documents one after another.

    `tokens` int32 [n]: the text ids. `latents` uint8 or float16 [m]: the images' values, row-major. `segments`
    int32 [S, 6]: rows of `SEGMENT_COLUMNS`, in document order. A text row holds its offset and length in `tokens`, and
    zero height and width. An image row holds the offset of its first value in `latents`, its number of patches, and
    its height and width in values. `weights` fp32 [S]: the weight of each segment's loss, or None for 1 everywhere.
    """

    tokens: np.ndarray
    segments: np.ndarray
    latents: np.ndarray
    weights: np.ndarray | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return int(self.segments[-1, 0]) + 1 if len(self.segments) else 0

    @property
    def num_positions(self) -> int:
        """Number of sequence positions that the documents occupy, special tokens included."""
        images = np.count_nonzero(self.segments[:, 1] != KIND_TEXT)
        patches_and_ids = self.segments[:, 3].sum(dtype=np.int64)
        return int(patches_and_ids + IMAGE_TOKENS * images + DOCUMENT_TOKENS * self.num_documents)

    def documents(self, modalities: Sequence[ModalityInfo]) -> list[Document]:
        """Return the documents that `make_pack` was given; their arrays are views of the pack's."""
        documents: list[list[Segment]] = [[] for _ in range(self.num_documents)]
        weights = [1.0] * len(self.segments) if self.weights is None else self.weights.tolist()
        for row, weight in zip(self.segments.tolist(), weights, strict=True):
            documents[row[0]].append(segment_at(row, weight, self.tokens, self.latents, modalities))
        return [tuple(segments) for segments in documents]


def tokens_dtype(num_text_tokens: int) -> np.dtype:
    """Return the dtype in which text ids are stored: uint8 or uint16 if the vocabulary allows, else int32."""
    return np.dtype(np.uint8 if num_text_tokens <= 1 << 8 else np.uint16 if num_text_tokens <= 1 << 16 else np.int32)


def latents_dtype(modalities: Sequence[ModalityInfo]) -> np.dtype:
    """Return the dtype of a pack's latents; InputError if pixels and latents would share one array."""
    encodings = sorted({modality.encoding for modality in modalities}) or ["pixels"]
    if len(encodings) > 1:
        raise InputError(f"modalities of one data folder must share one encoding, got {encodings}; prepare two folders")
    return _STORED_AS[encodings[0]]


def segment_length(segment: Segment, modalities: Sequence[ModalityInfo]) -> int:
    """Return the number of text ids or image patches of a segment; InputError for one that no pack can hold."""
    if isinstance(segment, TextSegment):
        ids = segment.ids
        if ids.dtype != _IDS or ids.ndim != 1 or ids.size == 0:
            raise InputError(
                f"text ids must be int32 [n] with at least one id, got {ids.dtype} of shape {ids.shape}; "
                "leave empty text out of the document"
            )
        return ids.size
    if not 0 <= segment.modality < len(modalities):
        raise InputError(f"modality of an image must be in 0..{len(modalities) - 1}, got {segment.modality}")
    modality, values = modalities[segment.modality], segment.values
    what, patch, dtype = f"image of modality {modality.name!r}", modality.patch_size, _STORED_AS[modality.encoding]
    if values.ndim != 3 or values.shape[2] != modality.channels or values.dtype != dtype:
        raise InputError(
            f"{what} must be {dtype} [height, width, {modality.channels}], got {values.dtype} of shape {values.shape}; "
            "convert it or correct the modality"
        )
    height, width, _ = values.shape
    if height == 0 or width == 0 or height % patch or width % patch:
        raise InputError(
            f"{what} must have a height and width that are positive multiples of its patch size {patch}, "
            f"got {height} x {width}; crop or resize it"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{what} must have finite values, got infinity or NaN; scale it to fit {dtype}")
    return (height // patch) * (width // patch)


def segment_row(
    segment: Segment, document: int, ids: int, values: int, modalities: Sequence[ModalityInfo]
) -> tuple[int, ...]:
    """Return the `SEGMENT_COLUMNS` of a segment after `ids` ids and `values` values; InputError as `segment_length`."""
    length = segment_length(segment, modalities)
    if isinstance(segment, TextSegment):
        return document, KIND_TEXT, ids, length, 0, 0
    return document, 1 + segment.modality, values, length, *segment.values.shape[:2]


def segment_at(
    row: Sequence[int], weight: float, tokens: np.ndarray, latents: np.ndarray, modalities: Sequence[ModalityInfo]
) -> Segment:
    """Return the segment that a row and its weight describe; its array is a view."""
    _, kind, offset, length, height, width = row
    if kind == KIND_TEXT:
        return TextSegment(tokens[offset : offset + length], weight)
    shape = (height, width, modalities[kind - 1].channels)
    return ImageSegment(latents[offset : offset + math.prod(shape)].reshape(shape), kind - 1, weight)


def make_pack(documents: Sequence[Document], modalities: Sequence[ModalityInfo]) -> Pack:
    """Return a pack of `documents`, numbered from 0; InputError for none, or for one that cannot be packed."""
    if not documents or not all(documents):
        raise InputError("pack must hold documents of at least one segment, got an empty one; leave it out")
    rows: list[tuple[int, ...]] = []
    tokens = [np.empty(0, np.int32)]
    latents = [np.empty(0, latents_dtype(modalities))]
    token_offset = value_offset = 0
    for number, document in enumerate(documents):
        for segment in document:
            rows.append(segment_row(segment, number, token_offset, value_offset, modalities))
            if isinstance(segment, TextSegment):
                tokens.append(segment.ids)
                token_offset += segment.ids.size
            else:
                latents.append(segment.values.reshape(-1))
                value_offset += segment.values.size
    weights = np.array([segment.weight for document in documents for segment in document], np.float32)
    has_weights = bool((weights != 1).any())
    return Pack(
        np.concatenate(tokens), np.array(rows, np.int32), np.concatenate(latents), weights if has_weights else None
    )


def empty_pack(modalities: Sequence[ModalityInfo]) -> Pack:
    """Return the pack of no documents that replaces an unreadable pack in a batch. No shard holds one."""
    segments = np.empty((0, len(SEGMENT_COLUMNS)), np.int32)
    return Pack(np.empty(0, np.int32), segments, np.empty(0, latents_dtype(modalities)))


def validate_pack(pack: Pack, modalities: Sequence[ModalityInfo], num_text_tokens: int, sequence_length: int) -> None:
    """Raise InputError unless a pack of arrays of the right kinds is one that `make_pack` makes for these settings.

    Afterwards every offset, length and size in the pack can be trusted. The caller, who knows the file, adds to the
    error what to do about it.
    """
    if pack.latents.dtype != (dtype := latents_dtype(modalities)):
        raise InputError(f"latents of a pack must be {dtype}, got {pack.latents.dtype}")
    if len(pack.segments) == 0:
        raise InputError("segments of a pack must be one row or more, got none")
    _check_rows(pack, modalities, sequence_length)
    if pack.tokens.size and not 0 <= pack.tokens.min() <= pack.tokens.max() < num_text_tokens:
        raise InputError(
            f"token ids of a pack must be in 0..{num_text_tokens - 1}, got {pack.tokens.min()}..{pack.tokens.max()}"
        )
    if not np.isfinite(pack.latents).all():
        raise InputError("latents of a pack must be finite, got infinity or NaN")
    weights = pack.weights
    if weights is not None and (len(weights) != len(pack.segments) or not ((weights >= 0) & (weights < np.inf)).all()):
        raise InputError(
            f"weights of a pack must be {len(pack.segments)} numbers from 0 on, one a segment, got "
            f"{weights.tolist()!r:.60}"
        )
    if pack.num_positions > sequence_length:
        raise InputError(f"pack must take at most {sequence_length} positions, got {pack.num_positions}")


def _check_rows(pack: Pack, modalities: Sequence[ModalityInfo], sequence_length: int) -> None:
    document, kind, offset, length, height, width = pack.segments.astype(np.int64).T

    def require(good: np.ndarray, rule: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            values = zip(SEGMENT_COLUMNS, pack.segments[row].tolist(), strict=True)
            got = ", ".join(f"{name} {value}" for name, value in values)
            raise InputError(f"segment {row} of a pack must {rule}, got {got}")

    steps = np.diff(document, prepend=0)
    require((steps >= 0) & (steps <= 1) & (document[0] == 0), "number its documents 0, 1, 2, ...")
    require((kind >= 0) & (kind <= len(modalities)), f"have a kind in 0..{len(modalities)}")
    require((length >= 1) & (length <= sequence_length), f"have a length in 1..{sequence_length}")
    is_text = kind == KIND_TEXT
    patch, channels = np.array([(1, 1), *((info.patch_size, info.channels) for info in modalities)])[kind].T
    cut = (height > 0) & (width > 0) & (height % patch == 0) & (width % patch == 0)
    cut &= (height // patch) * (width // patch) == length
    require(np.where(is_text, (height == 0) & (width == 0), cut), "have the height and width of its kind and length")
    # A product may exceed int64. In fp64 it is exact, or larger than any array.
    sizes = np.where(is_text, length, height * width * channels.astype(np.float64))
    for name, own in (("tokens", is_text), ("latents", ~is_text)):
        total, ends = getattr(pack, name).size, np.cumsum(sizes[own])
        if not np.array_equal(offset[own], ends - sizes[own]) or sizes[own].sum() != total:
            raise InputError(
                f"segments of a pack must cover its {total} {name} end to end, got {sizes[own].sum():.0f} in "
                f"{len(ends)} segments or a gap between them"
            )
