"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28, in ten classes (Xiao et al. 2017, arXiv 1708.07747).

Its four files come from a folder, from Debian's package, which is unpacked without root, or from the web; their
contents must have the checksums below.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import subprocess
import tempfile
import urllib.request
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from transfusion_fast.data.pack import Document, ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import BuiltIn, Split

CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MODALITY = ModalityInfo("fashion", channels=1, patch_size=4, encoding="pixels")
SIDE = 28
FILES: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "heldout": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Checksums of the files without gzip."""
PACKAGE = "dataset-fashion-mnist"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN, WEB = "debian", "web"
_IMAGES_HEADER, _LABELS_HEADER = 16, 8  # bytes
_MAX_BYTES = 64 << 20  # of one file
_TIMEOUT = 60  # seconds without an answer


class FashionMnist(BuiltIn):
    """The pictures and their classes, downloaded when they are first needed.

    Args:
        origin: a folder that holds the files somewhere below it, gzipped or not; a Debian package file; or "debian" or
            "web", to download them from there.
    """

    modality, side = MODALITY, SIDE

    def __init__(self, origin: str | Path) -> None:
        self.origin = origin

    def describe(self) -> dict[str, object]:
        return {"data": "fashion-mnist", "captions": CLASSES}

    @cached_property
    def splits(self) -> dict[Split, tuple[np.ndarray, np.ndarray]]:
        """Images uint8 [n, 28, 28] and labels int64 [n] of each split; InputError if they cannot be read."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = _folder_of(self.origin, Path(scratch))
            return {split: _load(folder, *names) for split, names in FILES.items()}

    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """Return (caption, image) pairs; the ten thousand of the original test set are held out."""
        captions = [TextSegment(tokenizer.encode(name)) for name in CLASSES]
        images, labels = self.splits[split]
        return [(captions[label], ImageSegment(image)) for image, label in zip(images[..., None], labels, strict=True)]


def _folder_of(origin: str | Path, scratch: Path) -> Path:
    """Return a folder that holds the files somewhere below it."""
    path = Path(origin)
    if origin == WEB:
        _download(scratch)
        return scratch
    if origin == DEBIAN:
        _run(["apt-get", "download", PACKAGE], scratch)
        path = next(scratch.glob(f"{PACKAGE}_*.deb"), scratch / f"{PACKAGE}.deb")
    if path.is_dir():
        return path
    if not path.is_file() or path.suffix != ".deb":
        raise InputError(
            f"source of Fashion-MNIST must be a folder of its files, a .deb, {DEBIAN} or {WEB}, got {str(origin)!r}"
        )
    _run(["dpkg", "-x", str(path.resolve()), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked"


def _run(command: list[str], folder: Path) -> None:
    cure = f"give --source {WEB}, or a folder that holds its files"
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise InputError(f"{PACKAGE} needs {command[0]}, which cannot be run ({error.strerror}); {cure}") from error
    if ended.returncode:
        said = " ".join(ended.stderr.split())[-200:]
        raise InputError(f"{' '.join(command[:2])} of {PACKAGE} failed ({said}); {cure}")


def _download(folder: Path) -> None:
    for name in SHA256:
        try:
            with urllib.request.urlopen(f"{URL}{name}.gz", timeout=_TIMEOUT) as answer:
                (folder / f"{name}.gz").write_bytes(answer.read(_MAX_BYTES))
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{URL}{name}.gz cannot be downloaded ({reason}); give --source {DEBIAN}, or a folder that holds it"
            ) from error


def _load(folder: Path, images: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.frombuffer(_content(folder, images), np.uint8, offset=_IMAGES_HEADER)
    numbers = np.frombuffer(_content(folder, labels), np.uint8, offset=_LABELS_HEADER)
    return pixels.reshape(-1, SIDE, SIDE), numbers.astype(np.int64)


def _content(folder: Path, name: str) -> bytes:
    """Return the content of the one file of that name below `folder`."""
    path = next((path for suffix in (".gz", "") for path in sorted(folder.rglob(name + suffix))), None)
    if path is None:
        raise InputError(f"folder {folder} must hold {name}.gz of Fashion-MNIST, got none; give another")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} must be a file of Fashion-MNIST, got {error}; fetch it again") from error
    if (sha256 := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        raise InputError(
            f"contents of {path} must have the sha256 {SHA256[name]} of Fashion-MNIST, got {sha256}; fetch it again"
        )
    return content
