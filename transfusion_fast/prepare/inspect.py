"""The whole of a data folder against its index, and the index anew for shards that lie there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    IndexedShard,
    check_different,
    check_schema,
    check_shard_file,
    file_sha256,
    index_shard,
    is_plain_name,
    make_index,
    parse_index,
    read_packs,
    table_place,
    write_index,
)
from transfusion_fast.data.pack import DOCUMENT_TOKENS, IMAGE_TOKENS, KIND_TEXT, ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import ShardInfo, read_table
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.prepare.packing import pack_stream
from transfusion_fast.prepare.pool import worker_pool


def verify(folder: Path, index: Index, processes: int = 1) -> Iterator[list[str]]:
    """What is wrong with a data folder: a list for each shard, in any order, then one for the folder. All empty: well.

    Every byte of the shards is read: sizes, sha256 and crc32 are compared, tars walked through, packs decoded and
    validated. What the index says beside that (modalities, pack length) is held to the packs only.
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
    findings: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0


def _verify_shard(job: tuple[Path, Index], shard: ShardInfo) -> _Found:
    folder, index = job
    path, found = folder / shard.file, _Found()
    try:
        check_shard_file(folder, shard)
        sha256 = file_sha256(path)
        if sha256 != shard.sha256:
            found.findings.append(f"sha256 of shard {path} must be {shard.sha256}, got {sha256}; copy it again")
        table = read_table(path)
        check_schema(path, table, index.schema)
        if (len(table.rows), *table_place(path, table)) != (shard.packs, shard.table, shard.table_crc32):
            cure = "rebuild the index" if sha256 == shard.sha256 else "copy it again"
            found.findings.append(f"table of shard {path} must be as its index says, and is not; {cure}")
        packs = read_packs(path, table, index.sequence_length, index.num_text_tokens, index.modalities)
        for place, pack in enumerate(packs):
            if isinstance(pack, InputError):
                found.findings.append(f"pack {place} of shard {path} cannot be used: {pack}; copy it again")
                continue
            found.documents += pack.num_documents
            found.tokens += pack.num_positions
    except InputError as error:
        found.findings.append(str(error))
    except OSError as error:
        found.findings.append(f"shard {path} must be readable, and is not ({error}); copy it again")
    return found


def _folder_findings(folder: Path, index: Index, found: tuple[int, int] | None) -> list[str]:
    """Of the sums over all packs, where they are known, the tokenizer, and shards that no index names."""
    findings = []
    if found is not None and found != (index.documents, index.tokens):
        findings.append(
            f"index of {folder} must count {found[0]} documents and {found[1]} tokens, got {index.documents} and "
            f"{index.tokens}; rebuild it"
        )
    try:
        load_tokenizer(index.tokenizer, folder)
    except InputError as error:
        findings.append(str(error))
    strange = {path.name for path in folder.glob("*.tar")} - {shard.file for shard in index.shards}
    findings += [f"shard {folder / name} is not in the index; rebuild it, or remove the shard" for name in strange]
    return sorted(findings)


def rebuild_index(folder: Path, like: Path | None = None, accept: bool = False, processes: int = 1) -> Index:
    """Writes the index of the shards that lie in `folder`, by name, with the settings of the index of `like`.

    Args:
        like: another data folder of the same tokenizer, modalities and sequence length; default: `folder` itself.
        accept: take shards as they lie where the folder's own index has another sha256 of them, or has others.

    Raises:
        InputError: no settings to go by, no shard, one that does not hold what they say, or one that is not as the
            folder's own index says. Then nothing is written.
    """
    folder = Path(folder)
    if like is None and not (folder / INDEX_NAME).exists():
        raise InputError(
            f"folder {folder} has no {INDEX_NAME} to take its settings from; name a data folder of the same tokenizer, "
            "modalities and pack length with --like"
        )
    settings = parse_index(like or folder)
    own = like is None or (folder / TOKENIZER_NAME).exists()
    tokenizer = load_tokenizer(settings.tokenizer, folder if own or like is None else like)
    files = sorted(path.name for path in folder.glob("*.tar"))
    if not files:
        raise InputError(f"folder {folder} must hold shards *.tar to index, and holds none")
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
    """The index of shards as they lie in a folder; InputError as of `index_shard`, or for one that lies there twice."""
    job = (sequence_length, tokenizer.describe(), tuple(modalities))
    with worker_pool(job, processes) as each:
        paths = enumerate(folder / file for file in files)
        shards = dict(tqdm(each(_index_numbered, paths), "indexing", len(files), unit="shard", disable=None))
    index = make_index([shards[number] for number in range(len(files))], sequence_length, tokenizer, modalities)
    check_different(index.shards, str(folder))
    return index


def _index_numbered(
    job: tuple[int, dict[str, str | int], tuple[ModalityInfo, ...]], numbered: tuple[int, Path]
) -> tuple[int, IndexedShard]:
    return numbered[0], index_shard(numbered[1], *job)


def _check_unchanged(folder: Path, now: Index) -> None:
    """The old index is all that can tell damage from data."""
    try:
        before = parse_index(folder)
    except InputError as error:
        raise InputError(f"{error}; or give --accept to index what lies there") from error
    found = {shard.file: shard.sha256 for shard in now.shards}
    for shard in before.shards:
        if shard.file not in found or found[shard.file] != shard.sha256:
            what = "is missing" if shard.file not in found else "has another sha256"
            raise InputError(
                f"shard {folder / shard.file} must be as the old index says, and {what}; copy it again, "
                "or give --accept to index what lies there"
            )


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
