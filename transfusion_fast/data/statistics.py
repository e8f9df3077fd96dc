"""What a data folder holds: documents, text against images, lengths, and what packing them otherwise would waste."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfusion_fast.data.pack import DOCUMENT_TOKENS, IMAGE_TOKENS, KIND_TEXT
from transfusion_fast.data.packing import pack_stream
from transfusion_fast.data.reader import PackReader


@dataclass(frozen=True)
class PackStatistics:
    """Of one pack."""

    text: int
    """Text ids."""
    patches: int
    images: int
    lengths: np.ndarray
    """Positions that each document takes, int64."""


@dataclass(frozen=True)
class Statistics:
    """Of a folder."""

    text: int
    patches: int
    images: int
    lengths: np.ndarray

    @property
    def text_share(self) -> float:
        """Of text ids among text ids and patches."""
        return self.text / (self.text + self.patches)

    def waste_at(self, capacity: int) -> float:
        """The part of all positions that packs of `capacity` would leave empty.

        A longer document counts as cut into full packs and a rest, images too, which no prepared folder does.
        """
        inner = capacity - DOCUMENT_TOKENS
        whole, rest = np.divmod(np.where(self.lengths > capacity, self.lengths - DOCUMENT_TOKENS, 0), inner)
        rest = np.where(self.lengths > capacity, np.where(rest, rest + DOCUMENT_TOKENS, 0), self.lengths)
        pieces, full = rest[rest > 0], int(whole.sum())
        packs = full + sum(1 for _ in pack_stream([pieces], capacity, seed=0))
        return 1 - (full * capacity + int(pieces.sum())) / (packs * capacity)


def pack_statistics(reader: PackReader) -> Iterator[PackStatistics]:
    """Of every pack in turn; InputError naming one that cannot be read."""
    for number in range(len(reader)):
        document, kind, _, length, _, _ = reader.read(number).segments.astype(np.int64).T
        is_image = kind != KIND_TEXT
        lengths = DOCUMENT_TOKENS + np.bincount(document, length + IMAGE_TOKENS * is_image).astype(np.int64)
        text, patches = int(length[~is_image].sum()), int(length[is_image].sum())
        yield PackStatistics(text, patches, int(is_image.sum()), lengths)


def summed(packs: Iterator[PackStatistics]) -> Statistics:
    """Of all packs together, which are one or more."""
    found = list(packs)
    return Statistics(
        text=sum(pack.text for pack in found),
        patches=sum(pack.patches for pack in found),
        images=sum(pack.images for pack in found),
        lengths=np.concatenate([pack.lengths for pack in found]),
    )


def draw_lengths(statistics: Statistics, title: str, path: Path) -> None:
    """Writes a PNG: how many documents there are of each length, and how many positions lie in them."""
    from matplotlib.figure import Figure  # a second to import, for this alone

    lengths = statistics.lengths
    scale = "log" if lengths.max() > 10 * lengths.min() else "linear"
    spaced = np.geomspace if scale == "log" else np.linspace
    edges = np.unique(spaced(lengths.min(), lengths.max() + 1, 41).round().astype(np.int64))
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    for axes, weights, name in zip(figure.subplots(1, 2), (None, lengths), ("documents", "positions"), strict=True):
        axes.hist(lengths, bins=edges, weights=weights, color="tab:blue")
        axes.set_xscale(scale)
        axes.set_xlabel("length of a document, positions")
        axes.set_ylabel(name)
    title = os.fsencode(title).decode(errors="replace")  # names of folders may be any bytes
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110, format="png")
