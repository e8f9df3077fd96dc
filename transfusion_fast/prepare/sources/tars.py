"""Samples of WebDataset tars: the files of one key, such as KEY.jpg and KEY.txt, follow one another.

Members are read one after another and never written anywhere, so no member's name can lead out of a folder. Links are
followed within their tar.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES
from transfusion_fast.prepare.sources.files import system_file

Sample = dict[str, bytes]
"""The content of the files of one key by extension."""
_BLOCK = 1 << 16

# tarfile does not catch the errors of its own arithmetic on a damaged header.
_DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, LookupError, MemoryError, RecursionError)


def read_samples(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Sample | Rejected]]:
    """Yield (location, sample) of each key of a tar: its files of the extensions that are wanted.

    Rejected once for the rest of a damaged tar.
    """
    links = _Links(path)
    key: str | None = None
    sample: Sample | Rejected = {}
    damage, in_content = "", False
    archive: tarfile.TarFile | None = None
    with path.open("rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            for member in _members(archive):
                begun, extension = _split(member.name)
                if passed_over := _passed_over(member.name, begun, extension):
                    yield f"{member.name} in {path}", passed_over
                    continue
                if begun != key:
                    if key is not None:
                        yield f"{key} in {path}", sample
                    key, sample = begun, {}
                if isinstance(sample, dict) and wanted(extension):
                    in_content = True
                    sample = _with_member(sample, extension, member, archive, links)
                    in_content = False
            _check_end(archive)
        except _DAMAGED as error:
            offset = file.tell() if in_content else archive.offset if archive else 0
            damage = f"what follows is lost ({error}, at byte {offset})"
    if key is not None and not in_content:
        yield f"{key} in {path}", sample
    if damage:
        yield str(path), Rejected("tar damaged", damage)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files and the links of a tar."""
    begin = -1
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # an index for random access that grows without end
        if archive.offset <= begin:
            archive.offset = member.offset
            raise tarfile.TarError(f"{member.name} must have a size, got {member.size}")
        begin = archive.offset
        if member.isfile() or member.islnk() or member.issym():
            yield member


class _Links:
    """The files that the links of a tar lead to. They are listed when the first one is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """Return the file that a link leads to, None if the tar has none of its name."""
        target = tarfile.TarInfo(link.name)
        target.offset_data, target.size = self._files.get(_linked_name(link), (-1, 0))
        return target if target.offset_data >= 0 else None

    @cached_property
    def _files(self) -> dict[str, tuple[int, int]]:
        """The offset and the size of each file by name."""
        found: dict[str, tuple[int, int]] = {}
        with self._path.open("rb") as file, suppress(*_DAMAGED):  # damage is reported by who reads the members
            for member in _members(tarfile.open(fileobj=file, mode="r:")):  # noqa: SIM115
                name = posixpath.normpath(member.name)
                if member.isfile() and not member.issparse():
                    found[name] = member.offset_data, member.size
                elif member.islnk() and (target := _linked_name(member)) in found:
                    found[name] = found[target]
        return found


def _linked_name(link: tarfile.TarInfo) -> str:
    """Return the name that a hard link gives, or a symbolic link gives relative to its folder."""
    return posixpath.normpath(posixpath.join("" if link.islnk() else posixpath.dirname(link.name), link.linkname))


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that nothing but zeros follows; to tarfile, a damaged header or a block of zeros is the end."""
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(2 * tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise tarfile.TarError("no end of archive")
    while rest := archive.fileobj.read(_BLOCK):
        if any(rest):
            raise tarfile.TarError("something follows the end of the archive")


def _split(name: str) -> tuple[str, str]:
    """Return (key, extension): WebDataset divides a name at the first dot behind its folders."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _passed_over(name: str, key: str, extension: str) -> Rejected | None:
    """Return why a file belongs to no sample: between the files of one, it does not end it. None for all others."""
    if system_file(name):
        return Rejected("system file", "")
    if not extension or key.endswith("/") or not key:
        return Rejected("no key", "its name must be KEY.EXTENSION")
    return None


def _with_member(
    sample: Sample, extension: str, member: tarfile.TarInfo, archive: tarfile.TarFile, links: _Links
) -> Sample | Rejected:
    """Return the sample with one more file, or why it cannot be used."""
    if extension in sample:
        return Rejected("duplicate key", f"two files .{extension}")
    if not member.isfile():
        linked, link = links.target(member), member.linkname
        if linked is None:
            return Rejected("broken link", f".{extension} leads to {link!r:.80}, which is no file of the tar")
        member = linked
    if member.size > MAX_BYTES:
        return Rejected("file too large", f"{member.size} bytes of .{extension}")
    file = archive.extractfile(member)
    content = file.read() if file else b""
    if len(content) != member.size:
        raise tarfile.TarError(f"{member.name} must have {member.size} bytes, got {len(content)}")
    return {**sample, extension: content}
