"""The commands that prepare files of one's own: what the data folder then holds, and what is said of the rest."""

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
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import load_tokenizer, read_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare

STORIES = [f"once upon a time there was cat number {n}, and it was content" for n in range(12)]


@pytest.fixture
def stories(tmp_path):
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES), encoding="utf-8")
    return file


def run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = prepare.main([*(str(argument) for argument in arguments), "--processes", "1"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def documents(folder):
    """The text of each, sorted."""
    reader = PackReader(folder)
    tokenizer = load_tokenizer(reader.index.tokenizer, folder)
    found = [document for number in range(len(reader)) for document in reader.read(number).documents(())]
    return sorted("".join(tokenizer.decode(segment.ids) for segment in document) for document in found)


def words_tokenizer(path, *words):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_text_is_bytes_unless_told_otherwise(stories, tmp_path, capsys):
    code, out, err = run(capsys, "text", stories, "--out", tmp_path / "data")
    assert (code, err) == (0, "") and "12 documents" in out
    assert read_index(tmp_path / "data").num_text_tokens == 256
    assert documents(tmp_path / "data") == sorted(STORIES)


def test_train_bpe_trains_on_these_texts_once(stories, tmp_path, capsys, monkeypatch):
    code, _, err = run(capsys, "text", stories, "--out", tmp_path / "data", "--train-bpe", 290)
    assert (code, err) == (0, "")
    index = read_index(tmp_path / "data")
    assert index.num_text_tokens == 290
    assert index.tokens < sum(map(len, STORIES)) / 2
    assert documents(tmp_path / "data") == sorted(STORIES)
    with monkeypatch.context() as patched:
        patched.setattr("transfusion_fast.prepare.build.train_bpe", lambda *_: pytest.fail("it was trained again"))
        code, out, _ = run(capsys, "text", stories, "--out", tmp_path / "data", "--train-bpe", 290)
    assert code == 0 and "already there" in out
    code, _, err = run(capsys, "text", stories, "--out", tmp_path / "data", "--train-bpe", 280)
    assert code == 2 and "train_bpe 290 -> 280" in err


def test_a_tokenizer_of_a_file_is_used_and_kept(stories, tmp_path, capsys):
    run(capsys, "text", stories, "--out", tmp_path / "first", "--train-bpe", 290)
    file = tmp_path / "first" / "tokenizer.json"
    code, _, err = run(capsys, "text", stories, "--out", tmp_path / "second", "--tokenizer", file)
    assert (code, err) == (0, "")
    index = read_index(tmp_path / "second")
    assert index.tokenizer == read_tokenizer(file).describe() == read_index(tmp_path / "first").tokenizer
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert documents(tmp_path / "second") == sorted(STORIES)


def test_documents_that_a_tokenizer_cannot_encode_are_counted_and_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('"old zebra doc"\n"old doc"\n"doc zoo"\n', encoding="utf-8")
    file = words_tokenizer(tmp_path / "words.json", "old", "doc")
    code, out, err = run(capsys, "text", tmp_path / "a.jsonl", "--out", tmp_path / "data", "--tokenizer", file)
    assert code == 0 and "1 documents" in out
    assert err.count("\n") == 2
    assert f"{tmp_path / 'data' / 'left_out.jsonl'} names all that was left out\n" in err
    assert f"left out 2: not in the vocabulary: 'zebra', byte 0 of {tmp_path / 'a.jsonl'}" in err
    file = words_tokenizer(tmp_path / "words.json", "other")
    code, out, err = run(capsys, "text", tmp_path / "a.jsonl", "--out", tmp_path / "none", "--tokenizer", file)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "3 x not in the vocabulary" in err


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
def test_options_that_cannot_be_get_one_line_and_code_2(stories, tmp_path, capsys, options, said):
    code, out, err = run(capsys, "text", stories, "--out", tmp_path / "data", *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("out", [".", "packed", "deeper/packed"])
def test_a_folder_is_not_made_inside_of_its_source(stories, tmp_path, capsys, out):
    code, _, err = run(capsys, "text", tmp_path, "--out", tmp_path / out)
    assert code == 2 and err.count("\n") == 1 and "must lie outside of the sources" in err
    assert [path.name for path in tmp_path.iterdir()] == ["stories.jsonl"]


@pytest.mark.parametrize("given", ["stories.jsonl", "./stories.jsonl", "absolute"])
def test_a_folder_may_be_made_beside_a_file_that_was_given(stories, tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "text", stories if given == "absolute" else given, "--out", "data")
    assert code == 0 and "12 documents" in out


def test_a_folder_is_not_made_where_links_lead(stories, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    stories.rename(tmp_path / "disk" / "stories.jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "more").symlink_to(tmp_path / "disk")
    code, _, err = run(capsys, "text", tmp_path / "links", "--out", tmp_path / "disk" / "out")
    assert code == 2 and "must lie outside of the sources" in err
    code, _, err = run(capsys, "text", tmp_path / "disk", "--out", tmp_path / "disk.partial" / ".." / "other")
    assert code == 0
    (tmp_path / "disk").rename(tmp_path / "disk.partial")
    code, _, err = run(capsys, "text", tmp_path / "disk.partial", "--out", tmp_path / "disk")
    assert code == 2 and "must lie outside of the sources" in err


@pytest.mark.parametrize("option", ["--out", "--tokenizer"])
def test_no_url_is_taken_for_a_folder(stories, tmp_path, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(capsys, "text", stories, "--out", tmp_path / "out", option, "s3://bucket/data")
    assert ended.value.code == 2 and "must be local, got 's3://bucket/data'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stories.jsonl"]


def test_a_folder_whose_name_is_no_text_can_be_looked_at(stories, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    for command in (["text", stories, "--out", folder, "--processes", "1"], ["info", folder],
                    ["preview", folder, "--out", tmp_path / "page.html"]):  # fmt: skip
        ended = subprocess.run([sys.executable, prepare.__file__, *command], capture_output=True)
        assert ended.returncode == 0 and b"Traceback" not in ended.stderr


def test_many_small_files_are_prepared_with_few_open(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(150):
        (tmp_path / "in" / f"{number}.jsonl").write_text(json.dumps(f"story {number}"))
    command = [sys.executable, prepare.__file__, "text", tmp_path / "in", "--out", tmp_path / "out"]
    subprocess.run([*command, "--processes", "1"], check=True, preexec_fn=_few_files)
    assert len(documents(tmp_path / "out")) == 150


def _few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


SIZE = ("--image-size", "16", "--patch-size", "8", "--seq-len", "64")


def test_pairs_of_every_kind_of_image_with_a_tokenizer_of_their_captions(tmp_path, capsys):
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    members = [(f"{name}.{name}", picture(kind)) for name, kind in kinds.items()]
    captions = [(f"{name}.txt", f"a picture, a picture of {name}".encode()) for name in kinds]
    write_tar(tmp_path / "a.tar", sorted(members + captions))
    code, out, err = run(capsys, "pairs", tmp_path / "a.tar", "--out", tmp_path / "data", *SIZE, "--train-bpe", 260)
    assert (code, err) == (0, "") and "4 documents" in out
    reader = PackReader(tmp_path / "data")
    assert reader.index.num_text_tokens == 260
    tokenizer = load_tokenizer(reader.index.tokenizer, tmp_path / "data")
    found = [d for number in range(len(reader)) for d in reader.read(number).documents(reader.index.modalities)]
    assert sorted(tokenizer.decode(text.ids) for text, _ in found) == sorted(text.decode() for _, text in captions)
    assert all(isinstance(image, ImageSegment) and image.values.shape[:2] == (16, 16) for _, image in found)


def test_a_damaged_tar_and_a_name_that_forges_lines_are_named_in_one_line_each(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", [("a.jpg", picture("JPEG")), ("a.txt", b"words")])
    write_tar(tmp_path / "in" / "b.tar", [("b\nprepare: all is well\x1b[2J.jpg", b"no picture")])
    with tarfile.open(tmp_path / "in" / "c.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("c.jpg")
        member.pax_headers = {"GNU.sparse.size": "abc"}
        archive.addfile(member)
    code, out, err = run(capsys, "pairs", tmp_path / "in", "--out", tmp_path / "data", *SIZE)
    assert code == 0 and "1 documents" in out
    damaged, forged = sorted(err.splitlines(), key=lambda line: "no caption" in line)
    assert "left out 1: tar damaged: " in damaged and "c.tar" in damaged
    assert r"left out 1: no caption: b\nprepare: all is well\x1b[2J in " in forged
