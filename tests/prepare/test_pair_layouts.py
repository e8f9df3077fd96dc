"""Captioned images are found in the layouts that downloaders and hubs write, and what cannot be used is named."""

import base64
import csv
import gzip
import io
import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from build_cases import IMAGES as ENCODER
from build_cases import content, documents_in, found_in, make_tar, read, words_of
from image_files import picture, png

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.sources import image_folders, pairs, references
from transfusion_fast.prepare.sources import records as reading
from transfusion_fast.prepare.sources.files import walk
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
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
    assert not source.passed_over


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
    """The layout of img2dataset's `files` output: folders of images with .txt and .json, beside tables of downloads."""
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
    assert [stray.reason for stray in PairsSource.of([tmp_path]).passed_over] == ["accompanying file"]
    root = tmp_path / "elsewhere"
    write(root, {name.replace("metadata", "list"): (tmp_path / name).read_bytes()})
    assert pairs_in(root, image_root=tmp_path) == (PAIRS, {})
    assert pairs_in(root)[1] == {"image missing": 3}


def test_records_of_json_hold_or_name_their_images(tmp_path):
    records = [
        {"image": {"bytes": None, "path": "a.jpg"}, "caption": "path in a struct"},
        {"image": "data:image/png;base64,Zmlyc3Q=", "caption": "data URI"},
        {"img": {"base64": "Zmlyc3Q"}, "caption": "base64"},
        {"img": base64.b64encode(b"long" * 50).decode(), "caption": "plain base64"},
        {"image_path": f"file://{tmp_path}/a.jpg", "caption": "file URL"},
        {"path": "../a.jpg", "caption": "outside"},
        {"image": "https://host/a.jpg", "caption": "remote"},
        {"picture": "a.jpg", "caption": "unknown"},
        "a.jpg",
    ]
    write(tmp_path, {"a.jpg": b"first", "a.json": json.dumps(records, indent=1)})
    documents, rejected = pairs_in(tmp_path / "a.json")
    short = [(words, b"first") for words in ("path in a struct", "data URI", "base64", "file URL")]
    assert documents == [*short[:3], ("plain base64", b"long" * 50), short[3]]
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
    one_image = [{"image": {"base64": "YQ"}, "captions": [f"{n} {kind}" for kind in "ab"]} for n in range(20)]
    write(tmp_path, {"b.jsonl": "\n".join(map(json.dumps, one_image))})
    assert {caption[-1] for caption, _ in pairs_in(tmp_path / "b.jsonl")[0]} == {"a", "b"}
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
    assert pairs_in(make_tar(path, [("0.img", b"first"), ("0.txt", b"a cat")]), image_field="img") == (PAIRS[:1], {})
    make_tar(path, members)
    assert pairs_in(path, caption_field="long.txt") == ([("long", b"x")], {"no caption": 3, "several files": 1})


CAPTION_ORDER = ["caption", "text", "txt", "captions", "TEXT"]
IMAGE_ORDER = [
    "image", "jpg", "jpeg", "png", "webp", "img", "file_name", "filename", "filepath", "image_path", "image_file",
    "file", "path",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_first_field_that_is_set_is_used_in_the_documented_order(tmp_path, kind):
    names, expected = [*IMAGE_ORDER, *CAPTION_ORDER], []
    write(tmp_path, {f"{name}.jpg": name for name in IMAGE_ORDER})
    records = []
    for number in range(len(IMAGE_ORDER)):
        own = [*IMAGE_ORDER[number:], *CAPTION_ORDER[number % len(CAPTION_ORDER) :]]
        values = {name: f"{name}.jpg" if name in IMAGE_ORDER else name for name in own}
        records.append({name: values.get(name) for name in reversed(names)})
        expected.append((CAPTION_ORDER[number % len(CAPTION_ORDER)], IMAGE_ORDER[number].encode()))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    else:
        write(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, records))})
    assert pairs_in(tmp_path / f"a.{kind}") == (expected, {})


def test_settings_that_change_the_documents_are_part_of_the_recipe(tmp_path):
    of_pairs = [{}, {"layout": "files"}, {"caption_field": "x"}, {"image_field": "x"}, {"image_root": tmp_path}]
    sources = [PairsSource((), **settings) for settings in of_pairs]
    of_documents = [{}, {"layout": "obelics"}, {"layout": "mmc4"}, {"image_root": tmp_path}]
    sources += [InterleavedSource((), **settings) for settings in of_documents]
    described = [json.dumps(source.describe()) for source in sources]
    described += [json.dumps(replace(ENCODER, bad_images=value).describe()) for value in ("reject", "skip")]
    assert len({*described}) == len(described)


