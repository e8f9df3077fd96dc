"""A held-out part: each document on the side that its content gives it, both sides complete, in one step."""

import json
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from build_cases import IMAGES, Stop, content, cut_off, pairs_recipe, stop, text_recipe, words

from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare import recipe as recipe_module
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.recipe import measure_features, train_tokenizer
from transfusion_fast.prepare.selection import SIDES, Selection, content_key
from transfusion_fast.prepare.sources.base import SourceDocument, TextRange

QUARTER = Selection(heldout=0.25)


def lines(path, texts):
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))


def sides(folder):
    return [set(words(folder / side)) for side in SIDES]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        lines(tmp_path / "in" / f"{number}.jsonl", (f"{number} {n}" for n in range(60)))
    return text_recipe(tmp_path / "in", packs_per_shard=5, selection=QUARTER)


def test_a_document_stays_on_its_side_whatever_is_beside_it_and_however_it_is_read(tmp_path, recipe):
    built = build(recipe, tmp_path / "out")
    train, heldout = sides(tmp_path / "out")
    assert len(train) == built.index.documents and len(heldout) == built.heldout.documents
    assert train | heldout == {f"{number} {n}" for number in range(3) for n in range(60)} and not train & heldout
    assert 0.15 < len(heldout) / 180 < 0.35
    build(recipe, tmp_path / "more", processes=2)
    assert content(tmp_path / "more") == content(tmp_path / "out")
    lines(tmp_path / "in" / "0a.jsonl", (f"new {n}" for n in range(100)))
    lines(tmp_path / "in" / "3.jsonl", [*heldout, *train])  # every document twice
    build(replace(text_recipe(tmp_path / "in"), selection=QUARTER), tmp_path / "doubled")
    more = sides(tmp_path / "doubled")
    assert train < more[0] and heldout < more[1] and not more[0] & more[1]
    build(replace(recipe, selection=Selection(heldout=0.5)), tmp_path / "half")
    assert heldout < sides(tmp_path / "half")[1], "a larger share holds out more, and the same ones"


def test_a_document_that_is_split_stays_on_one_side(tmp_path):
    lines(tmp_path / "a.jsonl", (" ".join([f"document{n}"] * 30) for n in range(40)))
    build(text_recipe(tmp_path / "a.jsonl", selection=QUARTER), tmp_path / "out")
    names = [{word.split("document")[-1] for text in side for word in text.split()} for side in sides(tmp_path / "out")]
    assert names[0] and names[1] and not names[0] & names[1] and len(names[0] | names[1]) == 40


def test_pairs_are_held_out_and_what_is_left_out_is_named_beside_both_parts(tmp_path, tars):
    recipe = replace(pairs_recipe(tars), selection=QUARTER)
    built = build(recipe, tmp_path / "out")
    assert built.index.documents + built.heldout.documents == 57 and built.rejected == {"image damaged": 3}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heldout", "left_out.jsonl", "recipe.json", "train",
    ]  # fmt: skip
    assert build(recipe, tmp_path / "out").reused
    for other in (Selection(), Selection(heldout=0.3)):
        with pytest.raises(InputError, match=r"made with other settings: selection.heldout 0\.25 -> 0\.[03]"):
            build(replace(recipe, selection=other), tmp_path / "out")
    index = tmp_path / "out" / "heldout" / "index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(InputError, match=r"made with other settings: index.heldout .* -> "):
        build(recipe, tmp_path / "out")


