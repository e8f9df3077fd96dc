"""From a source to a data folder, by several processes: the same bytes for any number of processes or interruptions.

Processes encode the units of the source and spool their documents; documents are assigned to packs by their lengths
alone; processes write packs shard by shard. All of it happens in the staging folder OUT.partial, which keeps finished
work if the run is cut off; its folder of shards becomes OUT in one step at the end. There, recipe.json says what the
folder was made of, so that the same command recognizes it, and left_out.jsonl which documents were left out, and why.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    IndexedShard,
    file_sha256,
    make_index,
    parse_shard,
    read_index,
    schema_of,
    write_index,
)
from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.pack import Pack, make_pack, validate_pack
from transfusion_fast.data.shards import MAX_PACKS, PACKS_PER_SHARD, write_shard
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.files import read_json, sync, write_atomically
from transfusion_fast.prepare import spool, staging
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.packing import BUFFER, pack_stream
from transfusion_fast.prepare.pool import worker_pool
from transfusion_fast.prepare.sources.base import Source, Unit
from transfusion_fast.prepare.spool import UnitReader, UnitReport
from transfusion_fast.prepare.staging import RECIPE, SHARDS, UNITS, discard, first_changes, output_and_staging

LEFT_OUT = "left_out.jsonl"
_VERSION = 4
"""Version of spooled units and of the packing: work begun by another version is refused."""
_OPEN_UNITS = 32  # of three files each, that a process has open at once
_UNIT_STREAM = (0, 0)  # `pack_stream` draws from streams of one number


@dataclass(frozen=True)
class Recipe:
    """Everything that a data folder depends on."""

    source: Source
    encoder: Encoder
    packs_per_shard: int = PACKS_PER_SHARD
    seed: int = 0
    buffer: int = BUFFER
    """Documents that are packed together."""
    train_bpe: int | None = None
    """Size of the vocabulary, if the tokenizer was trained on the source itself."""

    def __post_init__(self) -> None:
        for name, most in (("packs_per_shard", MAX_PACKS), ("buffer", None)):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}; give a larger number")
            if most and value > most:
                raise InputError(f"{name} must be at most {most}, got {value}; give a smaller number")

    def describe(self) -> dict[str, Any]:
        """Return the recipe as JSON, with the sizes and times by which changed source files are recognized."""
        return {
            **_source_description(self.source, self.train_bpe),
            "encoder": self.encoder.describe(),
            "packing": {"packs_per_shard": self.packs_per_shard, "seed": self.seed, "buffer": self.buffer},
        }


def _source_description(source: Source, train_bpe: int | None) -> dict[str, Any]:
    files = [(str(file.resolve()), file.stat()) for file in source.files]
    return {
        "version": _VERSION,
        "source": source.describe(),
        "files": {file: {"bytes": found.st_size, "modified": found.st_mtime_ns} for file, found in files},
        "order": hashlib.sha256(os.fsencode("\n".join(file for file, _ in files))).hexdigest(),
        "train_bpe": train_bpe,
    }


@dataclass(frozen=True)
class Built:
    """The index of a data folder, and what became of the source's documents."""

    index: Index
    rejected: dict[str, int] = field(default_factory=dict)
    """Number of documents that were left out by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first document that was left out for each reason."""
    cut: int = 0
    """Number of documents that were longer than a pack and became several."""
    reused: bool = False
    """True if the folder was there already, of the same recipe; then nothing is counted."""

    def remarks(self, folder: Path) -> Iterator[str]:
        """Yield a line about each kind of documents that are not in the folder as they were."""
        for reason, count in self.rejected.items():
            yield f"left out {count}: {self.examples[reason]}"
        if sum(self.rejected.values()) > len(self.rejected):
            yield f"{folder / LEFT_OUT} names all that was left out"
        if self.cut:
            yield f"split {self.cut} documents that are longer than a pack"


@dataclass(frozen=True)
class _Job:
    """The recipe and the staging folder, which every process has."""

    recipe: Recipe
    partial: Path


