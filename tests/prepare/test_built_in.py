"""Preparation: every document once, the same bytes each time, all of a folder or nothing of it."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare import build as building
from transfusion_fast.prepare.examples.built_in import prepare, prepare_splits
from transfusion_fast.prepare.examples.digits import MODALITY, Digits

TOKENIZER = ByteTokenizer()
DIGITS_SETTINGS = {"sequence_length": 512, "packs_per_shard": 16}
SETTINGS = {"sequence_length": 64, "tokenizer": TOKENIZER, "modalities": (MODALITY,), "packs_per_shard": 4}


def texts(*lengths):
    return [(TextSegment(np.full(length, number, np.int32)),) for number, length in enumerate(lengths)]


def fingerprint(document):
    return tuple(
        segment.values.tobytes() if isinstance(segment, ImageSegment) else segment.ids.tobytes() for segment in document
    )


def contents(folder):
    """Every file under `folder`, hidden ones too, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def load_script():
    path = Path(__file__).parents[2] / "train" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_digit_document_is_in_one_pack(digits, split):
    reader = PackReader(digits / split)
    packed = [document for position in range(len(reader)) for document in reader.read(position).documents((MODALITY,))]
    expected = Digits().documents(split, TOKENIZER)
    assert Counter(map(fingerprint, packed)) == Counter(map(fingerprint, expected))
    assert reader.index.documents == len(expected)


def test_digits_are_in_several_shards_and_waste_little(digits):
    index = read_index(digits / "train")
    assert len(index.shards) > 3
    assert index.waste < 0.02


def test_packs_of_digits_mix_the_classes(digits):
    reader = PackReader(digits / "train")
    for position in range(len(reader)):
        documents = reader.read(position).documents((MODALITY,))
        assert len({fingerprint(document)[0] for document in documents}) > 5


def test_the_same_input_gives_the_same_bytes(tmp_path):
    documents = Digits().documents("heldout", TOKENIZER)
    for name in ("first", "second"):
        prepare(documents, tmp_path / name, **SETTINGS)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_another_seed_puts_other_documents_together(tmp_path):
    documents = Digits().documents("heldout", TOKENIZER)
    packs = []
    for seed in (0, 1):
        prepare(documents, tmp_path / str(seed), seed=seed, **SETTINGS)
        reader = PackReader(tmp_path / str(seed))
        packs.append({reader.read(position).latents.tobytes() for position in range(len(reader))})
    assert packs[0] != packs[1]


def test_the_index_returned_is_the_one_on_disk(tmp_path):
    index = prepare(texts(5, 60, 7), tmp_path / "deep" / "out", **SETTINGS)
    assert read_index(tmp_path / "deep" / "out") == index
    assert (index.documents, index.num_packs, index.tokens) == (3, 2, 7 + 62 + 9)


