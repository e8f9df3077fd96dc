"""Checks of a data folder against its index, a new index for shards that lie there, and statistics of documents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from transfusion_fast.data.folder import LocalFolder
from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    check_different,
    file_sha256,
    is_plain_name,
    parse_index,
    read_packs,
    write_index,
)
from transfusion_fast.data.pack import DOCUMENT_TOKENS, KIND_TEXT, Pack
from transfusion_fast.data.shards import ShardInfo, read_table
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, load_tokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.prepare.packing import document_lengths, pack_stream
from transfusion_fast.prepare.pool import worker_pool
from transfusion_fast.prepare.progress import progress


@dataclass
class FoundShard:
    """The contents of a shard, and what is wrong with it."""

    findings: list[str] = field(default_factory=list)
    info: ShardInfo | None = None
    documents: int = 0
    tokens: int = 0


def read_shard(path: Path, settings: Index, expected: ShardInfo | None = None) -> FoundShard:
    """Read and validate a shard by the settings of an index, and compare it with its entry if one is given."""
    found = FoundShard()
    try:
        if expected:
            LocalFolder(path.parent).check_shards([expected])
        sha256 = file_sha256(path)
        intact = expected is None or expected.sha256 == sha256
        if expected and not intact:
            found.findings.append(f"sha256 of shard {path} must be {expected.sha256}, got {sha256}; copy it again")
        table = read_table(path)
        info = ShardInfo(path.name, path.stat().st_size, sha256, len(table.rows), *table.location)
        if expected and replace(info, sha256=expected.sha256) != expected:
            cure = "rebuild the index" if intact else "copy it again"
            found.findings.append(f"table of shard {path} must be as its index says, got another; {cure}")
        for place, pack in enumerate(read_packs(path, table, settings)):
            if isinstance(pack, InputError):
                found.findings.append(f"pack {place} of shard {path} cannot be used: {pack}; copy it again")
            else:
                found.documents += pack.num_documents
                found.tokens += pack.num_positions
        found.info = info
    except InputError as error:
        found.findings.append(str(error))
    except OSError as error:
        found.findings.append(f"shard {path} must be readable, got {error}; copy it again")
    return found


def _read_one(job: tuple[Path, Index], shard: ShardInfo | str) -> FoundShard:
    """Read a shard by its name, or one that an index lists, and compare that with its entry."""
    folder, settings = job
    if isinstance(shard, str):
        return read_shard(folder / shard, settings)
    return read_shard(folder / shard.file, settings, shard)


def verify(folder: Path, index: Index, processes: int = 1) -> Iterator[list[str]]:
    """Yield the findings of each shard, in any order, and then those of the folder; an intact folder has none.

    Every byte of the shards is read: sizes, sha256 and crc32 are compared, tars parsed, packs decoded and validated.
    """
    documents, tokens, intact = 0, 0, True
    with worker_pool((folder, replace(index, shards=())), processes) as each:
        for found in each(_read_one, index.shards):
            documents, tokens = documents + found.documents, tokens + found.tokens
            intact = intact and not found.findings
            yield found.findings
    findings = []
    if intact and (documents, tokens) != (index.documents, index.tokens):
        findings.append(
            f"index of {folder} must count {documents} documents and {tokens} tokens, got {index.documents} and "
            f"{index.tokens}; rebuild it"
        )
    try:
        load_tokenizer(index.tokenizer, folder)
    except InputError as error:
        findings.append(str(error))
    for name in {path.name for path in folder.glob("*.tar")} - {shard.file for shard in index.shards}:
        findings.append(f"shard {folder / name} is not in the index; rebuild the index, or remove the shard")
    yield sorted(findings)


def rebuild_index(folder: Path, like: Path | None = None, accept: bool = False, processes: int = 1) -> Index:
    """Write and return the index of the shards that lie in `folder`, by name, with the settings of another index.

    Args:
        like: data folder of the same tokenizer, modalities and pack length; default: `folder` itself.
        accept: accept shards that differ from the old index of `folder`.

    Raises:
        InputError: there are no settings or no shards, or a shard cannot be used or differs from the old index. Then
            nothing is written.
    """
    has_index = (folder / INDEX_NAME).exists()
    if like is None and not has_index:
        raise InputError(
            f"folder {folder} must have an {INDEX_NAME} to take its settings from, got none; name a data folder of the "
            "same tokenizer, modalities and pack length with --like"
        )
    settings = parse_index(like or folder)
    origin = folder if like is None or (folder / TOKENIZER_NAME).exists() else like
    tokenizer = load_tokenizer(settings.tokenizer, origin)
    files = sorted(path.name for path in folder.glob("*.tar"))
    if not files:
        raise InputError(f"folder {folder} must hold shards *.tar to index, got none; give another")
    for file in files:
        if not is_plain_name(file):
            raise InputError(f"shard's name must be of letters, digits, _ . and -, got {file!r}; rename or remove it")
    index = build_index(folder, files, settings, processes)
    if has_index and not accept:
        _check_unchanged(folder, index)
    tokenizer.write(folder)
    write_index(folder, index)
    return index


def build_index(folder: Path, files: Sequence[str], settings: Index, processes: int = 1) -> Index:
    """Return the index of these shards by name, every pack read and validated, with the settings of another index.

    Raises:
        InputError: a shard cannot be used, or is there twice.
    """
    shards, documents, tokens = [], 0, 0
    with worker_pool((folder, replace(settings, shards=())), processes) as each:
        for found in progress(each(_read_one, files), "indexing", "shard", len(files)):
            if found.info is None or found.findings:
                raise InputError(found.findings[0])
            shards.append(found.info)
            documents, tokens = documents + found.documents, tokens + found.tokens
    shards.sort(key=lambda info: info.file)
    check_different(shards, str(folder))
    return replace(settings, documents=documents, tokens=tokens, shards=tuple(shards))


def _check_unchanged(folder: Path, now: Index) -> None:
    """Raise InputError if a shard differs from the old index, which alone can tell damage from data."""
    cure = "or give --accept to index the shards that are there"
    try:
        before = parse_index(folder)
    except InputError as error:
        raise InputError(f"{error}; {cure}") from error
    found = {shard.file: shard.sha256 for shard in now.shards}
    for shard in before.shards:
        if found.get(shard.file) != shard.sha256:
            got, path = "another sha256" if shard.file in found else "no file", folder / shard.file
            raise InputError(f"shard {path} must be as the old index says, got {got}; copy it again, {cure}")


def summary(index: Index) -> str:
    """Return the size of a data folder in one line."""
    return (
        f"{index.num_packs} packs of {index.sequence_length} in {len(index.shards)} shards, "
        f"{index.documents} documents, {index.tokens} tokens, {100 * index.waste:.2f} % waste"
    )


@dataclass(frozen=True)
class Statistics:
    """Counts over the packs of a folder."""

    text: int
    """Text ids."""
    patches: int
    images: int
    lengths: np.ndarray
    """Positions that each document takes, int64."""
    ignored: int = 0
    """Text ids and patches of segments without loss, of weight 0."""
    weighted: int = 0
    """Text ids and patches of segments whose loss has another weight than 0 and 1."""
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of images by height and width in pixels or latents."""

    @classmethod
    def of(cls, packs: Iterable[Pack]) -> Statistics:
        """Count one or more packs."""
        counts, lengths = np.zeros(5, np.int64), []
        shapes: Counter[tuple[int, int]] = Counter()
        for pack in packs:
            is_image, length = pack.segments[:, 1] != KIND_TEXT, pack.segments[:, 3]
            weights = np.ones(len(length)) if pack.weights is None else pack.weights
            counts[:3] += length[~is_image].sum(), length[is_image].sum(), is_image.sum()
            counts[3:] += length[weights == 0].sum(), length[(weights != 0) & (weights != 1)].sum()
            shapes.update(map(tuple, pack.segments[is_image, 4:6].tolist()))
            lengths.append(document_lengths(*pack.segments.T[[0, 1, 3]]))
        text, patches, images, ignored, weighted = counts.tolist()
        return cls(text, patches, images, np.concatenate(lengths), ignored, weighted, shapes)

    def named_shapes(self, most: int) -> str:
        """Return the most frequent shapes of images and their numbers, in one line."""
        named = ", ".join(f"{height} x {width}: {count}" for (height, width), count in self.shapes.most_common(most))
        return f"height x width: {named}" + f", and {len(self.shapes) - most} more" * (len(self.shapes) > most)

    def waste_at(self, capacity: int) -> float:
        """Return the share of all positions that packs of `capacity` would leave empty.

        A longer document counts as cut into full packs and a rest, images too, which no prepared folder does.
        """
        full, rest = np.divmod(self.lengths - DOCUMENT_TOKENS, capacity - DOCUMENT_TOKENS)
        pieces, full_packs = rest[rest > 0] + DOCUMENT_TOKENS, int(full.sum())
        packs = full_packs + sum(1 for _ in pack_stream([pieces], capacity, seed=0))
        return 1 - (full_packs * capacity + int(pieces.sum())) / (packs * capacity)


def draw_lengths(statistics: Statistics, title: str, path: Path) -> None:
    """Write a PNG with histograms over the length of documents: of documents, and of the positions in them."""
    lengths = statistics.lengths
    scale, spaced = ("log", np.geomspace) if lengths.max() > 10 * lengths.min() else ("linear", np.linspace)
    edges = np.unique(spaced(lengths.min(), lengths.max() + 1, 41).round().astype(np.int64))
    figure = optional_module("matplotlib.figure", "examples").Figure(figsize=(7.2, 3.2), layout="constrained")
    for axes, weights, name in zip(figure.subplots(1, 2), (None, lengths), ("documents", "positions"), strict=True):
        axes.hist(lengths, bins=edges, weights=weights, color="tab:blue")
        axes.set(xscale=scale, xlabel="length of a document, positions", ylabel=name)
    title = os.fsencode(title).decode(errors="replace")  # names of folders may be any bytes
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110, format="png")
