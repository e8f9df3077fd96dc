"""Fashion-MNIST and the stories with its pictures: what the documents hold, and where the files may come from."""

import gzip
import http.server
import shutil
import socket
import subprocess
import threading
from collections import Counter
from functools import partial

import fashion_files
import numpy as np
import pytest
from fashion_files import SIZES

from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples import fashion, stories
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.fashion import CLASSES, FashionMnist
from transfusion_fast.prepare.examples.stories import Stories

TOKENIZER = ByteTokenizer()


@pytest.fixture
def files(tmp_path, monkeypatch):
    return fashion_files.write(tmp_path / "files", monkeypatch)


def refusal(origin):
    with pytest.raises(InputError) as error:
        FashionMnist(origin).documents("train", TOKENIZER)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_are_a_name_and_its_picture(files, split):
    documents = FashionMnist(files).documents(split, TOKENIZER)
    assert len(documents) == SIZES[split]
    for number, (caption, image) in enumerate(documents):
        assert TOKENIZER.decode(caption.ids) == CLASSES[number % 10]
        np.testing.assert_array_equal(image.values, np.full((28, 28, 1), number, np.uint8), strict=True)


def test_other_contents_are_refused_by_name(files):
    path = files / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"x"))
    assert "train-images-idx3-ubyte.gz must have the sha256" in refusal(files)


def test_a_damaged_or_missing_file_is_named(files):
    path = files / "train-images-idx3-ubyte.gz"
    for damaged in (path.read_bytes()[:100], b"no gzip", b""):
        path.write_bytes(damaged)
        assert "train-images-idx3-ubyte.gz" in refusal(files)
    path.unlink()
    assert "must hold train-images-idx3-ubyte.gz" in refusal(files)


def test_other_sources_are_refused(tmp_path):
    assert "got 'nowhere'" in refusal("nowhere")
    (tmp_path / "x.zip").write_text("")
    assert "x.zip" in refusal(tmp_path / "x.zip")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg")
def test_a_package_of_debian_is_unpacked_without_root(files, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(files, tree / "usr" / "share" / "datasets")
    (tree / "DEBIAN").mkdir()
    fields = "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(fields)
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "f.deb"], check=True, capture_output=True)
    assert len(FashionMnist(tmp_path / "f.deb").documents("train", TOKENIZER)) == SIZES["train"]
    (tmp_path / "f.deb").write_bytes(b"damaged")
    assert "dpkg -x of dataset-fashion-mnist failed" in refusal(tmp_path / "f.deb")


def test_without_apt_the_message_says_what_else_to_give(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs apt-get, which cannot be run" in refusal("debian")


@pytest.fixture
def web(files, monkeypatch):
    for file in (files / "deeper").iterdir():
        (files / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fashion, "URL", f"http://127.0.0.1:{server.server_port}/")
    yield files
    server.shutdown()
    server.server_close()


def test_downloads_are_checked(web):
    assert len(FashionMnist("web").documents("heldout", TOKENIZER)) == SIZES["heldout"]
    path = web / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"other"))
    assert "t10k-labels-idx1-ubyte.gz must have the sha256" in refusal("web")
    path.unlink()
    assert "t10k-labels-idx1-ubyte.gz cannot be downloaded" in refusal("web")


def test_an_answer_that_is_not_http_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection = server.accept()[0]
            connection.recv(4096)
            connection.sendall(b"garbage\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(fashion, "URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        assert "cannot be downloaded" in refusal("web")


def test_a_folder_that_is_there_needs_no_download(files, tmp_path):
    settings = {"sequence_length": 256, "packs_per_shard": 4}
    written = prepare_splits(FashionMnist(files), tmp_path / "out", **settings)
    again = prepare_splits(FashionMnist("nowhere"), tmp_path / "out", **settings)
    for split in ("train", "heldout"):
        assert again[split].reused and not written[split].reused and again[split].index == written[split].index


@pytest.fixture
def few_stories(files, monkeypatch):
    monkeypatch.setattr(stories, "STORIES", {"train": 60, "heldout": 20})
    return Stories(FashionMnist(files))


def test_stories_name_each_picture_just_before_or_behind_it(few_stories):
    found = Counter()
    for document in few_stories.documents("train", TOKENIZER):
        kinds = [type(segment) for segment in document]
        assert kinds == [TextSegment, *[ImageSegment, TextSegment] * (len(kinds) // 2)]
        texts = [TOKENIZER.decode(s.ids) if isinstance(s, TextSegment) else "" for s in document]
        for place, segment in enumerate(document):
            if isinstance(segment, ImageSegment):
                name = CLASSES[int(segment.values[0, 0, 0]) % 10]
                last, first = texts[place - 1].rsplit(". ")[-1], texts[place + 1].split(". ")[0]
                assert name in last or name in first
                found["before" if name in last else "behind"] += 1
    assert min(found.values()) > 30


def test_stories_are_the_same_each_time_and_differ(few_stories):
    def read(split):
        return [
            tuple(bytes(getattr(s, "ids", getattr(s, "values", None))) for s in d)
            for d in few_stories.documents(split, TOKENIZER)
        ]

    assert read("train") == read("train")
    assert len(set(read("train") + read("heldout"))) == 80


def test_held_out_stories_have_held_out_pictures_only(few_stories):
    shown = {
        int(s.values[0, 0, 0]) for d in few_stories.documents("train", TOKENIZER) for s in d if hasattr(s, "values")
    }
    assert max(shown) >= SIZES["heldout"]  # pictures that only the training set has
    heldout = few_stories.documents("heldout", TOKENIZER)
    assert all(int(s.values[0, 0, 0]) < SIZES["heldout"] for d in heldout for s in d if hasattr(s, "values"))
