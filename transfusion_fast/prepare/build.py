"""From a source to a data folder, by several processes: the same bytes whatever their number, and whatever befell.

Units of the source are encoded, each to files of documents; documents are planned into packs by their lengths alone;
packs are written shard by shard. All of it happens in FOLDER.partial, which keeps what is finished if the run is cut
off; the folder of shards within it becomes FOLDER in one step at the end. There recipe.json says what it was made of,
by which the same command knows that it is done, and left_out.jsonl which documents are not in it, and why.
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
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    IndexedShard,
    file_sha256,
    index_shard,
    make_index,
    parse_shard,
    read_index,
    schema_of,
    write_index,
)
from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.pack import Document, ModalityInfo, Pack, make_pack
from transfusion_fast.data.shards import MAX_PACKS, PACKS_PER_SHARD, write_shard
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.files import read_json, sync, write_atomically
from transfusion_fast.prepare.packing import BUFFER, pack_stream
from transfusion_fast.prepare.pool import worker_pool
from transfusion_fast.prepare.sources.base import Source, Unit
from transfusion_fast.prepare.spool import (
    UnitReader,
    UnitReport,
    copy_rejections,
    read_lengths,
    read_report,
    write_unit,
)
from transfusion_fast.prepare.staging import (
    RECIPE,
    SHARDS,
    UNITS,
    begin_or_go_on,
    check_ours,
    differing,
    discard,
    has_begun,
    locked,
    places,
)

LEFT_OUT = "left_out.jsonl"
_VERSION = 4
"""Of units and of how documents are packed: work begun by another is not gone on with."""
_OPEN_UNITS = 32  # of three files each, that a process has open at once
_UNIT_STREAM = (0, 0)  # `pack_stream` draws from streams of one number

Raw_contra = TypeVar("Raw_contra", contravariant=True)


class DocumentEncoder(Protocol[Raw_contra]):
    """What makes documents of raw ones, none longer than a pack. Picklable."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the texts."""

    @property
    def sequence_length(self) -> int:
        """Positions of a pack."""

    @property
    def modalities(self) -> tuple[ModalityInfo, ...]:
        """Of the images."""

    def encode(self, raws: Iterable[Raw_contra | Rejected]) -> Iterator[list[Document] | Rejected]:
        """Of each raw document, in order, one document or its parts, or why it cannot be used."""

    def describe(self) -> dict[str, Any]:
        """As JSON: encoders of one description make the same documents."""


@dataclass(frozen=True)
class Recipe:
    """All that the data folder depends on."""

    source: Source[Any]
    encoder: DocumentEncoder[Any]
    """Of what the source yields."""
    packs_per_shard: int = PACKS_PER_SHARD
    seed: int = 0
    buffer: int = BUFFER
    """Documents that are packed together."""
    train_bpe: int | None = None
    """Size of the vocabulary, where the tokenizer was trained on the source itself."""

    def __post_init__(self) -> None:
        for name, most in (("packs_per_shard", MAX_PACKS), ("buffer", None)):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}; give a larger number")
            if most and getattr(self, name) > most:
                raise InputError(f"{name} must be at most {most}, got {getattr(self, name)}; give a smaller number")

    def describe(self) -> dict[str, Any]:
        """As JSON, with what would tell that a file of the source has changed."""
        return {
            **_source_description(self.source, self.train_bpe),
            "encoder": self.encoder.describe(),
            "packing": {"packs_per_shard": self.packs_per_shard, "seed": self.seed, "buffer": self.buffer},
        }


def _source_description(source: Source[Any], train_bpe: int | None) -> dict[str, Any]:
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
    """The index, and what became of the source's documents."""

    index: Index
    rejected: dict[str, int] = field(default_factory=dict)
    """Of each reason, how many."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of each reason, the first."""
    cut: int = 0
    """How many were longer than a pack, and became several."""
    reused: bool = False
    """Whether the folder was there, made of the same recipe: then nothing is counted anew."""


@dataclass(frozen=True)
class _Job:
    """What every process has."""

    recipe: Recipe
    folder: Path


@dataclass(frozen=True, eq=False)
class _ShardTask:
    number: int
    packs: list[np.ndarray]
    """Of each pack the (unit, document) of every document."""


