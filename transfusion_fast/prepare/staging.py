"""Where a data folder is made: OUT.partial, which keeps what is finished, of one recipe and for one process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transfusion_fast.config import changes
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import partial_path, read_json, write_atomically

RECIPE = "recipe.json"
LOCK, UNITS, SHARDS = ".lock", "units", "shards"


def places(folder: Path) -> tuple[Path, Path]:
    """The folder, and where it is made."""
    folder = Path(folder).resolve()
    if not folder.name:
        raise InputError(f"output folder must have a name, got {str(folder)!r}; choose another")
    return folder, folder.with_name(f"{folder.name}.partial")


def check_ours(partial: Path) -> None:
    """InputError where the folder has what no run puts there: its contents would be gone in the end."""
    if not partial.exists():
        return
    ours = {LOCK, partial_path(partial / RECIPE).name}
    if read_json(partial / RECIPE) is not None:
        ours |= {RECIPE, TOKENIZER_NAME, partial_path(partial / TOKENIZER_NAME).name, UNITS, SHARDS}
    for path in partial.iterdir():
        if path.name not in ours:
            raise InputError(
                f"{partial} must be free, as OUT is made there, and holds {path.name}; choose another OUT, or move that"
            )


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Its lock is in the folder, and goes with it: who has locked one that is gone looks again."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = (partial / LOCK).open("w")
        except FileNotFoundError:
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{partial} must be made by one process, and another is at work in it") from error
            held = False
            with suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(lock.fileno()), (partial / LOCK).stat())
            if held:
                yield
                return


def begin_or_go_on(partial: Path, recipe: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes the recipe and the tokenizer, or finds the recipe of what has begun in `partial` to be the same."""
    before = read_json(partial / RECIPE)
    if before is not None and has_begun(partial):
        if change := differing(before, recipe):
            raise InputError(
                f"{partial} was begun otherwise: {change}; go on as it was begun, or remove it to begin anew"
            )
    else:
        for name in (UNITS, SHARDS):  # what has not begun may be of any
            shutil.rmtree(partial / name, ignore_errors=True)
        write_atomically(partial / RECIPE, json.dumps(recipe, indent=1))
        tokenizer.write(partial)
    for name in (UNITS, SHARDS):
        (partial / name).mkdir(exist_ok=True)


def has_begun(partial: Path) -> bool:
    """Whether a unit is finished."""
    return any((partial / UNITS).glob("*.json"))


def differing(before: object, now: dict[str, Any]) -> str:
    """What is not the same in two recipes, of each part the first thing."""
    known = before if isinstance(before, dict) else {}
    found = {name: next(changes(known.get(name), value, name), None) for name, value in now.items()}
    return " and ".join(change for change in found.values() if change)


def discard(partial: Path) -> None:
    """Frees its name in one step, so that who begins anew meets nothing of it; what takes time is before that."""
    for name in (UNITS, SHARDS):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    removed = partial.with_name(f".{partial.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    partial.rename(removed)
    shutil.rmtree(removed)
