"""Sources give every document once, however their files are cut, and name what they cannot use."""

import base64
import io
import json
import pickle
import re
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset as wds

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources import interleaved
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource


def found_in(source):
    """Every document and rejection."""
    found = [entry for unit in source.units() for entry in source.documents(unit)]
    assert all("\n" not in str(entry) for entry in found if isinstance(entry, Rejected))
    return found


def read(source):
    """(parts of every document, reasons of what was rejected)."""
    found = found_in(source)
    documents = [entry.parts for entry in found if not isinstance(entry, Rejected)]
    return documents, Counter(entry.reason for entry in found if isinstance(entry, Rejected))


def texts_of(paths, **options):
    documents, rejected = read(TextSource.of(paths, **options))
    return [text for (text,) in documents], rejected


def make_tar(path, members, ending=True):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        end = archive.offset
    path.write_bytes(file.getvalue() if ending else file.getvalue()[:end])


# Text.


def test_json_lines_text_files_and_parquet_are_read_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two\\nlines"}\r\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text("a whole\n\nfile\n", encoding="utf-8")
    table = pyarrow.table({"text": ["three", "four", "five"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    texts, rejected = texts_of([tmp_path])
    assert texts == ["one", "two\nlines", "a whole\n\nfile\n", "three", "four", "five"]
    assert not rejected


def test_entries_without_text_are_counted_and_others_read(tmp_path):
    lines = ['{"text": 5}', "nonsense", '{"other": "x"}', '"bare"', '{"text": " "}', "[" * 100_000, '{"text": "good"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("", encoding="utf-8")
    texts, rejected = texts_of([tmp_path])
    assert texts == ["bare", "good"]
    assert rejected == {"no text": 2, "not JSON": 2, "empty text": 2, "not UTF-8": 1}


def test_names_and_messages_cannot_forge_lines_on_the_terminal(tmp_path):
    make_tar(tmp_path / "a.tar", [("a\nprepare: all is well\x1b[2J.jpg", b"x"), ("é.jpg", b"x")])
    first, second = map(str, found_in(PairsSource.of([tmp_path])))
    assert first.isprintable() and r"a\nprepare: all is well\x1b[2J in " in first
    assert "é in " in second


def test_another_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n', encoding="utf-8")
    assert texts_of([tmp_path], field="content")[0] == ["x"]
    pyarrow.parquet.write_table(pyarrow.table({"content": ["y"]}), tmp_path / "b.parquet")
    with pytest.raises(
        InputError, match=r"column of .*b.parquet must be of content, got 'text'; name one with --field"
    ):
        texts_of([tmp_path / "b.parquet"])


def test_missing_files_and_other_kinds_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"source .* must exist, got no such file"):
        TextSource.of([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match=r"folder .* must hold files of .jsonl, .*.json.zst, .txt, .parquet, got none"):
        TextSource.of([tmp_path])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"source must be of .jsonl, .*, .txt, .parquet, got .*a.csv"):
        TextSource.of([tmp_path / "a.csv"])


def test_links_in_folders_are_followed_once_and_broken_ones_named(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "b.txt").write_text("two")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one")
    (corpus / "more").symlink_to(tmp_path / "disk")
    (corpus / "more" / "round").symlink_to(corpus)
    (corpus / "table.parquet").mkdir()
    assert texts_of([corpus])[0] == ["one", "two"]
    (corpus / "picture.png").symlink_to(tmp_path / "gone.png")  # which is for documents to miss
    assert texts_of([corpus])[0] == ["one", "two"]
    for name in ("c.txt", "part"):
        (corpus / name).symlink_to(tmp_path / "gone")
        with pytest.raises(InputError, match=rf"source .*{name} must be a file, got something else or a broken link"):
            TextSource.of([corpus])
        (corpus / name).unlink()


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
    assert read(PairsSource.of([tmp_path / "a.tar"]))[0] == [("caption", b"image")]


# Pairs.


def test_tars_of_img2dataset_and_of_webdataset_are_read(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "000000000", "jpg": b"first", "txt": "a cat", "json": {"caption": "not this"}})
        writer.write({"__key__": "000000001", "png": b"second", "json": {"caption": " a dog ", "width": 3}})
    assert read(PairsSource.of([tmp_path])) == ([("a cat", b"first"), ("a dog", b"second")], {})


def test_samples_that_are_no_pairs_are_counted(tmp_path):
    members = [
        ("a.txt", b"alone"), ("b.jpg", b"x"), ("c.jpg", b"x"), ("c.txt", b"  "), ("d.jpg", b"x"), ("d.txt", b"\xff"),
        ("e.jpg", b"x"), ("e.jpg", b"y"), ("e.txt", b"twice"), ("f.jpg", b"x"), ("f.json", b"{"), ("g.jpg", b"x"),
        ("g.json", b'{"caption": null}'), ("h.jpg", b"x"), ("h.txt", b"good"), ("i.pyd", pickle.dumps(print)),
    ]  # fmt: skip
    make_tar(tmp_path / "a.tar", members)
    documents, rejected = read(PairsSource.of([tmp_path]))
    assert documents == [("good", b"x")]
    assert rejected == {"no image": 2, "no caption": 3, "not UTF-8": 1, "duplicate key": 1, "not JSON": 1}


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
    assert read(PairsSource.of([folder])) == ([("l.txt", b"l.jpg"), ("b.txt", b"b.jpg")], {})
    assert sorted(tmp_path.rglob("*")) == before


PAIRS = [(f"{i}.{kind}", bytes([65 + i]) * 700) for i in range(4) for kind in ("jpg", "txt")]


@pytest.mark.parametrize("cut", np.linspace(0, 8 * 1536 + 511, 12).astype(int).tolist())
def test_a_truncated_tar_is_named_and_what_lies_before_is_kept(tmp_path, cut):
    make_tar(tmp_path / "a.tar", PAIRS)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    documents, rejected = read(PairsSource.of([tmp_path]))
    assert len(documents) >= cut // (2 * 1536) - 1 and rejected["tar damaged"] == 1
    assert documents == [(chr(65 + i) * 700, bytes([65 + i]) * 700) for i in range(len(documents))]


@pytest.mark.parametrize(("cut", "reasons"), [(2300, ["tar damaged"]), (1536, ["no caption", "tar damaged"])])
def test_a_sample_is_lost_if_the_damage_is_in_its_contents(tmp_path, cut, reasons):
    make_tar(tmp_path / "a.tar", PAIRS)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    assert sorted(read(PairsSource.of([tmp_path]))[1]) == reasons


def test_a_tar_that_ends_at_a_member_or_in_a_bad_header_is_named(tmp_path):
    make_tar(tmp_path / "a.tar", PAIRS, ending=False)
    assert read(PairsSource.of([tmp_path]))[1] == {"tar damaged": 1}
    make_tar(tmp_path / "a.tar", PAIRS)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[2 * 1536 * 2 + 3] ^= 0xFF  # in the header of the third pair
    (tmp_path / "a.tar").write_bytes(content)
    documents, rejected = read(PairsSource.of([tmp_path]))
    assert len(documents) == 2 and rejected == {"tar damaged": 1}


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


@pytest.mark.parametrize(
    "header",
    [
        {"GNU.sparse.size": "abc"},
        {"GNU.sparse.map": "1,x"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"GNU.sparse.realsize": "-5"},
        {"size": "-512"},
        2**63,
        2**90,
        -2048,
        -(2**80),
    ],
    ids=str,
)
def test_a_tar_of_impossible_headers_is_named_and_what_lies_before_is_kept(tmp_path, header):
    make_odd_tar(tmp_path / "a.tar", header)
    first, *_, last = found_in(PairsSource.of([tmp_path]))
    assert first.parts == ("ab", b"ab")
    assert isinstance(last, Rejected) and last.reason == "tar damaged"
    assert re.search(r"at byte \d+\), .*a\.tar$", last.detail)


def test_a_damaged_tar_names_the_byte_where_reading_stopped(tmp_path):
    make_tar(tmp_path / "a.tar", PAIRS)
    whole = (tmp_path / "a.tar").read_bytes()
    damaged = {1536: whole[:1536] + b"x" * 512 + whole[2048:], 612: whole[:612], 0: b"x" * 512}
    for offset, content in damaged.items():
        (tmp_path / "a.tar").write_bytes(content)
        assert f"at byte {offset})" in found_in(PairsSource.of([tmp_path]))[-1].detail


def test_data_behind_the_end_of_a_tar_is_reported(tmp_path):
    """Two tars may have been put end to end, or a block in the middle was lost."""
    for name in "ab":
        make_tar(tmp_path / f"{name}.tar", [(f"{name}{i}.{kind}", b"x") for i in range(20) for kind in ("jpg", "txt")])
    one, other = ((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    (tmp_path / "a.tar").write_bytes(one + other)
    (tmp_path / "b.tar").write_bytes(other[:10240] + bytes(4096) + other[14336:])
    for name, good in (("a", 20), ("b", 5)):
        documents, rejected = read(PairsSource.of([tmp_path / f"{name}.tar"]))
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


def test_images_of_every_kind_are_paired(tmp_path):
    kinds = ("jpg", "jpeg", "png", "webp", "JPEG")
    make_tar(tmp_path / "a.tar", [m for k in kinds for m in ((f"{k}.{k}", k.encode()), (f"{k}.txt", b"words"))])
    assert read(PairsSource.of([tmp_path])) == ([("words", kind.encode()) for kind in kinds], {})


def test_an_image_too_large_for_a_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("transfusion_fast.prepare.sources.pairs.MAX_BYTES", 100)
    make_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 101), ("a.txt", b"a")])
    assert read(PairsSource.of([tmp_path]))[1] == {"file too large": 1}


# Texts and images in turn.


def write_lines(folder, *entries):
    (folder / "a.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return InterleavedSource.of([folder])


def test_texts_and_images_alternate_as_written(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"first")
    parts = ["once", {"image": "pictures/1.png"}, {"text": "then"}, {"base64": base64.b64encode(b"second").decode()}]
    documents, rejected = read(write_lines(tmp_path, {"content": parts}, parts[:2]))
    assert documents == [("once", b"first", "then", b"second"), ("once", b"first")]
    assert not rejected


def test_entries_without_content_are_counted_and_others_read(tmp_path):
    bad = [5, {"other": []}, {"content": "text"}, {"content": []}, [{"image": 5}], [["nested"]], [{"image": "no.png"}],
           [" ", ""], [{"base64": "?"}], [{"image": "a\0b"}], [{"image": "x" * 5000}],
           [{"text": "", "image": "a.png"}], [{"image": "a.png", "base64": ""}]]  # fmt: skip
    documents, rejected = read(write_lines(tmp_path, *bad, ["good"]))
    assert documents == [("good",)]
    assert rejected == {
        "no content": 3, "empty document": 2, "unknown part": 4, "image missing": 1, "not base64": 1,
        "image unreadable": 2,
    }  # fmt: skip


def test_an_image_of_no_bytes_is_left_to_the_decoder_and_empty_text_is_left_out(tmp_path):
    (tmp_path / "a.png").touch()
    documents, rejected = read(write_lines(tmp_path, ["", "once", {"base64": ""}, {"text": ""}, {"image": "a.png"}]))
    assert documents == [("once", b"", b"")]
    assert not rejected


def test_a_document_of_many_large_images_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(interleaved, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(40))
    documents, rejected = read(write_lines(tmp_path, [{"image": "a.png"}] * 3, [{"image": "a.png"}] * 2))
    assert documents == [(bytes(40), bytes(40))]
    assert rejected == {"document too large": 1}


def test_no_path_leads_out_of_the_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (inside / "link.png").symlink_to(secret)
    (inside / "circle.png").symlink_to(inside / "circle.png")
    names = ["../secret.png", str(secret), "link.png", "sub/../../secret.png", "circle.png"]
    documents, rejected = read(write_lines(inside, *([{"image": name}] for name in names)))
    assert not documents
    assert rejected["path leads out"] == 4 and rejected.total() == 5
