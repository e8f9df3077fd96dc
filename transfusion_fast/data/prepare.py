"""From documents to a data folder: pack, write, index, and put it in place only when it is whole."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from transfusion_fast.data.index import Index, build_index, read_index, write_index
from transfusion_fast.data.pack import Document, ModalityInfo, check_lengths, document_length, make_pack
from transfusion_fast.data.packing import pack_stream
from transfusion_fast.data.shards import PACKS_PER_SHARD, write_shards
from transfusion_fast.data.source import Split
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer
from transfusion_fast.errors import InputError

SPLITS: tuple[Split, ...] = ("train", "heldout")
_RECIPE = "recipe.json"
_VERSION = 2
"""Of how documents are packed."""


class BuiltIn(Protocol):
    """A data set that the project brings or fetches itself, in two splits."""

    modality: ModalityInfo

    def describe(self) -> dict[str, object]:
        """As JSON: what the documents depend on."""

    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """The documents of a split."""


@dataclass(frozen=True)
class Prepared:
    """The index of each split, and whether the folder held this very data before."""

    splits: dict[Split, Index]
    reused: bool


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
    """Pack `documents` into the data folder `folder`, which must be free; the same input gives the same bytes.

    InputError for what cannot be packed, naming the document by its number.
    """
    if not documents:
        raise InputError("documents must be one or more, got none; give a source that holds some")
    lengths = [document_length(document, modalities) for document in documents]
    check_lengths(lengths, sequence_length)
    numbers = pack_stream([np.array(lengths)], sequence_length, seed, buffer=len(documents) + 1)
    packs = (make_pack([documents[number] for number in pack], modalities) for pack in numbers)
    with staged_folder(folder) as staging:
        files = write_shards(packs, staging, packs_per_shard)
        index = build_index(staging, files, sequence_length, tokenizer, modalities)
        tokenizer.write(staging)
        write_index(staging, index)
    return index


def prepare_splits(source: BuiltIn, out: Path, sequence_length: int, packs_per_shard: int) -> Prepared:
    """Write the data set as `out`/train and `out`/heldout, both or neither.

    Where `out` holds what was made of the same source and settings it is left as it is, without asking the source for
    documents; InputError where it holds anything else.
    """
    out, tokenizer = Path(out), ByteTokenizer()
    recipe = {
        **source.describe(),
        "version": _VERSION,
        "packing": [sequence_length, packs_per_shard],
        "tokenizer": tokenizer.describe(),
    }
    text = json.dumps(recipe, indent=1)
    if not _is_free(out):
        return Prepared(_same(out, text), reused=True)
    with staged_folder(out) as staging:
        splits = {
            split: prepare(
                source.documents(split, tokenizer),
                staging / split,
                sequence_length=sequence_length,
                tokenizer=tokenizer,
                modalities=(source.modality,),
                packs_per_shard=packs_per_shard,
            )
            for split in SPLITS
        }
        (staging / _RECIPE).write_text(text, encoding="utf-8")
    return Prepared(splits, reused=False)


def _same(out: Path, recipe: str) -> dict[Split, Index]:
    try:
        same = (out / _RECIPE).read_text(encoding="utf-8") == recipe
        indexes = {split: read_index(out / split) for split in SPLITS}
    except (InputError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{_not_free(out)} ({error})") from error
    if not same:
        raise InputError(f"{_not_free(out)} ({_RECIPE} there is of other data or settings)")
    return indexes


def check_free(folder: Path) -> None:
    """InputError where a data folder cannot be made there without touching what is there."""
    if not _is_free(folder):
        raise InputError(_not_free(folder))


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _not_free(folder: Path) -> str:
    return f"output folder must be new or empty, got {str(folder)!r}; choose another, or remove this one"


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which becomes `folder` if the block ends well, else is removed.

    InputError where `folder` is not free before or after.
    """
    folder = Path(folder).resolve()
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as holder:
        staging = Path(holder) / folder.name
        staging.mkdir()
        yield staging
        try:
            staging.rename(folder)
        except OSError as error:
            raise InputError(f"{_not_free(folder)} ({error})") from error
