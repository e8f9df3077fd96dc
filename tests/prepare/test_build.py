"""Data folders from sources: every good document, every bad one named, the same bytes for any number of processes."""

import io
import json
import os
import resource
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import webdataset as wds
from build_cases import (
    IMAGES,
    TOKENIZER,
    content,
    documents_in,
    texts,
    words,
)
from image_files import picture, png_with_header, saved
from PIL import Image

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource


def test_every_good_pair_is_in_the_folder_and_every_bad_one_is_counted(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    captions = Counter(TOKENIZER.decode(text.ids) for text, _ in documents_in(tmp_path / "out"))
    assert captions == Counter(f"picture {n} {i}" for n in range(3) for i in range(20) if i != 7)
    assert all(isinstance(image, ImageSegment) for _, image in documents_in(tmp_path / "out"))
    assert built.rejected == {"image damaged": 3}
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in left_out] == ["image damaged"] * 3
    for number, entry in enumerate(left_out):
        assert f"{number:05d}0007 in " in entry["detail"] and f"{number:05d}.tar" in entry["detail"]
    assert "000000007 in " in built.examples["image damaged"] and "00000.tar" in built.examples["image damaged"]
    assert built.index == read_index(tmp_path / "out") and built.index.documents == 57
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_without_rejections_has_no_list_of_them(tmp_path):
    build(texts(tmp_path / "a.jsonl", "old"), tmp_path / "out")
    assert not (tmp_path / "out" / "left_out.jsonl").exists()


