"""Sources as systems, hubs and other programs write them are read as their users expect, and repairs are counted."""

import base64
import json
import os
import re
import tarfile
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import webdataset as wds
from build_cases import TOKENIZER, found_in, make_tar, pairs_recipe, read
from image_files import picture, png_with_profile

from transfusion_fast.errors import InputError, Repaired
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

APPLE_DOUBLE = bytes.fromhex("00051607 00020000") + b"Mac OS X".ljust(16) + bytes(80)


def test_a_tar_from_macos_holds_the_samples_that_webdataset_reads(tmp_path):
    """`tar` on macOS writes `._NAME` before each file, and the Finder leaves its own between them."""
    members, expected = [], []
    for key in ("./0", "./sub/1", "2"):
        folder, _, stem = key.rpartition("/")
        for kind, content in (("jpg", b"image " + stem.encode()), ("txt", b"words")):
            members += [
                (os.path.join(folder, f"._{stem}.{kind}"), APPLE_DOUBLE),
                (f"{key}.{kind}", content),
                (os.path.join("__MACOSX", f"._{stem}.{kind}"), APPLE_DOUBLE),
                (os.path.join(folder, ".DS_Store"), b"x"),
                (os.path.join(folder, "Thumbs.db"), b"x"),
                ("README", b"x"),
                (".jpg", b"x"),
            ]
        expected.append(("words", b"image " + stem.encode()))
    make_tar(tmp_path / "a.tar", members)
    documents, rejected = read(PairsSource.of([tmp_path]))
    assert documents == expected
    assert rejected == {"system file": 24, "no key": 12}
    make_tar(tmp_path / "flat.tar", [m for m in members if not re.search("sub/|Thumbs|MACOSX", m[0])])
    samples = wds.WebDataset(str(tmp_path / "flat.tar"), shardshuffle=False)
    pairs = [(sample["txt"].decode(), sample["jpg"]) for sample in samples if "jpg" in sample and "txt" in sample]
    assert pairs == [expected[0], expected[2]] == read(PairsSource.of([tmp_path / "flat.tar"]))[0]


