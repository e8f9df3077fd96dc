"""From a source to a data folder, by several processes: the same bytes whatever their number, and whatever befell.

Units of the source are encoded, each to files of documents; documents are planned into packs by their lengths alone;
packs are written shard by shard. All of it happens in FOLDER.partial, which keeps what is finished if the run is cut
off; the folder of shards within it becomes FOLDER in one step at the end.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import active_children, forkserver, get_context, parent_process
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.index import (
    Index,
    IndexedShard,
    index_shard,
    make_index,
    parse_shard,
    write_index,
)
from transfusion_fast.data.pack import Document, ModalityInfo, Pack, make_pack
from transfusion_fast.data.packing import BUFFER, pack_stream
from transfusion_fast.data.prepare import check_free
from transfusion_fast.data.shards import PACKS_PER_SHARD, write_shard
from transfusion_fast.data.source import Rejected, Source, Unit
from transfusion_fast.data.store import UnitReader, UnitReport, read_lengths, read_report, write_unit
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError

_RECIPE, _LOCK, _UNITS, _SHARDS = "recipe.json", ".lock", "units", "shards"
_VERSION = 2
"""Of units and of how documents are packed: work begun by another is not gone on with."""
_OPEN_UNITS = 128  # of files that a process has open at once

Task = TypeVar("Task")
Result = TypeVar("Result")
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

    def __post_init__(self) -> None:
        for name in ("packs_per_shard", "buffer"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}; give a larger number")

    def describe(self) -> dict[str, Any]:
        """As JSON, with what would tell that a file of the source has changed."""
        files = sorted(set(self.source.files))
        return {
            "version": _VERSION,
            "source": {**self.source.describe(), "units": len(self.source.units())},
            "files": {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
            "encoder": self.encoder.describe(),
            "packing": [self.packs_per_shard, self.seed, self.buffer],
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
    """Makes the data folder, or goes on making it.

    Raises:
        InputError: `folder` is not free; what lies in FOLDER.partial was begun with another recipe, or is being made
            by another process; the source holds no document that can be used.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, got {processes}")
    folder = Path(folder).resolve()
    check_free(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    units = recipe.source.units()
    with _locked(partial):
        _check_recipe(partial, recipe)
        for name in (_UNITS, _SHARDS):
            (partial / name).mkdir(exist_ok=True)
        with _pool(_Job(recipe, partial), processes) as each:
            reports = dict(tqdm(each(_encode, enumerate(units)), "reading", len(units), unit="unit", disable=None))
            built = _merge([reports[number] for number in range(len(units))])
            tasks = _shard_tasks(recipe, partial, len(units))
            shards = dict(tqdm(each(_write, tasks), "writing", unit="shard", disable=None))
        if not shards:
            shutil.rmtree(partial)  # nothing to go on with, and settings may be what was wrong
            reasons = ", ".join(f"{count} x {reason}" for reason, count in built[0].items()) or "it is empty"
            raise InputError(f"source must hold documents that can be used, and has none ({reasons})")
        encoder = recipe.encoder
        ordered = [shards[number] for number in range(len(shards))]
        index = make_index(ordered, encoder.sequence_length, encoder.tokenizer, encoder.modalities)
        _finish(partial, folder, encoder, index)
    return Built(index, *built)


def _check_recipe(partial: Path, recipe: Recipe) -> None:
    """Writes the recipe, or finds the one that the work in `partial` was begun with to be the same."""
    path, now = partial / _RECIPE, json.loads(json.dumps(recipe.describe()))
    if not path.exists() or not any((partial / _UNITS).glob("*.json")):
        for name in (_UNITS, _SHARDS):  # what no recipe speaks for may be of any
            shutil.rmtree(partial / name, ignore_errors=True)
        staged = path.with_suffix(".staged")
        staged.write_text(json.dumps(now, indent=1), encoding="utf-8")
        staged.replace(path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name, value in now.items() if before.get(name) != value]
    if differing:
        raise InputError(
            f"{partial} was begun with other {' and '.join(differing)}; go on with those, or remove it to begin anew"
        )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{partial} must be made by one process, and another is at work in it") from error
        yield


def _encode(job: _Job, numbered: tuple[int, Unit]) -> tuple[int, UnitReport]:
    number, unit = numbered
    folder, encoder = job.folder / _UNITS, job.recipe.encoder
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


def _shard_tasks(recipe: Recipe, partial: Path, num_units: int) -> Iterator[_ShardTask]:
    """The plan of all packs, a shard at a time; only a buffer of it is ever in memory."""
    starts = [0]

    def lengths() -> Iterator[np.ndarray]:
        for number in range(num_units):
            part = read_lengths(partial / _UNITS, number)
            starts.append(starts[-1] + len(part))
            yield part

    packs = pack_stream(lengths(), recipe.encoder.sequence_length, recipe.seed, recipe.buffer)
    number = 0
    while chosen := list(islice(packs, recipe.packs_per_shard)):
        first = np.array(starts)
        units = [np.searchsorted(first, pack, side="right") - 1 for pack in chosen]
        located = [np.stack([unit, pack - first[unit]], axis=1) for unit, pack in zip(units, chosen, strict=True)]
        yield _ShardTask(number, located)
        number += 1


def _write(job: _Job, task: _ShardTask) -> tuple[int, IndexedShard]:
    record = job.folder / _UNITS / f"shard-{task.number:06d}.json"
    encoder = job.recipe.encoder
    folder = job.folder / _SHARDS
    if record.exists():
        entry, documents, tokens = json.loads(record.read_text(encoding="utf-8"))
        info = parse_shard(entry, str(record))
        if (folder / info.file).is_file() and (folder / info.file).stat().st_size == info.bytes:
            return task.number, IndexedShard(info, documents, tokens)
    name = write_shard(_packs(job, task), folder, task.number)
    num_text_tokens = encoder.tokenizer.num_text_tokens
    shard = index_shard(folder / name, encoder.sequence_length, num_text_tokens, encoder.modalities)
    staged = record.with_suffix(".staged")
    staged.write_text(json.dumps([shard.info.entry(), shard.documents, shard.tokens]), encoding="utf-8")
    staged.replace(record)
    return task.number, shard


def _packs(job: _Job, task: _ShardTask) -> Iterator[Pack]:
    modalities = job.recipe.encoder.modalities

    @functools.lru_cache(maxsize=_OPEN_UNITS)
    def reader(unit: int) -> UnitReader:
        return UnitReader(job.folder / _UNITS, unit, modalities)

    for pack in task.packs:
        yield make_pack([reader(unit)[document] for unit, document in pack.tolist()], modalities)


def _finish(partial: Path, folder: Path, encoder: DocumentEncoder[Any], index: Index) -> None:
    encoder.tokenizer.write(partial / _SHARDS)
    write_index(partial / _SHARDS, index)
    try:
        (partial / _SHARDS).rename(folder)
    except OSError as error:
        raise InputError(
            f"{partial / _SHARDS} is whole, but cannot become {folder} ({error}); move it there"
        ) from error
    (partial / _RECIPE).unlink()  # first: what a run that is killed now leaves must not be gone on with
    shutil.rmtree(partial)


class _Worker:
    """What a process of the pool was started with."""

    job: ClassVar[_Job]


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set, and no interrupt arrives
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(job: _Job) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.job = job


def _end_with_parent() -> None:
    """Who killed that one may begin anew in the same folder."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[[_Job, Task], Result], task: Task) -> Result:
    return function(_Worker.job, task)


@contextmanager
def _pool(job: _Job, processes: int) -> Iterator[Callable[..., Iterator]]:
    """Gives `each(function, tasks)`: function(job, task) of every task, in any order, in so many processes."""
    if processes == 1:
        yield lambda function, tasks: (function(job, task) for task in tasks)
        return
    context = get_context("forkserver")  # threads of libraries do not survive a fork
    with _interrupts_ignored():  # by its children too: Ctrl-C reaches all, and the process in charge ends the others
        forkserver.ensure_running()
    with ProcessPoolExecutor(processes, context, _begin, (job,)) as executor:

        def each(function: Callable[[_Job, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
            waiting: set[Future[Result]] = set()
            for task in tasks:
                waiting.add(executor.submit(_run, function, task))
                if len(waiting) > 2 * processes:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in waiting)

        try:
            yield each
        except BrokenProcessPool as error:
            raise InputError(
                f"one of {processes} processes was killed, perhaps for memory; run it again with fewer: it goes on"
            ) from error
        except BaseException:
            for process in active_children():
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
