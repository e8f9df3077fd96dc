"""index.json, which makes a folder of shards a data folder.

Tar readers lose the rest of a truncated shard in silence and never notice a flipped byte. So the index records size and
sha256 of every shard, and where in it the table of its packs lies with its crc32; the table, where each pack lies with
its own. What differs is an error that names shard and pack. Of a billion packs in 10^5 shards the index has 20 MB.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from transfusion_fast.data.folder import DataFolder, RemoteFolder
from transfusion_fast.data.pack import MAX_LENGTH, ModalityInfo, Pack, latents_dtype, validate_pack
from transfusion_fast.data.shards import (
    LEAST_BYTES,
    MAX_PACKS,
    PackTable,
    ShardInfo,
    decode_pack,
    read_table,
    table_bytes,
)
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import write_whole

INDEX_NAME = "index.json"
FORMAT = "transfusion_fast.packs"
VERSION = 3
_MAX_INT = 2**63 - 1  # which file offsets hold
_T = TypeVar("_T")


@dataclass(frozen=True)
class Index:
    """All that is known of a data folder without reading a shard; `tokens` counts laid-out sequence positions."""

    sequence_length: int
    tokenizer: dict[str, str | int]
    modalities: tuple[ModalityInfo, ...]
    documents: int
    tokens: int
    shards: tuple[ShardInfo, ...]

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
        """Text ids are below this."""
        return int(self.tokenizer["num_text_tokens"])

    @property
    def schema(self) -> bytes:
        """That every shard must carry."""
        return schema_of(self.sequence_length, self.tokenizer, self.modalities)

    @property
    def waste(self) -> float:
        """The part of all packs' positions that no document takes."""
        return 1 - self.tokens / (self.num_packs * self.sequence_length)


@dataclass(frozen=True)
class IndexedShard:
    """A shard, and what its packs hold."""

    info: ShardInfo
    documents: int
    tokens: int


def schema_of(sequence_length: int, tokenizer: Mapping[str, str | int], modalities: Sequence[ModalityInfo]) -> bytes:
    """Digest of what makes sense of the numbers in packs, which every shard carries."""
    described = [sequence_length, tokenizer, [asdict(modality) for modality in modalities]]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).digest()


def check_schema(path: Path, table: PackTable, schema: bytes) -> None:
    """InputError where the numbers in a shard mean something else."""
    if table.schema != schema:
        raise InputError(
            f"shard {path} must be of the tokenizer, modalities and pack length of its index, and is of others; "
            "prepare its documents again with those"
        )


def index_shard(
    path: Path, sequence_length: int, tokenizer: Mapping[str, str | int], modalities: Sequence[ModalityInfo]
) -> IndexedShard:
    """What is to be known of a shard as it lies on disk: every pack is read back and validated on the way.

    InputError naming the shard, and the pack, where one cannot be used.
    """
    table = read_table(path)
    check_schema(path, table, schema_of(sequence_length, tokenizer, modalities))
    documents = tokens = 0
    packs = read_packs(path, table, sequence_length, int(tokenizer["num_text_tokens"]), modalities)
    for place, pack in enumerate(packs):
        if isinstance(pack, InputError):
            raise InputError(f"pack {place} of shard {path} cannot be used: {pack}; copy the shard again") from pack
        documents += pack.num_documents
        tokens += pack.num_positions
    size, sha256, count = path.stat().st_size, file_sha256(path), len(table.rows)
    return IndexedShard(ShardInfo(path.name, size, sha256, count, *table_place(path, table)), documents, tokens)


def table_place(path: Path, table: PackTable) -> tuple[int, int]:
    """The byte that the table of a shard begins at, and the table's crc32."""
    begin = table.ends[-1]
    with path.open("rb") as stream:
        stream.seek(begin)
        return begin, zlib.crc32(stream.read(table_bytes(len(table.rows))))