def test_system_files_in_folders_are_passed_over_and_named(tmp_path):
    (tmp_path / "__MACOSX").mkdir()
    for name in ("._a.txt", "__MACOSX/b.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(APPLE_DOUBLE)
    with pytest.raises(InputError, match=r"got none \(2 were passed over, as system file: .*\); give another"):
        TextSource.of([tmp_path])
    (tmp_path / "a.txt").write_text("one")
    source = TextSource.of([tmp_path])
    assert [file.name for file in source.files] == ["a.txt"]
    assert Counter(stray.reason for stray in source.passed_over) == {"system file": 2}  # the others are of other kinds


def test_links_in_a_tar_lead_to_its_files_and_not_out_of_it(tmp_path):
    make_tar(tmp_path / "0.jpg", [])  # a file beside the tar, which a link must not reach
    links = [("b/1.jpg", tarfile.LNKTYPE, "./a/0.jpg"), ("b/2.jpg", tarfile.SYMTYPE, "../a/0.jpg"),
             ("b/3.jpg", tarfile.SYMTYPE, "1.jpg"), ("b/4.jpg", tarfile.SYMTYPE, "../0.jpg"),
             ("b/5.jpg", tarfile.SYMTYPE, "5.jpg"), ("b/6.jpg", tarfile.LNKTYPE, "../0.jpg")]  # fmt: skip
    make_tar(tmp_path / "a.tar", [("./a/0.jpg", b"image"), ("./a/0.txt", b"words 0")])
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
            caption = tmp_path / "caption"
            caption.write_text(f"words {name[2]}")
            archive.add(caption, name.replace("jpg", "txt"))
    documents, rejected = read(PairsSource.of([tmp_path / "a.tar"]))
    assert documents == [(f"words {n}", b"image") for n in range(4)]
    assert rejected == {"broken link": 3}


def test_links_on_disk_are_followed_as_hubs_and_annexes_lay_them(tmp_path):
    blobs, snapshot, elsewhere = tmp_path / "blobs", tmp_path / "snapshots" / "0", tmp_path / "elsewhere"
    for folder in (blobs, snapshot / "images", elsewhere):
        folder.mkdir(parents=True)
    (blobs / "aa").write_bytes(b"one")
    (blobs / "bb").write_text(json.dumps(["a", {"image": "images/1.jpg"}, {"image": "pics/../pics/2.jpg"}]))
    (elsewhere / "2.jpg").write_bytes(b"two")
    (snapshot / "a.jsonl").symlink_to("../../blobs/bb")
    (snapshot / "images" / "1.jpg").symlink_to("../../../blobs/aa")
    (snapshot / "pics").symlink_to(elsewhere)
    assert read(InterleavedSource.of([snapshot])) == ([("a", b"one", b"two")], {})
    (tmp_path / "data").symlink_to(snapshot)
    (blobs / "bb").write_text(json.dumps([{"image": f"{tmp_path}/data/pics/2.jpg"}]))
    assert read(InterleavedSource.of([tmp_path / "data"])) == ([(b"two",)], {})


@pytest.mark.parametrize("of", [
    lambda data: base64.b64encode(data).decode(),
    lambda data: base64.b64encode(data).decode().rstrip("="),
    lambda data: base64.urlsafe_b64encode(data).decode(),
    lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode(),
    lambda data: "data:image/png;x=y;base64," + base64.b64encode(data).decode().replace("+", "%2B").replace("=", "%3D"),
], ids=["standard", "unpadded", "URL-safe", "URL-safe, unpadded", "lines", "data URI", "escaped data URI"])  # fmt: skip
def test_base64_of_every_kind_gives_its_bytes(tmp_path, of):
    data = bytes(range(256)) * 4 + b"\xfb\xff"  # has all letters of both alphabets
    for length in (1024, 1025, 1026):
        (tmp_path / "a.jsonl").write_text(json.dumps([{"base64": of(data[-length:])}]))
        assert read(InterleavedSource.of([tmp_path])) == ([(data[-length:],)], {})


CESU = b"\xed\xa0\xbd\xed\xb8\x80"  # U+1F600 as two surrogates


@pytest.mark.parametrize(("name", "content", "text"), [
    ("a.jsonl", b'{"text": "a ' + CESU + b'"}', "a \U0001f600"),
    ("b.jsonl", b'["a \\ud83d\\ude00", "b \\ud83d"]', None),
    ("a.txt", b"a " + CESU, "a \U0001f600"),
], ids=["JSON", "halves", "text"])  # fmt: skip
def test_surrogates_are_joined_to_characters_and_counted(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    source = TextSource.of([tmp_path]) if text else InterleavedSource.of([tmp_path])
    repaired, document = found_in(source)
    assert isinstance(repaired, Repaired) and str(repaired).startswith("surrogates: ")
    assert str(tmp_path / name) in str(repaired)
    [document] = Encoder(TOKENIZER, 64).encode([document])
    decoded = [TOKENIZER.decode(segment.ids) for segment in document[0]]
    assert decoded == ([text] if text else ["a \U0001f600", "b ?"])


def test_captions_and_rows_of_cesu_8_are_joined(tmp_path):
    make_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", CESU)])
    values = pyarrow.array([CESU], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    for source in (PairsSource.of([tmp_path]), TextSource.of([tmp_path])):
        documents, counted = read(source)
        assert documents[0][0] == "\U0001f600" and counted == {"surrogates": 1}


def test_repairs_are_counted_and_named_beside_what_is_left_out(tmp_path):
    """An image with a broken colour profile is used."""
    members = [(f"{n}.png", png_with_profile(picture(16, 16), b"broken")) for n in range(3)]
    members += [(f"{n}.txt", b"words") for n in range(3)]
    make_tar(tmp_path / "a.tar", [*sorted(members), ("._4.png", APPLE_DOUBLE)])
    built = build(pairs_recipe(tmp_path / "a.tar"), tmp_path / "out", processes=2)
    assert built.index.documents == 3
    assert built.repaired == {"colour profile": 3} and built.rejected == {"system file": 1}
    listed = [json.loads(line) for line in (tmp_path / "out" / "repaired.jsonl").read_text().splitlines()]
    assert [line["detail"].rpartition(", ")[2] for line in listed] == [f"{n} in {tmp_path}/a.tar" for n in range(3)]
    left_out, repaired, rest = built.remarks(tmp_path / "out")
    assert left_out.startswith("left out 1: system file: ._4.png in ")
    assert repaired.startswith("repaired 3, the first: colour profile: ") and rest.endswith(
        "names all that was repaired"
    )
