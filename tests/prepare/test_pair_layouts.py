"""Captioned images are found in the layouts that downloaders and hubs write, and what cannot be used is named."""

import csv
import io
import json
import os
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from build_cases import IMAGES as ENCODER
from build_cases import content, found_in, make_tar, read
from image_files import picture, png

from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.sources import image_folders, pairs
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.staging import check_outside

PAIRS = [("a cat", b"first"), ("a dog", b"second"), ("two cats", b"third")]
CAPTIONS, IMAGES = zip(*PAIRS, strict=True)


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def table(**columns):
    return pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()})


def in_parquet(path, **columns):
    pyarrow.parquet.write_table(table(**columns), path, row_group_size=2)
    return path


def pairs_in(*paths, **settings):
    return read(PairsSource.of(paths, **settings))


STRUCTS = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(IMAGES)]


@pytest.mark.parametrize("columns", [
    {"image": STRUCTS, "text": CAPTIONS, "id": range(3)},
    {"picture": STRUCTS, "caption": CAPTIONS},  # the only column of the type in which `datasets` stores images
    {"key": ["0", "1", "2"], "url": ["x"] * 3, "jpg": IMAGES, "caption": CAPTIONS, "txt": CAPTIONS},
    {"png": [memoryview(image) for image in IMAGES], "captions": [[caption] for caption in CAPTIONS]},
], ids=["hub", "hub, another name", "img2dataset", "list of captions"])  # fmt: skip
def test_parquet_with_images_is_read(tmp_path, columns):
    write(tmp_path, {"00000_stats.json": "{}"})
    source = PairsSource.of([in_parquet(tmp_path / "00000.parquet", **columns).parent])
    assert read(source) == (PAIRS, {}) and len(source.units()) == 2
    assert [stray.reason for stray in source.strays] == ["accompanying file"]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files_are_read_and_damage_is_named(tmp_path, form):
    path, rows = tmp_path / "data-00000-of-00001.arrow", table(image=STRUCTS * 20, caption=CAPTIONS * 20)
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new(str(path), rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=30):
            writer.write_batch(batch)
    write(tmp_path, {"state.json": "{}", "dataset_info.json": "{}"})
    assert pairs_in(tmp_path) == (PAIRS * 20, {})
    content, generator, reasons = path.read_bytes(), np.random.default_rng(0), Counter()
    for _ in range(60):  # a damaged offset must not be followed, which would end the process
        at, flipped = generator.integers(len(content)), 1 << generator.integers(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ flipped]) + content[at + 1 :])
        reasons += pairs_in(path)[1]
    assert reasons["arrow damaged"] + reasons["file damaged"] > 5
    path.write_bytes(content[: len(content) // 2])
    assert pairs_in(path)[1].total() == 1


def test_rows_without_image_or_caption_are_counted_and_others_read(tmp_path):
    images = [None, b"", b"good", b"x", b"x"]
    captions = ["a", "b", "c", None, " "]
    in_parquet(tmp_path / "a.parquet", jpg=images, txt=captions)
    assert pairs_in(tmp_path) == ([("b", b""), ("c", b"good")], {"no image": 1, "no caption": 2})


@pytest.mark.parametrize(("columns", "option"), [
    ({"picture": [b"x"], "caption": ["a"]}, "image"),
    ({"one": STRUCTS[:1], "other": STRUCTS[:1], "caption": ["a"]}, "image"),
    ({"image": [b"x"], "words": ["a"]}, "caption"),
])  # fmt: skip
def test_a_table_whose_columns_are_not_found_names_the_option_that_says_them(tmp_path, columns, option):
    path = in_parquet(tmp_path / "a.parquet", **columns)
    [rejected] = found_in(PairsSource.of([path]))
    assert rejected.reason == f"no {option}" and f"name one with --{option}-field" in rejected.detail
    chosen = {"image_field": next(iter(columns)), "caption_field": list(columns)[-1]}
    image = next(iter(columns.values()))[0]
    assert pairs_in(path, **chosen) == ([("a", image["bytes"] if isinstance(image, dict) else image)], {})


def test_images_in_folders_have_their_captions_beside_them(tmp_path):
    """As img2dataset writes `files`: folders of images with .txt and .json, and tables of what was downloaded."""
    write(tmp_path, {
        "00000/0.jpg": b"first", "00000/0.txt": "a cat", "00000/0.json": '{"caption": "not this", "width": 3}',
        "00000/1.PNG": b"second", "00000/1.json": '{"caption": "a dog"}',
        "00001/v1.0 x.webp": b"third", "00001/v1.0 x.caption": " two cats\n",
        "00001/._a.jpg": "x", "00001/alone.jpg": "x", "00001/alone too.txt": "x",
        "00000.parquet": b"", "00000_stats.json": "{}",
    })  # fmt: skip
    (tmp_path / "00001" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert pairs_in(tmp_path) == (PAIRS, {"no caption": 1, "not a file": 1, "system file": 1})


def test_a_folder_of_many_images_is_read_in_units(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folders, "IMAGES_TOGETHER", 3)
    write(tmp_path, {f"{n}.{kind}": f"{n}" for n in range(8) for kind in ("jpg", "txt")})
    source = PairsSource.of([tmp_path])
    assert len(source.units()) == 3
    assert read(source)[0] == [(f"{n}", f"{n}".encode()) for n in range(8)]
    before = [source.checksum(unit) for unit in source.units()]
    write(tmp_path, {"4.txt": "9"})
    changed = [old != source.checksum(unit) for old, unit in zip(before, source.units(), strict=True)]
    assert changed == [False, True, False]
    with pytest.raises(InputError, match=r"must hold a folder once"):
        PairsSource.of([tmp_path, tmp_path / "."])


LISTS = {
    "metadata.csv": "file_name,caption,score\n0.jpg,a cat,1\nsub/1.jpg,a dog,2\n\n2.jpg,two cats,3\n",
    "metadata.tsv": "score\tfile_name\ttext\r\n1\t0.jpg\ta cat\r\n2\tsub/1.jpg\ta dog\r\n3\t2.jpg\ttwo cats\r\n",
    "metadata.jsonl": "\n".join(
        json.dumps({"file_name": name, "text": caption})
        for name, caption in zip(("0.jpg", "sub/1.jpg", "2.jpg"), CAPTIONS, strict=True)
    ),
}


@pytest.mark.parametrize("name", [*LISTS, "metadata.parquet"])
def test_the_hubs_image_folder_has_its_captions_in_a_list(tmp_path, name):
    write(tmp_path, {"0.jpg": b"first", "sub/1.jpg": b"second", "2.jpg": b"third", "other.csv": "x"})
    if name in LISTS:
        write(tmp_path, {name: LISTS[name]})
    else:
        in_parquet(tmp_path / name, file_name=["0.jpg", "sub/1.jpg", "2.jpg"], text=CAPTIONS)
    assert pairs_in(tmp_path) == (PAIRS, {})
    assert [stray.reason for stray in PairsSource.of([tmp_path]).strays] == ["accompanying file"]
    root = tmp_path / "elsewhere"
    write(root, {name.replace("metadata", "list"): (tmp_path / name).read_bytes()})
    assert pairs_in(root, image_root=tmp_path) == (PAIRS, {})
    assert pairs_in(root)[1] == {"image missing": 3}


def test_records_of_json_hold_or_name_their_images(tmp_path):
    records = [
        {"image": {"bytes": None, "path": "a.jpg"}, "caption": "path in a struct"},
        {"image": "data:image/png;base64,Zmlyc3Q=", "caption": "data URI"},
        {"img": {"base64": "Zmlyc3Q"}, "caption": "base64"},
        {"image_path": f"file://{tmp_path}/a.jpg", "caption": "file URL"},
        {"path": "../a.jpg", "caption": "outside"},
        {"image": "https://host/a.jpg", "caption": "remote"},
        {"picture": "a.jpg", "caption": "unknown"},
        "a.jpg",
    ]
    write(tmp_path, {"a.jpg": b"first", "a.json": json.dumps(records, indent=1)})
    documents, rejected = pairs_in(tmp_path / "a.json")
    assert documents == [(words, b"first") for words in ("path in a struct", "data URI", "base64", "file URL")]
    assert rejected == {"path leads out": 1, "image not downloaded": 1, "no image": 2}


def test_nested_captions_are_named_and_one_of_several_is_drawn_by_its_content(tmp_path):
    names = [f"caption {n}" for n in range(4)]
    sentences = [{"raw": name} for name in [*names, None]]
    records = [{"image": {"base64": f"{n:04d}"}, "sentences": sentences, "x": {"y": "z"}} for n in range(40)]
    path = write(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, records))}) / "a.jsonl"
    drawn = [caption for caption, _ in pairs_in(path, caption_field="sentences.raw")[0]]
    assert set(drawn) == set(names) and max(Counter(drawn).values()) < 20
    write(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, records[::-1]))})
    assert [caption for caption, _ in pairs_in(path, caption_field="sentences.raw")[0]] == drawn[::-1]
    assert pairs_in(path, caption_field="x.y")[0][0][0] == "z"
    assert pairs_in(path, caption_field="x.none")[1] == {"no caption": 40}


