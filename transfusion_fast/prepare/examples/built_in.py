"""Documents that are at hand, in memory or of a built-in data set, to data folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from transfusion_fast.data.index import Index
from transfusion_fast.data.pack import Document, ModalityInfo, TextSegment, document_length
from transfusion_fast.data.shards import PACKS_PER_SHARD
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Built, Recipe, build
from transfusion_fast.prepare.fitting import EncodedDocument, Fitter, Long
from transfusion_fast.prepare.packing import check_lengths
from transfusion_fast.prepare.sources.base import Split, Unit

SPLITS: tuple[Split, ...] = ("train", "heldout")


class BuiltIn(Protocol):
    """A data set that the project brings or fetches itself, in two splits. Picklable."""

    modality: ModalityInfo
    long: Long
    """What becomes of documents that are longer than a pack."""

    def describe(self) -> dict[str, object]:
        """As JSON: what the documents depend on."""

    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """The documents of a split."""


@dataclass(frozen=True)
class _SplitSource:
    """A split of a built-in data set, which is asked for documents only if they are needed."""

    data: BuiltIn
    split: Split
    tokenizer: Tokenizer

    files: tuple[Path, ...] = ()

    def units(self) -> list[Unit]:
        return [Unit(Path(self.split), 0, 1)]

    def documents(self, unit: Unit) -> Iterator[EncodedDocument]:
        return _numbered(self.data.documents(self.split, self.tokenizer), self.split)

    def describe(self) -> dict[str, Any]:
        return {**self.data.describe(), "split": self.split}


@dataclass(frozen=True)
class _InMemory:
    """Documents that are at hand."""

    held: Sequence[Document]

    files: tuple[Path, ...] = ()

    def units(self) -> list[Unit]:
        return [Unit(Path("memory"), 0, len(self.held))]

    def documents(self, unit: Unit) -> Iterator[EncodedDocument]:
        return _numbered(self.held, "memory")

    def describe(self) -> dict[str, Any]:
        sha256 = hashlib.sha256()
        for document in self.held:
            for segment in document:
                array = segment.ids if isinstance(segment, TextSegment) else segment.values
                sha256.update(repr((len(document), getattr(segment, "modality", None), array.shape)).encode())
                sha256.update(array.tobytes())
        return {"kind": "memory", "sha256": sha256.hexdigest()}


def _numbered(documents: Sequence[Document], where: str) -> Iterator[EncodedDocument]:
    return (EncodedDocument(f"document {number} of {where}", document) for number, document in enumerate(documents))


def prepare(
    documents: Sequence[Document],
    folder: Path,
    *,
    sequence_length: int,
    tokenizer: Tokenizer,
    modalities: Sequence[ModalityInfo],
    packs_per_shard: int = PACKS_PER_SHARD,
    seed: int = 0,
) -> Index:
    """Packs `documents` into the data folder `folder`; the same input gives the same bytes.

    Raises:
        InputError: what cannot be packed, naming the document by its number, or as `build` does.
    """
    if not documents:
        raise InputError("documents must be one or more, got none; give a source that holds some")
    lengths = [_length(number, document, tokenizer, modalities) for number, document in enumerate(documents)]
    check_lengths(lengths, sequence_length)
    fitter = Fitter(tokenizer, sequence_length, tuple(modalities))
    return build(Recipe(_InMemory(documents), fitter, packs_per_shard, seed), folder).index


def _length(number: int, document: Document, tokenizer: Tokenizer, modalities: Sequence[ModalityInfo]) -> int:
    try:
        length = document_length(document, modalities)
    except InputError as error:
        raise InputError(f"document {number} cannot be packed: {error}") from error
    for segment in document:
        ids = segment.ids if isinstance(segment, TextSegment) else np.zeros(1, np.int32)
        if not 0 <= ids.min() <= ids.max() < tokenizer.num_text_tokens:
            raise InputError(
                f"text ids of document {number} must be in 0..{tokenizer.num_text_tokens - 1}, "
                f"got {ids.min()}..{ids.max()}; encode it with the tokenizer"
            )
    return length


def prepare_splits(source: BuiltIn, out: Path, sequence_length: int, packs_per_shard: int) -> dict[Split, Built]:
    """Makes the data set as `out`/train and `out`/heldout, of bytes as tokens; InputError as of `build`."""
    tokenizer = ByteTokenizer()
    fitter = Fitter(tokenizer, sequence_length, (source.modality,), source.long)
    return {
        split: build(Recipe(_SplitSource(source, split, tokenizer), fitter, packs_per_shard), Path(out) / split)
        for split in SPLITS
    }