def test_both_parts_are_finished_in_one_step_and_a_run_that_was_cut_off_resumes(tmp_path, recipe, monkeypatch):
    build(recipe, tmp_path / "whole")
    cut_off(recipe, tmp_path / "out", monkeypatch)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("pathlib.Path.rename", stop)
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_part_that_would_be_empty_is_one_line_and_another_share_may_be_given(tmp_path):
    lines(tmp_path / "a.jsonl", ("one", "two", "three"))
    for share, side in ((1e-9, "heldout"), (1 - 1e-9, "train")):
        recipe = text_recipe(tmp_path / "a.jsonl", selection=Selection(heldout=share))
        with pytest.raises(InputError, match=f"^{side} part must hold a document, got none of the 3 with --heldout"):
            build(recipe, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    for share in (1, -0.1, float("nan")):
        with pytest.raises(InputError, match="--heldout must be a share between 0 and 1"):
            Selection(heldout=share)


def test_tokenizers_and_normalisation_see_no_document_that_is_held_out(tmp_path, recipe, tars, monkeypatch):
    seen = []
    monkeypatch.setattr(recipe_module, "train_bpe", lambda texts, _: seen.extend(texts))
    limited = replace(recipe, selection=replace(QUARTER, limit=100))  # of both parts together
    train_tokenizer(recipe.source, 300, tmp_path / "none", limited.selection)
    build(limited, tmp_path / "out")
    assert set(seen) == sides(tmp_path / "out")[0]

    pairs = replace(pairs_recipe(tars), selection=QUARTER)
    build(pairs, tmp_path / "pairs")
    seen.clear()
    monkeypatch.setattr(Encoder, "pixels", lambda _, documents: seen.extend(d.parts[0] for d in documents) or ())
    monkeypatch.setattr("transfusion_fast.data.vision_encoder.VisionEncoder", object)
    with pytest.raises(InputError, match="got none"):
        measure_features(replace(IMAGES, latents=Features()), pairs.source, None, tmp_path / "none", QUARTER)
    train, heldout = sides(tmp_path / "pairs")
    assert train < set(seen) and not heldout & set(seen)

    seen.clear()
    few = replace(QUARTER, limit=10)
    with pytest.raises(InputError, match="got none"):
        measure_features(replace(IMAGES, latents=Features()), pairs.source, None, tmp_path / "none", few)
    assert set(seen) <= {f"picture 0 {n}" for n in range(10)}, "nothing behind the limit is read"


class Features:
    encoder = object()

    def __call__(self, images):
        return images


def test_the_hash_is_of_the_content_alone(tmp_path):
    text = "Zoë's long text. " * 99_999
    (tmp_path / "a.txt").write_text(f"\ufeff{text}", encoding="utf-8")
    streamed = TextRange(tmp_path / "a.txt", 0, (tmp_path / "a.txt").stat().st_size)
    assert content_key([streamed]) == content_key([text]) != content_key([text[1:]])
    pixels = np.zeros((4, 6, 3), np.uint8)
    contents = [
        ["ab"], ["a", "b"], ["b", "a"], [b"ab"], [b"ab", "ab"], ["\ud800"], [pixels], [pixels.reshape(6, 4, 3)],
        [pixels + 1], [TextSegment(np.zeros(4, np.int32))], [TextSegment(np.ones(4, np.int32))],
        [ImageSegment(np.zeros((2, 2, 3), np.float16))],
    ]  # fmt: skip
    assert len({content_key(parts) for parts in contents}) == len(contents)
    known = content_key(["a text", b"an image", "more"]).hex()
    assert known == "ceef88d5a70988ef334657726f53776e", "another hash would move documents to the other side"
    marks = deque()
    documents = [SourceDocument("here", ("ab",)), SourceDocument("elsewhere", ("ab",), (0.5,))]
    assert list(QUARTER.marked(documents, marks)) == documents and marks[0] == marks[1]


def test_the_share_of_hashes_that_is_held_out_stays_the_same():
    """It begins at 0, and the first 8 bytes of a hash, the lowest first, are its place in it."""
    place = int.from_bytes(content_key(["a text"])[:8], "little") / 2**64
    for share in (place * (1 - 1e-12), place * (1 + 1e-12)):
        marks = deque()
        assert len([*Selection(heldout=share).marked([SourceDocument("here", ("a text",))], marks)]) == 1
        assert marks[0].heldout == (share > place), "another rule would move documents to the other side"


def test_a_document_used_without_a_missing_image_stays_on_its_side():
    missing = Rejected("image missing", "'a.jpg' below a folder that was moved")
    assert content_key(["words", missing]) == content_key(["words"]) != content_key(["words", b""])


def test_all_captions_of_an_image_are_on_one_side():
    documents = [SourceDocument("", (f"caption {n}", bytes([image]))) for image in range(40) for n in range(3)]
    marks = deque()
    list(Selection(heldout=0.3).marked(documents, marks))
    sides = [mark.heldout for mark in marks]
    assert sides[::3] == sides[1::3] == sides[2::3] and 3 < sum(sides[::3]) < 25
