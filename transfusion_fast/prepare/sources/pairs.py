"""Image-text pairs in WebDataset tars, as img2dataset writes them: KEY.jpg beside KEY.txt or KEY.json.

Members are read one after another and never written anywhere, so no member's name can lead out of a folder.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES, Source, Unit, decode_utf8, parse_json

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELD = "caption"
_BLOCK = 1 << 16

# tarfile does not catch the errors of its own arithmetic on a damaged header.
_DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, LookupError, MemoryError, RecursionError)

_Sample = dict[str, bytes] | Rejected
"""The files of one key by extension, or why they cannot be used."""


@dataclass(frozen=True)
class PairsSource(Source):
    """The captioned images of tars, caption first; a tar is a unit."""

    suffixes = (".tar",)

    def units(self) -> list[Unit]:
        return [Unit(file, 0, file.stat().st_size) for file in self.files]

    def entries(self, unit: Unit) -> Iterator[tuple[str, _Sample]]:
        key: str | None = None
        sample: _Sample = {}
        damage: _Damage | None = None
        try:
            for member, archive in _members(unit.path):
                begun, extension = _split(member.name)
                if begun != key:
                    if key is not None:
                        yield f"{key} in {unit.path}", sample
                    key, sample = begun, {}
                sample = _with_member(sample, extension, member, archive)
        except _Damage as error:
            damage = error
        if key is not None and not (damage and damage.in_content):
            yield f"{key} in {unit.path}", sample
        if damage:
            yield str(unit.path), Rejected("tar damaged", f"what follows is lost ({damage})")

    def parts(self, entry: dict[str, bytes], unit: Unit) -> tuple[str, bytes]:
        image = next((entry[extension] for extension in IMAGES if extension in entry), None)
        if image is None:
            raise Rejected("no image", f"none of {', '.join(IMAGES)}")
        if "txt" in entry:
            caption: Any = decode_utf8(entry["txt"], "utf-8-sig")
        else:
            fields = parse_json(entry.get("json", b"{}"))
            caption = fields.get(CAPTION_FIELD) if isinstance(fields, dict) else None
        if not isinstance(caption, str) or not caption.strip():
            raise Rejected("no caption", "")
        return caption.strip(), image

    def describe(self) -> dict[str, Any]:
        return {"kind": "pairs"}


class _Damage(Exception):
    """Damage that ends the reading of a tar."""

    def __init__(self, error: BaseException | str, offset: int, in_content: bool = False) -> None:
        super().__init__(f"{error}, at byte {offset}")
        self.in_content = in_content


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the regular files of a tar, and the tar; _Damage where the tar is not intact up to its end."""
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115
    except _DAMAGED as error:
        raise _Damage(error, 0) from error
    with archive:
        begin = -1
        while (member := _next(archive)) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # an index for random access that grows without end
            if archive.offset <= begin:
                raise _Damage(f"{member.name} must have a size, got {member.size}", member.offset)
            begin = archive.offset
            if member.isfile():
                yield member, archive
        _check_end(archive)


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except _DAMAGED as error:
        raise _Damage(error, archive.offset) from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that nothing but zeros follows; to tarfile, a damaged header or a block of zeros is the end."""
    try:
        archive.fileobj.seek(archive.offset)
        rest = archive.fileobj.read(2 * tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise _Damage("no end of archive", archive.offset)
        while rest := archive.fileobj.read(_BLOCK):
            if any(rest):
                raise _Damage("something follows the end of the archive", archive.offset)
    except _DAMAGED as error:
        raise _Damage(error, archive.offset) from error


def _split(name: str) -> tuple[str, str]:
    """Return (key, extension): WebDataset divides a name at the first dot behind its folders."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _with_member(sample: _Sample, extension: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> _Sample:
    """Return the sample with one more file."""
    if isinstance(sample, Rejected) or extension not in (*IMAGES, "txt", "json"):
        return sample
    if extension in sample:
        return Rejected("duplicate key", f"two files .{extension}")
    if member.size > MAX_BYTES:
        return Rejected("file too large", f"{member.size} bytes of .{extension}")
    try:
        file = archive.extractfile(member)
        content = file.read() if file else b""
    except _DAMAGED as error:
        raise _Damage(error, archive.fileobj.tell(), in_content=True) from error
    if len(content) != member.size:
        message = f"{member.name} must have {member.size} bytes, got {len(content)}"
        raise _Damage(message, archive.fileobj.tell(), in_content=True)
    return {**sample, extension: content}
