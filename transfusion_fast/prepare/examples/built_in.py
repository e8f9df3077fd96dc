"""Data folders of documents in memory, and of built-in data sets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from transfusion_fast.data.index import Index
from transfusion_fast.data.pack import Document, ModalityInfo, TextSegment, make_pack, validate_pack
from transfusion_fast.data.shards import PACKS_PER_SHARD
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Built, Recipe, build
from transfusion_fast.prepare.encode import Encoder, Long
from transfusion_fast.prepare.sources.base import Source, Unit

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


class BuiltIn(ABC):
    """A data set that the project ships or downloads itself, in two splits. Picklable."""

    modality: ClassVar[ModalityInfo]
    side: ClassVar[int]
    """Height and width of its images in pixels."""
    long: ClassVar[Long] = "reject"

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return everything that the documents depend on as JSON."""

    @abstractmethod
    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """Return the documents of a split."""


@dataclass(frozen=True)
class _DocumentsSource(Source):
    """Documents that a function returns, which is called only if they are needed."""

    name: str
    make: Callable[[], Sequence[Document]]
    description: dict[str, Any]

    def units(self) -> list[Unit]:
        return [Unit(Path(self.name), 0, 1)]

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        return []  # it has no files

    def entries(self, unit: Unit) -> Iterator[tuple[str, Document]]:
        return ((f"document {number} of {self.name}", document) for number, document in enumerate(self.make()))

    def describe(self) -> dict[str, Any]:
        return self.description


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
    """Pack `documents` into the data folder `folder`; equal input gives equal bytes.

    Raises:
        InputError: a document cannot be packed, which is named by its number; or as for `build`.
    """
    if not documents:
        raise InputError("documents must be one or more, got none; give a source that holds some")
    encoder = Encoder(tokenizer, sequence_length, tuple(modalities))
    sha256 = hashlib.sha256()
    for number, document in enumerate(documents):
        try:
            pack = make_pack([document], modalities)
            validate_pack(pack, modalities, tokenizer.num_text_tokens, sequence_length)
        except InputError as error:
            raise InputError(f"document {number} cannot be packed: {error}") from error
        for segment in document:
            array = segment.ids if isinstance(segment, TextSegment) else segment.values
            sha256.update(repr((len(document), getattr(segment, "modality", None), array.shape)).encode())
            sha256.update(array.tobytes())
    description = {"kind": "memory", "sha256": sha256.hexdigest()}
    source = _DocumentsSource((), "memory", partial(list, documents), description)
    return build(Recipe(source, encoder, packs_per_shard, seed), folder).index


def prepare_splits(
    data: BuiltIn, out: Path, sequence_length: int, packs_per_shard: int, patch_size: int | None = None
) -> dict[Split, Built]:
    """Make `out`/train and `out`/heldout of a data set, with bytes as tokens.

    Raises:
        InputError: the patch size does not divide the images; or as for `build`.
    """
    modality = data.modality if patch_size is None else replace(data.modality, patch_size=patch_size)
    if data.side % modality.patch_size:
        raise InputError(f"patch size must divide {data.side}, the side of the images, got {patch_size}; give another")
    tokenizer = ByteTokenizer()
    encoder = Encoder(tokenizer, sequence_length, (modality,), long=data.long)
    built: dict[Split, Built] = {}
    for split in SPLITS:
        make = partial(data.documents, split, tokenizer)
        source = _DocumentsSource((), split, make, {**data.describe(), "split": split})
        built[split] = build(Recipe(source, encoder, packs_per_shard), Path(out) / split)
    return built
