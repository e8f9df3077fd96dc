"""From a source to a data folder, by several processes: the same bytes for any number of processes or interruptions.

Processes encode the units of the source and spool their documents; documents are assigned to packs by their lengths
alone; processes write packs shard by shard. All of it happens in the staging folder OUT.partial, which keeps finished
work if the run is cut off; its folder of shards becomes OUT in one step at the end. There, recipe.json says what the
folder was made of, so that the same command recognizes it; left_out.jsonl names the documents that were left out, and
repaired.jsonl the faults that were mended.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.data.index import INDEX_NAME, Index, file_sha256, read_index, write_index
from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.pack import Pack, tokens_dtype, validate_pack
from transfusion_fast.data.shards import ShardInfo, write_shard
from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json, sync, write_atomically
from transfusion_fast.prepare import staging
from transfusion_fast.prepare.inspect import read_shard
from transfusion_fast.prepare.packing import pack_ids
from transfusion_fast.prepare.pool import worker_pool
from transfusion_fast.prepare.progress import progress
from transfusion_fast.prepare.recipe import UNIT_STREAM, Recipe
from transfusion_fast.prepare.selected_documents import FinishedUnits, SelectedDocuments, located
from transfusion_fast.prepare.selection import SIDES
from transfusion_fast.prepare.sources.base import Source, Unit
from transfusion_fast.prepare.spool import Counts, Mark, Spool, read_pack, remark_line
from transfusion_fast.prepare.staging import RECIPE, SHARDS, UNITS, discard, first_changes, output_and_staging

LEFT_OUT, REPAIRED = "left_out.jsonl", "repaired.jsonl"
_OPEN_UNITS = 32  # of three files each, that a process has open at once
_PARTS = "parts"  # in the recipe of a staging folder; the finished folder is the same for any number
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Built:
    """The index of a data folder, and what became of the source's documents."""

    index: Index
    heldout: Index | None = None
    """That of the held-out part, if there is one; then `index` is that of the part to train on."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of documents that were left out by reason."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Number of faults that were mended, or ignored, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first document that was left out, or mended, for each reason."""
    cut: int = 0
    """Number of documents that were longer than a pack and became several."""
    first: tuple[int, int] | None = None
    """Number of the source documents up to the limit, and of their tokens, if it was reached."""
    changed: str = ""
    """The first source files that changed while the source was read."""
    reused: bool = False
    """True if the folder was there already, of the same recipe; then nothing is counted."""

    def remarks(self, folder: Path) -> Iterator[str]:
        """Yield a line for each reason why documents were left out or repaired, for a limit and for split documents."""
        for done, counts, file in (("left out", self.rejected, LEFT_OUT), ("repaired", self.repaired, REPAIRED)):
            for reason, count in sorted(counts.items()):
                yield f"{done} {count}{', the first' * (count > 1)}: {self.examples[reason]}"
            if counts.total() > len(counts):
                yield f"{folder / file} names all that was {done}"
        if self.first:
            yield "stopped at the limit: the first {} documents of the source, {} tokens".format(*self.first)
        if self.changed:
            yield f"the source changed while it was read, and documents may be missing: {self.changed}"
        if self.cut:
            yield f"split {self.cut} documents that are longer than a pack"


def build(recipe: Recipe, folder: Path, processes: int = 1, parts: int = 1) -> Built:
    """Make the data folder, or resume making it; a folder that was made of this recipe stays as it is.

    Args:
        parts: number of parts in which it was begun; with more than one, another part that uses it is waited for.

    Raises:
        InputError: `folder` holds anything else; work in the staging folder has another recipe, or another process is
            using it; the source holds no document that can be used; the disk is full, and what was finished stays.
    """
    folder, partial = output_and_staging(folder)
    staged = staged_recipe(recipe, parts)
    if not partial.exists() and (built := finished(folder, recipe)):
        return built
    with one_line_if_full(partial), staging.locked(partial, wait=parts > 1):
        if built := finished(folder, recipe):  # perhaps by another process before the lock was free
            if read_json(partial / RECIPE) in (None, staged):  # left by a run that was killed while it cleaned up
                discard(partial)
            return built
        try:
            staging.begin_or_resume(partial, staged, recipe.encoder.tokenizer)
            built = Work(recipe, partial).carry_out(folder, processes)
        except BaseException as error:
            # With no unit there is nothing to resume, and settings may be what was wrong.
            if getattr(error, "errno", None) not in _FULL and not staging.has_units(partial):
                discard(partial)
            raise
        discard(partial)
    return built


def staged_recipe(recipe: Recipe, parts: int) -> dict[str, Any]:
    """Return what the staging folder says about the work in it."""
    return {**recipe.describe(), _PARTS: parts}


