"""Files that are whole under their names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that has its old contents or the new ones whenever the process ends."""
    begun = staged(path)
    begun.write_bytes(content.encode() if isinstance(content, str) else content)
    begun.replace(path)


def staged(path: Path) -> Path:
    """What `write_whole` leaves where it is cut off."""
    return path.with_name(f".{path.name}.partial")


def write_durably(path: Path, content: str | bytes) -> None:
    """As `write_whole`, and whenever the machine does."""
    begun = path.with_name(f".{path.name}.durable")
    write_whole(begun, content)
    sync(begun)
    begun.replace(path)
    sync(path.parent)


def sync(*paths: Path) -> None:
    """Puts files and folders on the disk, so that in a crash of the machine no name outlives its contents."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Any:
    """The value in a file of the project's own; None where there is none, or it cannot be read as JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
