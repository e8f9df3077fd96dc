"""Files that are complete whenever they exist under their names, locks, and strict JSON."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from transfusion_fast.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_T = TypeVar("_T")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that has its old or its new contents whenever the process ends."""
    partial = partial_path(path)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise


def partial_path(path: Path) -> Path:
    """Return the name under which an interrupted `write_atomically` leaves its file."""
    return path.with_name(f".{path.name}.partial")


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file that has its old or its new contents whenever the machine stops."""
    durable = path.with_name(f".{path.name}.durable")
    write_atomically(durable, content)
    sync(durable)
    durable.replace(path)
    sync(path.parent)


def lock(file: IO[Any], *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends; return False if another process has locked it.

    Args:
        shared: let others hold it too, if they also share it. Over NFS such a file must be open for reading.
        wait: wait until it is free.

    Raises:
        InputError: its file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # of some network file systems
        raise InputError(
            f"file system of {file.name} must have locks (flock), got {error.strerror}; choose a folder on another one"
        ) from error
    return True


def has_its_name(file: IO[Any]) -> bool:
    """Return whether an open file is still the one of its name, which another process may have deleted."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def remove_folder(folder: Path) -> None:
    """Delete a folder; its name is free in one step, so that no process finds half of it."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def sync(*paths: Path) -> None:
    """Flush files and folders to disk, so that a crash of the machine leaves no name without its contents."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file of the project's own, or None if it is missing or malformed."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def parse_json(adapter: TypeAdapter[_T], content: bytes, where: str, remedy: str) -> _T:
    """Return the value that a JSON text holds, without converting types.

    Raises:
        InputError: Its first error, in one line that names the field in `where` and ends in `remedy`.
    """
    from pydantic import ValidationError  # not everywhere where models are built

    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as invalid:
        error = invalid.errors()[0]
    kind, field = error["type"], ".".join(map(str, error["loc"]))
    if kind == "value_error":  # raised by a class of ours, with a complete message
        raise InputError(f"{where}: {error['ctx']['error']}")
    rule = {"json_invalid": "be JSON", "missing": "be given"}.get(kind) or error["msg"].split("should ", 1)[-1]
    got = "nothing" if kind == "missing" else repr(error["input"])
    raise InputError(f"{field + ' in ' if field else ''}{where} must {rule}, got {got:.60}; {remedy}")