def test_files_of_a_tar_are_found_by_their_kind_or_by_name(tmp_path):
    members = [
        ("0.image.jpg", b"first"), ("0.caption.txt", b"a cat"), ("1.jpg", b"second"), ("1.json", b'{"text": "a dog"}'),
        ("2.jpg", b"third"), ("2.caption", b"two cats"), ("3.left.jpg", b"x"), ("3.right.jpg", b"y"),
        ("3.txt", b"both"), ("4.jpg", b"x"), ("4.long.txt", b"long"), ("4.short.txt", b"short"),
    ]  # fmt: skip
    path = make_tar(tmp_path / "a.tar", members)
    assert pairs_in(path) == (PAIRS, {"several files": 2})
    assert pairs_in(path, image_field="right.jpg")[0] == [("both", b"y")]
    assert pairs_in(path, caption_field="long.txt") == ([("long", b"x")], {"no caption": 3, "several files": 1})


def test_csv_rows_that_cannot_be_used_are_named_and_others_read(tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([["path", "caption"], ["a.jpg", 'a "cat",\non two lines'], ["a.jpg"], ["a.jpg", "é"]])
    write(tmp_path, {"a.jpg": b"first", "a.csv": text.getvalue().encode() + b"a.jpg,\xff\n"})
    documents, rejected = pairs_in(tmp_path / "a.csv")
    assert documents == [('a "cat",\non two lines', b"first"), ("é", b"first")]
    assert rejected == {"bad row": 1, "not UTF-8": 1}
    write(tmp_path, {"a.csv": 'path,caption\na.jpg,a cat\na.jpg,"' + "x" * 200})
    assert pairs_in(tmp_path / "a.csv")[0][0] == ("a cat", b"first")


@pytest.mark.parametrize("names", [["a.tar", "metadata.csv"], ["metadata.csv", "a.tar"]])
def test_a_layout_does_not_depend_on_the_order_in_which_a_folder_is_listed(tmp_path, monkeypatch, names):
    write(tmp_path, {"a.tar": b"", "metadata.csv": "", "a.jpg": b"", "other.jsonl": ""})
    monkeypatch.setattr(pairs, "walk", lambda folder: [folder / name for name in [*names, "a.jpg", "other.jsonl"]])
    assert PairsSource.of([tmp_path]).layout == "records"


def test_a_metadata_json_is_no_list_of_images(tmp_path):
    write(tmp_path, {"metadata.json": "{}", "a.tar": b"", "a.jpg": b""})
    assert PairsSource.of([tmp_path]).layout == "tar"


def test_sources_of_several_layouts_are_refused_unless_one_is_given(tmp_path):
    write(tmp_path, {"tars/a.txt": "", "images/a.jpg": b"first", "images/a.txt": "a cat"})
    make_tar(tmp_path / "tars" / "a.tar", [("a.jpg", b"x"), ("a.txt", b"x")])
    with pytest.raises(InputError, match=r"must have one layout, got tar \(.*tars\), files \(.*images\); .*--layout"):
        pairs_in(tmp_path / "tars", tmp_path / "images")
    assert pairs_in(tmp_path, layout="files") == ([("a cat", b"first")], {})
    assert pairs_in(tmp_path)[0] == [("x", b"x")]
    with pytest.raises(InputError, match=r"must hold tars, images or records, got none"):
        pairs_in(write(tmp_path / "empty", {"a.doc": ""}))
    with pytest.raises(InputError, match=r"must be a folder, got .*a.jpg"):
        pairs_in(tmp_path / "images" / "a.jpg", layout="files")


def test_a_folder_of_images_is_prepared_once_by_any_number_of_processes_and_changes_are_noticed(tmp_path):
    source, outs = tmp_path / "in", [tmp_path / f"out{processes}" for processes in (1, 2)]
    file = png(picture(16, 16))
    write(source, {f"{n}.{kind}": file if kind == "png" else f"{n}" for n in range(9) for kind in ("png", "txt")})

    def built(out, processes=1):
        return build(Recipe(PairsSource.of([source]), ENCODER), out, processes)

    assert [built(out, processes).index.documents for processes, out in enumerate(outs, 1)] == [9, 9]
    assert content(outs[0]) == content(outs[1])
    os.utime(source / "3.txt")
    assert built(outs[0]).reused
    write(source, {"3.txt": "other"})
    with pytest.raises(InputError, match=r"made with other settings: files.*in"):
        built(outs[0])
    with pytest.raises(InputError, match="must lie outside of the sources"):
        check_outside(source / "out", [source], PairsSource.of([source]).files)
