"""Folders of built-in data sets and of documents in memory: every document once, the same bytes each time."""

from collections import Counter

import numpy as np
import pytest
from build_cases import TOKENIZER, content, documents_in, fingerprint

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare, prepare_splits
from transfusion_fast.prepare.examples.digits import MODALITY, Digits

DIGITS_SETTINGS = {"sequence_length": 512, "packs_per_shard": 16}
SETTINGS = {"sequence_length": 64, "tokenizer": TOKENIZER, "modalities": (MODALITY,), "packs_per_shard": 4}
TEXT, IMAGE = TextSegment(np.arange(2, dtype=np.int32)), ImageSegment(np.zeros((4, 2, 1), np.uint8))


def texts(*lengths):
    return [(TextSegment(np.full(length, number, np.int32)),) for number, length in enumerate(lengths)]


def refusal(action, *arguments, **settings):
    with pytest.raises(InputError) as error:
        action(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "digits"
    prepare_splits(Digits(), out, **DIGITS_SETTINGS)
    return out


def test_every_digit_document_is_in_one_pack_and_packs_mix_the_classes(digits):
    for split in ("train", "heldout"):
        expected = Digits().documents(split, TOKENIZER)
        assert Counter(map(fingerprint, documents_in(digits / split))) == Counter(map(fingerprint, expected))
        assert read_index(digits / split).documents == len(expected)
    reader = PackReader(digits / "train")
    assert len(reader.index.shards) > 3 and reader.index.waste < 0.02
    for position in range(len(reader)):
        documents = reader.read(position).documents((MODALITY,))
        assert len({fingerprint(document)[0] for document in documents}) > 5


def test_the_same_input_gives_the_same_bytes_and_another_seed_other_packs(tmp_path):
    documents = Digits().documents("heldout", TOKENIZER)
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        index = prepare(documents, tmp_path / "deep" / name, seed=seed, **SETTINGS)
        assert read_index(tmp_path / "deep" / name) == index
    first, second, other = (content(tmp_path / "deep" / name) for name in ("first", "second", "other"))
    assert first == second and not any(other[name] == first[name] for name in first if name.endswith(".tar"))
    index = prepare(texts(5, 60, 7), tmp_path / "out", **SETTINGS)
    assert (index.documents, index.num_packs, index.tokens) == (3, 2, 7 + 62 + 9)


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ((), "pack must hold documents of at least one segment"),
        ((TextSegment(np.zeros(63, np.int32)),), "pack must take at most 64 positions, got 65"),
        ((TextSegment(np.zeros(3, np.int64)),), "text ids must be int32"),
        ((TextSegment(np.array([5, 256], np.int32)),), "token ids of a pack must be in 0..255, got 5..256"),
        ((ImageSegment(np.zeros((3, 4, 1), np.uint8)),), "image of modality 'digits'"),
    ],
)
def test_a_document_that_cannot_be_packed_is_named_by_its_number_and_leaves_nothing(tmp_path, document, complaint):
    message = refusal(prepare, [*texts(5), document], tmp_path / "out", **SETTINGS)
    assert f"document 1 cannot be packed: {complaint}" in message
    assert "got none" in refusal(prepare, [], tmp_path / "out", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(digits, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare([(TEXT, TEXT)], out, **SETTINGS)  # an empty one is filled
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    tall = ImageSegment(IMAGE.values.reshape(2, 4, 1))
    for other in ([(TEXT,), (TEXT,)], [(TEXT, IMAGE)], [(TEXT, tall)]):  # whose arrays have the same bytes
        assert "settings: source.sha256 " in refusal(prepare, other, out, **SETTINGS)
    assert "settings: packing.seed 0 -> 1)" in refusal(prepare, [(TEXT, TEXT)], out, **SETTINGS, seed=1)
    assert "must be new or empty" in refusal(prepare, texts(5), tmp_path / "file", **SETTINGS)
    assert content(tmp_path) == before
    message = refusal(prepare_splits, Digits(), digits, **{**DIGITS_SETTINGS, "sequence_length": 256})
    assert "must be new or empty" in message and "encoder.sequence_length 512 -> 256" in message


def test_a_data_set_that_was_cut_off_resumes(digits, tmp_path):
    class FailsOnHeldout(Digits):
        def documents(self, split, tokenizer):
            if split == "heldout":
                raise KeyboardInterrupt
            return super().documents(split, tokenizer)

    out = tmp_path / "digits"
    with pytest.raises(KeyboardInterrupt):
        prepare_splits(FailsOnHeldout(), out, **DIGITS_SETTINGS)
    assert [path.name for path in out.iterdir()] == ["train"]
    for reused in ([True, False], [True, True]):
        built = prepare_splits(Digits(), out, **DIGITS_SETTINGS)
        assert [one.reused for one in built.values()] == reused
        assert {split: one.index for split, one in built.items()} == {s: read_index(out / s) for s in built}
    assert content(out) == content(digits)
    shard = out / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    before = content(out)
    assert "got 5000" in refusal(prepare_splits, Digits(), out, **DIGITS_SETTINGS)
    assert content(out) == before, "a damaged folder is not overwritten"
