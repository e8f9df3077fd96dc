"""Checks of a data folder against its index, a new index for shards that lie there, and statistics of documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.folder import LocalFolder
from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    IndexedShard,
    check_different,
    file_sha256,
    is_plain_name,
    make_index,
    parse_index,
    read_packs,
    write_index,
)
from transfusion_fast.data.pack import DOCUMENT_TOKENS, KIND_TEXT, ModalityInfo, Pack
from transfusion_fast.data.shards import ShardInfo, read_table
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.prepare.packing import document_lengths, pack_stream
from transfusion_fast.prepare.pool import worker_pool


def verify(folder: Path, index: Index, processes: int = 1) -> Iterator[list[str]]:
    """Yield the findings of each shard, in any order, and then those of the folder; an intact folder has none.

    Every byte of the shards is read: sizes, sha256 and crc32 are compared, tars parsed, packs decoded and validated.
    """
    folder = Path(folder)
    documents = tokens = 0
    damaged = False
    with worker_pool((folder, replace(index, shards=())), processes) as each:
        for found in each(_verify_shard, index.shards):
            documents += found.documents
            tokens += found.tokens
            damaged = damaged or bool(found.findings)
            yield found.findings
    yield _folder_findings(folder, index, None if damaged else (documents, tokens))


@dataclass
class _Found:
    """The contents of a shard, and what is wrong with it."""

    findings: list[str] = field(default_factory=list)
    info: ShardInfo | None = None
    documents: int = 0
    tokens: int = 0


def _read_shard(path: Path, index: Index, expected: ShardInfo | None = None) -> _Found:
    """Read a shard by the settings of an index, and compare it with its entry if one is given."""
    found = _Found()
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
        for place, pack in enumerate(read_packs(path, table, index)):
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


def _verify_shard(job: tuple[Path, Index], shard: ShardInfo) -> _Found:
    folder, index = job
    return _read_shard(folder / shard.file, index, shard)


def _folder_findings(folder: Path, index: Index, counted: tuple[int, int] | None) -> list[str]:
    """Return problems beyond single shards: wrong totals if they are known, the tokenizer, shards not in the index."""
    findings = []
    if counted is not None and counted != (index.documents, index.tokens):
        findings.append(
            f"index of {folder} must count {counted[0]} documents and {counted[1]} tokens, got {index.documents} and "
            f"{index.tokens}; rebuild it"
        )
    try:
        load_tokenizer(index.tokenizer, folder)
    except InputError as error:
        findings.append(str(error))
    strange = {path.name for path in folder.glob("*.tar")} - {shard.file for shard in index.shards}
    findings += [
        f"shard {folder / name} is not in the index; rebuild the index, or remove the shard" for name in strange
    ]
    return sorted(findings)


def rebuild_index(folder: Path, like: Path | None = None, accept: bool = False, processes: int = 1) -> Index:
    """Write and return the index of the shards that lie in `folder`, by name, with the settings of another index.

    Args:
        like: data folder of the same tokenizer, modalities and pack length; default: `folder` itself.
        accept: accept shards that differ from the old index of `folder`.

    Raises:
        InputError: there are no settings or no shards, or a shard cannot be used or differs from the old index. Then
            nothing is written.
    """
    folder = Path(folder)
    if like is None and not (folder / INDEX_NAME).exists():
        raise InputError(
            f"folder {folder} must have an {INDEX_NAME} to take its settings from, got none; name a data folder of the "
            "same tokenizer, modalities and pack length with --like"
        )
    settings = parse_index(like or folder)
    own = like is None or (folder / TOKENIZER_NAME).exists()
    tokenizer = load_tokenizer(settings.tokenizer, folder if own or like is None else like)
    files = sorted(path.name for path in folder.glob("*.tar"))
    if not files:
        raise InputError(f"folder {folder} must hold shards *.tar to index, got none; give another")
    for file in files:
        if not is_plain_name(file):
            raise InputError(f"shard's name must be of letters, digits, _ . and -, got {file!r}; rename or remove it")
    index = build_index(folder, files, settings.sequence_length, tokenizer, settings.modalities, processes)
    if (folder / INDEX_NAME).exists() and not accept:
        _check_unchanged(folder, index)
    if not own:
        tokenizer.write(folder)
    write_index(folder, index)
    return index


def build_index(
    folder: Path,
    files: Sequence[str],
    sequence_length: int,
    tokenizer: Tokenizer,
    modalities: Sequence[ModalityInfo],
    processes: int = 1,
) -> Index:
    """Return the index of shards as they lie in a folder, every pack read and validated.

    Raises:
        InputError: a shard cannot be used, or is there twice.
    """
    settings = Index(sequence_length, tokenizer.describe(), tuple(modalities), documents=0, tokens=0, shards=())
    shards: dict[str, IndexedShard] = {}
    with worker_pool((folder, settings), processes) as each:
        for file, found in tqdm(each(_read_named, files), "indexing", len(files), unit="shard", disable=None):
            if found.findings:
                raise InputError(found.findings[0])
            shards[file] = IndexedShard(found.info, found.documents, found.tokens)
    index = make_index([shards[file] for file in files], sequence_length, tokenizer, modalities)
    check_different(index.shards, str(folder))
    return index


def _read_named(job: tuple[Path, Index], file: str) -> tuple[str, _Found]:
    folder, settings = job
    return file, _read_shard(folder / file, settings)


def _check_unchanged(folder: Path, now: Index) -> None:
    """Raise InputError if a shard differs from the old index, which alone can tell damage from data."""
    try:
        before = parse_index(folder)
    except InputError as error:
        raise InputError(f"{error}; or give --accept to index the shards that are there") from error
    found = {shard.file: shard.sha256 for shard in now.shards}
    for shard in before.shards:
        if found.get(shard.file) != shard.sha256:
            got = "another sha256" if shard.file in found else "no file"
            raise InputError(
                f"shard {folder / shard.file} must be as the old index says, got {got}; copy it again, "
                "or give --accept to index the shards that are there"
            )


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

    @classmethod
    def of(cls, packs: Iterable[Pack]) -> Statistics:
        """Count one or more packs."""
        counts, lengths = np.zeros(3, np.int64), []
        for pack in packs:
            is_image, length = pack.segments[:, 1] != KIND_TEXT, pack.segments[:, 3]
            counts += length[~is_image].sum(), length[is_image].sum(), is_image.sum()
            lengths.append(document_lengths(pack.segments))
        text, patches, images = counts.tolist()
        return cls(text, patches, images, np.concatenate(lengths))

    @property
    def text_share(self) -> float:
        """Text ids as a share of text ids and patches."""
        return self.text / (self.text + self.patches)

    def waste_at(self, capacity: int) -> float:
        """Return the share of all positions that packs of `capacity` would leave empty.

        A longer document counts as cut into full packs and a rest, images too, which no prepared folder does.
        """
        inner = capacity - DOCUMENT_TOKENS
        full, rest = np.divmod(np.where(self.lengths > capacity, self.lengths - DOCUMENT_TOKENS, 0), inner)
        rest = np.where(self.lengths > capacity, np.where(rest, rest + DOCUMENT_TOKENS, 0), self.lengths)
        pieces, full_packs = rest[rest > 0], int(full.sum())
        packs = full_packs + sum(1 for _ in pack_stream([pieces], capacity, seed=0))
        return 1 - (full_packs * capacity + int(pieces.sum())) / (packs * capacity)


def draw_lengths(statistics: Statistics, title: str, path: Path) -> None:
    """Write a PNG with histograms over the length of documents: of documents, and of the positions in them."""
    lengths = statistics.lengths
    scale = "log" if lengths.max() > 10 * lengths.min() else "linear"
    spaced = np.geomspace if scale == "log" else np.linspace
    edges = np.unique(spaced(lengths.min(), lengths.max() + 1, 41).round().astype(np.int64))
    figure = optional_module("matplotlib.figure", "examples").Figure(figsize=(7.2, 3.2), layout="constrained")
    for axes, weights, name in zip(figure.subplots(1, 2), (None, lengths), ("documents", "positions"), strict=True):
        axes.hist(lengths, bins=edges, weights=weights, color="tab:blue")
        axes.set_xscale(scale)
        axes.set_xlabel("length of a document, positions")
        axes.set_ylabel(name)
    title = os.fsencode(title).decode(errors="replace")  # names of folders may be any bytes
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110, format="png")
