"""Filters leave out the documents that they name and no others, under reasons of their own."""

import gzip
import json
import math
import operator
from collections import Counter
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from build_cases import RGB, TOKENIZER, make_tar, words
from hypothesis import given
from hypothesis import strategies as st
from image_files import picture, png, png_with_header, saved
from PIL import Image

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.files import read_json
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.filters import Condition, Filters, parse_lengths
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.recipe import train_tokenizer
from transfusion_fast.prepare.selection import Selection
from transfusion_fast.prepare.sources.base import SourceDocument
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

COMPARED = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
SCORES = {"a": {"score": 0.5}, "b": {"score": 0.2}, "c": {}, "d": {"score": "high"}, "e": {"score": math.nan}}
LEFT_OUT = {"not score > 0.3": 1, "field missing": 1, "field is no number": 2}
ABOVE = Filters((Condition.parse("score > 0.3"),))


def reason(condition, **fields):
    """Return why a document of these fields is left out, "" if it is not."""
    try:
        Condition.parse(condition).check(fields)
    except Rejected as rejected:
        return rejected.reason
    return ""


@given(st.sampled_from(list(COMPARED)), st.floats(-3, 3), st.one_of(st.integers(-3, 3), st.floats(-3, 3)))
def test_numbers_are_compared_as_python_compares_them(sign, value, found):
    assert (reason(f"x{sign}{value!r}", x=found) == "") == COMPARED[sign](found, value)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("n.deep >= 2", ""),
        ("n.deep < 2", "not n.deep < 2"),
        ("large == 9007199254740993", ""),
        ("large != 9007199254740992", ""),
        ("n.deep > 1e999", "not n.deep > Infinity"),
        ("text == 'en'", ""),
        ('  text!="en" ', 'not text != "en"'),
        ("text == ''", 'not text == ""'),
        ("aesthetic-score > -1e-3", ""),
        ("n.other > 0", "field missing"),
        ("text.deep > 0", "field missing"),
        ("text > 0", "field is no number"),
        ("n > 0", "field is no number"),
        ("true == 1", "field is no number"),
        ("nan != 1", "field is no number"),
        ("none < 1", "field missing"),
        ("written > 1e-1", ""),
        ("written == 0.25", "not written == 0.25"),
        ("count == '3'", "field is no text"),
        ("huge > 1", ""),
        ("decimal >= 0.5", ""),
    ],
)
def test_conditions_name_fields_also_within_objects_and_compare_only_their_own_type(condition, expected):
    record = {"n": {"deep": 2}, "text": "en", "aesthetic-score": 5.5, "true": True, "nan": math.nan, "none": None}
    numbers = {"written": "0.5", "count": 3, "large": 9007199254740993, "huge": 10**400, "decimal": Decimal("0.50")}
    assert reason(condition, **record, **numbers) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "x >", "> 3", "x > y", "x > 0.3 and y > 1", "x = 3", "x => 3", "x > 'b'", "x == 'a", "x > nan",
        "x > inf", "x > 1_000", "x > " + "9" * 5000 + "a", "x > 0x10", "a b > 3", "x..y > 3", ".x > 3", "x > 3\n> 4",
        "__import__('os').abort() > 0", "x == 'a' or 'b'",
    ],
)  # fmt: skip
def test_a_malformed_condition_is_refused_in_one_line(text):
    with pytest.raises(InputError, match="condition must be FIELD, an operator") as error:
        Condition.parse(text)
    assert "\n" not in str(error.value)


def left_out(source, encoder=None):
    """(texts of the documents that are kept, reasons of the others)."""
    encoder = encoder or Encoder(TOKENIZER, 64, (RGB,), ImageRule("crop", 8, 4), filters=ABOVE)
    outcomes = [found for unit in source.units() for found in encoder.encode(source.documents(unit))]
    rejected = Counter(found.reason for found in outcomes if isinstance(found, Rejected))
    return [TOKENIZER.decode(found[0][0].ids) for found in outcomes if not isinstance(found, Rejected)], rejected


