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
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.index import INDEX_NAME, Index, file_sha256, read_index, write_index
from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.pack import Pack, tokens_dtype, validate_pack
from transfusion_fast.data.shards import MAX_PACKS, PACKS_PER_SHARD, ShardInfo, write_shard
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from transfusion_fast.data.vision_encoder import VisionEncoder
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.files import read_json, sync, write_atomically
from transfusion_fast.prepare import staging
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.inspect import read_shard
from transfusion_fast.prepare.packing import BUFFER, pack_stream
from transfusion_fast.prepare.pool import worker_pool
from transfusion_fast.prepare.sources.base import Part, Source, SourceDocument, TextRange, Unit
from transfusion_fast.prepare.spool import Counts, Spool, read_pack, remark_line
from transfusion_fast.prepare.staging import RECIPE, SHARDS, UNITS, discard, first_changes, output_and_staging

LEFT_OUT, REPAIRED = "left_out.jsonl", "repaired.jsonl"
_VERSION = 5
"""Version of spooled units and of the packing: work begun by another version is refused."""
MEASURED = 256
"""Images by which a vision encoder's features are normalised."""
_OPEN_UNITS = 32  # of three files each, that a process has open at once
_FULL = (errno.ENOSPC, errno.EDQUOT)
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
        if not 1 <= self.packs_per_shard <= MAX_PACKS:
            raise InputError(
                f"packs_per_shard must be in 1..{MAX_PACKS}, got {self.packs_per_shard}; give another number"
            )

    def describe(self) -> dict[str, Any]:
        """Return the recipe as JSON, with the sizes and times by which changed source files are recognized."""
        return {
            **_describe(self.source, self.train_bpe),
            "encoder": self.encoder.describe(),
            "packing": {"packs_per_shard": self.packs_per_shard, "seed": self.seed, "buffer": self.buffer},
        }


def _describe(source: Source, train_bpe: int | None) -> dict[str, Any]:
    states = source.states()
    return {
        "version": _VERSION,
        "source": source.describe(),
        "files": states,
        "order": hashlib.sha256(os.fsencode("\n".join(states))).hexdigest(),
        "train_bpe": train_bpe,
    }


@dataclass(frozen=True)
class Built:
    """The index of a data folder, and what became of the source's documents."""

    index: Index
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of documents that were left out by reason."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Number of faults that were mended, or ignored, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first document that was left out, or mended, for each reason."""
    cut: int = 0
    """Number of documents that were longer than a pack and became several."""
    reused: bool = False
    """True if the folder was there already, of the same recipe; then nothing is counted."""

    def remarks(self, folder: Path) -> Iterator[str]:
        """Yield a line for each reason why documents were left out or repaired, and one if any were split."""
        for done, counts, file in (("left out", self.rejected, LEFT_OUT), ("repaired", self.repaired, REPAIRED)):
            for reason, count in sorted(counts.items()):
                yield f"{done} {count}: {self.examples[reason]}"
            if counts.total() > len(counts):
                yield f"{folder / file} names all that was {done}"
        if self.cut:
            yield f"split {self.cut} documents that are longer than a pack"


def build(recipe: Recipe, folder: Path, processes: int = 1) -> Built:
    """Make the data folder, or resume making it; a folder that was made of this recipe stays as it is.

    Raises:
        InputError: `folder` holds anything else; work in the staging folder has another recipe, or another process is
            using it; the source holds no document that can be used; the disk is full, and what was finished stays.
    """
    folder, partial = output_and_staging(folder)
    described = json.loads(json.dumps(recipe.describe()))
    if not partial.exists() and (index := _finished(folder, described, recipe.source)):
        return Built(index, reused=True)
    with staging.locked(partial):
        if index := _finished(folder, described, recipe.source):  # perhaps by another process before the lock was free
            if read_json(partial / RECIPE) in (None, described):  # left by a run that was killed while it cleaned up
                discard(partial)
            return Built(index, reused=True)
        try:
            staging.begin_or_resume(partial, described, recipe.encoder.tokenizer)
            built = _Work(recipe, partial).carry_out(folder, processes)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise InputError(
                    f"file system of {partial} must have room, got {error.strerror}; make room and run it again: it "
                    "resumes"
                ) from error
            if not staging.has_units(partial):  # there is nothing to resume, and settings may be what was wrong
                discard(partial)
            raise
        discard(partial)
    return built


