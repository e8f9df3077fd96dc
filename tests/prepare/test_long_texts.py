"""Text files of any size, of one document or of many between separators, are read in pieces and lose nothing."""

import tracemalloc

import pytest
from build_cases import content, found_in, text_recipe, texts_of, words
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare import fitting
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.recipe import train_tokenizer
from transfusion_fast.prepare.sources import base, lines
from transfusion_fast.prepare.sources import text as text_source
from transfusion_fast.prepare.sources.lines import read_separated, separated_units
from transfusion_fast.prepare.sources.text import TextSource

STORY = "".join(f"Sentence {n} of the story: \u65e5\u672c\u8a9e.\n" + "\n" * (n % 9 == 0) for n in range(300))


@pytest.fixture
def streamed(monkeypatch):
    """Texts of more than 1,000 bytes are read in pieces of 100, and encoded in blocks of 500 characters."""
    for module in (lines, text_source):
        monkeypatch.setattr(module, "LONG_BYTES", 1000)
    for module, size in ((base, 100), (lines, 100), (fitting, 500)):
        monkeypatch.setattr(module, "_BLOCK", size)
    monkeypatch.setattr(fitting, "_BLOCK_PACKS", 1)


def test_a_long_text_becomes_what_it_becomes_in_memory(tmp_path, monkeypatch, streamed):
    path = tmp_path / "a.txt"
    path.write_text(f"\ufeff{STORY}", encoding="utf-8")
    built = build(text_recipe(path), tmp_path / "out")
    assert "".join(sorted(words(tmp_path / "out"), key=STORY.index)) == STORY and built.cut == 1
    assert train_tokenizer(TextSource.of([path]), 300, tmp_path / "none").num_text_tokens == 300
    for module in (lines, text_source):
        monkeypatch.setattr(module, "LONG_BYTES", 1 << 20)
    build(text_recipe(path), tmp_path / "whole")
    assert content(tmp_path / "whole") == content(tmp_path / "out")


@pytest.mark.parametrize(("end", "long", "reason"), [(b"\xff", "split", "not UTF-8"), (b"", "reject", "too long")])
def test_a_long_text_that_is_rejected_leaves_nothing(tmp_path, streamed, end, long, reason):
    files = tmp_path / "a.txt", tmp_path / "b.txt"
    files[0].write_bytes(STORY.encode() + end)
    files[1].write_text("good")
    recipe = Recipe(TextSource.of(files), Encoder(ByteTokenizer(), 64, long=long))
    assert build(recipe, tmp_path / "out").rejected == {reason: 1}
    assert words(tmp_path / "out") == ["good"]


@pytest.mark.parametrize("separator", ["<|end|>", "\n", "\n\n\n"])
@given(texts=st.lists(st.text("ab \u65e5", max_size=12), max_size=9), size=st.integers(1, 60))
def test_every_text_between_separators_is_in_one_unit_wherever_the_file_is_cut(
    tmp_path_factory, separator, texts, size
):
    path = tmp_path_factory.mktemp("separated") / "a.txt"
    path.write_text(separator.join(texts), encoding="utf-8")
    found = [  # where separators overlap, as in four ends of line, it is open which of them counts
        entry.decode().strip("\n")
        for unit in separated_units(path, separator.encode(), size)
        for _, entry in read_separated(unit, separator.encode())
    ]
    assert found == [text for text in texts if text.strip()]


def test_long_and_short_texts_between_separators_are_read_in_order(tmp_path, streamed, monkeypatch):
    texts = ["one", STORY, "two\n", STORY[:2000], "x" * 993, "end"]
    (tmp_path / "a.txt").write_text("<|end|>".join(texts), encoding="utf-8")
    source = TextSource.of([tmp_path], separator=b"<|end|>")
    found = [part for document in found_in(source) for part in document.parts]
    assert [part if isinstance(part, str) else "".join(part.pieces()) for part in found] == texts
    assert [isinstance(part, str) for part in found] == [True, False, True, False, True, True]
    assert texts_of([tmp_path], separator=b"no such")[1] == {}


def test_memory_does_not_grow_with_a_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words\n" * (24 << 17))  # 34 MB
    tracemalloc.start()
    try:
        [document] = found_in(TextSource.of([path]))
        assert sum(map(len, document.parts[0].pieces())) == path.stat().st_size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
