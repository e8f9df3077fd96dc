"""The encoded documents of units on disk become the packs that they would become in memory."""

from pathlib import Path

import numpy as np
import pytest
from build_cases import RGB, fingerprint, text_recipe
from hypothesis import given
from hypothesis import strategies as st
from shard_damage import assert_same_pack

from transfusion_fast.data.pack import ImageSegment, TextSegment, make_pack
from transfusion_fast.errors import Rejected
from transfusion_fast.prepare import build as building
from transfusion_fast.prepare import spool as spooling
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.spool import Spool, read_pack

WEIGHTS = st.sampled_from([1.0, 1.0, 0.5])
TEXTS = st.builds(
    lambda ids, weight: TextSegment(np.array(ids, np.int32), weight), st.lists(st.integers(0, 299), min_size=1), WEIGHTS
)
IMAGES = st.builds(
    lambda rows, value, weight: ImageSegment(np.full((4 * rows, 8, 3), value, np.uint8), 0, weight),
    st.integers(1, 3), st.integers(0, 255), WEIGHTS,
)  # fmt: skip
DOCUMENTS = st.lists(st.lists(TEXTS | IMAGES, min_size=1, max_size=3).map(tuple), max_size=4)


def spooled(folder, *units, vocabulary=300):
    spools = [Spool(folder, number, (RGB,), vocabulary) for number in range(len(units))]
    for spool, documents in zip(spools, units, strict=True):
        spool.write([[document] for document in documents])
    return spools


@given(units=st.lists(DOCUMENTS, min_size=1, max_size=3).filter(any), data=st.data())
def test_a_pack_that_is_read_equals_one_that_is_made(tmp_path_factory, units, data):
    spools = spooled(tmp_path_factory.mktemp("spool"), *units)
    located = [(unit, number) for unit, documents in enumerate(units) for number in range(len(documents))]
    chosen = data.draw(st.permutations(located).map(lambda order: order[: 1 + len(order) // 2]))
    found = read_pack(np.array(chosen), spools.__getitem__, (RGB,))
    expected = make_pack([units[unit][number] for unit, number in chosen], (RGB,))
    assert_same_pack(found, expected)
    assert (found.weights is None) == (expected.weights is None)
    assert found.weights is None or np.array_equal(found.weights, expected.weights)


def test_images_of_a_pack_do_not_stay_in_memory_with_their_file(tmp_path):
    values = np.zeros((8, 8, 3), np.uint8)
    (spool,) = spooled(tmp_path, [(ImageSegment(values),), (TextSegment(np.ones(3, np.int32)),)])
    read_pack(np.array([[0, 0], [0, 1]]), lambda unit: spool, (RGB,))
    mapped = Path("/proc/self/maps").read_text()
    assert str(spool.path("tokens")) in mapped and str(spool.path("latents")) not in mapped


@pytest.mark.parametrize("together", [1, 1024])
def test_a_document_that_is_rejected_late_leaves_nothing_behind(tmp_path, monkeypatch, together):
    """Neither in memory nor in files, to which its first documents may have gone."""
    monkeypatch.setattr(spooling, "_ROWS_TOGETHER", together)
    documents = [(TextSegment(np.full(9, number, np.int32)),) for number in range(4)]

    def until_rejected():
        yield from documents[1:3]
        raise Rejected("special token", "here")

    for number, outcomes in enumerate(([documents[:1], until_rejected(), iter(documents[2:])], [documents[:1]])):
        spool = Spool(tmp_path, number, (), 300)
        assert spool.write(outcomes) == spool.read_counts()
    whole = Spool(tmp_path, 0, (), 300)
    counts = whole.read_counts()
    assert (counts.documents, counts.cut, counts.tokens) == (3, 1, 3 * (9 + 2))
    assert b"special token" in whole.path("rejected").read_bytes()
    pack = read_pack(np.array([(0, 0), (0, 1), (0, 2)]), lambda _: whole, ())
    kept = [documents[number] for number in (0, 2, 3)]
    assert list(map(fingerprint, pack.documents(()))) == list(map(fingerprint, kept))


def test_work_takes_at_most_three_times_the_source_on_disk(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    with source.open("w") as file:
        file.writelines(f'"{number} {"some words " * 20}"\n' for number in range(3000))
    taken, discard = [], building.discard

    def measure(partial):  # when everything is made and nothing is deleted
        folders = (partial, tmp_path / "out")
        taken.append(sum(path.stat().st_size for folder in folders for path in folder.rglob("*.*")))
        discard(partial)

    monkeypatch.setattr(building, "discard", measure)
    build(text_recipe(source, 4096), tmp_path / "out")
    assert taken[0] < 3 * source.stat().st_size