def build(recipe: Recipe, folder: Path, processes: int = 1) -> Built:
    """Makes the data folder, or goes on making it; one that was made of this recipe is left as it is.

    Raises:
        InputError: `folder` holds anything else; what lies in FOLDER.partial was begun with another recipe, or is being
            made by another process; the source holds no document that can be used.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, got {processes}")
    folder, partial = places(folder)
    described = json.loads(json.dumps(recipe.describe()))
    index = _finished(folder, described)
    if index is not None and not partial.exists():
        return Built(index, reused=True)
    check_ours(partial)
    with locked(partial):
        index = _finished(folder, described)  # another process may have come first
        if index is not None:
            if read_json(partial / RECIPE) in (None, described):  # of a run that was killed before it had tidied up
                discard(partial)
            return Built(index, reused=True)
        begin_or_go_on(partial, described, recipe.encoder.tokenizer)
        try:
            built = _build(recipe, folder, partial, processes)
        except BaseException:
            if not has_begun(partial):  # nothing to go on with, and settings may be what was wrong
                discard(partial)
            raise
        discard(partial)
    return built


def tokenizer_of_before(source: Source[Any], vocabulary: int, folder: Path) -> Tokenizer | None:
    """The tokenizer that was trained on this very source, where the folder was made or begun with it."""
    now = json.loads(json.dumps(_source_description(source, vocabulary)))
    for place in places(folder):
        match read_json(place / RECIPE):
            case {"encoder": {"tokenizer": dict(described)}, **rest} if now.items() <= rest.items():
                with suppress(InputError):
                    return load_tokenizer(described, place)
    return None


def _build(recipe: Recipe, folder: Path, partial: Path, processes: int) -> Built:
    encoder, units = recipe.encoder, recipe.source.units()
    with worker_pool(_Job(recipe, partial), processes) as each:
        reports = dict(tqdm(each(_encode, enumerate(units)), "reading", len(units), unit="unit", disable=None))
        built = _merge([reports[number] for number in range(len(units))])
        counts = np.array([reports[number].documents for number in range(len(units))], dtype=np.int64)
        tasks = _shard_tasks(recipe, partial, counts)
        shards = dict(tqdm(each(_write, tasks), "writing", unit="shard", disable=None))
    if not shards:
        shutil.rmtree(partial / UNITS)
        rejected, examples, _ = built
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejected.items()) or "it is empty"
        first = "".join(f"; {example}" for example in list(examples.values())[:1])
        raise InputError(f"source must hold documents that can be used, and has none ({reasons}){first}")
    ordered = [shards[number] for number in range(len(shards))]
    index = make_index(ordered, encoder.sequence_length, encoder.tokenizer, encoder.modalities)
    _finish(partial, folder, encoder, index, units=len(units))
    return Built(index, *built)


def _finished(folder: Path, recipe: dict[str, Any]) -> Index | None:
    """The index of a folder that was made of this recipe and is as it was then; None where the folder is free."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        made_of = read_json(folder / RECIPE)
        if made_of is None:
            raise InputError(f"it has no {RECIPE} to tell what it was made of")
        if change := differing(made_of, {**recipe, "index": file_sha256(folder / INDEX_NAME)}):
            raise InputError(f"it was made otherwise: {change}")
        return read_index(folder)
    except (OSError, InputError) as error:
        raise InputError(
            f"output folder must be new or empty, got {str(folder)!r} ({error}); choose another, or remove this one"
        ) from error


def _encode(job: _Job, numbered: tuple[int, Unit]) -> tuple[int, UnitReport]:
    number, unit = numbered
    folder, encoder = job.folder / UNITS, job.recipe.encoder
    report = read_report(folder, number)
    if report is None:
        documents = encoder.encode(job.recipe.source.documents(unit))
        report = write_unit(folder, number, documents, encoder.modalities)
    return number, report


def _merge(reports: Iterable[UnitReport]) -> tuple[dict[str, int], dict[str, str], int]:
    cut = 0
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for report in reports:
        cut += report.cut
        rejected.update(report.rejected)
        examples = report.examples | examples
    return dict(sorted(rejected.items())), examples, cut


def _shard_tasks(recipe: Recipe, partial: Path, counts: np.ndarray) -> Iterator[_ShardTask]:
    """The plan of all packs, a shard at a time; only a buffer of it is ever in memory.

    `counts` int64 [units] are documents. Units come in a keyed order, as those of a source may be sorted by length.
    """
    order = keyed_permutation(len(counts), recipe.seed, *_UNIT_STREAM)
    starts = np.cumsum(counts[order]) - counts[order]
    lengths = (read_lengths(partial / UNITS, number) for number in order.tolist())
    packs = pack_stream(lengths, recipe.encoder.sequence_length, recipe.seed, recipe.buffer)
    number = 0
    while chosen := list(islice(packs, recipe.packs_per_shard)):
        places = [np.searchsorted(starts, pack, side="right") - 1 for pack in chosen]
        located = [np.stack([order[at], pack - starts[at]], axis=1) for at, pack in zip(places, chosen, strict=True)]
        yield _ShardTask(number, located)
        number += 1


def _write(job: _Job, task: _ShardTask) -> tuple[int, IndexedShard]:
    record = job.folder / UNITS / f"shard-{task.number:06d}.json"
    encoder = job.recipe.encoder
    folder = job.folder / SHARDS
    match read_json(record):
        case [dict(entry), int(documents), int(tokens)]:
            info = parse_shard(entry, str(record))
            if (folder / info.file).is_file() and file_sha256(folder / info.file) == info.sha256:
                return task.number, IndexedShard(info, documents, tokens)
    tokenizer = encoder.tokenizer.describe()
    schema = schema_of(encoder.sequence_length, tokenizer, encoder.modalities)
    name = write_shard(_packs(job, task), folder, task.number, schema)
    shard = index_shard(folder / name, encoder.sequence_length, tokenizer, encoder.modalities)
    write_atomically(record, json.dumps([asdict(shard.info), shard.documents, shard.tokens]))
    return task.number, shard


def _packs(job: _Job, task: _ShardTask) -> Iterator[Pack]:
    modalities = job.recipe.encoder.modalities

    @functools.lru_cache(maxsize=_OPEN_UNITS)
    def reader(unit: int) -> UnitReader:
        return UnitReader(job.folder / UNITS, unit, modalities)

    for pack in task.packs:
        yield make_pack([reader(unit)[document] for unit, document in pack.tolist()], modalities)


def _finish(partial: Path, folder: Path, encoder: DocumentEncoder[Any], index: Index, units: int) -> None:
    """Puts what belongs beside the shards there, and the folder into its place."""
    shards = partial / SHARDS
    encoder.tokenizer.write(shards)
    copy_rejections(partial / UNITS, units, shards / LEFT_OUT)
    write_index(shards, index)
    recipe = {**read_json(partial / RECIPE), "index": file_sha256(shards / INDEX_NAME)}
    write_atomically(shards / RECIPE, json.dumps(recipe, indent=1))
    sync(*(path for path in shards.iterdir() if path.suffix != ".tar"), shards)  # each tar was when it was written
    try:
        shards.rename(folder)
    except OSError as error:
        raise InputError(f"{shards} is whole, but cannot become {folder} ({error}); move it there") from error
    sync(folder.parent)
