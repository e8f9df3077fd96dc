"""From documents to a data folder: pack, write, index, and put it in place only when it is whole."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfusion_fast.data.digits import MODALITY, Split, digit_documents
from transfusion_fast.data.index import Index, build_index, read_index, write_index
from transfusion_fast.data.pack import Document, ModalityInfo, check_lengths, document_length, make_pack
from transfusion_fast.data.packing import pack_stream
from transfusion_fast.data.shards import PACKS_PER_SHARD, write_shards
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer
from transfusion_fast.errors import InputError

DIGIT_PACKS_PER_SHARD = 16
DIGIT_SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class PreparedDigits:
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


def prepare_digits(
    out: Path, sequence_length: int = 512, packs_per_shard: int = DIGIT_PACKS_PER_SHARD
) -> PreparedDigits:
    """Write the digits as `out`/train and `out`/heldout, both or neither.

    Where `out` holds exactly what would be written it is left as it is; InputError where it holds anything else.
    """
    out = Path(out)
    if _is_free(out):
        with staged_folder(out) as staging:
            splits = _write_digits(staging, sequence_length, packs_per_shard)
        return PreparedDigits(splits, reused=False)
    with tempfile.TemporaryDirectory() as scratch:
        splits = _write_digits(Path(scratch), sequence_length, packs_per_shard)
    for split, index in splits.items():
        _check_same(out / split, index)
    return PreparedDigits(splits, reused=True)


def _write_digits(out: Path, sequence_length: int, packs_per_shard: int) -> dict[Split, Index]:
    tokenizer = ByteTokenizer()
    return {
        split: prepare(
            digit_documents(split, tokenizer),
            out / split,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
            modalities=(MODALITY,),
            packs_per_shard=packs_per_shard,
        )
        for split in DIGIT_SPLITS
    }


def _check_same(folder: Path, expected: Index) -> None:
    try:
        same = read_index(folder) == expected
    except InputError as error:
        raise InputError(f"{_not_free(folder.parent)} ({error})") from error
    if not same:
        raise InputError(f"{_not_free(folder.parent)} ({folder.name} was prepared from other data or settings)")


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