def read_packs(
    path: Path, table: PackTable, sequence_length: int, num_text_tokens: int, modalities: Sequence[ModalityInfo]
) -> Iterator[Pack | InputError]:
    """Each pack of a shard, checked and validated, or what is wrong with it."""
    with path.open("rb") as stream:
        for place in range(len(table.rows)):
            start, end = table.span(place)
            payload = stream.read(end - start)
            try:
                table.check(place, payload)
                pack = decode_pack(payload)
                validate_pack(pack, modalities, num_text_tokens, sequence_length)
            except InputError as error:
                yield error
            else:
                yield pack


def make_index(
    shards: Sequence[IndexedShard], sequence_length: int, tokenizer: Tokenizer, modalities: Sequence[ModalityInfo]
) -> Index:
    """The index of shards in their order."""
    return Index(
        sequence_length=sequence_length,
        tokenizer=tokenizer.describe(),
        modalities=tuple(modalities),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        shards=tuple(shard.info for shard in shards),
    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_index(folder: Path, index: Index) -> None:
    """Write `folder`/index.json: a line a field and a shard, under its name only once it is whole."""
    fields = {"format": FORMAT, "version": VERSION, **vars(index)}
    fields["modalities"] = [asdict(modality) for modality in index.modalities]
    shards = ",\n".join(f"    {json.dumps(asdict(shard))}" for shard in fields.pop("shards"))
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in fields.items()]
    write_whole(folder / INDEX_NAME, "\n".join(["{", *lines, '  "shards": [', shards, "  ]", "}", ""]))


def read_index(folder: DataFolder) -> Index:
    """The index of a data folder, each local shard present and of its size; else an InputError saying why not."""
    index = parse_index(folder)
    check_shard_files(folder, index.shards)
    return index


def parse_index(folder: DataFolder) -> Index:
    """The index of a data folder, whatever has become of its shards; InputError where there is none to use."""
    return decode_index(read_index_bytes(folder), str(folder / INDEX_NAME))


def read_index_bytes(folder: DataFolder) -> bytes:
    """The bytes of a data folder's index; InputError where there is none."""
    if isinstance(folder, RemoteFolder):
        return folder.read_bytes(INDEX_NAME)
    if not folder.is_dir():
        raise InputError(
            f"data folder must exist, got {str(folder)!r}; to make one, run: python train/prepare.py digits OUT"
        )
    if not (folder / INDEX_NAME).is_file():
        raise InputError(
            f"data folder must hold {INDEX_NAME}, got {str(folder)!r}, which is not a prepared data folder; "
            "give one that train/prepare.py wrote, such as OUT/train"
        )
    return (folder / INDEX_NAME).read_bytes()


def decode_index(content: bytes, where: str) -> Index:
    """The index of those bytes; InputError naming `where` for anything but what `write_index` writes."""
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} must be JSON, and is not; prepare the data again") from error
    return _parse_index(entry, where)


def _parse_index(entry: object, where: str) -> Index:
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        got = entry.get("format") if isinstance(entry, dict) else entry
        raise InputError(f"format of {where} must be {FORMAT!r}, got {got!r:.60}; give a folder of train/prepare.py")
    version = _field(entry, "version", int, where)
    if version != VERSION:
        raise InputError(f"version of {where} must be {VERSION}, the one supported, got {version}; prepare it again")
    index = Index(
        sequence_length=_field(entry, "sequence_length", int, where),
        tokenizer=_parse_tokenizer(_field(entry, "tokenizer", dict, where), where),
        modalities=tuple(_parse_modality(item, where) for item in _field(entry, "modalities", list, where)),
        documents=_field(entry, "documents", int, where),
        tokens=_field(entry, "tokens", int, where),
        shards=tuple(parse_shard(item, where) for item in _field(entry, "shards", list, where)),
    )
    if min(index.sequence_length, index.documents, index.tokens, len(index.shards)) < 1:
        raise InputError(f"sequence length, documents, tokens and shards in {where} must be positive; prepare it again")
    if index.sequence_length > MAX_LENGTH:
        raise InputError(
            f"sequence_length in {where} must be at most {MAX_LENGTH}, got {index.sequence_length}; prepare it again"
        )
    latents_dtype(index.modalities)  # which must have one
    check_different(index.shards, where)
    return index