def test_fields_with_dots_in_their_names_are_preferred_to_fields_of_objects(tmp_path):
    write(tmp_path, {"a.jsonl": json.dumps({"image": {"base64": "YQ"}, "a.b": "literal", "a": {"b": "nested"}})})
    assert pairs_in(tmp_path / "a.jsonl", caption_field="a.b")[0] == [("literal", b"a")]
    in_parquet(tmp_path / "a.parquet", **{"image": [b"a"], "a": [{"b": "nested"}], "a.b": ["literal"]})
    assert pairs_in(tmp_path / "a.parquet", caption_field="a.b")[0] == [("literal", b"a")]
    in_parquet(tmp_path / "a.parquet", image=[b"a"], a=[{"b": "nested"}])
    assert pairs_in(tmp_path / "a.parquet", caption_field="a.b")[0] == [("nested", b"a")]


def test_columns_of_one_name_are_the_first_of_them_in_arrow_files_too(tmp_path):
    names, arrays = ["image", "text", "text"], [pyarrow.array([b"a"]), pyarrow.array(["one"]), pyarrow.array(["other"])]
    rows = pyarrow.Table.from_arrays(arrays, names)
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    for kind in ("parquet", "arrow"):
        assert pairs_in(tmp_path / f"a.{kind}") == ([("one", b"a")], {})


def test_columns_that_cannot_be_converted_are_named_and_others_read(tmp_path):
    indices = pyarrow.array([0, 1, 1], pyarrow.int8())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(STRUCTS[:2]))
    rows = pyarrow.table({"image": column, "text": CAPTIONS})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    in_parquet(tmp_path / "b.parquet", image=STRUCTS, text=CAPTIONS)
    assert pairs_in(tmp_path) == (PAIRS, {"columns unreadable": 1})


def test_a_list_of_many_levels_is_named(tmp_path):
    good = json.dumps({"image": {"base64": "YQ"}, "a": {"b": "words"}})
    deep = "[" * 700 + "]" * 700
    write(tmp_path, {"a.jsonl": f'{good}\n{deep}\n{{"image": {deep}, "a": {deep}}}'})
    assert pairs_in(tmp_path / "a.jsonl", caption_field="a.b") == ([("words", b"a")], {"no image": 2})


def test_no_image_is_read_outside_of_the_folder_or_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MAX_BYTES", 5)
    inside = write(tmp_path / "in", {"a.jpg": b"first", "large.jpg": b"larger", "a.txt": "a cat", "large.txt": "x"})
    write(tmp_path, {"inner/secret.jpg": b"x"})  # whose path begins with that of the folder
    lines = ["path,caption", *(f"{name},a cat" for name in ("a.jpg", "large.jpg", "../inner/secret.jpg"))]
    write(inside, {"a.csv": "\n".join(lines)})
    assert pairs_in(inside / "a.csv") == (PAIRS[:1], {"file too large": 1, "path leads out": 1})
    assert pairs_in(inside) == (PAIRS[:1], {"file too large": 1})


def test_a_root_of_images_must_be_a_folder_and_be_used(tmp_path):
    write(tmp_path, {"a.csv": "path,caption\na.jpg,a cat", "a.jpg": b"first", "a.txt": "a cat"})
    for source in (PairsSource, InterleavedSource):
        with pytest.raises(InputError, match=r"--image-root must be a folder, got .*a.jpg; give the one"):
            source((), image_root=tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"--image-root must come with records, got layout files"):
        pairs_in(tmp_path, image_root=tmp_path)


def test_the_options_of_the_command_are_followed(tmp_path, command):
    rows = ["x,y,caption", "a.png,a cat,no", "a.png,a,no"]
    write(tmp_path, {"images/a.png": png(picture(32, 32)), "a.csv": "\n".join(rows)})
    options = ["--image-field", "x", "--caption-field", "y", "--image-root", tmp_path / "images", "--layout", "records"]
    more = ["--caption-length", "2:", "--image-size", 32, "--out", tmp_path / "out"]
    code, _, err = command("prepare", "pairs", tmp_path / "a.csv", *options, *more)
    assert code == 0 and "left out 1: caption too short" in err
    [document] = documents_in(tmp_path / "out")
    assert words_of(document) == "a cat" and len(document) == 2


