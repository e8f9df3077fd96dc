"""Exact deduplication: the first of equal documents stays, in the order of the source, and the others are named."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
from build_cases import IMAGES, content, documents_in, make_pairs, pairs_recipe, text_recipe, words
from hypothesis import given
from hypothesis import strategies as st
from image_files import picture, png

from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.selected_documents import located, repeated
from transfusion_fast.prepare.selection import SIDES, Selection
from transfusion_fast.prepare.sources.interleaved import InterleavedSource

DOCUMENTS = Selection(dedup="documents")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))))
def test_a_key_is_repeated_if_an_earlier_one_is_equal(keys):
    found = repeated(np.array(keys, np.uint64).reshape(-1, 2).T)
    assert found.tolist() == [key in keys[:number] for number, key in enumerate(keys)]


def test_an_id_holds_the_number_of_a_unit_and_of_any_of_its_documents():
    assert located(np.array([5, (7 << 32) + (1 << 31)])).tolist() == [[0, 5], [7, 1 << 31]]


@pytest.fixture
def recipe(tmp_path):
    """Three files of twenty texts, of which each but the first begins with the last ten of the one before."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        lines = (f"{json.dumps(f'text {n}')}\n" for n in range(10 * number, 10 * number + 20))
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(lines))
    return text_recipe(tmp_path / "in", packs_per_shard=2, selection=DOCUMENTS)


def left_out(folder):
    return [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]


def test_later_documents_that_equal_an_earlier_one_are_left_out_and_named(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    assert words(tmp_path / "out") == sorted(f"text {n}" for n in range(40))
    assert built.rejected == {"duplicate documents": 20} and built.index.documents == 40
    named = [entry["detail"] for entry in left_out(tmp_path / "out")]
    assert [place.rsplit("/", 1)[1] for place in named] == ["1.jsonl"] * 10 + ["2.jsonl"] * 10
    assert named[0].startswith("byte 0 of ") and len(set(named)) == 20
    assert f"left out 20, the first: duplicate documents: {named[0]}" in built.remarks(tmp_path / "out")
    build(recipe, tmp_path / "processes", processes=2)
    assert content(tmp_path / "processes") == content(tmp_path / "out")
    assert build(recipe, tmp_path / "out").reused


def test_duplicates_go_with_a_limit_and_a_held_out_part(tmp_path, recipe):
    selection = replace(DOCUMENTS, limit=25, heldout=0.3)
    built = build(replace(recipe, selection=selection), tmp_path / "out")
    texts = [text for side in SIDES for text in words(tmp_path / "out" / side)]
    assert sorted(texts) == sorted(f"text {n}" for n in range(20)) and built.first[0] == 25
    assert len(left_out(tmp_path / "out")) == 5


def test_split_documents_are_left_out_whole_and_counted_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'"{"a" * 100}"\n' * 3 + '"b"\n')
    built = build(text_recipe(tmp_path / "a.jsonl", selection=DOCUMENTS), tmp_path / "out")
    assert sum(map(len, words(tmp_path / "out"))) == 101 and built.cut == 1
    assert built.rejected == {"duplicate documents": 2}


def test_pairs_are_compared_by_image_and_caption_or_by_image_alone(tmp_path):
    red, blue, broken = png(np.full((20, 20, 3), 9, np.uint8)), png(np.full((20, 20, 3), 200, np.uint8)), b"none"
    pairs = [(broken, "one"), (broken, "one"), (red, "one"), (red, "one"), (red, "two"), (blue, "one"), (blue, "one")]
    numbered = {str(number): pair for number, pair in enumerate(pairs)}
    recipe = pairs_recipe(make_pairs(tmp_path / "a.tar", numbered, "png"))
    for kind, kept, out in ((None, 5, 0), ("documents", 3, 2), ("images", 2, 3)):
        built = build(replace(recipe, selection=Selection(dedup=kind)), tmp_path / str(kind))
        assert len(documents_in(tmp_path / str(kind))) == kept
        assert built.rejected == {"not an image": 2} | ({f"duplicate {kind}": out} if kind else {})
    assert words(tmp_path / "images") == ["one", "one"], "what is rejected is no earlier document"


def test_texts_have_no_images_to_compare(tmp_path, recipe):
    built = build(replace(recipe, selection=Selection(dedup="images")), tmp_path / "out")
    assert built.index.documents == 60 and not built.rejected


def test_documents_that_are_used_without_an_image_that_is_broken_have_no_equals_by_that(tmp_path):
    """A crawl has the same page in place of many images that are gone."""
    gone, good = ({"base64": base64.b64encode(data).decode()} for data in (b"<html>", png(picture(8, 8))))
    documents = [["one", gone], ["two", gone], ["three", gone, good], ["four", gone, good], ["five"]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    encoder = replace(IMAGES, bad_images="skip")
    recipe = Recipe(InterleavedSource.of([tmp_path]), encoder, selection=Selection(dedup="images"))
    assert build(recipe, tmp_path / "out").rejected == {"duplicate images": 1}
    assert words(tmp_path / "out") == ["five", "one", "three", "two"]
