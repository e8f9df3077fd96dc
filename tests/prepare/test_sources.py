"""Sources give every document once, however their files are cut, and name what they cannot use."""

import base64
import io
import json
import os
import pickle
import re
import tarfile
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset as wds
from build_cases import found_in, make_tar, read, text_recipe, texts_of

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.sources import interleaved, tars
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource


def pairs_in(path):
    return read(PairsSource.of([path]))


# Text.


def test_json_lines_text_files_and_parquet_are_read_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two\\nlines"}\r\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text("a whole\n\nfile\n", encoding="utf-8")
    table = pyarrow.table({"text": ["three", "four", "five"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    assert texts_of([tmp_path]) == (["one", "two\nlines", "a whole\n\nfile\n", "three", "four", "five"], {})


def test_entries_without_text_are_counted_and_others_read(tmp_path):
    lines = ['{"text": 5}', "nonsense", '{"other": "x"}', '"bare"', '{"text": " "}', "[" * 100_000, '{"text": "good"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("", encoding="utf-8")
    rejected = {"no text": 2, "not JSON": 2, "empty text": 2, "not UTF-8": 1}
    assert texts_of([tmp_path]) == (["bare", "good"], rejected)


def test_another_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n', encoding="utf-8")
    assert texts_of([tmp_path], field="content")[0] == ["x"]
    pyarrow.parquet.write_table(pyarrow.table({"content": ["y"]}), tmp_path / "b.parquet")
    assert texts_of([tmp_path], field="content") == (["x", "y"], {})


def test_missing_files_and_other_kinds_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    for name, refusal in (
        ("none.jsonl", "source .* must exist, got no such file"),
        (".", r"folder .* must hold files of .jsonl, .*, .txt \(also .gz, .*\), got none"),
        ("a.doc", r"source must be of .jsonl, .*, .txt \(also .gz, .*\), got .*a.doc"),
    ):
        with pytest.raises(InputError, match=refusal):
            TextSource.of([tmp_path / name])


def test_links_in_folders_are_followed_once_and_broken_ones_passed_over_and_named(tmp_path):
    corpus, disk = tmp_path / "corpus", tmp_path / "disk"
    for folder, name, text in ((disk, "b.txt", "two"), (corpus, "a.txt", "one")):
        folder.mkdir()
        (folder / name).write_text(text)
    (corpus / "more").symlink_to(disk)
    (corpus / "more" / "round").symlink_to(corpus)
    (corpus / "table.parquet").mkdir()
    (corpus / "picture.png").symlink_to(tmp_path / "gone.png")  # which is for documents to miss
    assert texts_of([corpus])[0] == ["one", "two"]
    for name in ("c.txt", "part"):
        (corpus / name).symlink_to(tmp_path / "gone")
    os.mkfifo(corpus / "pipe.txt")
    source = TextSource.of([corpus])
    assert read(source)[0] == [("one",), ("two",)]
    names = sorted(re.match("not a file: (.*) is a broken link", str(stray))[1] for stray in source.passed_over)
    assert names == [str(corpus / name) for name in ("c.txt", "part", "pipe.txt")]
    built = build(text_recipe(corpus), tmp_path / "out", processes=2)  # others get a copy of the source
    assert built.rejected == {"not a file": 3} and built.index.documents == 2
    with pytest.raises(InputError, match=r"must exist, got no such file"):
        TextSource.of([corpus / "c.txt"])


@pytest.mark.parametrize("again", ["a.txt", ".", "link.txt"])
def test_a_file_that_is_given_twice_is_refused(tmp_path, again):
    (tmp_path / "a.txt").write_text("one")
    if again == "link.txt":
        (tmp_path / again).symlink_to(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"must hold a file once, got .*a.txt and .*, the same file"):
        TextSource.of([tmp_path, tmp_path / again])


def test_the_byte_order_mark_is_not_part_of_the_text(tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('"hello"', encoding="utf-8-sig")
    assert texts_of([tmp_path])[0] == ['"hello"', "hello"]
    make_tar(tmp_path / "a.tar", [("a.jpg", b"image"), ("a.txt", "\ufeff caption".encode())])
    assert pairs_in(tmp_path / "a.tar")[0] == [("caption", b"image")]


# Pairs.


def test_tars_of_img2dataset_and_of_webdataset_are_read(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "000000000", "jpg": b"first", "txt": "a cat", "json": {"caption": "not this"}})
        writer.write({"__key__": "000000001", "png": b"second", "json": {"caption": " a dog ", "width": 3}})
    kinds = ("jpg", "jpeg", "png", "webp", "JPEG")
    make_tar(tmp_path / "b.tar", [m for k in kinds for m in ((f"{k}.{k}", k.encode()), (f"{k}.txt", b"words"))])
    expected = [("a cat", b"first"), ("a dog", b"second"), *(("words", kind.encode()) for kind in kinds)]
    assert pairs_in(tmp_path) == (expected, {})


def test_samples_that_are_no_pairs_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 100)
    members = [
        ("a.txt", b"alone"), ("b.jpg", b"x"), ("c.jpg", b"x"), ("c.txt", b"  "), ("d.jpg", b"x"), ("d.txt", b"\xff"),
        ("e.jpg", b"x"), ("e.jpg", b"y"), ("e.txt", b"twice"), ("f.jpg", b"x"), ("f.json", b"{"), ("g.jpg", b"x"),
        ("g.json", b'{"caption": null}'), ("h.jpg", b"x"), ("h.txt", b"good"), ("i.pyd", pickle.dumps(print)),
        ("j.jpg", b"x" * 101), ("j.txt", b"large"),
    ]  # fmt: skip
    documents, rejected = pairs_in(make_tar(tmp_path / "a.tar", members))
    assert documents == [("good", b"x")]
    assert rejected == {
        "no image": 2, "no caption": 3, "not UTF-8": 1, "duplicate key": 1, "not JSON": 1, "file too large": 1,
    }  # fmt: skip


def test_names_that_lead_elsewhere_and_links_and_devices_are_not_followed(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    names = ("../../evil.jpg", "../../evil.txt", "/abs/b.jpg", "/abs/b.txt")
    make_tar(folder / "a.tar", [(name, name[-5:].encode()) for name in names])
    with tarfile.open(folder / "b.tar", "w") as archive:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    assert pairs_in(folder) == ([("l.txt", b"l.jpg"), ("b.txt", b"b.jpg")], {"broken link": 2})
    assert sorted(tmp_path.rglob("*")) == before


def test_names_and_messages_cannot_forge_lines_on_the_terminal(tmp_path):
    make_tar(tmp_path / "a.tar", [("a\nprepare: all is well\x1b[2J.jpg", b"x"), ("é.jpg", b"x")])
    first, second = map(str, found_in(PairsSource.of([tmp_path])))
    assert first.isprintable() and r"a\nprepare: all is well\x1b[2J in " in first
    assert "é in " in second


PAIRS = [(f"{i}.{kind}", bytes([65 + i]) * 700) for i in range(4) for kind in ("jpg", "txt")]


@pytest.fixture
def whole(tmp_path):
    """The bytes of a tar of four pairs, whose files take 1536 bytes each."""
    return make_tar(tmp_path / "a.tar", PAIRS).read_bytes()


@pytest.mark.parametrize("cut", np.linspace(0, 8 * 1536 + 511, 12).astype(int).tolist())
def test_a_truncated_tar_is_named_and_what_lies_before_is_kept(tmp_path, whole, cut):
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    documents, rejected = pairs_in(tmp_path)
    assert len(documents) >= cut // (2 * 1536) - 1 and rejected["tar damaged"] == 1
    assert documents == [(chr(65 + i) * 700, bytes([65 + i]) * 700) for i in range(len(documents))]


@pytest.mark.parametrize(
    ("damaged", "good", "reasons"),
    [
        (lambda whole: whole[:2300], 0, {"tar damaged": 1}),  # in the contents, of which the sample is lost
        (lambda whole: whole[:1536], 0, {"no caption": 1, "tar damaged": 1}),
        (lambda whole: whole[: 8 * 1536], 4, {"tar damaged": 1}),  # where a member ends
        (lambda whole: whole[:6147] + bytes([whole[6147] ^ 255]) + whole[6148:], 2, {"tar damaged": 1}),  # in a header
    ],
)
def test_a_sample_is_lost_only_if_the_damage_is_in_its_contents(tmp_path, whole, damaged, good, reasons):
    (tmp_path / "a.tar").write_bytes(damaged(whole))
    documents, rejected = pairs_in(tmp_path)
    assert (len(documents), rejected) == (good, reasons)


def test_a_damaged_tar_names_the_byte_where_reading_stopped(tmp_path, whole):
    damaged = {1536: whole[:1536] + b"x" * 512 + whole[2048:], 612: whole[:612], 0: b"x" * 512}
    for offset, content in damaged.items():
        (tmp_path / "a.tar").write_bytes(content)
        assert f"at byte {offset})" in found_in(PairsSource.of([tmp_path]))[-1].detail


def make_odd_tar(path, header):
    """Three pairs of two blocks a file; the second image has pax fields, or a size as GNU tar writes large ones."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            for kind in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = 2
                if isinstance(header, dict) and number == 1 and kind == "jpg":
                    member.pax_headers = header
                archive.addfile(member, io.BytesIO(b"ab"))
    if isinstance(header, int):
        content = bytearray(path.read_bytes())
        at = 4 * tarfile.BLOCKSIZE
        content[at + 124 : at + 136] = header.to_bytes(12, "big", signed=True)
        content[at + 124] |= 0x80
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + tarfile.BLOCKSIZE])
        path.write_bytes(content)


IMPOSSIBLE = [
    {"GNU.sparse.size": "abc"}, {"GNU.sparse.map": "1,x"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    {"GNU.sparse.realsize": "-5"}, {"size": "-512"}, 2**63, 2**90, -2048, -(2**80),
]  # fmt: skip


@pytest.mark.parametrize("header", IMPOSSIBLE, ids=str)
def test_a_tar_of_impossible_headers_is_named_and_what_lies_before_is_kept(tmp_path, header):
    make_odd_tar(tmp_path / "a.tar", header)
    first, *_, last = found_in(PairsSource.of([tmp_path]))
    assert first.parts == ("ab", b"ab")
    assert isinstance(last, Rejected) and last.reason == "tar damaged"
    assert re.search(r"at byte \d+\), .*a\.tar$", last.detail)


def test_data_behind_the_end_of_a_tar_is_reported(tmp_path):
    """Two tars may have been put end to end, or a block in the middle was lost."""
    one, other = (
        make_tar(tmp_path / f"{name}.tar", [(f"{name}{i}.{kind}", b"x") for i in range(20) for kind in ("jpg", "txt")])
        for name in "ab"
    )
    content = other.read_bytes()
    one.write_bytes(one.read_bytes() + content)
    other.write_bytes(content[:10240] + bytes(4096) + content[14336:])
    for path, good in ((one, 20), (other, 5)):
        documents, rejected = pairs_in(path)
        assert len(documents) == good and rejected == {"tar damaged": 1}


def test_reading_a_tar_takes_no_memory_for_each_member(tmp_path):
    make_tar(tmp_path / "a.tar", [(f"{i}.{kind}", b"x") for i in range(1500) for kind in ("jpg", "txt")])
    source = PairsSource.of([tmp_path])
    [unit] = source.units()
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.documents(unit)) == 1500
        assert tracemalloc.get_traced_memory()[1] < 400_000
    finally:
        tracemalloc.stop()


# Texts and images in turn.


def interleaved_in(folder, *entries):
    (folder / "a.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return read(InterleavedSource.of([folder]))


def test_texts_and_images_alternate_as_written(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"first")
    parts = ["once", {"image": "pictures/1.png"}, {"text": "then"}, {"base64": base64.b64encode(b"second").decode()}]
    expected = [("once", b"first", "then", b"second"), ("once", b"first")]
    assert interleaved_in(tmp_path, {"content": parts}, parts[:2]) == (expected, {})


def test_entries_without_content_are_counted_and_others_read(tmp_path):
    bad = [5, {"other": []}, {"content": "text"}, {"content": []}, [{"image": 5}], [["nested"]], [{"image": "no.png"}],
           [" ", ""], [{"base64": "?"}], [{"base64": "data:image/png,x"}], [{"image": "a\0b"}],
           [{"image": "x." * 5000}],
           [{"text": "", "image": "a.png"}], [{"image": "a.png", "base64": ""}]]  # fmt: skip
    documents, rejected = interleaved_in(tmp_path, *bad, ["good"])
    assert documents == [("good",)]
    assert rejected == {
        "no content": 3, "empty document": 2, "unknown part": 3, "image missing": 1, "not base64": 2, "no image": 1,
        "image unreadable": 2,
    }  # fmt: skip


def test_an_image_of_no_bytes_is_left_to_the_decoder_and_empty_text_is_left_out(tmp_path):
    (tmp_path / "a.png").touch()
    parts = ["", "once", {"base64": ""}, {"text": ""}, {"image": "a.png"}]
    assert interleaved_in(tmp_path, parts) == ([("once", b"", b"")], {})


def test_a_document_of_many_large_images_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(interleaved, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(40))
    documents, rejected = interleaved_in(tmp_path, [{"image": "a.png"}] * 3, [{"image": "a.png"}] * 2)
    assert documents == [(bytes(40), bytes(40))]
    assert rejected == {"document too large": 1}


def test_no_written_path_leads_out_of_the_folder(tmp_path):
    inside, secret = tmp_path / "inside", tmp_path / "secret.png"
    (inside / "sub").mkdir(parents=True)
    secret.write_bytes(b"secret")
    (inside / "circle.png").symlink_to(inside / "circle.png")
    (inside / "parent").symlink_to(tmp_path)
    names = ["../secret.png", str(secret), "sub/../../secret.png", "parent/../../secret.png", "circle.png"]
    documents, rejected = interleaved_in(inside, *([{"image": name}] for name in names))
    assert not documents
    assert rejected["path leads out"] == 4 and rejected.total() == 5