def test_a_circle_of_links_beside_images_is_named(tmp_path):
    write(tmp_path, {"a.jpg": b"first", "a.txt": "a cat"})
    (tmp_path / "b.jpg").symlink_to(tmp_path / "b.jpg")
    assert pairs_in(tmp_path) == (PAIRS[:1], {"not a file": 1})
    assert PairsSource.of([tmp_path]).states()[str(tmp_path)]["bytes"] == len(b"firsta cat")


@pytest.mark.parametrize("order", [sorted, lambda files: sorted(files, reverse=True)])
def test_the_layout_of_a_folder_does_not_depend_on_the_order_of_its_files(tmp_path, monkeypatch, order):
    write(tmp_path, {"metadata.csv": "path,caption\nb.jpg,other", "b.jpg": b"x", "z.jsonl": "", "b.txt": "x"})
    monkeypatch.setattr(pairs, "walk", lambda folder: order(walk(folder)))
    assert pairs_in(tmp_path) == ([("other", b"x")], {})
    make_tar(tmp_path / "n.tar", [("a.jpg", b"first"), ("a.txt", b"a cat")])
    assert pairs_in(tmp_path) == (PAIRS[:1], {})


def test_csv_lines_that_hold_no_row_are_named_and_rows_behind_them_read(tmp_path, monkeypatch):
    rows = ["path,caption", 'a.jpg,"open', "a.jpg,lost", 'a.jpg,"other"', "a.jpg," + "x" * 200_000, "a.jpg,good"]
    write(tmp_path, {"a.jpg": b"first", "a.csv": "\n".join(rows)})
    long, good, bad = sorted(
        found_in(PairsSource.of([tmp_path / "a.csv"])), key=lambda found: isinstance(found, Rejected)
    )
    assert (len(long.parts[0]), good.parts[0]) == (200_000, "good")
    assert bad.reason == "bad row" and "lines 2 to 4 hold no row" in bad.detail
    monkeypatch.setattr(reading, "MAX_BYTES", 100_000)
    assert pairs_in(tmp_path / "a.csv") == ([], {"bad row": 1, "line too long": 1})


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json.gz"])
def test_a_compressed_file_of_records_is_used_as_a_whole_or_not_at_all(tmp_path, name):
    content = "path,caption\na.jpg,a cat" if "csv" in name else '[{"path": "a.jpg", "caption": "a cat"}]'
    whole = gzip.compress(content.encode())
    write(tmp_path, {"a.jpg": b"first", name: whole + b"something else"})
    assert pairs_in(tmp_path / name) == (PAIRS[:1], {"trailing bytes": 1})
    write(tmp_path, {name: whole[:-1]})
    assert pairs_in(tmp_path / name) == ([], {"file damaged": 1})


def test_csv_rows_that_cannot_be_used_are_named_and_others_read(tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([["path", "caption"], ["a.jpg", 'a "cat",\non two lines'], ["a.jpg"], ["a.jpg", "é"]])
    write(tmp_path, {"a.jpg": b"first", "a.csv": text.getvalue().encode() + b"a.jpg,\xff\n"})
    documents, rejected = pairs_in(tmp_path / "a.csv")
    assert documents == [('a "cat",\non two lines', b"first"), ("é", b"first")]
    assert rejected == {"bad row": 1, "not UTF-8": 1}
    write(tmp_path, {"a.csv": 'path,caption\na.jpg,a cat\na.jpg,"' + "x" * 200})
    assert pairs_in(tmp_path / "a.csv")[0][0] == ("a cat", b"first")


def test_csv_files_of_other_separators_say_which_is_needed(tmp_path):
    write(tmp_path, {"a.jpg": b"first", "a.csv": "path;caption\na.jpg;a cat\n", "b.tsv": "path|caption\n"})
    found = found_in(PairsSource.of([tmp_path], layout="records"))
    assert [str(rejected).partition(", line")[0] for rejected in found] == [
        "no columns: values must be separated by ',', got ';'",
        "no columns: values must be separated by '\\t', got '|'",
    ]


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
    write(source, {"3.txt": "x"})  # of the same size
    with pytest.raises(InputError, match=r"made with other settings: files.*in"):
        built(outs[0])
    with pytest.raises(InputError, match="must lie outside of the sources"):
        check_outside(source / "out", [source], PairsSource.of([source]).files)
