"""Data folders from sources: every good document, every bad one named, the same bytes for any number of processes."""

import json
import os
import resource
from collections import Counter
from dataclasses import replace

import pytest
import webdataset as wds
from build_cases import IMAGES, content, documents_in, text_recipe, texts, words, words_of

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.sources.text import TextSource


def test_every_good_pair_is_in_the_folder_and_every_bad_one_is_counted(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    found = documents_in(tmp_path / "out")
    assert Counter(map(words_of, found)) == Counter(f"picture {n} {i}" for n in range(3) for i in range(20) if i != 7)
    assert all(isinstance(image, ImageSegment) for _, image in found)
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert built.rejected == {"image damaged": 3} == Counter(entry["reason"] for entry in left_out)
    for number, entry in enumerate(left_out):
        assert f"{number:05d}0007 in " in entry["detail"] and f"{number:05d}.tar" in entry["detail"]
    assert built.examples["image damaged"] == f"image damaged: {left_out[0]['detail']}"
    assert built.index == read_index(tmp_path / "out") and built.index.documents == 57
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    files = [str(tmp_path / "out" / shard.file) for shard in built.index.shards]
    samples = list(wds.WebDataset(files, shardshuffle=False, empty_check=False))
    assert len(samples) == built.index.num_packs
    assert all({"tokens.npy", "segments.npy", "latents.npy"} <= sample.keys() for sample in samples)


def test_the_bytes_of_a_folder_do_not_change_between_versions(tmp_path):
    for n in range(5):
        lines = (json.dumps(f"{n} {i}" + "x" * (i * 7 % 23)) + "\n" for i in range(20))
        (tmp_path / f"{n}.jsonl").write_text("".join(lines))
    build(text_recipe(tmp_path, packs_per_shard=5, seed=1, buffer=16), tmp_path / "out")
    expected = "52eec2163ae01511faf2ec1902f4cbaf2bfca5dd52ec624b484b5cc86e5c5630"
    assert content(tmp_path / "out")["index.json"] == expected, "which holds the sha256 of every shard"


def test_sources_that_are_sorted_by_length_waste_little(tmp_path):
    """Long documents in the first files and short ones in the last find each other."""
    for number in range(40):
        words = "x" * (1500 if number < 20 else 60 + number)
        lines = (json.dumps({"text": f"{n} {words}"}) + "\n" for n in range(20 if number < 20 else 120))
        (tmp_path / f"{number:02d}.jsonl").write_text("".join(lines))
    built = build(text_recipe(tmp_path, 2048, buffer=200), tmp_path / "out")
    assert built.index.documents == 20 * 20 + 20 * 120 and built.index.waste < 0.1  # else 0.21


@pytest.mark.parametrize(("kind", "count", "units"), [("txt", 600, 3), ("jsonl", 300, 300)])
def test_thousands_of_small_files_need_few_open_ones(tmp_path, kind, count, units):
    (tmp_path / "in").mkdir()
    for n in range(count):
        (tmp_path / "in" / f"{n:04d}.{kind}").write_text(f"file {n}" if kind == "txt" else f'"file {n}"')
    recipe = text_recipe(tmp_path / "in", 8192)
    assert len(recipe.source.units()) == units
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300 + len(os.listdir("/proc/self/fd")), hard))
    try:
        build(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert words(tmp_path / "out") == sorted(f"file {n}" for n in range(count))
    assert not (tmp_path / "out" / "left_out.jsonl").exists()


def test_what_cannot_be_built_makes_no_folder(tmp_path, recipe):
    with pytest.raises(InputError, match=r"packs_per_shard must be in 1..1048576, got 0"):
        Recipe(recipe.source, IMAGES, packs_per_shard=0)
    with pytest.raises(InputError, match="processes must be 1 or more, got 0"):
        build(recipe, tmp_path / "out", processes=0)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n5\n')
    with pytest.raises(InputError, match=r"got none \(1 x empty text, 1 x no text\)"):
        build(text_recipe(tmp_path / "a.jsonl"), tmp_path / "out")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match=r"got none \(it is empty\)"):
        build(text_recipe(tmp_path / "a.jsonl"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_text_with_a_tokenizer_of_its_own_is_split_at_pauses_and_read_back(tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    tokenizer = train_bpe([text], 280)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(9)))
    recipe = replace(text_recipe(tmp_path / "a.jsonl", buffer=20), encoder=Encoder(tokenizer, 256))
    built = build(recipe, tmp_path / "out", processes=2)
    documents = documents_in(tmp_path / "out")
    assert all(isinstance(segment, TextSegment) for document in documents for segment in document)
    assert sum(map(len, words(tmp_path / "out"))) == sum(len(f"{i} {text}") for i in range(9))
    assert built.index.tokenizer == tokenizer.describe() and built.index.num_text_tokens == 280
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.content


def test_files_that_are_passed_over_are_counted_once_as_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    texts(tmp_path / "in" / "a.jsonl", "text")
    (tmp_path / "in" / "._a.jsonl").write_bytes(b"of macOS")
    built = build(text_recipe(tmp_path / "in"), tmp_path / "out")
    assert built.rejected == {"system file": 1} and not built.repaired and built.index.documents == 50


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
    path, read = tmp_path / "a.jsonl", TextSource.entries

    def entries(source, unit):
        yield from read(source, unit)
        path.write_text(path.read_text() + '"one more"\n')

    recipe = texts(path, "text")
    monkeypatch.setattr(TextSource, "entries", entries)
    built = build(recipe, tmp_path / "out")
    [line] = built.remarks(tmp_path / "out")
    assert line.startswith("the source changed while it was read, and documents may be missing: ") and "a.jsonl" in line
