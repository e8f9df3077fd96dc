"""A data folder in packs of another length: the same documents, and nothing cut but where a reader would pause."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from build_cases import TOKENIZER, content, documents_in, fingerprint, words, words_of

from transfusion_fast.data.index import read_index
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.repack import PacksSource
from transfusion_fast.prepare.staging import RECIPE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train"))
import prepare as command

PHOTOS = ModalityInfo("photos", channels=3, patch_size=2, encoding="pixels")
ICONS = ModalityInfo("icons", channels=1, patch_size=1, encoding="pixels")
SENTENCES = [f"Number {n} is told of in a sentence of its own. " * (1 + n % 7) for n in range(40)]
BPE = train_bpe(SENTENCES, 300)


def made(folder, documents, tokenizer=BPE, modalities=(), length=8192):
    prepare(documents, folder, sequence_length=length, tokenizer=tokenizer, modalities=modalities, packs_per_shard=3)
    return folder


@pytest.fixture(scope="module")
def documents():
    """Texts with a picture of one of two kinds between them, of many lengths."""
    generator, made = np.random.default_rng(0), []
    for number, text in enumerate(SENTENCES):
        shape = (4, 6, 3) if number % 2 else (3, 3, 1)
        image = ImageSegment(generator.integers(0, 256, shape, dtype=np.uint8), modality=1 - number % 2)
        made.append((TextSegment(TOKENIZER.encode(text)), image, TextSegment(TOKENIZER.encode(text.upper()))))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    return made(tmp_path_factory.mktemp("repack") / "data", documents, TOKENIZER, (PHOTOS, ICONS), 1024)


def repacked(folder, out, length, long="split", processes=1):
    source = PacksSource.open(folder)
    return build(Recipe(source, source.encoder(length, long), 3), out, processes)


def test_longer_packs_hold_the_same_documents(folder, documents, tmp_path):
    assert not repacked(folder, tmp_path / "out", 2048).rejected
    assert Counter(map(fingerprint, documents_in(tmp_path / "out"))) == Counter(map(fingerprint, documents))
    before, after = read_index(folder), read_index(tmp_path / "out")
    assert (after.sequence_length, after.modalities, after.tokenizer) == (2048, before.modalities, before.tokenizer)
    assert after.num_packs < before.num_packs


def test_shorter_packs_cut_texts_between_sentences_and_lose_nothing(folder, documents, tmp_path):
    assert not repacked(folder, tmp_path / "out", 256).rejected
    found = documents_in(tmp_path / "out")
    assert len(found) > len(SENTENCES)
    assert all(words_of(d).rstrip().endswith(".") for d in found if words_of(d))
    pieces = Counter(s.values.tobytes() for d in found for s in d if isinstance(s, ImageSegment))
    assert pieces == Counter(d[1].values.tobytes() for d in documents)
    assert Counter("".join(map(words_of, found))) == Counter("".join(map(words_of, documents)))


def test_too_long_documents_and_images_may_be_left_out_instead(folder, documents, tmp_path):
    built = repacked(folder, tmp_path / "out", 256, long="reject")
    fits = [d for d in documents if len(words_of(d)) + 12 <= 250]
    assert 0 < len(fits) < len(SENTENCES)
    assert built.index.documents == len(SENTENCES) - built.rejected["too long"]
    assert "of pack" in built.examples["too long"]
    rejected = repacked(folder, tmp_path / "tiny", 10).rejected
    assert rejected["image takes too many positions"] == sum(d[1].modality for d in documents)


def test_texts_of_a_vocabulary_keep_their_ids_when_they_are_cut(tmp_path):
    ids = BPE.encode(" ".join(SENTENCES))
    assert not repacked(made(tmp_path / "data", [(TextSegment(ids),)]), tmp_path / "out", 256).rejected
    found = np.concatenate([document[0].ids for document in documents_in(tmp_path / "out")])
    assert Counter(found.tolist()) == Counter(ids.tolist())


def test_texts_with_other_ids_for_the_same_text_are_cut_and_parts_of_characters_are_not(tmp_path):
    """A blank line is one token at the end of a text and two before words."""
    whole = "\n".join(SENTENCES)
    odd = np.concatenate([BPE.encode(letter) for letter in whole])
    part = np.concatenate([BPE.encode("日")[:1], BPE.encode(whole)])
    data = made(tmp_path / "data", [(TextSegment(odd),), (TextSegment(part),)])
    assert repacked(data, tmp_path / "out", 256).rejected == {"text cannot be cut": 1}
    found = words(tmp_path / "out")
    assert Counter("".join(found)) == Counter(whole) and len(found) > 5


def test_a_text_that_is_not_cut_is_not_encoded_again(tmp_path):
    odd = np.concatenate([BPE.encode(letter) for letter in "odd text of letters"])
    texts = [TextSegment(np.resize(odd, length).astype(np.int32)) for length in (24, 12, 1)]
    assert not repacked(made(tmp_path / "data", [tuple(texts)], length=64), tmp_path / "out", 30).rejected
    found = sorted(len(segment.ids) for document in documents_in(tmp_path / "out") for segment in document)
    assert found == [1, 12, 24]


def test_the_bytes_do_not_depend_on_the_processes(folder, tmp_path):
    for processes in (1, 3):
        repacked(folder, tmp_path / str(processes), 512, processes=processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_a_damaged_pack_is_named_and_ends_repacking(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
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
    for source, out, length, code, said in (
        (folder, tmp_path / "out", 512, 0, "packs of 512"),
        (folder, tmp_path / "other", 4, 2, "must be in 5..16777216, got 4"),
        (folder, folder, 512, 2, "must be new or empty"),
        (tmp_path / "none", tmp_path / "other", 512, 2, "must hold a readable index.json"),
    ):
        arguments = ["repack", str(source), "--out", str(out), "--seq-len", str(length), "--processes", "1"]
        assert command.main(arguments) == code
        printed = "".join(capsys.readouterr())
        assert said in printed and (code == 0 or printed.count("\n") == 1)


def test_long_documents_follow_the_original_setting(tmp_path):
    """A caption is not: whether a picture goes with all of its text is known to the recipe alone."""
    document = (ImageSegment(np.zeros((4, 4, 3), np.uint8)), TextSegment(TOKENIZER.encode("An article. " * 45)))
    path = made(tmp_path / "data", [document] * 3, TOKENIZER, (PHOTOS,)) / RECIPE
    assert repacked(tmp_path / "data", tmp_path / "split", 256, long=None).cut == 3
    recipe = json.loads(path.read_text())
    recipe["encoder"]["long"] = "reject"
    path.write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=r"got none .3 x too long"):
        repacked(tmp_path / "data", tmp_path / "rejected", 256, long=None)
    path.unlink()
    with pytest.raises(InputError, match=r"must have a recipe.json that says .* give --long split, or --long reject"):
        repacked(tmp_path / "data", tmp_path / "unknown", 256, long=None)
    (made(tmp_path / "text", [document[1:]], TOKENIZER) / RECIPE).unlink()
    assert repacked(tmp_path / "text", tmp_path / "cut", 256, long=None).cut == 1
