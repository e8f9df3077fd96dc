"""A rebuilt index holds intact shards only, and statistics are what a count by hand gives."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from shard_damage import COUNTS, ELSEWHERE, GREY, IN_PACKS, SHARD, documents, findings_of, write_folder

from transfusion_fast.data.index import INDEX_NAME, read_index
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.inspect import Statistics, draw_lengths, rebuild_index

DAMAGE = IN_PACKS | ELSEWHERE | COUNTS


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("intact") / "data")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


def refuses(folder, refusal, **options):
    """The index is not rebuilt, for this reason, and stays as it is."""
    before = (folder / INDEX_NAME).read_bytes()
    with pytest.raises(InputError, match=refusal):
        rebuild_index(folder, **options)
    assert (folder / INDEX_NAME).read_bytes() == before


@pytest.mark.parametrize("name", [name for name in [*IN_PACKS, *ELSEWHERE] if not name.startswith("index")])
def test_a_damaged_shard_is_not_indexed(folder, name):
    DAMAGE[name](folder)
    refuses(folder, SHARD)


@pytest.mark.parametrize("name", COUNTS)
def test_no_pack_is_read_from_a_shard_with_a_wrong_count(folder, name):
    COUNTS[name](folder)
    reader = PackReader(folder)
    for number in range(5, 5 + reader.index.shards[1].packs):
        with pytest.raises(InputError, match=rf"{SHARD} .* table must be one file __packs__ of [14] packs"):
            reader.read(number)


@pytest.mark.parametrize("name", [name for name in DAMAGE if name.startswith("index")])
def test_a_wrong_index_is_rebuilt_as_it_was(folder, intact, name):
    DAMAGE[name](folder)
    rebuild_index(folder, accept="sha256" in name)
    assert (folder / INDEX_NAME).read_bytes() == (intact / INDEX_NAME).read_bytes()
    assert findings_of(folder) == []


def test_a_lost_index_is_rebuilt_with_the_settings_of_another_folder(folder, intact):
    (folder / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=INDEX_NAME):
        rebuild_index(folder)
    rebuild_index(folder, like=intact)
    assert (folder / INDEX_NAME).read_bytes() == (intact / INDEX_NAME).read_bytes()


def test_shards_that_differ_from_the_old_index_are_indexed_on_request(folder, intact):
    before = (folder / INDEX_NAME).read_bytes()
    (folder / SHARD).unlink()
    for like in (None, intact, folder):
        refuses(folder, rf"{SHARD} must be as the old index says, got no file; .* --accept", like=like)
    (folder / INDEX_NAME).write_text("{")
    refuses(folder, r"must be JSON, .*; or give --accept", like=intact)
    for options in ({"like": intact}, {}):
        (folder / INDEX_NAME).write_bytes(before)
        assert rebuild_index(folder, accept=True, **options).num_packs == read_index(intact).num_packs - 5
        assert findings_of(folder) == []


@pytest.mark.parametrize(
    ("name", "refusal"),
    [("copy (1).tar", r"copy \(1\).tar"), ("copy.tar", f"got .*{SHARD}.* of the same bytes; remove one")],
)
def test_a_copy_of_a_shard_is_not_indexed(folder, name, refusal):
    shutil.copy(folder / SHARD, folder / name)
    refuses(folder, refusal)


def test_shards_of_another_pack_length_are_refused(folder, tmp_path):
    longer = tmp_path / "longer"
    prepare(list(documents(7)), longer, sequence_length=128, tokenizer=ByteTokenizer(), modalities=(GREY,))
    for shard in folder.glob("*.tar"):
        shard.rename(longer / f"other-{shard.name}")
    refuses(longer, "must be of the tokenizer, modalities and pack length of its index")


def test_shards_beside_the_index_and_wrong_sums_are_found(folder):
    entry = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps({**entry, "documents": 7}))
    shutil.copy(folder / SHARD, folder / "shard-000099.tar")
    counts, strange = findings_of(folder)
    assert "40 documents" in counts and "got 7" in counts
    assert "shard-000099.tar" in strange


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
    assert sorted(found.lengths.tolist()) == sorted([5 + 10, 30 + 10, 30 + 2, 1 + 2, 60 + 2])


def test_waste_is_that_of_packing_again(found):
    total = 15 + 40 + 32 + 3 + 62
    assert found.waste_at(152) == 1 - total / 152, "all in one"
    assert found.waste_at(62) == pytest.approx(1 - total / (3 * 62)), "62, 40 and 15, 32 and 3"
    # Of 31, 29 hold a document's inside: 60 is two of them and a rest of 2, 38 one and 9, 30 one and 1.
    pieces = [4, 11, 3, 15, 3]
    assert sum(pieces) <= 2 * 31
    assert found.waste_at(31) == pytest.approx(1 - (4 * 31 + sum(pieces)) / (6 * 31))


def test_lengths_are_drawn(found, tmp_path):
    draw_lengths(found, "a $title_{ with a \\ of no formula and no text\udce9", tmp_path / "lengths.png")
    assert np.asarray(Image.open(tmp_path / "lengths.png").convert("L")).std() > 10
