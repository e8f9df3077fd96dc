"""A recorder of the order in which a program makes its files durable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def record_durability(patch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Return a list that grows with every fsync and rename of this process, paths as names.

    ("fsync", NAME, SIZE) is a file or folder flushed to disk, with its size in bytes at that moment ("folder" for a
    folder); ("rename", OLD, NEW) is a rename or replacement.
    """
    events: list[tuple[str, ...]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", path.name, "folder" if path.is_dir() else str(path.stat().st_size)))
        fsync(descriptor)

    def recorded(move):
        def moved(source, target, **options) -> None:
            events.append(("rename", Path(source).name, Path(target).name))
            move(source, target, **options)

        return moved

    patch.setattr(os, "fsync", recorded_fsync)
    patch.setattr(os, "rename", recorded(rename))
    patch.setattr(os, "replace", recorded(replace))
    return events
