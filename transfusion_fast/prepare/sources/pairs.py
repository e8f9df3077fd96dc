"""Image-text pairs in WebDataset tars, as img2dataset writes them: KEY.jpg beside KEY.txt or KEY.json.

Members are read one after another and never written anywhere, so no name of theirs can lead out of a folder.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES, RawDocument, Unit, existing_files, parse_json

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELD = "caption"
_BLOCK = 1 << 16

# tarfile lets out whatever its arithmetic raises on a damaged header.
_DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, LookupError, MemoryError, RecursionError)


@dataclass(frozen=True)
class PairsSource:
    """The captioned images of tars, caption first."""

    files: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> PairsSource:
        """Of tars and folders of them; InputError where there are none."""
        return cls(tuple(existing_files(paths, (".tar",))))

    def units(self) -> list[Unit]:
        return [Unit(file, 0, file.stat().st_size) for file in self.files]

    def documents(self, unit: Unit) -> Iterator[RawDocument | Rejected]:
        try:
            with _opened(unit.path) as archive:
                for key, sample in itertools.groupby(_files(archive), key=_key):
                    if isinstance(key, Exception):
                        raise key
                    yield _pair(
                        archive, unit.path, key, [member for member in sample if not isinstance(member, Exception)]
                    )
        except tarfile.ReadError as error:
            yield Rejected("tar damaged", f"what follows is lost ({error}), {unit.path}")

    def describe(self) -> dict[str, Any]:
        return {"kind": "pairs"}


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except _DAMAGED as error:
        raise _at(0, error) from error


def _at(byte: int, error: BaseException | str) -> tarfile.ReadError:
    return tarfile.ReadError(f"{error}, at byte {byte}")


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo | Exception]:
    """The regular files, and at last what is wrong if more is to follow: an iterator that raises loses a sample."""
    try:
        begin = -1
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # which are for finding one again
            if archive.offset <= begin:
                yield _at(member.offset, f"{member.name} must have a size, got {member.size}")
                return
            begin = archive.offset
            if member.isfile():
                yield member
        # A damaged header counts as the end, and so does a block of zeros; but a tar ends in those and nothing else.
        archive.fileobj.seek(archive.offset)
        rest = archive.fileobj.read(2 * tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            yield _at(archive.offset, "no end of archive")
        while rest := archive.fileobj.read(_BLOCK):
            if any(rest):
                yield _at(archive.offset, "something follows the end of the archive")
                return
    except _DAMAGED as error:
        yield _at(archive.offset, error)


def _key(member: tarfile.TarInfo | Exception) -> str | Exception:
    return member if isinstance(member, Exception) else _split(member.name)[0]


def _split(name: str) -> tuple[str, str]:
    """(key, extension): WebDataset divides a name at the first dot behind its folders."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _pair(archive: tarfile.TarFile, path: Path, key: str, sample: list[tarfile.TarInfo]) -> RawDocument | Rejected:
    files: dict[str, bytes] = {}
    where = f"{key} in {path}"
    for member in sample:
        extension = _split(member.name)[1]
        if extension not in (*IMAGES, "txt", "json"):
            continue
        if extension in files:
            return Rejected("duplicate key", f"two files .{extension}, {where}")
        if member.size > MAX_BYTES:
            return Rejected("file too large", f"{member.size} bytes of .{extension}, {where}")
        files[extension] = _content(archive, member)
    image = next((files[extension] for extension in IMAGES if extension in files), None)
    if image is None:
        return Rejected("no image", f"none of {', '.join(IMAGES)}, {where}")
    caption = _caption(files, where)
    return caption if isinstance(caption, Rejected) else RawDocument(where, (caption, image))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = archive.extractfile(member)
        content = file.read() if file else b""
    except _DAMAGED as error:
        raise _at(archive.fileobj.tell(), error) from error
    if len(content) != member.size:
        raise _at(archive.fileobj.tell(), f"{member.name} must have {member.size} bytes, got {len(content)}")
    return content


def _caption(files: dict[str, bytes], where: str) -> str | Rejected:
    """Of the .txt, else of the .json."""
    if "txt" in files:
        try:
            caption: Any = files["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Rejected("not UTF-8", f"{error.reason} at byte {error.start}, {where}")
    else:
        caption = parse_json(files.get("json", b"{}"), where)
        if isinstance(caption, Rejected):
            return caption
        caption = caption.get(CAPTION_FIELD) if isinstance(caption, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        return Rejected("no caption", where)
    return caption.strip()