def test_images_of_every_kind_are_prepared_or_reported(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(picture(16, 16))
    good = {
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "sixteen bits": saved(Image.fromarray(picture(16, 16)[..., 0].astype(np.uint16) * 257), "PNG"),
        "palette": saved(rgb.convert("P"), "PNG"),
        "turned": saved(rgb, "JPEG", exif=exif),
        "thin": saved(Image.new("RGB", (20_000, 1)), "PNG"),
        "plain": saved(rgb, "WEBP"),
    }
    bad = {
        "bomb": (saved(Image.new("L", (9000, 9000)), "PNG"), "image too large"),
        "header": (png_with_header(100_000, 100_000), "image too large"),
        "truncated": (saved(rgb, "JPEG")[:200], "image damaged"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        "script": (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
    }
    files = good | {name: data for name, (data, _) in bad.items()}
    with wds.TarWriter(str(tmp_path / "zoo.tar")) as writer:
        for number, (name, data) in enumerate(files.items()):
            writer.write({"__key__": f"{number:03d}", "png": data, "txt": name})
    encoder = replace(IMAGES, image=ImageRule("crop", 16, 4))
    built = build(Recipe(PairsSource.of([tmp_path / "zoo.tar"]), encoder), tmp_path / "out")
    assert built.rejected == Counter(reason for _, reason in bad.values())
    found = {TOKENIZER.decode(text.ids): image.values for text, image in documents_in(tmp_path / "out")}
    assert found.keys() == good.keys()
    grey_is_kept = np.array_equal(found["sixteen bits"][..., 0], picture(16, 16)[..., 0])
    level = np.abs(found["turned"].astype(int) - np.rot90(np.asarray(Image.open(io.BytesIO(good["turned"]))), -1))
    assert level.max() == 0 and np.ptp(found["cmyk"]) > 100 and grey_is_kept


def test_the_number_of_processes_changes_no_byte(tmp_path, recipe):
    for processes in (1, 3):
        build(recipe, tmp_path / str(processes), processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_the_bytes_of_a_folder_do_not_change_between_versions(tmp_path):
    for n in range(5):
        lines = (json.dumps(f"{n} {i}" + "x" * (i * 7 % 23)) + "\n" for i in range(20))
        (tmp_path / f"{n}.jsonl").write_text("".join(lines))
    source = TextSource.of([tmp_path])
    build(Recipe(source, Encoder(TOKENIZER, 64), packs_per_shard=5, seed=1, buffer=16), tmp_path / "out")
    expected = "d8d16d0eda599b5f49c057a6e553d600fef5d27bea379629e9a963e381a026f4"
    assert content(tmp_path / "out")["index.json"] == expected, "which holds the sha256 of every shard"


def test_plain_webdataset_reads_the_shards(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    files = [str(tmp_path / "out" / shard.file) for shard in built.index.shards]
    samples = list(wds.WebDataset(files, shardshuffle=False, empty_check=False))
    assert len(samples) == built.index.num_packs
    assert all({"tokens.npy", "segments.npy", "latents.npy"} <= sample.keys() for sample in samples)


def test_sources_that_are_sorted_by_length_waste_little(tmp_path):
    """Long documents in the first files and short ones in the last find each other."""
    for number in range(40):
        words = "x" * (1500 if number < 20 else 60 + number)
        lines = (json.dumps({"text": f"{n} {words}"}) + "\n" for n in range(20 if number < 20 else 120))
        (tmp_path / f"{number:02d}.jsonl").write_text("".join(lines))
    source = TextSource.of([tmp_path])
    built = build(Recipe(source, Encoder(TOKENIZER, 2048), buffer=200), tmp_path / "out")
    assert built.index.documents == 20 * 20 + 20 * 120 and built.index.waste < 0.1  # else 0.21


def test_thousands_of_small_files_need_few_open_ones(tmp_path):
    for kind, count in (("txt", 600), ("jsonl", 300)):
        folder = tmp_path / kind
        folder.mkdir()
        for n in range(count):
            (folder / f"{n:04d}.{kind}").write_text(
                f"{kind} {n}" if kind == "txt" else json.dumps({"text": f"{kind} {n}"})
            )
        source = TextSource.of([folder])
        assert len(source.units()) == (3 if kind == "txt" else count)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (300 + len(os.listdir("/proc/self/fd")), hard))
        try:
            build(Recipe(source, Encoder(TOKENIZER, 8192)), tmp_path / f"out-{kind}")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert words(tmp_path / f"out-{kind}") == sorted(f"{kind} {n}" for n in range(count))


def test_a_document_that_becomes_two_is_counted_as_split(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    built = build(Recipe(TextSource.of([tmp_path / "a.txt"]), Encoder(TOKENIZER, 64)), tmp_path / "out")
    assert (built.cut, built.index.documents) == (1, 2)


def test_numbers_below_one_are_refused_before_anything_is_made(tmp_path, recipe):
    with pytest.raises(InputError, match="packs_per_shard must be 1 or more, got 0"):
        Recipe(recipe.source, IMAGES, packs_per_shard=0)
    with pytest.raises(InputError, match="processes must be 1 or more, got 0"):
        build(recipe, tmp_path / "out", processes=0)
    assert not list(tmp_path.iterdir())


def test_a_source_of_which_all_is_rejected_makes_no_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n5\n')
    with pytest.raises(InputError, match=r"got none \(1 x empty text, 1 x no text\)"):
        build(Recipe(TextSource.of([tmp_path / "a.jsonl"]), Encoder(TOKENIZER, 64)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_with_a_tokenizer_of_its_own_is_split_at_pauses_and_read_back(tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    tokenizer = train_bpe([text], 280)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(9)))
    recipe = Recipe(TextSource.of([tmp_path / "a.jsonl"]), Encoder(tokenizer, 256), buffer=20)
    built = build(recipe, tmp_path / "out", processes=2)
    documents = documents_in(tmp_path / "out")
    assert all(isinstance(segment, TextSegment) for document in documents for segment in document)
    pieces = [tokenizer.decode(text.ids) for (text,) in documents]
    assert sum(map(len, pieces)) == sum(len(f"{i} {text}") for i in range(9))
    assert built.index.tokenizer == tokenizer.describe() and built.index.num_text_tokens == 280
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.content
