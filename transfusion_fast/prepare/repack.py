"""A data folder as a source, whose documents are packed again at another length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.data.index import INDEX_NAME, file_sha256, parse_index
from transfusion_fast.data.pack import Document
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json
from transfusion_fast.prepare.encode import Encoder, Long
from transfusion_fast.prepare.sources.base import Source, Unit
from transfusion_fast.prepare.staging import RECIPE


@dataclass(frozen=True)
class PacksSource(Source):
    """The documents of a data folder; a unit is a shard, from its first pack to its last.

    A pack that cannot be read is an InputError: repacking must lose nothing.
    """

    folder: Path
    reader: PackReader

    @classmethod
    def open(cls, folder: Path) -> PacksSource:
        """Return the documents of a folder, whose index is read here, once for all processes."""
        reader = PackReader(folder, parse_index(folder))
        return cls(tuple(folder / shard.file for shard in reader.index.shards), folder, reader)

    def units(self) -> list[Unit]:
        ends = itertools.accumulate(self.reader.index.pack_counts, initial=0)
        return [Unit(file, *span) for file, span in zip(self.files, itertools.pairwise(ends), strict=True)]

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        return []  # `describe` has the sha256 of every shard

    def entries(self, unit: Unit) -> Iterator[tuple[str, Document]]:
        for number in range(unit.start, unit.end):
            documents = self.reader.read(number).documents(self.reader.index.modalities)
            for place, document in enumerate(documents):
                yield f"document {place} of pack {number} of {self.folder}", document

    def describe(self) -> dict[str, Any]:
        return {"kind": "packs", "index": file_sha256(self.folder / INDEX_NAME)}

    def encoder(self, sequence_length: int, long: Long | None = None) -> Encoder:
        """Return the encoder for packs of another length, with the folder's own tokenizer and modalities.

        Over-long documents follow the folder's original setting if `long` is not given; InputError if a folder with
        images has no recipe that says it.
        """
        index = self.reader.index
        match long, read_json(self.folder / RECIPE):
            case None, {"encoder": {"long": ("split" | "reject") as original}}:
                long = original
            case None, _ if index.modalities:
                raise InputError(
                    f"{self.folder} must have a {RECIPE} that says what becomes of documents longer than a pack, got "
                    "none; give --long split, or --long reject to keep images with their captions"
                )
        tokenizer = load_tokenizer(index.tokenizer, self.folder)
        return Encoder(tokenizer, sequence_length, index.modalities, long=long or "split")
