"""Weights of losses from JSON lines to training batches, and folders without any as they were before."""

import itertools
import json
import tarfile

import pytest
from build_cases import RGB, TOKENIZER, documents_in, found_in, words_of
from image_files import picture, png

from transfusion_fast.config import Config
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.index import parse_index
from transfusion_fast.data.loader import batch_builder
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.inspect import Statistics, verify
from transfusion_fast.prepare.preview import Picture, Special, preview
from transfusion_fast.prepare.repack import PacksSource
from transfusion_fast.prepare.sources.interleaved import InterleavedSource

ANSWER = "Yes. " * 12
LINES = [
    {"content": [{"text": "Is it? ", "loss": False}, {"image": "a.png", "weight": 0}, {"text": ANSWER, "weight": 2}]},
    {"content": ["It is. ", {"image": "a.png", "weight": 4}], "weight": 0.5},
    ["Nothing is weighed."],
]
WEIGHTS = {"Is it? ": [0, 0, 2], "It is. ": [0.5, 2], "Nothing": [1]}


def source(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png(picture(4, 8)))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return InterleavedSource.of([folder / "a.jsonl"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    encoder = Encoder(TOKENIZER, 128, (RGB,), ImageRule("native", 16, 4))
    build(Recipe(source(folder / "lines", LINES), encoder), folder / "data")
    return folder / "data"


def weights_in(folder):
    documents = documents_in(folder)
    return {words_of(document)[:7]: [segment.weight for segment in document] for document in documents}


def test_weights_of_lines_reach_the_folder_and_its_batches(prepared):
    assert weights_in(prepared) == WEIGHTS
    assert list(verify(prepared, parse_index(prepared))) == [[], []]
    reader = PackReader(prepared)
    model = {"num_text_tokens": 256, "dim_latent": 48}
    for caption_first in (1.0, 0.0):  # the pair is turned around with its weights
        data = {"caption_first": caption_first, "prob_uncond": 0.0}
        builder = batch_builder(Config.model_validate({"model": model, "data": data}), reader.index, packs=1)
        found = []
        for number in range(len(reader)):
            batch = builder([KeyedPack(reader.read(number), 0, number)])
            found += zip(batch.labels[batch.supervised].tolist(), batch.token_weights.tolist(), strict=True)
            if len(batch.modalities[0].weights) == 2:
                assert sorted(batch.modalities[0].weights.tolist()) == [0, 2]
        of_pair = [ord(c) for c in "It is. "]
        expected = [(ord(c), 2) for c in ANSWER] + [(ord(c), 1) for c in "Nothing is weighed."]
        expected += [(n, 0.5) for n in of_pair] + [(builder.vocabulary.boi(), 2)]
        expected += [(builder.vocabulary.eos, weight) for weight in (2, 1, 2 if caption_first else 0.5)]
        assert sorted(found) == sorted(expected)


def test_only_packs_with_other_weights_than_1_have_a_file_of_them(prepared, tmp_path):
    encoder = Encoder(TOKENIZER, 128, (RGB,), ImageRule("native", 16, 4))
    plain = [{"content": ["It is. ", {"image": "a.png", "weight": 1}, {"text": "b", "loss": True}], "weight": 1.0}]
    build(Recipe(source(tmp_path / "lines", plain), encoder), tmp_path / "data")
    for folder, expected in ((tmp_path / "data", False), (prepared, True)):
        with tarfile.open(folder / "shard-000000.tar") as tar:
            assert any(name.endswith(".weights.npy") for name in tar.getnames()) == expected


def test_packs_of_another_length_keep_the_weights_of_what_is_cut(prepared, tmp_path):
    repack = PacksSource.open(prepared)
    build(Recipe(repack, repack.encoder(40, "split")), tmp_path / "short")
    documents = documents_in(tmp_path / "short")
    answers = [s for d in documents for s in d if not isinstance(s, ImageSegment) and "Yes" in words_of([s])]
    assert len(answers) > 1 and {segment.weight for segment in answers} == {2}


def test_info_and_preview_show_weights(prepared, command):
    reader = PackReader(prepared)
    found = Statistics.of(reader.read(number) for number in range(len(reader)))
    assert (found.ignored, found.weighted) == (7 + 2, len(ANSWER) + 7 + 2)
    code, out, _ = command("prepare", "info", prepared)
    assert code == 0 and f"without loss: 9, with another weight than 1: {len(ANSWER) + 9}" in out
    pages = [piece for number in range(len(reader)) for document in preview(reader, number, 0, 0) for piece in document]
    marks = [(a.name, b) for a, b in itertools.pairwise(pages) if isinstance(a, Special) and isinstance(b, str)]
    shown = {text: name for name, text in marks}
    assert shown["Is it? "] == "weight 0" and shown[ANSWER] == "weight 2" and shown["It is. "] == "weight 0.5"
    assert shown["Nothing is weighed."] == "bos"
    captions = [piece.caption for piece in pages if isinstance(piece, Picture)]
    assert sorted(caption.partition("weight ")[2] for caption in captions) == ["0", "2"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"content": ["a", {"text": "b", "weight": -1}]}, "weight of part 1 must be a number in 0..1000000, got -1"),
        ({"content": ["a"], "weight": float("nan")}, "weight of document must be a number in 0..1000000, got nan"),
        ({"content": ["a"], "weight": "2"}, "weight of document must be a number in 0..1000000, got '2'"),
        ({"content": [{"text": "b", "weight": "2"}]}, "weight of part 0 must be a number in 0..1000000, got '2'"),
        ({"content": [{"text": "b", "loss": 0}]}, "loss of part 0 must be true or false"),
        (
            {"content": [{"text": "b", "loss": True, "weight": 2}]},
            "loss of part 0 must be true or false, and given without",
        ),
    ],
)
def test_a_bad_weight_is_named_with_its_line_and_part(tmp_path, line, complaint):
    [good, bad] = found_in(source(tmp_path, [["good"], line]))
    assert good.parts == ("good",) and isinstance(bad, Rejected)
    assert bad.reason == "bad weight" and complaint in str(bad) and f"byte 9 of {tmp_path / 'a.jsonl'}" in str(bad)