def check_different(shards: Sequence[ShardInfo], where: str) -> None:
    """No name twice, and no shard under two names: its documents would be trained on twice."""
    for shard, another in itertools.pairwise(sorted(shards, key=lambda shard: shard.file)):
        if shard.file == another.file:
            raise InputError(f"shards in {where} must differ, got {shard.file} twice; rebuild the index")
    for shard, another in itertools.pairwise(sorted(shards, key=lambda shard: shard.sha256)):
        if shard.sha256 == another.sha256:
            raise InputError(
                f"shards in {where} must differ, got {shard.file} and {another.file} of the same bytes; remove one"
            )


def _field(entry: object, name: str, kind: type[_T], where: str) -> _T:
    """`entry[name]`, which must be of that very type: a bool is no int."""
    value = entry.get(name) if isinstance(entry, Mapping) else None
    if type(value) is not kind:
        raise InputError(f"{name} in {where} must be of type {kind.__name__}, got {value!r:.60}; prepare it again")
    if isinstance(value, int) and abs(value) > _MAX_INT:
        raise InputError(f"{name} in {where} must be below 2**63, got {value!r:.60}; prepare it again")
    return value


def _parse_tokenizer(entry: object, where: str) -> dict[str, str | int]:
    kinds = {"name": str, "num_text_tokens": int, "sha256": str}
    return {name: _field(entry, name, kind, where) for name, kind in kinds.items()}


def _parse_modality(entry: object, where: str) -> ModalityInfo:
    kinds = {"name": str, "channels": int, "patch_size": int, "encoding": str, "autoencoder": str}
    return ModalityInfo(**{name: _field(entry, name, kind, where) for name, kind in kinds.items()})


def parse_shard(entry: object, where: str) -> ShardInfo:
    """One entry of an index, as JSON; InputError naming `where` for what `write_index` would not have written."""
    kinds = {"file": str, "bytes": int, "sha256": str, "packs": int, "table": int, "table_crc32": int}
    shard = ShardInfo(**{name: _field(entry, name, kind, where) for name, kind in kinds.items()})
    if not is_plain_name(shard.file):
        raise InputError(
            f"shard file in {where} must be a plain name of that folder, got {shard.file!r}; prepare it again"
        )
    if not 1 <= shard.packs <= MAX_PACKS:
        raise InputError(f"packs of {shard.file} in {where} must be in 1..{MAX_PACKS}, got {shard.packs}")
    if shard.table < shard.packs * LEAST_BYTES or shard.table_span[1] > shard.bytes:
        raise InputError(
            f"table of {shard.file} in {where} must lie behind its {shard.packs} packs and within its {shard.bytes} "
            f"bytes, got {shard.table_span[0]}..{shard.table_span[1]}; prepare it again"
        )
    if not 0 <= shard.table_crc32 < 2**32:
        raise InputError(f"table_crc32 of {shard.file} in {where} must be in 0..{2**32 - 1}; prepare it again")
    if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise InputError(
            f"sha256 of {shard.file} in {where} must be 64 hexadecimal digits, got {shard.sha256!r:.80}; "
            "prepare it again"
        )
    return shard


def is_plain_name(file: str) -> bool:
    """Whether an index may name that file: nothing that leads out of its folder or means more to some reader."""
    return re.fullmatch(r"\w[\w.-]*", file, re.ASCII) is not None


def check_shard_files(folder: DataFolder, shards: Iterable[ShardInfo]) -> None:
    """InputError naming a shard that is missing or of another size. Remote ones are looked at when they are fetched."""
    if not isinstance(folder, RemoteFolder):
        for shard in shards:
            check_shard_file(folder, shard)


def check_shard_file(folder: Path, shard: ShardInfo) -> None:
    """InputError where a shard is missing or of another size."""
    path, size = Path(folder) / shard.file, shard.bytes
    if not path.is_file():
        raise InputError(f"shard {path} must exist, and is missing; copy it again or prepare the data again")
    actual = path.stat().st_size
    if actual != size:
        raise InputError(
            f"shard {path} must have {size} bytes as its index says, got {actual}; "
            "it is truncated or replaced: copy it again or prepare the data again"
        )
