"""The commands that prepare data folders: what the folder then holds, and what is printed about the rest."""

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from build_cases import content, documents_in, words
from fashion_files import write as write_fashion
from image_files import saved
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.tokenizer import load_tokenizer, read_tokenizer
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
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run_command(*arguments):
        one_process = () if arguments[0] in ("digits", "fashion-mnist", "stories") else ("--processes", "1")
        code = prepare.main([*map(str, arguments), *one_process])
        return code, *capsys.readouterr()

    return run_command


def words_tokenizer(path, *vocabulary):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_the_digits_command_prints_a_summary_and_may_be_repeated(tmp_path, run):
    written, repeated = (run("digits", tmp_path / "out")[1].splitlines() for _ in range(2))
    assert [line.split(": ")[1] for line in written + repeated] == ["written"] * 2 + ["already there"] * 2
    assert "packs of 512" in written[0] and "% waste" in written[0]


def test_what_the_digits_command_cannot_use_is_one_line_each(tmp_path, run):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "notes.txt").write_text("mine")
    before = content(tmp_path)
    for arguments in (["mine"], ["mine/train/notes.txt"], ["out", "--seq-len", 4]):
        code, out, err = run("digits", tmp_path / arguments[0], *arguments[1:])
        assert (code, out) == (2, "") and err.startswith("prepare: ") and err.count("\n") == 1
    assert content(tmp_path) == before


def test_fashion_mnist_and_stories_take_a_folder_of_the_files(tmp_path, run, monkeypatch):
    monkeypatch.setattr(story_data, "STORIES", {"train": 60, "heldout": 20})
    files = write_fashion(tmp_path / "files", monkeypatch)
    for name in ("fashion-mnist", "stories"):
        arguments = (name, tmp_path / name, "--source", files, "--seq-len", "1024")
        lines = run(*arguments)[1].splitlines() + run(*arguments)[1].splitlines()
        assert [line.split(": ")[1] for line in lines] == ["written"] * 2 + ["already there"] * 2
    code, _, err = run("stories", tmp_path / "fashion-mnist", "--source", files)
    assert code == 2 and "source.data fashion-mnist -> stories" in err


def test_text_is_bytes_by_default(stories, tmp_path, run):
    code, out, err = run("text", stories, "--out", tmp_path / "data")
    assert (code, err) == (0, "") and "12 documents" in out
    assert read_index(tmp_path / "data").num_text_tokens == 256
    assert words(tmp_path / "data") == STORIES


def test_a_tokenizer_is_trained_on_the_texts_or_given_as_a_file_and_kept(stories, tmp_path, run):
    for _ in range(2):
        code, out, err = run("text", stories, "--out", tmp_path / "first", "--train-bpe", 290)
        assert (code, err) == (0, "")
    assert "already there" in out
    index = read_index(tmp_path / "first")
    assert index.num_text_tokens == 290 and index.tokens < sum(map(len, STORIES)) / 2
    code, _, err = run("text", stories, "--out", tmp_path / "first", "--train-bpe", 280)
    assert code == 2 and "train_bpe 290 -> 280" in err
    file = tmp_path / "first" / "tokenizer.json"
    assert run("text", stories, "--out", tmp_path / "second", "--tokenizer", file)[0] == 0
    assert read_index(tmp_path / "second").tokenizer == read_tokenizer(file).describe() == index.tokenizer
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert words(tmp_path / "first") == words(tmp_path / "second") == STORIES


