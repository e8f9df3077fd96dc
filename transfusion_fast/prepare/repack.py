"""A data folder as a source: its documents, to be packed anew at another length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transfusion_fast.data.index import INDEX_NAME, file_sha256, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json
from transfusion_fast.prepare.fitting import EncodedDocument, Fitter, Long
from transfusion_fast.prepare.sources.base import Unit
from transfusion_fast.prepare.staging import RECIPE


@dataclass(frozen=True)
class PacksSource:
    """The documents of a data folder; a unit is a shard, from its first pack to its last.

    A pack that cannot be read is an InputError: of a prepared folder nothing is to be lost.
    """

    folder: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / shard.file for shard in self._reader.index.shards)

    def units(self) -> list[Unit]:
        counts = self._reader.index.pack_counts
        ends = itertools.accumulate(counts)
        return [Unit(file, end - count, end) for file, count, end in zip(self.files, counts, ends, strict=True)]

    def documents(self, unit: Unit) -> Iterator[EncodedDocument]:
        modalities = self._reader.index.modalities
        for number in range(unit.start, unit.end):
            documents = self._reader.read(number).documents(modalities)
            for place, document in enumerate(documents):
                yield EncodedDocument(f"document {place} of pack {number} of {self.folder}", document)

    def describe(self) -> dict[str, Any]:
        return {"kind": "packs", "index": file_sha256(self.folder / INDEX_NAME)}

    def fitter(self, sequence_length: int, long: Long | None = None) -> Fitter:
        """What makes the documents fit packs of another length, with the folder's own tokenizer and modalities.

        `long` is as in its recipe if it is not given; without either, InputError for a folder with images.
        """
        index = self._reader.index
        tokenizer = load_tokenizer(index.tokenizer, self.folder)
        return Fitter(tokenizer, sequence_length, index.modalities, long or self._long)

    @property
    def _long(self) -> Long:
        match read_json(self.folder / RECIPE):
            case {"encoder": {"long": ("split" | "reject") as long}}:
                return long
        if not self._reader.index.modalities:
            return "split"
        raise InputError(
            f"{self.folder} has no {RECIPE} to say what becomes of documents longer than a pack; "
            "give --long split, or --long reject to keep images with their captions"
        )

    @cached_property
    def _reader(self) -> PackReader:
        """Goes to other processes with its index: one of many shards takes seconds to read."""
        return PackReader(self.folder, parse_index(self.folder))
