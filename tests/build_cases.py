"""Sources to build data folders of, and ways to look at what came of it."""

import hashlib
import io
import json

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare import build as building
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder, ImageRule
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

TOKENIZER = ByteTokenizer()
RGB = ModalityInfo("images", channels=3, patch_size=4, encoding="pixels")
IMAGES = Encoder(TOKENIZER, 64, RGB, ImageRule("native", 16, 4))
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


def content(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def documents_in(folder):
    reader = PackReader(folder)
    return [d for number in range(len(reader)) for d in reader.read(number).documents(reader.index.modalities)]


class Stop(BaseException):
    """A kill."""


def cut_off(recipe, out, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_shard", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(recipe, out)


def texts(path, name, count=50):
    path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
    return Recipe(TextSource.of([path]), Encoder(TOKENIZER, 64), packs_per_shard=PER_SHARD)


def words(folder):
    reader = PackReader(folder)
    documents = [d for number in range(len(reader)) for d in reader.read(number).documents(())]
    return sorted(TOKENIZER.decode(d[0].ids) for d in documents)
