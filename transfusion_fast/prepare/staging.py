"""The staging folder OUT.partial of a data folder OUT: finished work of one recipe.

It is in use by one process at a time, or by several that share its lock and encode parts of the source.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transfusion_fast.config_reading import changes
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import has_its_name, lock, partial_path, read_json, remove_folder, write_atomically

RECIPE = "recipe.json"
_MOUNTS = Path("/proc/self/mountinfo")
LOCK, UNITS, SHARDS = ".lock", "units", "shards"


def output_and_staging(folder: Path) -> tuple[Path, Path]:
    """Return the absolute paths of a data folder and of its staging folder.

    Raises:
        InputError: it has no name, or is a mount point, to which no folder can be renamed, and no finished folder.
    """
    folder = Path(os.path.realpath(folder))
    if folder.is_symlink():
        raise InputError(f"output folder must not be a link to itself, got {str(folder)!r}; choose another")
    if not folder.name:
        raise InputError(f"output folder must have a name, got {str(folder)!r}; choose another")
    if _is_mount_point(folder) and read_json(folder / RECIPE) is None:
        raise InputError(
            f"output folder must not be a mount point, got {str(folder)!r}; choose a folder inside of it, such as "
            f"{str(folder / 'data')!r}"
        )
    return folder, folder.with_name(f"{folder.name}.partial")


def _is_mount_point(folder: Path) -> bool:
    """Return True also for a folder that is mounted from the same file system, for which os.path.ismount is False."""
    mounts: list[bytes] = []
    with suppress(OSError):
        mounts = [line.split()[4] for line in _MOUNTS.read_bytes().splitlines()]
    names = (name.decode("unicode_escape").encode("latin-1") for name in mounts)  # a space is \040
    return os.path.ismount(folder) or os.fsencode(folder) in names


def check_outside(out: Path, given: Iterable[Path], files: Sequence[Path]) -> None:
    """Raise InputError if OUT or its staging folder lies in a folder of sources: the next run would read it.

    Args:
        given: files and folders that the user named.
        files: all files found there, by links too.
    """
    given = [path for path in given if path.is_dir()]
    holding = {file if file.is_dir() else file.parent for file in files}
    parents = {parent for folder in holding for parent in (folder, *folder.parents)}
    sources = {path.resolve(): path for path in parents if any(path.is_relative_to(folder) for folder in given)}
    for path in output_and_staging(out):
        if source := next((sources[parent] for parent in (path, *path.parents) if parent in sources), None):
            raise InputError(f"output folder must lie outside of the sources, got {path} in {source}; choose another")


class InUseError(InputError):
    """A staging folder, or a part of it, that another process is using."""


@contextmanager
def locked(partial: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the staging folder, which is created if it is missing.

    The lock is deleted with the folder, so a lock that was opened is used only if it still has its name.

    Args:
        shared: let others hold it that share it too.
        wait: wait until it is free.

    Raises:
        InUseError: another process holds it.
        InputError: its file system has no locks, or the folder holds files of somebody else, which would be deleted.
    """
    _check_ours(partial)
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            file = (partial / LOCK).open("a+")
        except FileNotFoundError:
            continue
        with file:
            try:
                free = lock(file, shared=shared, wait=wait)
            except InputError:  # without locks nobody else can be using it
                (partial / LOCK).unlink()
                with suppress(OSError):
                    partial.rmdir()
                raise
            if not free:
                raise InUseError(
                    f"{partial} must be used by one process at a time, got another one using it; wait for it to end"
                )
            if has_its_name(file):
                yield
                return


@contextmanager
def part_locked(partial: Path, part: int) -> Iterator[None]:
    """Hold the lock of one part of the units, in a staging folder whose lock is held; InUseError if another does."""
    with (partial / UNITS / f"part-{part}.lock").open("a+") as file:
        if not lock(file):
            raise InUseError(f"part {part} of {partial} must be run once at a time, got another run; wait for its end")
        yield


def _check_ours(partial: Path) -> None:
    """Raise InputError if the folder holds files that no run makes; another run may be making or deleting it now."""
    found = set(os.listdir(partial)) if partial.exists() else set()
    ours = {LOCK, partial_path(partial / RECIPE).name}
    if read_json(partial / RECIPE) is not None:
        ours |= {RECIPE, TOKENIZER_NAME, partial_path(partial / TOKENIZER_NAME).name, UNITS, SHARDS}
    for name in found - ours:
        if os.path.lexists(partial / name):
            raise InputError(
                f"{partial} must be free for staging OUT, got a folder that holds {name}; choose another OUT, or move "
                "that"
            )


def begin_or_resume(partial: Path, recipe: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write the recipe and the tokenizer, or check that the work that is there has the same recipe."""
    if read_json(partial / RECIPE) is not None and has_units(partial):
        check_begun(partial, recipe)
    else:
        for name in (UNITS, SHARDS):  # without a finished unit, files there may be of any recipe
            shutil.rmtree(partial / name, ignore_errors=True)
        write_atomically(partial / RECIPE, json.dumps(recipe, indent=1))
        tokenizer.write(partial)
    for name in (UNITS, SHARDS):
        (partial / name).mkdir(exist_ok=True)


def check_begun(partial: Path, recipe: dict[str, Any]) -> None:
    """Raise InputError if the work that is there, if any, has another recipe."""
    before = read_json(partial / RECIPE)
    if before is not None and (change := first_changes(before, recipe)):
        raise InputError(f"{partial} must be of the same recipe, got other settings: {change}; keep them or remove it")


def has_units(partial: Path) -> bool:
    """Return whether a unit is finished."""
    return any((partial / UNITS).glob("*.json"))


def first_changes(before: object, now: dict[str, Any]) -> str:
    """Return the first change in each part of a recipe, as text; empty if there is none."""
    known = before if isinstance(before, dict) else {}
    found = (next(changes(known.get(name), value, name), None) for name, value in now.items())
    return " and ".join(change for change in found if change)


def discard(partial: Path) -> None:
    """Delete the staging folder, its large parts first."""
    for name in (UNITS, SHARDS):
        if os.path.lexists(partial / name):
            shutil.rmtree(partial / name)
    remove_folder(partial)
