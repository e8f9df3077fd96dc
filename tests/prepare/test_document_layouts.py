"""Interleaved documents are read in the layouts of public datasets, with the loss where it belongs."""

import json
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from build_cases import IMAGES, found_in, read, words_of
from build_cases import documents_in as prepared_in
from hypothesis import example, given
from hypothesis import strategies as st
from image_files import picture, png

from transfusion_fast.errors import Rejected, Repaired
from transfusion_fast.prepare.sources.base import Unit
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.layouts import FIELDS

FILES = {f"{name}.jpg": name.encode() for name in "abc"}


def documents_in(folder, *records, **settings):
    return read(written(folder, *records, **settings))


def written(folder, *records, **settings):
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return InterleavedSource.of([folder / "a.jsonl"], **settings)


def test_obelics_alternates_lists_of_texts_and_images(tmp_path):
    record = {"images": ["a.jpg", None, "b.jpg"], "texts": [None, "words\n\nmore", None], "metadata": "[]"}
    assert documents_in(tmp_path, record) == ([(b"a", "words\n\nmore", b"b")], {})
    both = {"images": ["a.jpg"], "texts": ["and words"]}
    assert documents_in(tmp_path, both, {**both, "texts": [None, None]})[1] == {"no content": 2}


def test_mmc4_puts_each_image_before_its_sentence(tmp_path):
    infos = [{"image_name": "b.jpg", "matched_text_index": 1, "matched_sim": 0.3},
             {"image_name": "x.jpg", "image_base64": "Yw==", "matched_text_index": 1},
             {"image_name": "a.jpg", "raw_url": "https://host/a.jpg", "matched_text_index": 0}]  # fmt: skip
    record = {"url": "x", "text_list": ["One.", "Two.", "Three."], "image_info": infos}
    assert documents_in(tmp_path, record) == ([(b"a", "One.", b"b", b"c", " Two.", " Three.")], {})
    for index in (3, -1, None):
        record = {"text_list": ["One."], "image_info": [{"image_name": "a.jpg", "matched_text_index": index}]}
        assert documents_in(tmp_path, record)[1] == {"no content": 1}


def test_conversations_have_their_loss_on_what_the_assistant_says(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."},
             {"from": "human", "value": "And here? <image>"}, {"from": "gpt", "value": "Two."}]  # fmt: skip
    [found] = found_in(written(tmp_path, {"id": 1, "image": ["a.jpg", "b.jpg"], "conversations": turns}))
    assert list(zip(found.parts, found.weights, strict=True)) == [
        ("User: ", 0), (b"a", 0), ("What is this?\nAssistant: ", 0), ("A cat.\n", 1),
        ("User: And here? ", 0), (b"b", 0), ("\nAssistant: ", 0), ("Two.\n", 1),
    ]  # fmt: skip


def test_messages_with_typed_parts_are_the_same_conversation(tmp_path):
    typed = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": typed},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]  # fmt: skip
    value = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>What?"},
             {"from": "gpt", "value": "A cat."}]  # fmt: skip
    records = {"messages": messages, "images": ["a.jpg"]}, {"conversations": value, "image": "a.jpg"}
    one, other = found_in(written(tmp_path, *records))
    assert one.parts == other.parts == ("System: Be brief.\nUser: ", b"a", "What?\nAssistant: ", "A cat.\n")
    assert one.weights == other.weights == (0, 0, 0, 1)


