"""index.json, which makes a folder of shards a data folder.

Tar readers lose the rest of a truncated shard in silence and never notice a flipped byte. So the index records the
size and sha256 of every shard, and where each pack lies with its crc32; what differs is an error that names the pack.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from transfusion_fast.data.pack import ModalityInfo, latents_dtype, validate_pack
from transfusion_fast.data.remote import DataFolder, RemoteFolder
from transfusion_fast.data.shards import decode_pack, pack_spans
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError

INDEX_NAME = "index.json"
FORMAT = "transfusion_fast.packs"
VERSION = 1
_MAX_INT = 2**63 - 1  # which file offsets hold
MAX_POSITION = 2**31 - 1  # which the layouts' int32 hold
_T = TypeVar("_T")


@dataclass(frozen=True)
class ShardInfo:
    """One shard: pack i is the bytes of `span(i)`, tar headers included, and has the checksum crc32[i].

    There may be millions of packs, and a process for each core: arrays take a seventh of what tuples do.
    """

    file: str
    bytes: int
    sha256: str
    offsets: array[int]
    end: int
    crc32: array[int]

    @staticmethod
    def of(file: str, size: int, sha256: str, offsets: Sequence[int], end: int, crc32: Sequence[int]) -> ShardInfo:
        """The shard of these numbers, which its arrays must be able to hold."""
        return ShardInfo(file, size, sha256, array("q", offsets), end, array("I", crc32))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the bytes of each pack are."""
        return list(itertools.pairwise((*self.offsets, self.end)))

    def span(self, place: int) -> tuple[int, int]:
        """Where the bytes of that pack are: up to the next pack, or to `end`."""
        return self.offsets[place], self.offsets[place + 1] if place + 1 < len(self.offsets) else self.end

    def entry(self) -> dict[str, str | int | list[int]]:
        """As JSON, which `parse_shard` reads."""
        return {**vars(self), "offsets": self.offsets.tolist(), "crc32": self.crc32.tolist()}


@dataclass(frozen=True)
class Index:
    """All that is known of a data folder without reading a shard; `tokens` counts laid-out sequence positions."""

    sequence_length: int
    tokenizer: dict[str, str | int]
    modalities: tuple[ModalityInfo, ...]
    latents_dtype: str
    documents: int
    tokens: int
    shards: tuple[ShardInfo, ...]

    @property
    def pack_counts(self) -> list[int]:
        """Packs in each shard."""
        return [len(shard.offsets) for shard in self.shards]

    @property
    def num_packs(self) -> int:
        """Packs in the folder."""
        return sum(self.pack_counts)

    @property
    def num_text_tokens(self) -> int:
        """Text ids are below this."""
        return int(self.tokenizer["num_text_tokens"])

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


def index_shard(
    path: Path, sequence_length: int, num_text_tokens: int, modalities: Sequence[ModalityInfo]
) -> IndexedShard:
    """What is to be known of a shard as it lies on disk: every pack is read back and validated on the way.

    InputError naming the shard, and the pack, where one cannot be used.
    """
    spans, crc32 = pack_spans(path), []
    documents = tokens = 0
    for place, payload in enumerate(_read_spans(path, spans)):
        try:
            pack = decode_pack(payload)
            validate_pack(pack, modalities, num_text_tokens, sequence_length)
        except InputError as error:
            raise InputError(f"pack {place} of shard {path} cannot be used: {error}; copy the shard again") from error
        crc32.append(zlib.crc32(payload))
        documents += pack.num_documents
        tokens += pack.num_positions
    return IndexedShard(_shard_info(path, spans, crc32), documents, tokens)


def make_index(
    shards: Sequence[IndexedShard], sequence_length: int, tokenizer: Tokenizer, modalities: Sequence[ModalityInfo]
) -> Index:
    """The index of shards in their order."""
    return Index(
        sequence_length=sequence_length,
        tokenizer=tokenizer.describe(),
        modalities=tuple(modalities),
        latents_dtype=latents_dtype(modalities).name,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        shards=tuple(shard.info for shard in shards),
    )


def build_index(
    folder: Path,
    files: Sequence[str],
    sequence_length: int,
    tokenizer: Tokenizer,
    modalities: Sequence[ModalityInfo],
) -> Index:
    """The index of shards as they lie in a folder."""
    num_text_tokens = tokenizer.num_text_tokens
    shards = [index_shard(folder / file, sequence_length, num_text_tokens, modalities) for file in files]
    return make_index(shards, sequence_length, tokenizer, modalities)


