"""A data folder in packs of another length: the same documents, and nothing cut but where a reader would pause."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from build_cases import content, documents_in, fingerprint

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.tokenizer import ByteTokenizer, train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.repack import PacksSource
from transfusion_fast.prepare.staging import RECIPE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare as command

BYTES = ByteTokenizer()
PHOTOS = ModalityInfo("photos", channels=3, patch_size=2, encoding="pixels")
ICONS = ModalityInfo("icons", channels=1, patch_size=1, encoding="pixels")
TEXT = {"sequence_length": 1024, "tokenizer": BYTES, "modalities": ()}
SENTENCES = [f"Number {n} is told of in a sentence of its own. " * (1 + n % 7) for n in range(40)]


def documents(tokenizer):
    """Texts with a picture of one of two kinds between them, of many lengths."""
    generator = np.random.default_rng(0)
    made = []
    for number, words in enumerate(SENTENCES):
        shape = (4, 6, 3) if number % 2 else (3, 3, 1)
        image = ImageSegment(generator.integers(0, 256, shape, dtype=np.uint8), modality=1 - number % 2)
        made.append((TextSegment(tokenizer.encode(words)), image, TextSegment(tokenizer.encode(words.upper()))))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("repack") / "data"
    settings = {"sequence_length": 1024, "tokenizer": BYTES, "modalities": (PHOTOS, ICONS), "packs_per_shard": 3}
    prepare(documents(BYTES), out, **settings)
    return out


def repacked(folder, out, length, long="split", processes=1):
    source = PacksSource.open(folder)
    return build(Recipe(source, source.encoder(length, long), 3), out, processes)


def words_of(document):
    return "".join(BYTES.decode(s.ids) for s in document if isinstance(s, TextSegment))


def test_longer_packs_hold_the_same_documents(folder, tmp_path):
    built = repacked(folder, tmp_path / "out", 2048)
    assert not built.rejected
    assert Counter(map(fingerprint, documents_in(tmp_path / "out"))) == Counter(map(fingerprint, documents(BYTES)))
    before, after = read_index(folder), read_index(tmp_path / "out")
    assert (after.sequence_length, after.modalities, after.tokenizer) == (2048, before.modalities, before.tokenizer)
    assert after.num_packs < before.num_packs


def test_shorter_packs_cut_texts_between_sentences_and_lose_nothing(folder, tmp_path):
    built = repacked(folder, tmp_path / "out", 256)
    assert not built.rejected
    found = documents_in(tmp_path / "out")
    assert len(found) > len(SENTENCES)
    assert all(words_of(d).rstrip().endswith(".") for d in found if words_of(d))
    pieces = Counter(s.values.tobytes() for d in found for s in d if isinstance(s, ImageSegment))
    assert pieces == Counter(d[1].values.tobytes() for d in documents(BYTES))
    letters = Counter("".join(words_of(d) for d in found))
    assert letters == Counter("".join(words_of(d) for d in documents(BYTES)))


def test_too_long_documents_may_be_left_out_instead(folder, tmp_path):
    built = repacked(folder, tmp_path / "out", 256, long="reject")
    fits = [d for d in documents(BYTES) if len(words_of(d)) + 12 <= 250]
    assert 0 < len(fits) < len(SENTENCES)
    assert built.index.documents == len(SENTENCES) - built.rejected["too long"]
    assert "of pack" in built.examples["too long"]


def test_an_image_that_no_pack_has_room_for_is_counted(folder, tmp_path):
    built = repacked(folder, tmp_path / "out", 10)
    assert built.rejected["image too long"] == sum(d[1].modality for d in documents(BYTES))


def test_texts_of_a_vocabulary_keep_their_ids_when_they_are_cut(tmp_path):
    tokenizer = train_bpe(SENTENCES, 300)
    whole = " ".join(SENTENCES)
    ids = tokenizer.encode(whole)
    settings = {"sequence_length": 8192, "tokenizer": tokenizer, "modalities": ()}
    prepare([(TextSegment(ids),)], tmp_path / "data", **settings)
    assert not repacked(tmp_path / "data", tmp_path / "out", 256).rejected
    found = [document[0].ids for document in documents_in(tmp_path / "out")]
    assert sum(map(len, found)) == len(ids)
    assert Counter(np.concatenate(found).tolist()) == Counter(ids.tolist())


def test_texts_with_other_ids_for_the_same_text_are_cut_and_parts_of_characters_are_not(tmp_path):
    """A blank line is one token at the end of a text and two before words."""
    tokenizer = train_bpe(SENTENCES, 300)
    whole = "\n".join(SENTENCES)
    odd = np.concatenate([tokenizer.encode(letter) for letter in whole])
    part = np.concatenate([tokenizer.encode("日")[:1], tokenizer.encode(whole)])
    settings = {"sequence_length": 8192, "tokenizer": tokenizer, "modalities": ()}
    prepare([(TextSegment(odd),), (TextSegment(part),)], tmp_path / "data", **settings)
    assert repacked(tmp_path / "data", tmp_path / "out", 256).rejected == {"text cannot be cut": 1}
    found = [tokenizer.decode(document[0].ids) for document in documents_in(tmp_path / "out")]
    assert Counter("".join(found)) == Counter(whole) and len(found) > 5


def test_the_bytes_do_not_depend_on_the_processes(folder, tmp_path):
    for processes in (1, 3):
        repacked(folder, tmp_path / str(processes), 512, processes=processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_a_damaged_pack_is_named_and_ends_repacking(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"pack 0 of shard .*shard-000000.tar .* cannot be read"):
        repacked(copy, tmp_path / "out", 2048)
    assert not (tmp_path / "out").exists()
    shutil.copy(folder / "shard-000000.tar", shard)
    assert repacked(copy, tmp_path / "out", 2048).index.documents == len(SENTENCES)


def test_the_command_repacks_and_refuses_in_one_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert command.main(["repack", str(folder), "--out", str(out), "--seq-len", "512", "--processes", "1"]) == 0
    assert "packs of 512" in capsys.readouterr().out
    for arguments, said in (
        (["--seq-len", "4"], "at least 5, got 4"),
        (["--out", str(folder)], "must be new or empty"),
    ):
        assert (
            command.main(["repack", str(folder), "--out", str(tmp_path / "other"), "--processes", "1", *arguments]) == 2
        )
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert command.main(["repack", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2
    assert "must hold a readable index.json" in capsys.readouterr().err
    with pytest.raises(InputError, match="at least 5"):
        PacksSource.open(folder).encoder(4, "split")


def test_long_documents_follow_the_original_setting(tmp_path):
    """A caption is not: whether a picture goes with all of its text is known to the recipe alone."""
    image = ImageSegment(np.zeros((4, 4, 3), np.uint8))
    document = (image, TextSegment(BYTES.encode("A sentence of an article. " * 20)))
    settings = {"sequence_length": 1024, "tokenizer": BYTES, "modalities": (PHOTOS,)}
    prepare([document] * 3, tmp_path / "data", **settings)
    assert repacked(tmp_path / "data", tmp_path / "split", 256, long=None).cut == 3
    recipe = json.loads((tmp_path / "data" / RECIPE).read_text())
    recipe["encoder"]["long"] = "reject"
    (tmp_path / "data" / RECIPE).write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=r"got none .3 x too long"):
        repacked(tmp_path / "data", tmp_path / "rejected", 256, long=None)
    (tmp_path / "data" / RECIPE).unlink()
    with pytest.raises(InputError, match=r"must have a recipe.json that says .* give --long split, or --long reject"):
        repacked(tmp_path / "data", tmp_path / "unknown", 256, long=None)
    prepare([document[1:]], tmp_path / "text", **TEXT)
    (tmp_path / "text" / RECIPE).unlink()
    assert repacked(tmp_path / "text", tmp_path / "cut", 256, long=None).cut == 1


def test_a_text_that_is_not_cut_is_not_encoded_again(tmp_path):
    odd = np.concatenate([train_bpe(SENTENCES, 300).encode(letter) for letter in "odd text of letters"])
    texts = [TextSegment(np.resize(odd, length).astype(np.int32)) for length in (24, 12, 1)]
    settings = {"sequence_length": 64, "tokenizer": train_bpe(SENTENCES, 300), "modalities": ()}
    prepare([tuple(texts)], tmp_path / "data", **settings)
    assert not repacked(tmp_path / "data", tmp_path / "out", 30).rejected
    assert sorted(len(segment.ids) for document in documents_in(tmp_path / "out") for segment in document) == [
        1,
        12,
        24,
    ]