@dataclass(frozen=True, eq=False)
class _ShardTask:
    number: int
    packs: list[np.ndarray]
    """(unit, document) of every document of each pack."""


def build(recipe: Recipe, folder: Path, processes: int = 1) -> Built:
    """Make the data folder, or resume making it; a folder that was made of this recipe stays as it is.

    Raises:
        InputError: `folder` holds anything else; work in the staging folder has another recipe, or another process is
            at it; the source holds no document that can be used.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, got {processes}; give a larger number")
    folder, partial = output_and_staging(folder)
    described = json.loads(json.dumps(recipe.describe()))
    index = _finished(folder, described)
    if index is not None and not partial.exists():
        return Built(index, reused=True)
    staging.check_staging(partial)
    with staging.locked(partial):
        index = _finished(folder, described)  # another process may have finished it before the lock was free
        if index is not None:
            if read_json(partial / RECIPE) in (None, described):  # left by a run that was killed while it cleaned up
                discard(partial)
            return Built(index, reused=True)
        staging.begin_or_resume(partial, described, recipe.encoder.tokenizer)
        try:
            built = _build(_Job(recipe, partial), folder, processes)
        except BaseException:
            if not staging.has_units(partial):  # there is nothing to resume, and settings may be what was wrong
                discard(partial)
            raise
        discard(partial)
    return built


def train_tokenizer(source: Source, vocabulary: int, folder: Path) -> Tokenizer:
    """Train a BPE tokenizer on the texts of a source; if `folder` was made or begun with one, return that one."""
    now = json.loads(json.dumps(_source_description(source, vocabulary)))
    for path in output_and_staging(folder):
        match read_json(path / RECIPE):
            case {"encoder": {"tokenizer": dict(described)}, **rest} if now.items() <= rest.items():
                with suppress(InputError):
                    return load_tokenizer(described, path)
    documents = (found for unit in source.units() for found in source.documents(unit))
    parts = (part for found in documents if not isinstance(found, Rejected) for part in found.parts)
    return train_bpe((part for part in parts if isinstance(part, str)), vocabulary)


def _finished(folder: Path, recipe: dict[str, Any]) -> Index | None:
    """Return the index of an unchanged folder of this recipe; None if the folder is free, else InputError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        made_of = read_json(folder / RECIPE)
        if made_of is None:
            raise InputError(f"it has no {RECIPE}")
        if change := first_changes(made_of, {**recipe, "index": file_sha256(folder / INDEX_NAME)}):
            raise InputError(f"it was made with other settings: {change}")
        return read_index(folder)
    except (OSError, InputError) as error:
        raise InputError(
            f"output folder must be new or empty, got {str(folder)!r} ({error}); choose another, or remove this one"
        ) from error


def _build(job: _Job, folder: Path, processes: int) -> Built:
    encoder, units = job.recipe.encoder, job.recipe.source.units()
    with worker_pool(job, processes) as each:
        by_number = dict(tqdm(each(_encode, enumerate(units)), "reading", len(units), unit="unit", disable=None))
        reports = [by_number[number] for number in range(len(units))]
        tasks = _shard_tasks(job, [report.documents for report in reports])
        shards = dict(tqdm(each(_write, tasks), "writing", unit="shard", disable=None))
    rejected, examples, cut = _totals(reports)
    if not shards:
        shutil.rmtree(job.partial / UNITS)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejected.items()) or "it is empty"
        first = "".join(f"; {example}" for example in list(examples.values())[:1])
        raise InputError(f"source must hold documents that can be used, got none ({reasons}){first}")
    ordered = [shards[number] for number in range(len(shards))]
    index = make_index(ordered, encoder.sequence_length, encoder.tokenizer, encoder.modalities)
    _finish(job, folder, index, units=len(units))
    return Built(index, rejected, examples, cut)


def _encode(job: _Job, numbered: tuple[int, Unit]) -> tuple[int, UnitReport]:
    number, unit = numbered
    folder, encoder = job.partial / UNITS, job.recipe.encoder
    report = spool.read_report(folder, number)
    if report is None:
        documents = encoder.encode(job.recipe.source.documents(unit))
        report = spool.write_unit(folder, number, documents, encoder.modalities)
    return number, report