def train_tokenizer(source: Source, vocabulary: int, folder: Path) -> Tokenizer:
    """Train a BPE tokenizer on the texts of a source; if `folder` was made or begun with one, return that one."""
    for path, begun in _begun(source, vocabulary, folder):
        match begun:
            case {"tokenizer": dict(described)}:
                with suppress(InputError):
                    return load_tokenizer(described, path)
    documents = (found for unit in source.units() for found in source.documents(unit))
    parts = (part for found in documents if isinstance(found, SourceDocument) for part in found.parts)
    return train_bpe((text for part in parts for text in _texts(part)), vocabulary)


def _texts(part: Part) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, TextRange):
        with suppress(Rejected):  # which is counted when the text is encoded
            yield from part.pieces()


def measure_features(encoder: Encoder, source: Source, train_bpe: int | None, folder: Path) -> VisionEncoder:
    """Return the vision encoder of `encoder`, normalised by images from all of a source; as `folder` was begun, if so.

    InputError if none of the images that are looked at can be used.
    """
    assert encoder.latents is not None and isinstance(encoder.latents.encoder, VisionEncoder)
    vision, latents = encoder.latents.encoder, encoder.latents
    for _, begun in _begun(source, train_bpe, folder):
        match begun:
            case {"modalities": [{"autoencoder": vision.fingerprint, "mean": list(mean), "std": list(std)}]}:
                return replace(vision, mean=tuple(mean), std=tuple(std))
    units = source.units()
    each = -(-MEASURED // max(len(units), 1))
    chosen = (units[number] for number in keyed_permutation(len(units), 0, *_UNIT_STREAM).tolist())
    pixels = (image for unit in chosen for image in islice(encoder.pixels(source.documents(unit)), each))
    found = latents(list(islice(pixels, MEASURED)))
    features = [values for values in found if not isinstance(values, Rejected)]
    if not features:
        raise InputError("source must hold images whose features can be measured, got none; look at its files")
    return vision.normalised_by(features)


def _begun(source: Source, train_bpe: int | None, folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield `folder` and its staging folder with the settings of their encoders, if they were made of this source."""
    now = json.loads(json.dumps(_describe(source, train_bpe)))
    for path in output_and_staging(folder):
        match read_json(path / RECIPE):
            case {"encoder": dict(settings), **rest} if now.items() <= rest.items():
                yield path, settings


def _finished(folder: Path, recipe: dict[str, Any], source: Source) -> Index | None:
    """Return the index of an unchanged folder of this recipe; None if the folder is free, else InputError.

    Source files with other times than in its recipe are read, to see whether they are still the same.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        if (made_of := read_json(folder / RECIPE)) is None:
            raise InputError(f"it has no {RECIPE}")
        now = {**recipe, "index": file_sha256(folder / INDEX_NAME)}
        if (change := first_changes(made_of, now)) and not _only_touched(made_of, now, source):
            raise InputError(f"it was made with other settings: {change}")
        return read_index(folder)
    except (OSError, InputError) as error:
        raise InputError(
            f"output folder must be new or empty, got {str(folder)!r} ({error}); choose another, or remove this one"
        ) from error


def _only_touched(made_of: Any, recipe: dict[str, Any], source: Source) -> bool:
    """Return True if the times of the source files are the only difference; only then is the source read for that."""
    match made_of:
        case {"files": dict(files), "contents": list(contents)}:
            sizes = [{name: file["bytes"] for name, file in own.items()} for own in (files, recipe["files"])]
            others = {**recipe, "files": made_of["files"]}
            same = sizes[0] == sizes[1] and not first_changes(made_of, others)
            return same and contents == [source.checksum(unit) for unit in source.units()]
    return False


@dataclass(frozen=True)
class _Work:
    """A recipe and the staging folder in which it is carried out. Every process has a copy."""

    recipe: Recipe
    partial: Path

    def carry_out(self, folder: Path, processes: int) -> Built:
        """Encode all units, write all shards, and give the folder its name."""
        units = self.recipe.source.units()
        with worker_pool(self, processes) as each:
            found = dict(tqdm(each(_Work.encode, enumerate(units)), "reading", len(units), unit="unit", disable=None))
            counts = [found[number] for number in range(len(units))]
            tasks = enumerate(self.located_packs(np.array([own.documents for own in counts], np.int64)))
            written = dict(tqdm(each(_Work.write, tasks), "writing", unit="shard", disable=None))
        examples: dict[str, str] = {}
        rejected = self.list_remarks("rejected", LEFT_OUT, len(units), examples)
        repaired = self.list_remarks("repaired", REPAIRED, len(units), examples)
        if not written:
            shutil.rmtree(self.partial / UNITS)
            reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(rejected.items())) or "it is empty"
            first = "".join(f"; {example}" for example in list(examples.values())[:1])
            raise InputError(f"source must hold documents that can be used, got none ({reasons}){first}")
        index = replace(
            self.recipe.encoder.empty_index(),
            documents=sum(own.documents for own in counts),
            tokens=sum(own.tokens for own in counts),
            shards=tuple(written[number] for number in range(len(written))),
        )
        self.finish(folder, index, [own.source for own in counts])
        return Built(index, rejected, repaired, examples, sum(own.cut for own in counts))

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
            source = self.recipe.source
            documents = self.recipe.encoder.encode(source.documents(unit))
            counts = spool.write(documents, functools.partial(source.checksum, unit))
        return number, counts

    def located_packs(self, documents: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Yield a list for each shard: an array of rows (unit, document) for each of its packs.

        `documents` are the counts of the units. At most `buffer` documents are in memory at a time. Units come in a
        keyed order, as a source may be sorted by length.
        """
        recipe = self.recipe
        order = keyed_permutation(len(documents), recipe.seed, *_UNIT_STREAM)
        starts = np.cumsum(documents[order]) - documents[order]
        lengths = (self.spool(unit).lengths for unit in order.tolist())
        packs = pack_stream(lengths, recipe.encoder.sequence_length, recipe.seed, recipe.buffer)
        while chosen := list(islice(packs, recipe.packs_per_shard)):
            units = [np.searchsorted(starts, pack, side="right") - 1 for pack in chosen]
            yield [np.stack([order[u], pack - starts[u]], axis=1) for u, pack in zip(units, chosen, strict=True)]

    def write(self, task: tuple[int, list[np.ndarray]]) -> tuple[int, ShardInfo]:
        """Write a shard, or find that it is there."""
        number, located = task
        folder, settings = self.partial / SHARDS, self.recipe.encoder.empty_index()
        found = read_shard(folder / f"shard-{number:06d}.tar", settings)
        if found.info and not found.findings:
            return number, found.info
        dtype = tokens_dtype(settings.num_text_tokens)
        return number, write_shard(self.packs(located), folder, number, settings.schema, dtype)

    def packs(self, located: list[np.ndarray]) -> Iterator[Pack]:
        """Yield the packs of a shard."""
        spool, encoder = functools.lru_cache(maxsize=_OPEN_UNITS)(self.spool), self.recipe.encoder
        for chosen in located:
            pack = read_pack(chosen, spool, encoder.modalities)
            validate_pack(pack, encoder.modalities, encoder.tokenizer.num_text_tokens, encoder.sequence_length)
            yield pack

    def list_remarks(self, kind: str, name: str, units: int, examples: dict[str, str]) -> Counter[str]:
        """Write a file of all units' remarks of one kind; return their number by reason, and add to `examples`."""
        found: Counter[str] = Counter()
        with (self.partial / SHARDS / name).open("wb") as whole:
            for line in self.remarks(kind, units):
                whole.write(line)
                entry = json.loads(line)
                found[entry["reason"]] += 1
                examples.setdefault(entry["reason"], f"{entry['reason']}: {entry['detail']}")
        if not found:
            Path(whole.name).unlink()
        return found

    def remarks(self, kind: str, units: int) -> Iterator[bytes]:
        """Yield the remarks of one kind as lines: files that are passed over, then those of each unit."""
        if kind == "rejected":
            yield from map(remark_line, self.recipe.source.strays)
        for number in range(units):
            with self.spool(number).path(kind).open("rb") as lines:
                yield from lines

    def finish(self, folder: Path, index: Index, checksums: list[int]) -> None:
        """Write the files beside the shards, and give the folder its name once all of it is on disk."""
        shards = self.partial / SHARDS
        self.recipe.encoder.tokenizer.write(shards)
        write_index(shards, index)
        recipe = {**read_json(self.partial / RECIPE), "index": file_sha256(shards / INDEX_NAME), "contents": checksums}
        write_atomically(shards / RECIPE, json.dumps(recipe, indent=1))
        sync(*(path for path in shards.iterdir() if path.suffix != ".tar"), shards)  # `write_shard` synced each tar
        try:
            shards.rename(folder)
        except OSError as error:
            raise InputError(f"{folder} must be free, got {error}; move {shards} there, which is complete") from error
        sync(folder.parent)