def test_documents_that_a_tokenizer_cannot_encode_are_counted_and_named(tmp_path, run):
    (tmp_path / "a.jsonl").write_text('"old zebra doc"\n"old doc"\n"doc zoo"\n', encoding="utf-8")
    file = words_tokenizer(tmp_path / "words.json", "old", "doc")
    code, out, err = run("text", tmp_path / "a.jsonl", "--out", tmp_path / "data", "--tokenizer", file)
    assert code == 0 and "1 documents" in out and err.count("\n") == 2
    assert f"{tmp_path / 'data' / 'left_out.jsonl'} names all that was left out\n" in err
    assert f"left out 2: not in the vocabulary: 'zebra', byte 0 of {tmp_path / 'a.jsonl'}" in err
    file = words_tokenizer(tmp_path / "words.json", "other")
    code, out, err = run("text", tmp_path / "a.jsonl", "--out", tmp_path / "none", "--tokenizer", file)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "3 x not in the vocabulary" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokenizer", "none.json"], "none.json cannot be read"),
        (["--tokenizer", "none.json", "--train-bpe", 300], "got both"),
        (["--train-bpe", 100], "must be at least 256, got 100"),
        (["--train-bpe", 60_000], "must be at most the"),
        (["--field", "body"], "got none (12 x no text)"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_get_one_line_and_code_2(stories, tmp_path, run, options, said):
    code, out, err = run("text", stories, "--out", tmp_path / "data", *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("out", [".", "packed", "deeper/packed"])
def test_a_folder_is_not_made_inside_of_its_source(stories, tmp_path, run, out):
    code, _, err = run("text", tmp_path, "--out", tmp_path / out)
    assert code == 2 and err.count("\n") == 1 and "must lie outside of the sources" in err
    assert [path.name for path in tmp_path.iterdir()] == ["stories.jsonl"]


@pytest.mark.parametrize("given", ["stories.jsonl", "./stories.jsonl", "absolute"])
def test_a_folder_may_be_made_beside_a_file_that_was_given(stories, tmp_path, run, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("text", stories if given == "absolute" else given, "--out", "data")
    assert code == 0 and "12 documents" in out


def test_a_folder_is_not_made_where_links_of_its_source_lead(stories, tmp_path, run):
    (tmp_path / "disk").mkdir()
    stories.rename(tmp_path / "disk" / "stories.jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "more").symlink_to(tmp_path / "disk")
    code, _, err = run("text", tmp_path / "links", "--out", tmp_path / "disk" / "out")
    assert code == 2 and "must lie outside of the sources" in err
    assert run("text", tmp_path / "disk", "--out", tmp_path / "disk.partial" / ".." / "other")[0] == 0
    (tmp_path / "disk").rename(tmp_path / "disk.partial")
    code, _, err = run("text", tmp_path / "disk.partial", "--out", tmp_path / "disk")
    assert code == 2 and "must lie outside of the sources" in err


@pytest.mark.parametrize("option", ["--out", "--tokenizer"])
def test_no_url_is_taken_for_a_folder(stories, tmp_path, run, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run("text", stories, "--out", tmp_path / "out", option, "s3://bucket/data")
    assert ended.value.code == 2 and "must be local, got 's3://bucket/data'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stories.jsonl"]


def test_many_small_files_become_a_folder_whose_name_is_no_text_with_few_files_open(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(150):
        (tmp_path / "in" / f"{number}.jsonl").write_text(json.dumps(f"story {number}"))
    out = tmp_path / os.fsdecode(b"\xff")
    command = [sys.executable, prepare.__file__, "text", tmp_path / "in", "--out", out, "--processes", "1"]
    limit = (200, 200)
    printed = subprocess.run(
        command, check=True, capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    ).stdout
    assert b"150 documents" in printed and len(words(out)) == 150


def test_pairs_of_every_kind_of_image_with_a_tokenizer_of_their_captions(tmp_path, run):
    image = Image.fromarray(np.full((20, 30, 3), 99, np.uint8))
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    captions = {name: f"a picture, a picture of {name}" for name in kinds}
    members = [(f"{name}.{name}", saved(image, kind)) for name, kind in kinds.items()]
    members += [(f"{name}.txt", caption.encode()) for name, caption in captions.items()]
    write_tar(tmp_path / "a.tar", sorted(members))
    code, out, err = run("pairs", tmp_path / "a.tar", "--out", tmp_path / "data", *SIZE, "--train-bpe", 260)
    assert (code, err) == (0, "") and "4 documents" in out
    index = read_index(tmp_path / "data")
    tokenizer = load_tokenizer(index.tokenizer, tmp_path / "data")
    found = documents_in(tmp_path / "data")
    assert index.num_text_tokens == 260
    assert sorted(tokenizer.decode(text.ids) for text, _ in found) == sorted(captions.values())
    assert all(isinstance(image, ImageSegment) and image.values.shape[:2] == (16, 16) for _, image in found)


def test_a_damaged_tar_and_a_name_that_forges_lines_are_named_in_one_line_each(tmp_path, run):
    (tmp_path / "in").mkdir()
    jpeg = saved(Image.fromarray(np.full((20, 30, 3), 99, np.uint8)), "JPEG")
    write_tar(tmp_path / "in" / "a.tar", [("a.jpg", jpeg), ("a.txt", b"words")])
    write_tar(tmp_path / "in" / "b.tar", [("b\nprepare: all is well\x1b[2J.jpg", b"no picture")])
    with tarfile.open(tmp_path / "in" / "c.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("c.jpg")
        member.pax_headers = {"GNU.sparse.size": "abc"}
        archive.addfile(member)
    code, out, err = run("pairs", tmp_path / "in", "--out", tmp_path / "data", *SIZE)
    assert code == 0 and "1 documents" in out
    damaged, forged = sorted(err.splitlines(), key=lambda line: "no caption" in line)
    assert "left out 1: tar damaged: " in damaged and "c.tar" in damaged
    assert r"left out 1: no caption: b\nprepare: all is well\x1b[2J in " in forged


def test_documents_that_are_split_are_counted(tmp_path, run):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("A sentence of some words. " * 20)
    (tmp_path / "in" / "b.txt").write_text("short")
    code, _, err = run("text", tmp_path / "in", "--out", tmp_path / "out", "--seq-len", 64)
    assert code == 0 and "split 1 documents that are longer than a pack" in err
