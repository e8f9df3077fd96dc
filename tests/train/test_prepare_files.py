"""The commands that prepare data folders: what the folder then holds, and what is printed about the rest."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from build_cases import documents_in, make_tar, words
from fashion_files import write as write_fashion
from image_files import png, saved
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from transfusion_fast.data.index import read_index
from transfusion_fast.data.tokenizer import read_tokenizer
from transfusion_fast.prepare.examples import stories as story_data

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare

STORIES = sorted(f"once upon a time there was cat number {n}, and it was content" for n in range(12))
SIZE = ("--image-size", "16", "--patch-size", "8", "--seq-len", "64")


@pytest.fixture
def stories(tmp_path):
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES), encoding="utf-8")
    return file


@pytest.fixture
def run(capsys):
    """Runs a command in this process: (exit code, standard output, standard error), one line if it fails."""

    def run_command(*arguments):
        one_process = () if arguments[0] in ("digits", "fashion-mnist", "stories") else ("--processes", "1")
        code = prepare.main([*map(str, arguments), *one_process])
        out, err = capsys.readouterr()
        assert code == 0 or (code, out, err.count("\n"), err[:9]) == (2, "", 1, "prepare: ")
        return code, out, err

    return run_command


def words_tokenizer(path, *vocabulary):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_built_in_data_is_prepared_once(tmp_path, run, monkeypatch):
    monkeypatch.setattr(story_data, "STORIES", {"train": 60, "heldout": 20})
    files = write_fashion(tmp_path / "files", monkeypatch)
    source = ("--source", files, "--seq-len", "1024")
    for name, length, options in (("digits", 512, ()), ("fashion-mnist", 1024, source), ("stories", 1024, source)):
        lines = [line for _ in range(2) for line in run(name, tmp_path / name, *options)[1].splitlines()]
        assert [line.split(": ")[1] for line in lines] == ["written"] * 2 + ["already there"] * 2
        assert f"packs of {length}" in lines[0] and "% waste" in lines[0]
    assert "source.data fashion-mnist -> stories" in run("stories", tmp_path / "fashion-mnist", "--source", files)[2]


def test_text_is_bytes_by_default_or_of_a_tokenizer_that_is_trained_or_given(stories, tmp_path, run):
    plain = tmp_path / os.fsdecode(b"\xff")  # a name that is no text
    code, out, err = run("text", stories, "--out", plain)
    assert (code, err) == (0, "") and "12 documents" in out
    assert read_index(plain).num_text_tokens == 256
    for said in ("written", "already there"):
        assert said in run("text", stories, "--out", tmp_path / "trained", "--train-bpe", 290)[1]
    index = read_index(tmp_path / "trained")
    assert index.num_text_tokens == 290 and index.tokens < sum(map(len, STORIES)) / 2
    assert "train_bpe 290 -> 280" in run("text", stories, "--out", tmp_path / "trained", "--train-bpe", 280)[2]
    file = tmp_path / "trained" / "tokenizer.json"
    assert run("text", stories, "--out", tmp_path / "given", "--tokenizer", file)[0] == 0
    assert read_index(tmp_path / "given").tokenizer == read_tokenizer(file).describe() == index.tokenizer
    assert (tmp_path / "given" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert words(plain) == words(tmp_path / "trained") == words(tmp_path / "given") == STORIES


def test_documents_that_are_left_out_or_split_are_counted_and_named(tmp_path, run):
    (tmp_path / "a.jsonl").write_text('"old zebra doc"\n"old doc"\n"doc zoo"\n', encoding="utf-8")
    options = ("--tokenizer", words_tokenizer(tmp_path / "words.json", "old", "doc"), "--out", tmp_path / "data")
    code, out, err = run("text", tmp_path / "a.jsonl", *options)
    assert code == 0 and "1 documents" in out and err.count("\n") == 2
    assert f"{tmp_path / 'data' / 'left_out.jsonl'} names all that was left out\n" in err
    assert f"left out 2, the first: not in the vocabulary: 'zebra', byte 0 of {tmp_path / 'a.jsonl'}" in err
    options = ("--tokenizer", words_tokenizer(tmp_path / "words.json", "other"), "--out", tmp_path / "none")
    code, out, err = run("text", tmp_path / "a.jsonl", *options)
    assert code == 2 and "3 x not in the vocabulary" in err
    (tmp_path / "b.txt").write_text("A sentence of some words. " * 20)
    code, _, err = run("text", tmp_path / "b.txt", "--out", tmp_path / "out", "--seq-len", 64)
    assert code == 0 and "split 1 documents that are longer than a pack" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokenizer", "none.json"], "none.json cannot be read"),
        (["--tokenizer", "none.json", "--train-bpe", 300], "got both"),
        (["--train-bpe", 100], "must be at least 256, got 100"),
        (["--train-bpe", 60_000], "must be at most the"),
        (["--field", "body"], "got none (12 x no text)"),
        (["--where", "text > abc"], "condition must be FIELD, an operator of < <= > >= == !=, and a number"),
        (["--limit-tokens", 99, "--train-bpe", 300], "--limit-tokens must be given without --train-bpe"),
        (["--dedup", "images"], "--dedup of texts must be documents, got images"),
        (["--part", "3/2"], "--part must be I/N with I in 1..N, got '3/2'"),
        (["--heldout", 1.5], "--heldout must be a share between 0 and 1, got 1.5"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_get_one_line_and_code_2(stories, tmp_path, run, options, said):
    assert said in run("text", stories, "--out", tmp_path / "data", *options)[2]
    assert not (tmp_path / "data").exists()


def test_documents_are_chosen_divided_and_read_in_parts(stories, tmp_path, run):
    stories.write_text(stories.read_text() + json.dumps({"text": STORIES[0]}) + "\n")
    options = ("text", stories, "--heldout", 0.3, "--dedup", "documents", "--seq-len", 128)
    data = tmp_path / "data"
    _, out, err = run(*options, "--out", data, "--limit", 13)
    assert [line.split(": written: ")[0] for line in out.splitlines()] == [str(data / "train"), str(data / "heldout")]
    assert "stopped at the limit: the first 13 documents of the source" in err
    assert "left out 1: duplicate documents: byte " in err
    assert sorted(words(data / "train") + words(data / "heldout")) == STORIES
    _, out, err = run(*options, "--out", tmp_path / "parts", "--part", "2/2")
    assert out.endswith("part 2/2 is read; missing: 1/2; the last part writes the shards\n") and not err
    assert run(*options, "--out", tmp_path / "parts", "--part", "1/2")[1].count(": written: ") == 2
    assert run(*options, "--out", tmp_path / "parts")[1].count(": already there: ") == 2


@pytest.mark.parametrize("out", [".", "packed", "deeper/packed"])
def test_a_folder_is_not_made_inside_of_its_source(stories, tmp_path, run, out):
    assert "must lie outside of the sources" in run("text", tmp_path, "--out", tmp_path / out)[2]
    assert [path.name for path in tmp_path.iterdir()] == ["stories.jsonl"]


@pytest.mark.parametrize("given", ["stories.jsonl", "./stories.jsonl", "absolute"])
def test_a_folder_may_be_made_beside_a_file_that_was_given(stories, tmp_path, run, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert "12 documents" in run("text", stories if given == "absolute" else given, "--out", "data")[1]


def test_a_folder_is_not_made_where_links_of_its_source_lead(stories, tmp_path, run):
    disk, partial = tmp_path / "disk", tmp_path / "disk.partial"
    disk.mkdir()
    stories.rename(disk / "stories.jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "more").symlink_to(disk)
    assert "must lie outside of the sources" in run("text", tmp_path / "links", "--out", disk / "out")[2]
    assert run("text", disk, "--out", partial / ".." / "other")[0] == 0
    disk.rename(partial)
    assert "must lie outside of the sources" in run("text", partial, "--out", disk)[2]


def test_pairs_become_images_with_a_tokenizer_of_their_captions_and_damage_is_named(tmp_path, run):
    pixels = np.full((20, 30, 3), 99, np.uint8)
    kinds = {"jpg": saved(Image.fromarray(pixels), "JPEG"), "png": png(pixels)}
    (tmp_path / "in").mkdir()
    members = [m for k, data in kinds.items() for m in ((f"{k}.{k}", data), (f"{k}.txt", f"a picture, {k}".encode()))]
    make_tar(tmp_path / "in" / "a.tar", members)
    make_tar(tmp_path / "in" / "b.tar", [("b\nprepare: all is well\x1b[2J.jpg", b"no picture")])
    make_tar(tmp_path / "in" / "c.tar", [], ending=False)
    code, out, err = run("pairs", tmp_path / "in", "--out", tmp_path / "data", *SIZE, "--train-bpe", 260)
    assert code == 0 and "2 documents" in out and read_index(tmp_path / "data").num_text_tokens == 260
    forged, damaged = sorted(err.splitlines())
    assert "left out 1: tar damaged: " in damaged and "c.tar" in damaged
    assert r"left out 1: no caption: b\nprepare: all is well\x1b[2J in " in forged
    assert words(tmp_path / "data") == ["a picture, jpg", "a picture, png"]
    assert all(image.values.shape == (16, 16, 3) for _, image in documents_in(tmp_path / "data"))


def test_pairs_are_filtered_by_size_caption_and_record(tmp_path, run):
    sizes = {"good": (16, 16), "small": (16, 9), "long": (50, 16), "a": (16, 16), "poor": (16, 16)}
    members = [
        member
        for name, size in sizes.items()
        for member in (
            (f"{name}.png", png(np.zeros((*size, 3), np.uint8))),
            (f"{name}.json", json.dumps({"caption": name, "similarity": 0.1 if name == "poor" else 0.4}).encode()),
        )
    ]
    make_tar(tmp_path / "0.tar", members)
    filters = ("--where", "similarity > 0.3", "--min-side", 10, "--max-aspect", 2, "--caption-length", "2:")
    code, out, err = run("pairs", tmp_path / "0.tar", "--out", tmp_path / "out", *SIZE, *filters)
    assert code == 0 and "1 documents" in out and words(tmp_path / "out") == ["good"]
    reasons = ("aspect ratio too large", "caption too short", "image too small", "not similarity > 0.3")
    assert [line.split(": ")[1:3] for line in err.splitlines()[:4]] == [["left out 1", reason] for reason in reasons]


@pytest.mark.parametrize("option", [("--where", "x >"), ("--caption-length", "9"), ("--min-side", "0")], ids=str)
def test_filters_that_cannot_be_used_are_refused_before_anything_is_read(tmp_path, run, option):
    assert "none.tar" not in run("pairs", tmp_path / "none.tar", "--out", tmp_path / "out", *option)[2]
