"""Tokenizers reproduce every text, describe themselves, and are refused for data of another tokenizer."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from transfusion_fast.data.tokenizer import (
    TOKENIZER_NAME,
    ByteTokenizer,
    FileTokenizer,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from transfusion_fast.data.tokenizer import Tokenizer as Base
from transfusion_fast.errors import InputError, Rejected

TEXTS = ["the cat sat on the mat. " * 5, "once upon a time there was a cat\n" * 4, "日本語 and français " * 3]
BPE = train_bpe(TEXTS, 300)
TOKENIZERS = [ByteTokenizer(), BPE]
# JSON can hold lone surrogates; UTF-8 cannot.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@given(text=WORDS)
def test_decoding_reproduces_every_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.num_text_tokens


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@given(text=WORDS)
def test_starts_are_the_first_characters_of_tokens(tokenizer, text):
    ids, starts = tokenizer.encode_with_starts(text)
    assert np.array_equal(ids, tokenizer.encode(text)) and len(starts) == len(ids)
    assert (np.diff(starts) >= 0).all()
    # A cut before a token that begins another character than the one before it cuts the text there.
    for at in np.flatnonzero(np.diff(starts, prepend=-1)).tolist():
        assert tokenizer.decode(ids[:at]) == text[: starts[at]]


@pytest.mark.parametrize("prefix", [False, True])
def test_starts_of_byte_level_tokens_are_those_of_the_library(prefix):
    library = Tokenizer.from_buffer(BPE.content)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)  # a space that has no byte
    library.add_tokens(["\N{EURO SIGN} added"])
    tokenizer = FileTokenizer(library.to_str().encode())
    text = "some 日本 \N{EURO SIGN} added\n  words"
    expected = library.encode(text, add_special_tokens=False)
    ids, starts = tokenizer.encode_with_starts(text)
    assert ids.tolist() == expected.ids and starts.tolist() == [start for start, _ in expected.offsets]


def test_bpe_is_shorter_than_bytes_and_the_same_each_time():
    assert BPE.num_text_tokens == 300
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert train_bpe(TEXTS, 300).content == BPE.content


def test_a_lone_surrogate_becomes_a_question_mark_in_texts_and_in_training():
    text = json.loads('"a\\ud800b"')
    assert all(tokenizer.decode(tokenizer.encode(text)) == "a?b" for tokenizer in TOKENIZERS)
    assert train_bpe(["\ud800 abc"], 256).encode("\ud800").tolist() == train_bpe(["abc"], 256).encode("?").tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_a_written_tokenizer_can_be_loaded(tmp_path, tokenizer):
    tokenizer.write(tmp_path)
    loaded = load_tokenizer(tokenizer.describe(), tmp_path)
    assert loaded.describe() == tokenizer.describe()
    assert loaded.encode("cats").tolist() == tokenizer.encode("cats").tolist()
    assert pickle.loads(pickle.dumps(tokenizer)).describe() == tokenizer.describe()  # as worker processes get it


def test_settings_of_a_file_that_would_change_texts_are_ignored():
    settings = Tokenizer.from_str(BPE.content.decode())
    settings.enable_truncation(2)
    settings.enable_padding(length=400, pad_token="a")
    settings.post_processor = processors.ByteLevel(trim_offsets=True)  # spaces outside of offsets are not missing
    tokenizer = FileTokenizer(settings.to_str().encode())
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == BPE.encode(text).tolist()
    dropping = built(models.BPE(numbered("a", "b", "ab"), [("a", "b")], dropout=0.5))
    assert {tuple(dropping.encode("abab").tolist()) for _ in range(30)} == {(2, 2)}


def test_a_file_other_than_that_of_the_data_is_refused(tmp_path):
    train_bpe(TEXTS, 290).write(tmp_path)
    with pytest.raises(InputError, match=r"num_text_tokens of .* must be 300, as its index says, got 290"):
        load_tokenizer(BPE.describe(), tmp_path)
    (tmp_path / TOKENIZER_NAME).write_bytes(BPE.content.replace(b'"merges"', b'"merges" '))
    with pytest.raises(InputError, match="sha256 of tokenizer"):
        load_tokenizer(BPE.describe(), tmp_path)


def test_an_invalid_tokenizer_is_refused_in_one_line(tmp_path):
    beyond = json.loads(BPE.content)
    beyond["model"]["vocab"]["beyond"] = 2**32 - 1
    for content, reason in (
        (None, r"cannot be read .*; give a tokenizer.json"),
        (pickle.dumps(print), r"must be a tokenizer.json of .*, got .*; correct it"),
        (json.dumps(beyond).encode(), r"ids of .*tokenizer.json must be below 1073741824, got 4294967295"),
    ):
        if content is not None:
            (tmp_path / TOKENIZER_NAME).write_bytes(content)
        with pytest.raises(InputError, match=reason) as caught:
            read_tokenizer(tmp_path / TOKENIZER_NAME)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"tokenizer must be 'bytes' or 'tokenizer.json', got 'sentencepiece'"):
        load_tokenizer({"name": "sentencepiece"}, tmp_path)
    for vocabulary, reason in ((5000, "must be at most the .* tokens that these texts yield"), (100, "at least 256")):
        with pytest.raises(InputError, match=f"{reason}, got {vocabulary}"):
            train_bpe(TEXTS, vocabulary)
    for tokenizer in TOKENIZERS:
        with pytest.raises(InputError, match="text ids must be in 0"):
            tokenizer.decode([0, tokenizer.num_text_tokens])


def built(model, normalizer=None, pre_tokenizer=None, special=()):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(list(special))
    return FileTokenizer(tokenizer.to_str().encode())


def numbered(*tokens):
    return {token: number for number, token in enumerate(tokens)}


UNKNOWING = {
    "bpe": (built(models.BPE(numbered("a", "b", "ab"), [("a", "b")])), "ab", "abzzab", "'z'"),
    "bpe with spaces": (built(models.BPE(numbered("a", " "), [])), "a a", "z ", "'z'"),
    "words": (
        built(models.WordLevel(numbered("ab", "cd")), None, pre_tokenizers.Whitespace()),
        "ab  cd\n",
        "ab zz",
        "zz",
    ),
    "pieces": (built(models.WordPiece(numbered("ab", "##ab"))), "abab", "abz", "z"),
    "unigram": (built(models.Unigram([("a", -1.0), ("b", -2.0)])), "abab", "az", "'z'"),
    "removing": (built(models.BPE(numbered("a", "b"), []), normalizers.Replace("b", "")), "aa", "abba", "'bb'"),
}


def test_replaced_characters_do_not_count_as_missing():
    rules = normalizers.Sequence([normalizers.Replace("``", "b"), normalizers.Replace(Regex("c+"), "a")])
    tokenizer = built(models.BPE(numbered("a", "b"), []), rules)
    ids, _ = tokenizer.encode_with_starts("a``ccca")
    assert ids.tolist() == tokenizer.encode("abaa").tolist()


def test_invisible_characters_may_be_removed():
    tokenizer = built(models.WordLevel(numbered("ab", "cd")), normalizers.BertNormalizer(), pre_tokenizers.Whitespace())
    assert tokenizer.encode("ab\ufffd cd\ue000").tolist() == [0, 1]


@pytest.mark.parametrize("kind", UNKNOWING)
def test_text_outside_of_the_vocabulary_is_rejected_and_never_dropped(kind):
    tokenizer, known, unknown, named = UNKNOWING[kind]
    assert len(tokenizer.encode(known))
    with pytest.raises(Rejected, match=f"^not in the vocabulary: .*{named}"):
        tokenizer.encode_with_starts(unknown)
    with pytest.raises(InputError, match=f"text must be of the vocabulary of tokenizer.json, got .*{named}.*; change"):
        tokenizer.encode(unknown)


def test_an_unknown_token_replaces_text_outside_of_the_vocabulary():
    words = built(
        models.WordLevel(numbered("[UNK]", "ab"), unk_token="[UNK]"), None, pre_tokenizers.Whitespace(), ["[UNK]"]
    )
    assert words.encode("ab zz ab").tolist() == [1, 0, 1]
    letters = built(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), special=["<unk>"])
    assert letters.encode("aza").tolist() == [1, 0, 1]


def test_white_space_and_accents_may_be_removed_and_characters_composed():
    bert = built(
        models.WordPiece(numbered("[UNK]", "cafe", "au", "lait"), unk_token="[UNK]"),
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    for text in ("Café  au\tlait\n", "Cafe\u0301 au\u200b\x07 lait"):
        assert bert.encode(text).tolist() == [1, 2, 3]
    composing = built(models.BPE(numbered("하", "バ", "é"), []), normalizers.NFKC())
    assert composing.encode("\u1112\u1161ﾊﾞe\u0301").tolist() == [0, 1, 2]


def test_text_never_becomes_a_special_token():
    settings = Tokenizer.from_str(BPE.content.decode())
    settings.add_special_tokens(["<|end|>"])
    tokenizer = FileTokenizer(settings.to_str().encode())
    assert tokenizer.num_text_tokens == 301
    text = "the cat<|end|> sat"
    assert tokenizer.encode(text).max() < 300 and tokenizer.decode(tokenizer.encode(text)) == text
    # A vocabulary of pieces may contain a special token as a piece.
    pieces = built(models.Unigram([("</s>", 0.0), *((letter, -9.0) for letter in "a</s>")]), special=["</s>"])
    with pytest.raises(Rejected, match=r"^special token: '</s>' would become one"):
        pieces.encode_with_starts("aa</s>")


@pytest.mark.parametrize("special", [False, True])
def test_byte_fallback_encodes_any_text_even_if_the_file_calls_its_byte_tokens_special(special):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE(numbered("<unk>", *bytes_, "a", "b"), [], unk_token="<unk>", byte_fallback=True)
    tokenizer = built(model, special=bytes_ if special else [])
    ids, starts = tokenizer.encode_with_starts("aéb")
    assert ids.tolist() == [257, 1 + 0xC3, 1 + 0xA9, 258] and starts.tolist() == [0, 1, 1, 2]
    assert [own.tolist() for own in tokenizer.encode_batch(["aéb", "ab"])] == [ids.tolist(), [257, 258]]


def outcome(encoded):
    return str(encoded) if isinstance(encoded, Rejected) else encoded.tolist()


@given(texts=st.lists(WORDS | st.sampled_from(["abab", "a b</s>", "cd  ab", "\ud800"]), max_size=5))
def test_a_batch_gives_each_text_what_it_gets_alone(texts):
    special = built(models.Unigram([("</s>", 0.0), *((letter, -9.0) for letter in "ab</s>")]), special=["</s>"])
    for tokenizer in (*TOKENIZERS, special, *(case[0] for case in UNKNOWING.values())):
        alone = [Base.encode_batch(tokenizer, [text]) for text in texts]
        assert list(map(outcome, tokenizer.encode_batch(texts))) == [outcome(own) for [own] in alone], tokenizer


def test_a_process_builds_a_tokenizer_once_however_often_it_is_unpickled():
    sent = pickle.dumps(BPE)
    assert pickle.loads(sent) is pickle.loads(sent)
    other = train_bpe(TEXTS, 290)
    assert pickle.loads(pickle.dumps(other)).describe() == other.describe() != pickle.loads(sent).describe()
