"""The files of a source: their kinds by name, and their search in folders."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from transfusion_fast.errors import InputError, Rejected

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_SYSTEM_FILES = (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "_stats.json")
"""Ends of the names of files that `datasets` and img2dataset write beside those of a dataset."""


def source_files(paths: Sequence[Path], suffixes: Sequence[str]) -> tuple[tuple[Path, ...], tuple[Rejected, ...]]:
    """Return files as they are given, those of `suffixes` below folders by name, and why others were passed over.

    Raises:
        InputError: a path leads nowhere, a folder holds no such file, a file is of another kind or was given twice.
    """
    names: dict[Path, Path] = {}
    passed_over: list[Rejected] = []
    for file in (file for path in paths for file in _files_at(path, suffixes, passed_over)):
        if (other := names.setdefault(file.resolve(), file)) is not file:
            raise InputError(f"source must hold a file once, got {other} and {file}, the same file; leave one out")
    return tuple(names.values()), tuple(passed_over)


@functools.lru_cache  # asked for every document, and slow
def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, with that of its compression: `.parquet`, `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def system_file(name: str) -> bool:
    """Return whether a file, by its name in an archive or folder, is one that macOS or Windows adds to those of users.

    AppleDouble files `._NAME`, alone or in `__MACOSX`, have the suffix of the file that they accompany.
    """
    *folders, base = name.split("/")
    return base.startswith("._") or base.lower() in _SYSTEM_FILES or "__MACOSX" in folders


def _files_at(path: Path, suffixes: Sequence[str], passed_over: list[Rejected]) -> list[Path]:
    """Return a file, or the files below a folder by name.

    Files that are passed over are added to `passed_over`; files of other suffixes are not mentioned.
    """
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"source {path} must exist, got no such file; give files or folders of files")
        if kind_of(path) not in suffixes:
            raise InputError(f"source must be of {_shown(suffixes)}, got {path}; convert it or rename it")
        return [path]
    found: list[Path] = []
    for file in walk(path):
        wanted = kind_of(file) in suffixes and not file.name.endswith(_DESCRIPTIONS)
        if wanted and system_file(str(file.relative_to(path))):
            passed_over.append(Rejected("system file", str(file)))
        elif wanted and file.is_file():
            found.append(file)
        elif wanted or (not file.suffix and file.is_symlink() and not file.exists()):  # perhaps to a folder
            passed_over.append(Rejected("not a file", f"{file} is a broken link or something else"))
    if not found:
        found_else = f" ({len(passed_over)} were passed over, as {passed_over[0]})" if passed_over else ""
        raise InputError(f"folder {path} must hold files of {_shown(suffixes)}, got none{found_else}; give another")
    return sorted(found)


def _shown(suffixes: Sequence[str]) -> str:
    """Return kinds of files for messages, those of one file with and without compression once."""
    plain = [suffix for suffix in suffixes if not suffix.endswith(COMPRESSIONS)]
    return ", ".join(plain) + f" (also {', '.join(COMPRESSIONS)})" * (len(plain) < len(suffixes))


def walk(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder and is no folder, in no order. Links are followed, and no folder entered twice."""
    entered: set[tuple[int, int]] = set()
    for current, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort(reverse=True)  # so that a folder with several names is entered by the same one each time
        yield from (Path(current, name) for name in names)


def _fail(error: OSError) -> None:
    raise error
