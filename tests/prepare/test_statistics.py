"""What `info` tells of a folder is what a count by hand gives."""

import numpy as np
import pytest
from PIL import Image

from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.inspect import Statistics, draw_lengths

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
TEXTS = [5, 30, 30, 1, 60]  # ids of each document; the first two end in an image of 6 patches


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics") / "data"
    image = ImageSegment(np.zeros((4, 6, 1), np.uint8))
    texts = [TextSegment(np.zeros(length, np.int32)) for length in TEXTS]
    documents = [(texts[0], image), (texts[1], image), *((text,) for text in texts[2:])]
    prepare(documents, folder, sequence_length=70, tokenizer=ByteTokenizer(), modalities=(GREY,))
    reader = PackReader(folder)
    return Statistics.of(reader.read(number) for number in range(len(reader)))


def test_ids_patches_and_lengths_are_counted(found):
    assert (found.text, found.patches, found.images) == (sum(TEXTS), 12, 2)
    assert found.text_share == sum(TEXTS) / (sum(TEXTS) + 12)
    assert sorted(found.lengths.tolist()) == sorted([5 + 10, 30 + 10, 30 + 2, 1 + 2, 60 + 2])


def test_waste_is_that_of_packing_anew(found):
    total = 15 + 40 + 32 + 3 + 62
    assert found.waste_at(152) == 1 - total / 152, "all in one"
    assert found.waste_at(62) == pytest.approx(1 - total / (3 * 62)), "62, 40 and 15, 32 and 3"
    # Of 31, 29 hold a document's inside: 60 is two of them and a rest of 2, 38 one and 9, 30 one and 1.
    pieces = [4, 11, 3, 15, 3]
    assert sum(pieces) <= 2 * 31
    assert found.waste_at(31) == pytest.approx(1 - (4 * 31 + sum(pieces)) / (6 * 31))


def test_the_picture_shows_something(found, tmp_path):
    draw_lengths(found, "a $title_{ with a \\ of no formula and no text\udce9", tmp_path / "lengths.png")
    assert np.asarray(Image.open(tmp_path / "lengths.png").convert("L")).std() > 10