@contextmanager
def one_line_if_full(partial: Path) -> Iterator[None]:
    """Raise InputError in place of the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InputError(
            f"file system of {partial} must have room, got {error.strerror}; make room and run it again: it resumes"
        ) from error


def finished(folder: Path, recipe: Recipe) -> Built | None:
    """Return an unchanged folder of this recipe; None if the folder is free, else InputError.

    Source files with other times than in its recipe are read, to see whether they are still the same.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        if (made_of := read_json(folder / RECIPE)) is None:
            raise InputError(f"it has no {RECIPE}")
        sides = recipe.selection.sides
        now = {**recipe.describe(), "index": _hashes(folder, sides)}
        if (change := first_changes(made_of, now)) and not _only_touched(made_of, now, recipe.source):
            raise InputError(f"it was made with other settings: {change}")
        return Built(*_first_two([read_index(folder / side) for side in sides]), reused=True)
    except (OSError, InputError) as error:
        raise InputError(
            f"output folder must be new or empty, got {str(folder)!r} ({error}); choose another, or remove this one"
        ) from error


def _hashes(folder: Path, sides: Sequence[str]) -> str | dict[str, str] | None:
    """Return the sha256 of the index of a data folder, or by side; None for a folder that is divided otherwise."""
    if any((folder / side).is_dir() != (side in sides) for side in SIDES):
        return None
    found = {side: file_sha256(folder / side / INDEX_NAME) for side in sides}
    return found.get("", found)


def _only_touched(made_of: Any, recipe: dict[str, Any], source: Source) -> bool:
    """Return True if the times of the source files are the only difference; only then is the source read for that."""
    match made_of:
        case {"files": dict(files), "contents": list(contents)}:
            sizes = [{name: file["bytes"] for name, file in own.items()} for own in (files, recipe["files"])]
            others = {**recipe, "files": made_of["files"]}
            same = sizes[0] == sizes[1] and not first_changes(made_of, others)
            units = source.units()[: len(contents)]  # no more were read, if there was a limit
            return same and None not in contents and contents == [source.checksum(unit) for unit in units]
    return False


