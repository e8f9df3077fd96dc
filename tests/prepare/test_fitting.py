"""Long texts are cut where a reader would pause, and nothing of them is lost."""

import numpy as np
import pytest
from build_cases import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.prepare.fitting import piece_lengths, split_blocks

BPE = train_bpe(["the quick brown fox jumps over the lazy dog. " * 20], 285)


def pieces(text, limit, first=None, tokenizer=TOKENIZER):
    ids, starts = tokenizer.encode_with_starts(text)
    lengths = list(piece_lengths(text, starts, first or limit, limit))
    assert sum(lengths) == len(ids) and min(lengths) >= 1
    assert lengths[0] <= (first or limit) and max(lengths) <= max(limit, first or limit)
    return [tokenizer.decode(part) for part in np.split(ids, np.cumsum(lengths)[:-1])]


@given(st.text(st.sampled_from("ab é日.\n"), min_size=1, max_size=60), st.integers(4, 9), st.integers(4, 9))
def test_pieces_fit_and_are_the_text(text, limit, first):
    for tokenizer in (TOKENIZER, BPE):  # no character needs more than 4 tokens, so every piece is text by itself
        assert "".join(pieces(text, limit, first, tokenizer)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two.", ["one two."]),
        ("aa bb.\n\ncccc.dd ee\nff gg", ["aa bb.\n\n", "cccc.dd ee\n", "ff gg"]),
        ("aaaa\n\nbb\ncc dd", ["aaaa\n\n", "bb\ncc dd"]),
        ("aa bb\ncc. dd ee ff", ["aa bb\n", "cc. dd ee ff"]),
        ("aa bb? cc dd ee ff", ["aa bb? ", "cc dd ee ff"]),
        ('a "bb." cc dd ee ff', ['a "bb." ', "cc dd ee ff"]),
        ("aaaa bbbb ccccc dd", ["aaaa bbbb ", "ccccc dd"]),
        ("a bbbbbbbbbbbbbbbbb", ["a bbbbbbbbbb", "bbbbbbb"]),
        ("日本語日本日", ["日本語日", "本日"]),
        ("x日本語日本", ["x日本語", "日本"]),
    ],
)
def test_the_best_pause_in_the_second_half_is_taken_and_no_character_cut(text, expected):
    assert pieces(text, 12) == expected


@pytest.mark.parametrize(
    ("paragraph", "sentence", "end"),
    [(200, 252, 252), (224, 247, 224), (200, 230, 230), (140, 200, 140), (100, 200, 200), (256, 250, 256)],
)
def test_a_pause_near_the_end_of_what_fits_goes_before_a_better_one_that_is_not(paragraph, sentence, end):
    """Near is the last 32nd, the last eighth or the second half, of 256 here."""
    letters = list("x" * 400)
    letters[sentence - 2 : sentence] = ". "
    letters[paragraph - 2 : paragraph] = "\n\n"
    assert len(pieces("".join(letters), 256)[0]) == end


def test_bytes_that_are_no_character_are_replaced():
    assert TOKENIZER.decode([0xE4, 0x41]) == "\ufffdA"


def test_a_space_stays_with_the_word_that_its_token_holds():
    parts = pieces("the quick brown fox jumps over", 4, tokenizer=BPE)
    assert len(parts) > 1 and all(not part.endswith(" ") for part in parts)
    assert all(part.startswith(" ") for part in parts[1:])


@given(text=st.text(st.sampled_from("ab é.\n"), max_size=60), size=st.integers(1, 20))
def test_blocks_fit_and_are_the_text(text, size):
    found = list(split_blocks([text], size))
    assert "".join(found) == text
    assert list(split_blocks(iter(text), size)) == found, "however the text is divided"
    assert all(0 < len(block) <= size for block in found) or not text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aa bb.\n\ncc. dd\nee ff gg hh", ["aa bb.\n\n", "cc. dd\n", "ee ff gg hh"]),
        ("aa bbbb? cc dd ee", ["aa bbbb?", " cc dd ee"]),
        ("aaaa bbbb ccccc dd", ["aaaa bbbb", " ccccc dd"]),
        ("a bbbbbbbbbbbbbbbbb", ["a bbbbbbbbbb", "bbbbbbb"]),
        ("aa bb", ["aa bb"]),
    ],
)
def test_blocks_end_at_the_best_pause_of_their_second_half(text, expected):
    assert list(split_blocks([text], 12)) == expected