def _read_spans(shard: Path, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    with shard.open("rb") as stream:
        for start, end in spans:
            stream.seek(start)
            yield stream.read(end - start)


def _shard_info(shard: Path, spans: Sequence[tuple[int, int]], crc32: Sequence[int]) -> ShardInfo:
    offsets = [start for start, _ in spans]
    return ShardInfo.of(shard.name, shard.stat().st_size, file_sha256(shard), offsets, spans[-1][1], crc32)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_index(folder: Path, index: Index) -> None:
    """Write `folder`/index.json: one line a field and a few a shard, under its name only once it is whole."""
    fields = {"format": FORMAT, "version": VERSION, **vars(index)}
    fields["modalities"] = [asdict(modality) for modality in index.modalities]
    shards = [shard.entry() for shard in fields.pop("shards")]
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in fields.items()]
    blocks = [",\n".join(f'      "{name}": {json.dumps(value)}' for name, value in shard.items()) for shard in shards]
    body = ",\n".join(f"    {{\n{block}\n    }}" for block in blocks)
    unfinished = folder / f".{INDEX_NAME}.partial"
    unfinished.write_text("\n".join(["{", *lines, '  "shards": [', body, "  ]", "}", ""]), encoding="utf-8")
    unfinished.replace(folder / INDEX_NAME)


def read_index(folder: DataFolder) -> Index:
    """The index of a data folder, each local shard present and of its size; else an InputError saying why not."""
    index = parse_index(folder)
    check_shard_files(folder, index)
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
        latents_dtype=_field(entry, "latents_dtype", str, where),
        documents=_field(entry, "documents", int, where),
        tokens=_field(entry, "tokens", int, where),
        shards=tuple(parse_shard(item, where) for item in _field(entry, "shards", list, where)),
    )
    if min(index.sequence_length, index.documents, index.tokens, len(index.shards)) < 1:
        raise InputError(f"sequence length, documents, tokens and shards in {where} must be positive; prepare it again")
    if index.sequence_length > MAX_POSITION:
        raise InputError(
            f"sequence_length in {where} must be at most {MAX_POSITION}, got {index.sequence_length}; prepare it again"
        )
    if index.latents_dtype != latents_dtype(index.modalities).name:
        raise InputError(
            f"latents_dtype in {where} must be {latents_dtype(index.modalities).name}, as its modalities have, "
            f"got {index.latents_dtype!r}; prepare it again"
        )
    return index


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
    kinds = {"name": str, "channels": int, "patch_size": int, "encoding": str}
    if isinstance(entry, Mapping) and "autoencoder" in entry:  # folders of pixels were once written without
        kinds["autoencoder"] = str
    return ModalityInfo(**{name: _field(entry, name, kind, where) for name, kind in kinds.items()})


def parse_shard(entry: object, where: str) -> ShardInfo:
    """One entry of an index, as JSON; InputError naming `where` for what `entry` would not have written."""
    file = _field(entry, "file", str, where)
    if not is_plain_name(file):
        raise InputError(f"shard file in {where} must be a plain name of that folder, got {file!r}; prepare it again")
    offsets, crc32 = (_field(entry, name, list, where) for name in ("offsets", "crc32"))
    size, end = (_field(entry, name, int, where) for name in ("bytes", "end"))
    if not all(type(number) is int for number in (*offsets, *crc32)) or not 0 < len(offsets) == len(crc32):
        raise InputError(f"offsets and crc32 of {file} in {where} must be a whole number each a pack; prepare it again")
    if not all(0 <= number < 2**32 for number in crc32):
        raise InputError(f"crc32 of {file} in {where} must be in 0..{2**32 - 1} each; prepare it again")
    if offsets[0] < 0 or end > size or any(a >= b for a, b in itertools.pairwise((*offsets, end))):
        raise InputError(f"offsets of {file} in {where} must rise within its {size} bytes; prepare it again")
    sha256 = _field(entry, "sha256", str, where)
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(
            f"sha256 of {file} in {where} must be 64 hexadecimal digits, got {sha256!r:.80}; prepare it again"
        )
    return ShardInfo.of(file, size, sha256, offsets, end, crc32)


def is_plain_name(file: str) -> bool:
    """Whether an index may name that file: nothing that leads out of its folder or means more to some reader."""
    return re.fullmatch(r"\w[\w.-]*", file, re.ASCII) is not None


def check_shard_files(folder: DataFolder, index: Index) -> None:
    """InputError naming a shard that is missing or of another size. Remote ones are looked at when they are fetched."""
    if not isinstance(folder, RemoteFolder):
        for shard in index.shards:
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
