"""Files as Fashion-MNIST's, of few pictures that can be told apart."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from transfusion_fast.prepare.examples import fashion

SIZES = {"train": 40, "heldout": 20}


def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of them, some gzipped, some further below; their checksums are put in place of the real ones."""
    (folder / "deeper").mkdir(parents=True)
    for place, (name, content) in enumerate(_contents().items()):
        monkeypatch.setitem(fashion.SHA256, name, hashlib.sha256(content).hexdigest())
        if place % 2:
            (folder / "deeper" / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def _contents() -> dict[str, bytes]:
    """Picture i is all of value i, and of class i % 10."""
    files = {}
    for split, (images, labels) in fashion.FILES.items():
        number = np.arange(SIZES[split], dtype=np.uint8)
        files[images] = bytes(16) + np.repeat(number, fashion.SIDE**2).tobytes()
        files[labels] = bytes(8) + (number % 10).tobytes()
    return files