def _totals(reports: Iterable[UnitReport]) -> tuple[dict[str, int], dict[str, str], int]:
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    cut = 0
    for report in reports:
        rejected.update(report.rejected)
        examples = report.examples | examples
        cut += report.cut
    return dict(sorted(rejected.items())), examples, cut


def _shard_tasks(job: _Job, documents: list[int]) -> Iterator[_ShardTask]:
    """Yield the packs of each shard; only a buffer of documents is in memory.

    `documents` are the counts of the units. Units come in a keyed order, as a source may be sorted by length.
    """
    recipe, counts = job.recipe, np.array(documents, dtype=np.int64)
    order = keyed_permutation(len(counts), recipe.seed, *_UNIT_STREAM)
    starts = np.cumsum(counts[order]) - counts[order]
    lengths = (spool.read_lengths(job.partial / UNITS, number) for number in order.tolist())
    packs = pack_stream(lengths, recipe.encoder.sequence_length, recipe.seed, recipe.buffer)
    number = 0
    while chosen := list(islice(packs, recipe.packs_per_shard)):
        units = [np.searchsorted(starts, pack, side="right") - 1 for pack in chosen]
        located = [
            np.stack([order[unit], pack - starts[unit]], axis=1) for unit, pack in zip(units, chosen, strict=True)
        ]
        yield _ShardTask(number, located)
        number += 1


def _write(job: _Job, task: _ShardTask) -> tuple[int, IndexedShard]:
    """Write a shard, or find that it is there."""
    record = job.partial / UNITS / f"shard-{task.number:06d}.json"
    folder, encoder = job.partial / SHARDS, job.recipe.encoder
    match read_json(record):
        case [dict(entry), int(documents), int(tokens)]:
            info = parse_shard(entry, str(record))
            if (folder / info.file).is_file() and file_sha256(folder / info.file) == info.sha256:
                return task.number, IndexedShard(info, documents, tokens)
    counts: list[tuple[int, int]] = []
    schema = schema_of(encoder.sequence_length, encoder.tokenizer.describe(), encoder.modalities)
    info = write_shard(_packs(job, task, counts), folder, task.number, schema)
    shard = IndexedShard(info, *(sum(column) for column in zip(*counts, strict=True)))
    write_atomically(record, json.dumps([asdict(shard.info), shard.documents, shard.tokens]))
    return task.number, shard


def _packs(job: _Job, task: _ShardTask, counts: list[tuple[int, int]]) -> Iterator[Pack]:
    """Yield the packs of a shard, and append the numbers of documents and tokens of each to `counts`."""
    encoder = job.recipe.encoder

    @functools.lru_cache(maxsize=_OPEN_UNITS)
    def reader(unit: int) -> UnitReader:
        return UnitReader(job.partial / UNITS, unit, encoder.modalities)

    for chosen in task.packs:
        pack = make_pack([reader(unit)[document] for unit, document in chosen.tolist()], encoder.modalities)
        validate_pack(pack, encoder.modalities, encoder.tokenizer.num_text_tokens, encoder.sequence_length)
        counts.append((pack.num_documents, pack.num_positions))
        yield pack


def _finish(job: _Job, folder: Path, index: Index, units: int) -> None:
    """Write the files beside the shards, and give the folder its name once all of it is on disk."""
    shards = job.partial / SHARDS
    job.recipe.encoder.tokenizer.write(shards)
    spool.copy_rejections(job.partial / UNITS, units, shards / LEFT_OUT)
    write_index(shards, index)
    recipe = {**read_json(job.partial / RECIPE), "index": file_sha256(shards / INDEX_NAME)}
    write_atomically(shards / RECIPE, json.dumps(recipe, indent=1))
    sync(*(path for path in shards.iterdir() if path.suffix != ".tar"), shards)  # `write_shard` synced each tar
    try:
        shards.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} must be free, got {error}; move {shards} there, which is complete") from error
    sync(folder.parent)
