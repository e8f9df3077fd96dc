"""Sources of data folders, ways to interrupt their building, and ways to read the result."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer, load_tokenizer
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

TOKENIZER = ByteTokenizer()
RGB = ModalityInfo("images", channels=3, patch_size=4, encoding="pixels")
IMAGES = Encoder(TOKENIZER, 64, (RGB,), ImageRule("native", 16, 4))
PER_SHARD = 5


def jpeg(seed):
    generator = np.random.default_rng(seed)
    file = io.BytesIO()
    pixels = generator.integers(0, 256, (*generator.integers(8, 30, 2), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tars(folder):
    """Three tars of 20 captioned pictures, of which one in each is broken."""
    for number in range(3):
        with wds.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for i in range(20):
                image = jpeg(100 * number + i)
                broken = image[:80] if i == 7 else image
                writer.write({"__key__": f"{number:05d}{i:04d}", "jpg": broken, "txt": f"picture {number} {i}"})
    return folder


def recipe_of(tars):
    return Recipe(PairsSource.of([tars]), IMAGES, packs_per_shard=PER_SHARD)


def texts(path, name, count=50):
    path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
    return Recipe(TextSource.of([path]), Encoder(TOKENIZER, 64), packs_per_shard=PER_SHARD)


def content(folder):
    """The sha256 of each file below a folder, hidden files too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_in(folder):
    reader = PackReader(folder)
    return [d for number in range(len(reader)) for d in reader.read(number).documents(reader.index.modalities)]


def words(folder):
    """The text of each document, sorted."""
    tokenizer = load_tokenizer(PackReader(folder).index.tokenizer, folder)
    found = ([s.ids for s in document if isinstance(s, TextSegment)] for document in documents_in(folder))
    return sorted("".join(map(tokenizer.decode, ids)) for ids in found)


def fingerprint(document):
    """A value that differs between documents of different segments."""
    return tuple(
        (s.modality, s.values.shape, s.values.tobytes()) if isinstance(s, ImageSegment) else s.ids.tobytes()
        for s in document
    )


class Stop(BaseException):
    """A kill."""


def stop(*_, **__):
    raise Stop


def cut_off(recipe, out, monkeypatch):
    """Begin to build a folder: its units are finished, and no shard."""
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", stop)  # of the first shard
        with pytest.raises(Stop):
            build(recipe, out)


def path_of(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")


def record_disk(monkeypatch):
    """Record each fsync as ("sync", inode) and each rename as ("rename", inode, new name), in order."""
    events, fsync = [], os.fsync

    def synced(descriptor):
        events.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renamed(rename):
        def call(old, new):
            events.append(("rename", os.stat(old).st_ino, os.path.basename(new)))
            rename(old, new)

        return call

    monkeypatch.setattr("os.fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(f"os.{name}", renamed(getattr(os, name)))
    return events