def test_conditions_look_at_json_lines_and_at_the_json_beside_an_image(tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(png(picture(8, 8)))
    lines = "\n".join(json.dumps({"text": name, "content": [name, {"image": image.name}], **SCORES[name]})
                      for name in SCORES)  # fmt: skip
    (tmp_path / "a.jsonl").write_text(lines)
    for kind in (TextSource, InterleavedSource):
        assert left_out(kind.of([tmp_path / "a.jsonl"], fields=ABOVE.fields)) == (["a"], LEFT_OUT)
    members = [
        (f"{name}.{extension}", content)
        for name in SCORES
        for extension, content in (
            ("png", image.read_bytes()),
            ("txt", name.encode()),
            ("json", json.dumps(SCORES[name]).encode()),
        )
        if name != "c" or extension != "json"
    ]
    source = PairsSource.of([make_tar(tmp_path / "a.tar", members)], fields=ABOVE.fields)
    assert left_out(source) == (["a"], LEFT_OUT)


def test_conditions_look_at_parquet_rows_whose_other_columns_are_not_read(tmp_path, monkeypatch):
    path, other, read = tmp_path / "a.parquet", tmp_path / "b.parquet", []
    numbers = {"score": [0.5, 0.2, None, None, math.nan]}
    pyarrow.parquet.write_table(pyarrow.table({"wide": ["w"] * 5, "text": list("abcde"), **numbers}), path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["f"]}), other)
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def logged(table, *given, columns, **options):
        read.append(sorted(columns))
        return iter_batches(table, *given, columns=columns, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", logged)
    reasons = {"not score > 0.3": 1, "field missing": 3, "field is no number": 1}
    assert left_out(TextSource.of([path, other], fields=ABOVE.fields)) == (["a"], reasons)
    assert read == [["score", "text"], ["text"]]
    assert left_out(TextSource.of([path]), Encoder(TOKENIZER, 64))[0] == list("abcde")
    assert read[2:] == [["text"]]
    nested = pyarrow.table({"text": ["a", "b"], "scores": [{"clip": 0.4}, {"clip": 0.1}]})
    pyarrow.parquet.write_table(nested, path)
    filters = Filters((Condition.parse("scores.clip > 0.3"),))
    assert left_out(TextSource.of([path], fields=filters.fields), Encoder(TOKENIZER, 64, filters=filters))[0] == ["a"]


@pytest.mark.parametrize("kind", ["csv", "tsv.gz"])
def test_values_of_csv_files_are_numbers_if_they_read_as_such(tmp_path, kind):
    rows = [
        "path,text,score,language",
        "i.png,a,0.5,en",
        "i.png,b,2e-1,en",
        "i.png,1,.4,7",
        "i.png,d,,en",
        "i.png,e,nan,en",
    ]
    content, path = "\n".join(rows).replace(",", "\t" if "tsv" in kind else ",").encode(), tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    (tmp_path / "i.png").write_bytes(png(picture(8, 8)))
    for source in (TextSource.of([path], fields=ABOVE.fields), PairsSource.of([path], fields=ABOVE.fields)):
        assert left_out(source) == (["a", "1"], {"not score > 0.3": 1, "field is no number": 2})
    english = Filters((Condition.parse("language == 'en'"),))
    source = TextSource.of([path], fields=english.fields)
    assert left_out(source, Encoder(TOKENIZER, 64, filters=english)) == (list("abde"), {'not language == "en"': 1})


def test_conditions_look_at_parquet_rows_of_documents_with_images(tmp_path):
    image = png(picture(8, 8))
    table = pyarrow.table({"image": [image] * 2, "text": ["a", "b"], "score": [0.5, 0.2], "wide": ["w"] * 2})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert left_out(PairsSource.of([tmp_path], fields=ABOVE.fields)) == (["a"], {"not score > 0.3": 1})
    pyarrow.parquet.write_table(table.append_column("content", [[["a"], ["b"]]]), tmp_path / "a.parquet")
    assert left_out(InterleavedSource.of([tmp_path], fields=ABOVE.fields)) == (["a"], {"not score > 0.3": 1})


def test_a_string_that_is_not_utf8_leaves_out_its_row_alone(tmp_path):
    offsets = np.array([0, 2, 4], np.int32)
    values = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"en\xff\xfe"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "language": values}), tmp_path / "a.parquet")
    filters = Filters((Condition.parse("language == 'en'"),))
    source = TextSource.of([tmp_path / "a.parquet"], fields=filters.fields)
    assert left_out(source, Encoder(TOKENIZER, 64, filters=filters)) == (["a"], {"not UTF-8": 1})


def test_fields_of_csv_files_are_numbers_if_they_are_written_so_and_names_may_have_dots(tmp_path):
    (tmp_path / "a.csv").write_text("text,scores.clip,words\none,0.31,x\ntwo,0.2,x\nthree,,x\nfour,high,x\n")
    filters = Filters.parse(["scores.clip > 0.3", "words == 'x'"])
    source = TextSource.of([tmp_path / "a.csv"], fields=filters.fields)
    expected = {"not scores.clip > 0.3": 1, "field is no number": 2}
    assert left_out(source, Encoder(TOKENIZER, 64, filters=filters)) == (["one"], expected)


def outcome(filters, *parts):
    """Return why a document is left out, "" if it is not."""
    encoder = Encoder(TOKENIZER, 64, (RGB,), ImageRule("crop", 8, 4), filters=filters)
    [found] = encoder.encode([SourceDocument("here", parts)])
    assert not isinstance(found, Rejected) or str(found).endswith(", here")
    return found.reason if isinstance(found, Rejected) else ""


