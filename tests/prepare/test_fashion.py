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
from build_cases import TOKENIZER, fingerprint, words_of
from fashion_files import SIZES

from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples import fashion, stories
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.fashion import CLASSES, FashionMnist
from transfusion_fast.prepare.examples.stories import Stories


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
    for number, document in enumerate(documents):
        assert words_of(document) == CLASSES[number % 10]
        np.testing.assert_array_equal(document[1].values, np.full((28, 28, 1), number, np.uint8), strict=True)


def test_other_damaged_or_missing_files_are_refused_by_name(files):
    path = files / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(content)[:-1] + b"x"))
    assert f"{path.name} must have the sha256" in refusal(files)
    for damaged in (content[:100], b"no gzip", b""):
        path.write_bytes(damaged)
        assert path.name in refusal(files)
    path.unlink()
    assert f"must hold {path.name}" in refusal(files)


def test_other_sources_are_refused(tmp_path, monkeypatch):
    assert "got 'nowhere'" in refusal("nowhere")
    (tmp_path / "x.zip").write_text("")
    assert "x.zip" in refusal(tmp_path / "x.zip")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs apt-get, which cannot be run" in refusal("debian")


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


def test_downloads_are_checked(files, monkeypatch):
    for file in (files / "deeper").iterdir():
        (files / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(fashion, "URL", f"http://127.0.0.1:{server.server_port}/")
        assert len(FashionMnist("web").documents("heldout", TOKENIZER)) == SIZES["heldout"]
        path = files / "t10k-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(b"other"))
        assert f"{path.name} must have the sha256" in refusal("web")
        path.unlink()
        assert f"{path.name} cannot be downloaded" in refusal("web")
        server.shutdown()


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


def test_stories_name_each_picture_of_their_split_just_before_or_behind_it(files, monkeypatch):
    monkeypatch.setattr(stories, "STORIES", {"train": 60, "heldout": 20})
    splits = {split: Stories(FashionMnist(files)).documents(split, TOKENIZER) for split in ("train", "heldout")}
    found, shown = Counter(), {"train": set(), "heldout": set()}
    for split, documents in splits.items():
        for document in documents:
            kinds = [type(segment) for segment in document]
            assert kinds == [TextSegment, *[ImageSegment, TextSegment] * (len(kinds) // 2)]
            for before, image, after in zip(document[::2], document[1::2], document[2::2], strict=False):
                number = int(image.values[0, 0, 0])
                last, first = words_of([before]).rsplit(". ")[-1], words_of([after]).split(". ")[0]
                assert CLASSES[number % 10] in last or CLASSES[number % 10] in first
                found[split, "before" if CLASSES[number % 10] in last else "behind"] += 1
                shown[split].add(number)
    assert min(found["train", "before"], found["train", "behind"]) > 30
    assert max(shown["train"]) >= SIZES["heldout"] > max(shown["heldout"]), "only the training set has those pictures"
    again = Stories(FashionMnist(files)).documents("train", TOKENIZER)
    assert list(map(fingerprint, again)) == list(map(fingerprint, splits["train"]))
    assert len(set(map(fingerprint, splits["train"] + splits["heldout"]))) == 80