@dataclass(frozen=True)
class Work:
    """A recipe and the staging folder in which it is carried out. Every process has a copy."""

    recipe: Recipe
    partial: Path

    def carry_out(self, folder: Path, processes: int) -> Built:
        """Encode all units, write all shards, and give the folder its name."""
        units = self.recipe.source.units()
        with worker_pool(self, processes) as each:
            front = FinishedUnits(self.recipe.selection)
            unread = takewhile(lambda _: not front.has_enough, enumerate(units))
            total = None if self.recipe.selection.has_limit else len(units)
            for number, counts in progress(each(Work.encode, unread), "reading", "unit", total):
                front.add(number, counts)
            changed = self.changes()
            chosen = SelectedDocuments(self.recipe.selection, self.spool, front.counts)
            examples: dict[str, str] = {}
            rejected = self.list_remarks("rejected", LEFT_OUT, chosen, examples)
            repaired = self.list_remarks("repaired", REPAIRED, chosen, examples)
            totals = self.totals(chosen, rejected, examples)
            tasks = (task for side in totals for task in self.tasks(chosen, side))
            written = dict(progress(each(Work.write, tasks), "writing", "shard"))
        empty = self.recipe.encoder.empty_index()
        indices = {
            side: replace(empty, documents=own[0], tokens=own[1], shards=_in_order(written, side))
            for side, own in totals.items()
        }
        self.finish(folder, indices, [own.checksum for own in chosen.counts])
        first = (chosen.first, sum(tokens for _, tokens in totals.values())) if chosen.first else None
        return Built(*_first_two([*indices.values()]), rejected, repaired, examples, chosen.cut, first, changed)

    def totals(
        self, chosen: SelectedDocuments, rejected: Counter[str], examples: dict[str, str]
    ) -> dict[str, tuple[int, int]]:
        """Return the number of documents and of tokens by side; InputError if a side has none.

        Then nothing is kept that would hold the user to these settings.
        """
        totals = {side: chosen.totals(side) for side in self.recipe.selection.sides}
        if all(documents for documents, _ in totals.values()):
            return totals
        shutil.rmtree(self.partial / UNITS)
        if chosen.stopped_at == 0 and len(chosen.counts) == 1:
            most = self.recipe.selection.limit_tokens
            raise InputError(f"--limit-tokens must leave the first document, got {most}; give a larger number")
        if count := sum(documents for documents, _ in totals.values()):
            side = next(side for side, own in totals.items() if not own[0])
            raise InputError(
                f"{side} part must hold a document, got none of the {count} with --heldout "
                f"{self.recipe.selection.heldout}; give another share"
            )
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(rejected.items())) or "it is empty"
        first = "".join(f"; {example}" for example in list(examples.values())[:1])
        raise InputError(f"source must hold documents that can be used, got none ({reasons}){first}")

    def changes(self) -> str:
        """Return the first source files that are not as they were when the work began; "" if all are."""
        try:
            return first_changes(read_json(self.partial / RECIPE)["files"], self.recipe.source.states())
        except OSError as error:
            return str(error)

    def spool(self, unit: int) -> Spool:
        """Return the encoded documents of a unit."""
        encoder = self.recipe.encoder
        return Spool(self.partial / UNITS, unit, encoder.modalities, encoder.tokenizer.num_text_tokens)

    def encode(self, task: tuple[int, Unit]) -> tuple[int, Counts]:
        """Spool the documents of a unit, or find that they are there."""
        number, unit = task
        spool = self.spool(number)
        counts = spool.read_counts()
        if counts is None:
            source, selection = self.recipe.source, self.recipe.selection
            documents, marks = source.documents(unit), None
            if not selection.takes_all:
                marks = deque[Mark | None]()
                documents = selection.marked(documents, marks)
            encoded = self.recipe.encoder.encode(documents)
            counts = spool.write(encoded, functools.partial(source.checksum, unit), marks, selection.is_enough)
        return number, counts

    def tasks(self, chosen: SelectedDocuments, side: str) -> Iterator[tuple[tuple[str, int], list[np.ndarray]]]:
        """Yield (side, number) and the packs of each shard: an array of rows (unit, document) for each pack.

        At most `buffer` documents are in memory at a time. Units come in a keyed order, as a source may be sorted by
        length.
        """
        recipe = self.recipe
        (self.partial / SHARDS / side).mkdir(exist_ok=True)
        order = keyed_permutation(len(chosen.counts), recipe.seed, *UNIT_STREAM).tolist()
        documents = (chosen.ids_and_lengths(unit, side) for unit in order)
        packs = map(located, pack_ids(documents, recipe.encoder.sequence_length, recipe.seed, recipe.buffer))
        number = 0
        while some := list(islice(packs, recipe.packs_per_shard)):
            yield (side, number), some
            number += 1

    def write(self, task: tuple[tuple[str, int], list[np.ndarray]]) -> tuple[tuple[str, int], ShardInfo]:
        """Write a shard, or find that it is there."""
        (side, number), packs = task
        folder, settings = self.partial / SHARDS / side, self.recipe.encoder.empty_index()
        found = read_shard(folder / f"shard-{number:06d}.tar", settings)
        if found.info and not found.findings:
            return (side, number), found.info
        dtype = tokens_dtype(settings.num_text_tokens)
        return (side, number), write_shard(self.packs(packs), folder, number, settings.schema, dtype)

    def packs(self, packs: list[np.ndarray]) -> Iterator[Pack]:
        """Yield the packs of a shard from the places of their documents."""
        spool, encoder = functools.lru_cache(maxsize=_OPEN_UNITS)(self.spool), self.recipe.encoder
        for places in packs:
            pack = read_pack(places, spool, encoder.modalities)
            validate_pack(pack, encoder.modalities, encoder.tokenizer.num_text_tokens, encoder.sequence_length)
            yield pack

    def list_remarks(self, kind: str, name: str, chosen: SelectedDocuments, examples: dict[str, str]) -> Counter[str]:
        """Write a file of all remarks of one kind; return their number by reason, and add to `examples`."""
        found: Counter[str] = Counter()
        with (self.partial / SHARDS / name).open("wb") as whole:
            passed_over = map(remark_line, self.recipe.source.passed_over if kind == "rejected" else ())
            for line in chain(passed_over, chosen.remarks(kind)):
                whole.write(line)
                entry = json.loads(line)
                found[entry["reason"]] += 1
                examples.setdefault(entry["reason"], f"{entry['reason']}: {entry['detail']}")
        if not found:
            Path(whole.name).unlink()
        return found

    def finish(self, folder: Path, indices: dict[str, Index], checksums: list[int | None]) -> None:
        """Write the files beside the shards, and give the folder its name once all of it is on disk."""
        shards = self.partial / SHARDS
        begun = {name: value for name, value in read_json(self.partial / RECIPE).items() if name != _PARTS}
        recipe = {**begun, "contents": checksums}
        for side, index in indices.items():
            self.recipe.encoder.tokenizer.write(shards / side)
            write_index(shards / side, index)
            _write_recipe(shards / side, {**recipe, "index": file_sha256(shards / side / INDEX_NAME)})
        _write_recipe(shards, {**recipe, "index": _hashes(shards, list(indices))})
        for path in {shards, *(shards / side for side in indices)}:
            sync(*(file for file in path.iterdir() if file.suffix != ".tar"), path)  # `write_shard` synced each tar
        try:
            shards.rename(folder)
        except OSError as error:
            raise InputError(f"{folder} must be free, got {error}; move {shards} there, which is complete") from error
        sync(folder.parent)


def _first_two(indices: Sequence[Index]) -> tuple[Index, Index | None]:
    return indices[0], indices[1] if len(indices) > 1 else None


def _write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    write_atomically(folder / RECIPE, json.dumps(recipe, indent=1))


def _in_order(written: dict[tuple[str, int], ShardInfo], side: str) -> tuple[ShardInfo, ...]:
    return tuple(shard for key, shard in sorted(written.items()) if key[0] == side)
