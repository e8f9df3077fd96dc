"""The whole of a data folder against its index, and the index anew for shards that lie there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transfusion_fast.data.index import (
    Index,
    PackReader,
    ShardInfo,
    build_index,
    check_shard_file,
    file_sha256,
    pack_spans,
    parse_index,
    write_index,
)
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, load_tokenizer
from transfusion_fast.errors import InputError


def verify(folder: Path) -> Iterator[list[str]]:
    """What is wrong with a data folder: a list for each shard, then one for the folder. All empty: all is well.

    Every byte is read: sizes, sha256 and crc32 are compared, tars walked through, packs decoded and validated.

    Raises:
        InputError: there is no index to compare with.
    """
    folder = Path(folder)
    index = parse_index(folder)
    reader = PackReader(folder, index)
    found = [0, 0]  # documents and tokens
    first, damaged = 0, False
    for shard in index.shards:
        findings = _file_findings(folder, shard)
        for number in range(first, first + len(shard.offsets)):
            try:
                pack = reader.read(number)
            except InputError as error:
                findings.append(str(error))
                continue
            found[0] += pack.num_documents
            found[1] += pack.num_positions
        first += len(shard.offsets)
        damaged = damaged or bool(findings)
        yield findings
    reader.close()
    yield _folder_findings(folder, index, None if damaged else (found[0], found[1]))


def _file_findings(folder: Path, shard: ShardInfo) -> list[str]:
    path = folder / shard.file
    findings = []
    try:
        check_shard_file(folder, shard)
    except InputError as error:
        findings.append(str(error))
        if not path.is_file():
            return findings
    if (sha256 := file_sha256(path)) != shard.sha256:
        findings.append(f"sha256 of shard {path} must be {shard.sha256}, got {sha256}; copy it again")
    try:
        if tuple(pack_spans(path)) != tuple(zip(shard.offsets, shard.ends, strict=True)):
            findings.append(f"packs of shard {path} must lie where its index says, and do not; rebuild the index")
    except InputError as error:
        findings.append(str(error))
    return findings


def _folder_findings(folder: Path, index: Index, found: tuple[int, int] | None) -> list[str]:
    """Of the sums over all packs, where they are known, the tokenizer, and shards that no index names."""
    findings = []
    if found is not None and found != (index.documents, index.tokens):
        findings.append(
            f"index of {folder} must count {found[0]} documents and {found[1]} tokens, got {index.documents} and "
            f"{index.tokens}; rebuild it"
        )
    try:
        load_tokenizer(index.tokenizer, folder)
    except InputError as error:
        findings.append(str(error))
    strange = {path.name for path in folder.glob("*.tar")} - {shard.file for shard in index.shards}
    findings += [f"shard {folder / name} is not in the index; rebuild it, or remove the shard" for name in strange]
    return findings


def rebuild_index(folder: Path, like: Path | None = None) -> Index:
    """Writes the index of the shards that lie in `folder`, by name, with the settings of the index of `like`.

    Args:
        like: another data folder of the same tokenizer, modalities and sequence length; default: `folder` itself.

    Raises:
        InputError: no settings to go by, no shard, or one that does not hold what they say. Then nothing is written.
    """
    folder = Path(folder)
    settings = parse_index(like or folder)
    own = like is None or (folder / TOKENIZER_NAME).exists()
    tokenizer = load_tokenizer(settings.tokenizer, folder if own or like is None else like)
    files = sorted(path.name for path in folder.glob("*.tar"))
    if not files:
        raise InputError(f"folder {folder} must hold shards *.tar to index, and holds none")
    index = build_index(folder, files, settings.sequence_length, tokenizer, settings.modalities)
    if not own:
        tokenizer.write(folder)
    write_index(folder, index)
    return index
