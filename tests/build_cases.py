"""Sources of data folders, ways to interrupt their building, and ways to read the result."""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
from image_files import saved
from PIL import Image

from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer, load_tokenizer
from transfusion_fast.errors import Rejected, Remark
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

TOKENIZER = ByteTokenizer()
RGB = ModalityInfo("images", channels=3, patch_size=4, encoding="pixels")
IMAGES = Encoder(TOKENIZER, 64, (RGB,), ImageRule("native", 16, 4))
PER_SHARD = 5


def make_tar(path, members, ending=True):
    """Write a tar of (name, data)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        end = archive.offset
    if not ending:
        os.truncate(path, end)
    return path


def make_pairs(path, pairs, kind="jpg"):
    """Write a tar of (image file, caption) by key."""
    files = (((f"{key}.{kind}", image), (f"{key}.txt", caption.encode())) for key, (image, caption) in pairs.items())
    return make_tar(path, itertools.chain.from_iterable(files))


def write_tars(folder):
    """Three tars of 20 captioned pictures, of which one in each is broken."""
    for number in range(3):
        pairs = {}
        for i in range(20):
            generator = np.random.default_rng(100 * number + i)
            pixels = generator.integers(0, 256, (*generator.integers(8, 30, 2), 3), dtype=np.uint8)
            image = saved(Image.fromarray(pixels), "JPEG")
            pairs[f"{number:05d}{i:04d}"] = image[:80] if i == 7 else image, f"picture {number} {i}"
        make_pairs(folder / f"{number:05d}.tar", pairs)
    return folder


def texts(path, name, count=50):
    path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
    return text_recipe(path, packs_per_shard=PER_SHARD)


def text_recipe(path, length=64, **settings):
    return Recipe(TextSource.of([path]), Encoder(TOKENIZER, length), **settings)


def found_in(source):
    """Every document and rejection."""
    found = [entry for unit in source.units() for entry in source.documents(unit)]
    assert all("\n" not in str(entry) for entry in found if isinstance(entry, Remark))
    return found


def read(source):
    """(parts of every document, reasons of what was rejected or repaired)."""
    found = found_in(source)
    parts = [() if isinstance(entry, Remark) else entry.parts for entry in found]
    bad = [next((part for part in own if isinstance(part, Rejected)), None) for own in parts]
    documents = [own for own, missing in zip(parts, bad, strict=True) if own and not missing]
    return documents, Counter(entry.reason for entry in (*found, *bad) if isinstance(entry, Remark))


def texts_of(paths, **options):
    """(texts, reasons of what was rejected)."""
    documents, rejected = read(TextSource.of(paths, **options))
    return [text for (text,) in documents], rejected


def content(folder):
    """The sha256 of each file below a folder, hidden files too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_in(folder):
    reader = PackReader(folder)
    return [d for number in range(len(reader)) for d in reader.read(number).documents(reader.index.modalities)]


def words_of(document, tokenizer=TOKENIZER):
    """The texts of a document."""
    return "".join(tokenizer.decode(segment.ids) for segment in document if isinstance(segment, TextSegment))


def words(folder):
    """The text of each document, sorted."""
    tokenizer = load_tokenizer(PackReader(folder).index.tokenizer, folder)
    return sorted(words_of(document, tokenizer) for document in documents_in(folder))


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


def pairs_recipe(*tars):
    return Recipe(PairsSource.of(tars), IMAGES, packs_per_shard=PER_SHARD)