def test_a_document_too_long_is_named_by_its_number_and_leaves_nothing(tmp_path):
    message = refusal(prepare, texts(5, 6, 90, 7), tmp_path / "out", **SETTINGS)
    assert "document 2 cannot be packed: segment 0 of a pack must have a length in 1..64" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ((), "document 1 cannot be packed: pack must hold documents of at least one segment"),
        ((TextSegment(np.zeros(3, np.int64)),), "document 1 cannot be packed: text ids must be int32"),
        (
            (TextSegment(np.array([5, 256], np.int32)),),
            r"document 1 cannot be packed: token ids of a pack must be in 0..255, got 5..256",
        ),
        ((ImageSegment(np.zeros((3, 4, 1), np.uint8)),), "document 1 cannot be packed: image of modality 'digits'"),
    ],
)
def test_a_document_that_cannot_be_packed_is_named_by_its_number_and_leaves_nothing(tmp_path, document, complaint):
    assert complaint in refusal(prepare, [*texts(5), document], tmp_path / "out", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_make_no_folder(tmp_path):
    assert "got none" in refusal(prepare, [], tmp_path / "out", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare(texts(5), out, **SETTINGS)  # an empty one is filled
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    assert "(it was made with other settings: source.sha256 " in refusal(prepare, texts(6), out, **SETTINGS)
    assert "(it was made with other settings: packing.seed 0 -> 1)" in refusal(
        prepare, texts(5), out, **SETTINGS, seed=1
    )
    assert "must be new or empty" in refusal(prepare, texts(5), tmp_path / "file", **SETTINGS)
    assert contents(tmp_path) == before


def test_documents_that_look_alike_are_told_apart(tmp_path):
    """By what they are, not only by the bytes of their arrays."""
    text, image = TextSegment(np.arange(2, dtype=np.int32)), ImageSegment(np.zeros((4, 2, 1), np.uint8))
    alike = [
        [(text, text)],
        [(text,), (text,)],
        [(text, image)],
        [(text, ImageSegment(image.values.reshape(2, 4, 1)))],
    ]
    prepare(alike[0], tmp_path / "out", **SETTINGS)
    for documents in alike[1:]:
        assert "made with other settings: source.sha256" in refusal(prepare, documents, tmp_path / "out", **SETTINGS)


def test_a_folder_filled_meanwhile_is_left_alone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_index = building.write_index

    def write_and_be_overtaken(*arguments):
        write_index(*arguments)
        out.mkdir()
        (out / "theirs").write_text("theirs")

    monkeypatch.setattr(building, "write_index", write_and_be_overtaken)
    assert "must be free, got" in refusal(prepare, texts(5), out, **SETTINGS)
    assert contents(out) == {"theirs": b"theirs"}


def test_digits_prepared_again_are_left_as_they_are(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    again = prepare_splits(Digits(), digits, **DIGITS_SETTINGS)
    assert {split: (built.reused, built.index) for split, built in again.items()} == {
        split: (True, read_index(digits / split)) for split in ("train", "heldout")
    }
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


def test_digits_of_other_settings_or_damaged_are_not_overwritten(digits, tmp_path):
    message = refusal(prepare_splits, Digits(), digits, **{**DIGITS_SETTINGS, "sequence_length": 256})
    assert (
        "must be new or empty" in message and "made with other settings: encoder.sequence_length 512 -> 256" in message
    )
    out = tmp_path / "digits"
    prepare_splits(Digits(), out, **DIGITS_SETTINGS)
    shard = out / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    before = contents(out)
    assert "got 5000" in refusal(prepare_splits, Digits(), out, **DIGITS_SETTINGS)
    assert contents(out) == before


def test_a_data_set_that_was_cut_off_goes_on(digits, tmp_path, monkeypatch):
    class FailsOnHeldout(Digits):
        def documents(self, split, tokenizer):
            if split == "heldout":
                raise KeyboardInterrupt
            return super().documents(split, tokenizer)

    out = tmp_path / "digits"
    with pytest.raises(KeyboardInterrupt):
        prepare_splits(FailsOnHeldout(), out, **DIGITS_SETTINGS)
    assert [path.name for path in out.iterdir()] == ["train"]
    built = prepare_splits(Digits(), out, **DIGITS_SETTINGS)
    assert [one.reused for one in built.values()] == [True, False]
    assert contents(out) == contents(digits)


def test_the_command_prints_a_summary_and_may_be_repeated(tmp_path, capsys):
    main = load_script().main
    assert main(["digits", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.splitlines()
    assert main(["digits", str(tmp_path / "out")]) == 0
    repeated = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in written + repeated] == ["written"] * 2 + ["already there"] * 2
    assert "packs of 512" in written[0] and "% waste" in written[0]


def test_the_command_says_in_one_line_what_cannot_be_used(tmp_path, capsys):
    main = load_script().main
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "notes.txt").write_text("mine")
    assert main(["digits", str(tmp_path / "mine")]) == 2
    assert main(["digits", str(tmp_path / "mine" / "train" / "notes.txt")]) == 2
    assert main(["digits", str(tmp_path / "out"), "--seq-len", "4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.startswith("prepare: ") for line in captured.err.splitlines()] == [True] * 3
    assert contents(tmp_path) == {"mine/train/notes.txt": b"mine"}