def test_an_assistant_that_draws_has_the_loss_on_its_image(tmp_path):
    turns = [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<image>"}]
    [found] = found_in(written(tmp_path, {"image": "a.jpg", "conversations": turns}))
    assert (found.parts, found.weights) == (("User: Draw.\nAssistant: ", b"a", "\n"), (0, 1, 1))


@pytest.mark.parametrize(("record", "reason"), [
    ({"conversations": [{"from": "human", "value": "<image>"}]}, "no image"),
    ({"image": "a.jpg", "conversations": [{"from": "human", "value": "no mark"}]}, "no content"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown speaker"),
    ({"conversations": [{"value": "x"}]}, "no content"),
    ({"messages": [{"role": "user", "content": 5}]}, "no content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "unknown part"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "unknown part"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "unknown part"),
    ({"conversations": []}, "no content"),
])  # fmt: skip
def test_conversations_that_cannot_be_read_are_named(tmp_path, record, reason):
    assert documents_in(tmp_path, record, ["good"]) == ([("good",)], {reason: 1})


WORDS = st.sampled_from(["text", "image", "type", "value", "from", "role", "human", "gpt", "<image>", "a.jpg", "url"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(VALUES, max_size=3), max_size=4))
@example({"content": [], "images": {"a": 1}})
def test_records_of_any_values_are_read_or_named(record):
    source = InterleavedSource((Path("/none/a.jsonl"),))
    with suppress(Rejected):
        for part in source.parts(record, Unit(source.files[0], 0, 1)):
            assert isinstance(part.content, str | bytes | Rejected)


@pytest.mark.parametrize("part", [
    {"type": "image", "image": "a.jpg"}, {"type": "image", "path": "a.jpg"}, {"type": "image", "base64": "YQ=="},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,YQ=="}}, {"type": "image"},
    {"type": "image_url", "image_url": "a.jpg"}, {"image": "a.jpg", "alt": "other keys are ignored"},
    {"type": "image", "image": {"bytes": None, "path": "a.jpg"}},
], ids=str)  # fmt: skip
def test_images_of_typed_parts_are_found(tmp_path, part):
    record = {"content": [{"type": "text", "text": "words"}, part, None], "images": ["a.jpg"]}
    assert documents_in(tmp_path, record) == ([("words", b"a")], {})


def test_images_that_typed_parts_leave_over_are_named(tmp_path):
    record = {"content": [{"type": "image"}, "words"], "images": ["a.jpg", "b.jpg"]}
    assert documents_in(tmp_path, record, {**record, "images": ["a.jpg"]}) == ([(b"a", "words")], {"no content": 1})


def test_typed_parts_keep_their_weights(tmp_path):
    content = [{"type": "text", "text": "a", "loss": False}, {"type": "image", "image": "a.jpg", "weight": 3}]
    assert found_in(written(tmp_path, content))[0].weights == (0, 3)


def test_a_given_layout_is_the_only_one_that_is_read(tmp_path):
    obelics, content = {"images": [None], "texts": ["words"]}, {"content": ["text"]}
    assert documents_in(tmp_path, obelics, content) == ([("words",), ("text",)], {})
    assert documents_in(tmp_path, obelics, content, layout="obelics") == ([("words",)], {"no content": 1})


def test_tables_hold_documents_too(tmp_path):
    structs = [{"bytes": b"one", "path": None}]
    conversation = [[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "é"}], None]
    table = pyarrow.table({
        "images": pyarrow.array([structs, [None, *structs]]),
        "texts": pyarrow.array([None, ["words", None]], pyarrow.list_(pyarrow.string())),
        "conversations": pyarrow.array(conversation),
        "url": ["x", "y"],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents, rejected = read(InterleavedSource.of([tmp_path]))
    assert documents == [("User: ", b"one", "?\nAssistant: ", "é\n"), ("words", b"one")] and not rejected
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"]}), tmp_path / "a.parquet")
    [rejected] = found_in(InterleavedSource.of([tmp_path]))
    assert rejected.reason == "no content" and "'url'" in rejected.detail


def test_null_fields_are_none_as_rows_of_tables_have_all_columns(tmp_path):
    """Also structures in lists, of which each has the fields of all others."""
    parts = [{"text": "Is it? ", "loss": False}, {"image": "a.jpg", "weight": 2.0}, {"text": "Yes."}]
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    records = [
        {"content": parts}, {"image": {"bytes": b"b", "path": None}, "messages": turns},
        {"conversations": [{"from": "gpt", "value": "y"}]}, {"images": [None], "texts": ["words"]},
    ]  # fmt: skip
    table = pyarrow.table({name: [record.get(name) for record in records] for name in FIELDS[:-2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    written(tmp_path)
    typed, conversation, *others = found_in(InterleavedSource.of([tmp_path / "a.parquet"]))
    assert (typed.parts, typed.weights) == (("Is it? ", b"a", "Yes."), (0, 2, 1))
    assert conversation.parts == ("User: ", b"b", "?\nAssistant: ", "x\n")
    assert [other.parts for other in others] == [("Assistant: ", "y\n"), ("words",)]


def test_paths_are_relative_to_the_root_that_is_given(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "d.jpg").write_bytes(b"d")
    assert documents_in(tmp_path, [{"image": "d.jpg"}], image_root=root) == ([(b"d",)], {})
    assert documents_in(tmp_path, [{"image": "../a.jpg"}], image_root=root)[1] == {"path leads out": 1}


def test_the_options_of_the_command_are_followed(tmp_path, command):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(png(picture(32, 32)))
    obelics = {"texts": ["one", None, None], "images": [None, "a.jpg", "no.jpg"]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [obelics, {"content": ["other"]}])))
    options = ["--image-root", tmp_path / "images", "--bad-images", "skip", "--layout", "obelics", "--image-size", 32]
    code, _, err = command("prepare", "interleaved", tmp_path / "a.jsonl", "--out", tmp_path / "out", *options)
    assert code == 0 and "left out 1: no content" in err and "repaired 1: image left out" in err
    [document] = prepared_in(tmp_path / "out")
    assert words_of(document) == "one" and len(document) == 2


@pytest.mark.parametrize("bad", [{"image": "no.jpg"}, {"base64": "?"}, {"image": "broken.jpg"}], ids=str)
def test_a_document_with_a_bad_image_is_left_out_or_used_without_it(tmp_path, bad):
    (tmp_path / "good.jpg").write_bytes(png(picture(16, 16)))
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    record = {"content": [{"text": "one", "weight": 2}, bad, {"image": "good.jpg"}, {"text": "two", "weight": 3}]}
    source = written(tmp_path, record, [bad])
    encoded = list(IMAGES.encode(found_in(source)))
    assert all(isinstance(found, Rejected) for found in encoded) and len(encoded) == 2
    skipping = IMAGES.__class__(**{**vars(IMAGES), "bad_images": "skip"})
    repaired, [document], other, empty = skipping.encode(found_in(source))
    assert isinstance(repaired, Repaired) and repaired.reason == other.reason == "image left out"
    assert "part 1" in repaired.detail or "broken" in str(bad)
    assert words_of(document) == "onetwo" and [segment.weight for segment in document] == [2, 1, 3]
    assert isinstance(empty, Rejected) and empty.reason == "empty document"
