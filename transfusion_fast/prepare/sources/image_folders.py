"""Images in folders with their captions beside them, as img2dataset's `files` output: KEY.jpg beside KEY.txt."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources.base import Unit
from transfusion_fast.prepare.sources.files import system_file, walk
from transfusion_fast.prepare.sources.references import read_limited
from transfusion_fast.prepare.sources.tars import Sample

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")
"""Extensions of image files."""
IMAGES_TOGETHER = 1024
"""Most images in a unit."""
_Names = tuple[list[str], dict[str, list[str]]]


def folders_with_images(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders at and below `paths` that hold images, by name; InputError if one was given twice."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"source of image files must be a folder, got {path}; give the folder that holds it")
        holding = sorted({file.parent for file in walk(path) if extension_of(file.name) in IMAGES})
        if not holding:
            raise InputError(f"folder {path} must hold images ({', '.join(IMAGES)}), got none; give another")
        for folder in holding:
            if (other := found.setdefault(folder.resolve(), folder)) is not folder:
                raise InputError(f"source must hold a folder once, got {other} and {folder}; leave one out")
    return tuple(found.values())


def folder_units(folder: Path) -> list[Unit]:
    """Return the images of a folder, without those below it, in units of up to `IMAGES_TOGETHER`."""
    count = len(_names(folder)[0])
    return [Unit(folder, start, min(start + IMAGES_TOGETHER, count)) for start in range(0, count, IMAGES_TOGETHER)]


def folder_state(folder: Path) -> dict[str, int]:
    """Return the size of all files of a folder together, in bytes, and the last time that one changed."""
    found = [path.stat() for path in folder.iterdir() if path.is_file()]
    return {
        "bytes": sum(status.st_size for status in found),
        "modified": max([folder.stat().st_mtime_ns, *(status.st_mtime_ns for status in found)]),
    }


def files_of(unit: Unit) -> list[Path]:
    """Return the images of a unit and all files beside them."""
    images, stems = _names(unit.path)
    return [unit.path / name for image in images[unit.start : unit.end] for name in stems[_stem(image)]]


def read_images(unit: Unit, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Sample | Rejected]]:
    """Yield (location, sample) of each image: itself and the files beside it of the extensions that are wanted."""
    images, stems = _names(unit.path)
    for image in images[unit.start : unit.end]:
        beside = [name for name in stems[_stem(image)] if extension_of(name) not in IMAGES]
        names = [image, *(name for name in beside if wanted(extension_of(name)))]
        yield str(unit.path / image), _sample(unit.path, names)


def _sample(folder: Path, names: Sequence[str]) -> Sample | Rejected:
    if system_file(names[0]):
        return Rejected("system file", "")
    sample: Sample = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            return Rejected("not a file", f"{name} is a broken link or something else")
        try:
            sample[extension_of(name)] = read_limited(path)
        except Rejected as rejected:
            return rejected
    return sample


def _names(folder: Path) -> _Names:
    """Return the names of the images of a folder, and all its names by their stem; both sorted."""
    return _listing(folder, folder.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # units of one folder follow one another
def _listing(folder: Path, _modified: int) -> _Names:
    stems: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        stems.setdefault(_stem(name), []).append(name)
    images = [name for names in stems.values() for name in names if extension_of(name) in IMAGES]
    return sorted(images), stems


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def extension_of(name: str) -> str:
    """Return what follows the last dot, in small letters; "" if there is no dot, or nothing before it."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""
