"""index.json, which makes a folder of shards a data folder.

Tar readers silently lose the rest of a truncated shard and do not notice a flipped byte. The index therefore records
size and sha256 of every shard, and the location and crc32 of the shard's table; the table records those of each pack.
Any difference is an error that names the shard and the pack. The index of 10^9 packs in 10^5 shards takes
under 30 MB.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, TypeAdapter

from transfusion_fast.data.folder import Folder, as_folder
from transfusion_fast.data.pack import MAX_LENGTH, ModalityInfo, Pack, latents_dtype, validate_pack
from transfusion_fast.data.shards import PLAIN_NAME, PackTable, ShardInfo
from transfusion_fast.data.tokenizer import TokenizerDescription
from transfusion_fast.errors import InputError
from transfusion_fast.files import parse_json, write_atomically

INDEX_NAME = "index.json"
_Count = Annotated[PositiveInt, Field(lt=1 << 63)]


@dataclass(frozen=True)
class _Header:
    format: Literal["transfusion_fast.packs"]
    version: Literal[3, 4]  # up to 3, all text ids were stored as int32


_HEADER = _Header("transfusion_fast.packs", 4)
_REMEDY = "prepare the data again"


@dataclass(frozen=True)
class Index:
    """Everything known about a data folder without reading a shard. Extra fields in the file are ignored."""

    sequence_length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    """Positions of a pack."""
    tokenizer: TokenizerDescription
    modalities: tuple[ModalityInfo, ...]
    documents: _Count
    tokens: _Count
    """Sequence positions that documents take in all packs, special tokens included."""
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1, fail_fast=True)]

    def __post_init__(self) -> None:
        """Raise InputError if pixels and latents are mixed."""
        latents_dtype(self.modalities)

    @property
    def pack_counts(self) -> list[int]:
        """Packs in each shard."""
        return [shard.packs for shard in self.shards]

    @property
    def num_packs(self) -> int:
        """Packs in the folder."""
        return sum(self.pack_counts)

    @property
    def num_text_tokens(self) -> int:
        """Size of the text vocabulary."""
        return self.tokenizer["num_text_tokens"]

    @property
    def schema(self) -> bytes:
        """Digest that every shard must carry."""
        return schema_of(self.sequence_length, self.tokenizer, self.modalities)

    @property
    def waste(self) -> float:
        """Fraction of all positions that no document takes."""
        return 1 - self.tokens / (self.num_packs * self.sequence_length)

    def decode(self, table: PackTable, number: int, payload: bytes) -> Pack:
        """Return a pack of a shard from its bytes, validated; raise InputError if they are not valid."""
        pack = table.decode(number, payload)
        validate_pack(pack, self.modalities, self.num_text_tokens, self.sequence_length)
        return pack


_HEADERS, _INDEXES = TypeAdapter(_Header), TypeAdapter(Index)


def schema_of(sequence_length: int, tokenizer: TokenizerDescription, modalities: Sequence[ModalityInfo]) -> bytes:
    """Return the digest of the settings that give the numbers in packs their meaning."""
    settings = [sequence_length, tokenizer, [modality.describe() for modality in modalities]]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()


def read_packs(path: Path, table: PackTable, index: Index) -> Iterator[Pack | InputError]:
    """Yield each pack of a shard, validated, or its error; raise InputError if the shard is not of the index's kind."""
    if table.schema != index.schema:
        raise InputError(
            f"shard {path} must be of the tokenizer, modalities and pack length of its index, got others; "
            "prepare its documents again with those"
        )
    with path.open("rb") as stream:
        for number in range(len(table.rows)):
            start, end = table.span(number)
            payload = stream.read(end - start)
            try:
                yield index.decode(table, number, payload)
            except InputError as error:
                yield error


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_index(folder: Path, index: Index) -> None:
    """Write index.json atomically, with a line for each field and each shard."""
    fields = {**vars(_HEADER), **vars(index)}
    fields["modalities"] = [modality.describe() for modality in index.modalities]
    shards = ",\n".join(f"    {json.dumps(asdict(shard))}" for shard in fields.pop("shards"))
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in fields.items()]
    write_atomically(folder / INDEX_NAME, "\n".join(["{", *lines, '  "shards": [', shards, "  ]", "}", ""]))


def read_index(folder: Folder | Path | str) -> Index:
    """Return the index of a data folder, after checking that local shards exist and have the right size.

    Raises:
        InputError: There is no valid index, or a shard is missing or has another size.
        FetchError: The index is remote and cannot be fetched.
    """
    index = parse_index(folder)
    as_folder(folder).check_shards(index.shards)
    return index


def parse_index(folder: Folder | Path | str) -> Index:
    """Return the index of a data folder without looking at its shards; raise as `read_index` does."""
    folder = as_folder(folder)
    return decode_index(folder.read_bytes(INDEX_NAME), folder.path_to(INDEX_NAME))


def decode_index(content: bytes, where: str) -> Index:
    """Return the index in these bytes; raise InputError naming `where` and the field that is wrong."""
    parse_json(_HEADERS, content, where, _REMEDY)
    index = parse_json(_INDEXES, content, where, _REMEDY)
    check_different(index.shards, where)
    return index


def check_different(shards: Sequence[ShardInfo], where: str) -> None:
    """Raise InputError if a name or the contents of a shard occur twice, which would repeat documents in training."""
    for field, what in (("file", "name"), ("sha256", "bytes")):
        first: dict[str, ShardInfo] = {}
        for shard in shards:
            if (other := first.setdefault(getattr(shard, field), shard)) is not shard:
                names = f"{other.file} and {shard.file}"
                raise InputError(f"shards in {where} must differ, got {names} of the same {what}; remove one")


def is_plain_name(file: str) -> bool:
    """Return True for a file name that an index may contain."""
    return re.fullmatch(PLAIN_NAME, file) is not None
