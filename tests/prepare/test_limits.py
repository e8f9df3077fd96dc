"""Limits: the first documents of the source, whatever reads them, and nothing behind them."""

import json
import os

import pytest
from build_cases import content, cut_off, text_recipe, words

from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.recipe import train_tokenizer
from transfusion_fast.prepare.selection import SIDES, Selection
from transfusion_fast.prepare.sources.text import TextSource


@pytest.fixture
def recipe(tmp_path):
    """Six files of ten texts, each with a bad line before its text 0, 4 and 8."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        lines = ("5\n" * (n % 4 == 0) + json.dumps(f"text {number} {n}") + "\n" for n in range(10))
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(lines))

    def limited(**limits):
        return text_recipe(tmp_path / "in", packs_per_shard=5, selection=Selection(**limits))

    return limited


def first(count):
    return sorted(f"text {n // 10} {n % 10}" for n in range(count))


@pytest.mark.parametrize(("limit", "rejected"), [(1, 1), (8, 2), (9, 3), (10, 3), (11, 4), (60, 18), (999, 18)])
def test_the_first_documents_are_used_and_said(tmp_path, recipe, limit, rejected):
    built = build(recipe(limit=limit), tmp_path / "out")
    assert words(tmp_path / "out") == first(min(limit, 60))
    assert built.rejected == {"no text": rejected}, "those behind the limit are not named"
    said = list(built.remarks(tmp_path / "out"))
    tokens = built.index.tokens
    reached = f"stopped at the limit: the first {limit} documents of the source, {tokens} tokens"
    assert (reached in said) == (limit <= 60)


@pytest.mark.parametrize(
    ("tokens", "count", "rejected"), [(10, 1, 1), (19, 1, 1), (20, 2, 1), (105, 10, 3), (9999, 60, 18)]
)
def test_documents_are_used_while_their_tokens_fit(tmp_path, recipe, tokens, count, rejected):
    built = build(recipe(limit_tokens=tokens), tmp_path / "out")  # each takes 8, and 2 at its ends
    assert words(tmp_path / "out") == first(count) and built.index.tokens == 10 * count
    assert built.rejected == {"no text": rejected}, "none of a file of which no document fits"


def test_a_limit_gives_the_same_bytes_for_any_number_of_processes_and_after_a_kill(tmp_path, recipe, monkeypatch):
    limited = recipe(limit=25, heldout=0.3)
    built = build(limited, tmp_path / "out")
    assert sorted(text for side in SIDES for text in words(tmp_path / "out" / side)) == first(25)
    assert built.first == (25, built.index.tokens + built.heldout.tokens)
    build(limited, tmp_path / "processes", processes=2)
    assert content(tmp_path / "processes") == content(tmp_path / "out")
    cut_off(limited, tmp_path / "resumed", monkeypatch)
    build(limited, tmp_path / "resumed")
    assert content(tmp_path / "resumed") == content(tmp_path / "out")


def test_what_is_behind_the_limit_is_not_read(tmp_path, recipe, monkeypatch):
    read, entries = [], TextSource.entries
    (tmp_path / "in" / "1.jsonl").write_text('"a text"\n' * 9000)

    def counted(self, unit):
        for entry in entries(self, unit):
            read.append(unit.path.name)
            yield entry

    monkeypatch.setattr(TextSource, "entries", counted)
    build(recipe(limit=12), tmp_path / "out")
    assert set(read) == {"0.jsonl", "1.jsonl"} and read.count("1.jsonl") < 3000
    read.clear()
    train_tokenizer(recipe().source, 260, tmp_path / "none", Selection(limit=12))
    assert read.count("1.jsonl") == 2


def test_a_folder_with_a_limit_is_recognized_and_a_touched_file_is_compared_as_far_as_it_was_read(tmp_path, recipe):
    build(recipe(limit=20), tmp_path / "out")
    os.utime(tmp_path / "in" / "4.jsonl", (1, 1))
    assert build(recipe(limit=20), tmp_path / "out").reused
    with pytest.raises(InputError, match=r"made with other settings: .* and selection\.limit 20 -> 30"):
        build(recipe(limit=30), tmp_path / "out")
    build(recipe(limit=5), tmp_path / "partly")
    os.utime(tmp_path / "in" / "0.jsonl", (1, 1))  # of which no checksum was made, as it was not read to its end
    with pytest.raises(InputError, match="modified"):
        build(recipe(limit=5), tmp_path / "partly")


def test_long_documents_count_once_and_one_behind_the_limit_is_not_split(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'"{letter * 100}"\n' for letter in "abcd"))
    built = build(text_recipe(tmp_path / "a.jsonl", selection=Selection(limit=2)), tmp_path / "out")
    assert set("".join(words(tmp_path / "out"))) == {"a", "b"} and built.cut == 2
    assert built.index.documents == 4 and built.first == (2, built.index.tokens)


def test_a_limit_that_leaves_nothing_is_one_line(tmp_path, recipe):
    with pytest.raises(InputError, match="--limit-tokens must leave the first document, got 9; give a larger"):
        build(recipe(limit_tokens=9), tmp_path / "out")
    for name, option in (("limit", "--limit"), ("limit_tokens", "--limit-tokens")):
        with pytest.raises(InputError, match=f"{option} must be 1 or more, got 0"):
            recipe(**{name: 0})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