@pytest.mark.parametrize(("size", "expected"), [((40, 80), ""), ((39, 40), "image too small"),
                                                ((81, 40), "aspect ratio too large")])  # fmt: skip
def test_images_are_left_out_by_their_original_size_however_they_lie(size, expected):
    filters = Filters(min_side=40, max_aspect=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for width, height in (size, size[::-1]):
        assert outcome(filters, "a", png(np.zeros((height, width, 3), np.uint8))) == expected
        turned = saved(Image.new("RGB", (width, height)), "JPEG", exif=exif)
        assert outcome(filters, "a", turned) == expected


def test_the_size_is_checked_before_an_image_is_decoded():
    filters = Filters(min_side=40, max_aspect=2)
    assert outcome(filters, png_with_header(30, 30)) == "image too small"
    assert outcome(filters, png_with_header(300, 100)) == "aspect ratio too large"
    assert outcome(filters, png_with_header(100, 100)) == "image damaged"


def test_a_document_with_one_small_image_is_left_out_as_a_whole():
    large, small = png(picture(50, 50)), png(picture(10, 50))
    assert outcome(Filters(min_side=40), "a", large, "b", large) == ""
    assert outcome(Filters(min_side=40), "a", large, "b", small) == "image too small"


@pytest.mark.parametrize(("bounds", "kept"), [("2:4", "234"), ("2:", "2345"), (":4", "1234"), ("3:3", "3")])
def test_captions_are_kept_by_their_number_of_characters(bounds, kept):
    filters = Filters(caption_length=parse_lengths(bounds))
    found = {length: outcome(filters, "ä" * length) for length in range(1, 6)}
    assert "".join(str(length) for length, why in found.items() if not why) == kept
    assert set(found.values()) <= {"", "caption too short", "caption too long"}


@pytest.mark.parametrize("text", ["", ":", "5", "5:4", "a:b", "-1:3", "1:2:3", "1.5:3", "²:3", "1:" + "9" * 5000])
def test_malformed_lengths_are_refused(text):
    with pytest.raises(InputError, match="caption length must be MIN:MAX characters, got "):
        parse_lengths(text)


@pytest.mark.parametrize("settings", [{"min_side": 0}, {"max_aspect": 0.5}, {"max_aspect": math.nan}], ids=str)
def test_sizes_that_no_image_or_every_image_has_are_refused(settings):
    with pytest.raises(InputError, match="must be 1 or more, got"):
        Filters(**settings)


def test_a_folder_is_of_its_filters(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"text": name, **SCORES[name]}) + "\n" for name in SCORES))

    def recipe(filters):
        return Recipe(TextSource.of([path], fields=filters.fields), Encoder(TOKENIZER, 64, filters=filters))

    built = build(recipe(ABOVE), out)
    assert (words(out), built.rejected) == (["a"], LEFT_OUT)
    lines = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["not score > 0.3", "field missing", *["field is no number"] * 2]
    assert all(str(path) in line["detail"] for line in lines)
    assert build(recipe(ABOVE), out).reused
    below = replace(ABOVE, where=(Condition.parse("score > 0.4"),))
    for filters in (Filters(), below, replace(ABOVE, caption_length=(0, 5))):
        with pytest.raises(InputError, match=r"made with other settings: encoder.filters"):
            build(recipe(filters), out)
    build(recipe(Filters()), tmp_path / "all")
    assert "filters" not in read_json(tmp_path / "all" / "recipe.json")["encoder"]
    assert build(recipe(Filters()), tmp_path / "all").reused


def test_a_tokenizer_is_trained_on_what_conditions_leave_and_kept_with_them(tmp_path, monkeypatch):
    path, out, seen = tmp_path / "a.jsonl", tmp_path / "out", []
    path.write_text("".join(json.dumps({"text": f"text {n} " * 9, "score": n / 10}) + "\n" for n in range(10)))
    source = TextSource.of([path], fields=ABOVE.fields)
    tokenizer = train_tokenizer(source, 260, out, filters=ABOVE)
    build(Recipe(source, Encoder(tokenizer, 64, filters=ABOVE), train_bpe=260), out)
    monkeypatch.setattr("transfusion_fast.prepare.recipe.train_bpe", lambda texts, _: seen.extend(texts))
    assert train_tokenizer(source, 260, out, filters=ABOVE).describe() == tokenizer.describe() and not seen
    train_tokenizer(source, 260, out, Selection(limit=3), ABOVE)
    assert seen == [f"text {n} " * 9 for n in (4, 5, 6)]
    seen.clear()
    train_tokenizer(source, 260, out)
    assert len(seen) == 10
