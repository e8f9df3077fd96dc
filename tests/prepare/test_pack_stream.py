"""Packs of a stream of documents: little is wasted, nothing is lost, and the stream's cuts do not matter."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.prepare.packing import BUFFER, pack_stream


def web_lengths(count, seed=0):
    """Documents with half of them under 292 positions and one in twenty above 1107."""
    spread = np.log(1107 / 292) / 1.645
    lengths = np.random.default_rng(seed).lognormal(np.log(292), spread, count)
    return np.clip(lengths, 4, 4096).astype(np.int64)


@given(st.lists(st.lists(st.integers(1, 50), max_size=9), max_size=6), st.integers(1, 12), st.integers(0, 3))
def test_every_document_is_in_one_pack_and_every_pack_fits(parts, buffer, seed):
    packs = list(pack_stream([np.array(part, dtype=np.int64) for part in parts], 50, seed, buffer))
    lengths = np.array([length for part in parts for length in part])
    assert sorted(np.concatenate([np.empty(0, int), *packs]).tolist()) == list(range(len(lengths)))
    assert all(len(pack) and lengths[pack].sum() <= 50 for pack in packs)


@given(st.integers(1, 7), st.integers(0, 2))
def test_how_the_stream_is_cut_does_not_matter(parts, seed):
    lengths = web_lengths(300)
    whole = list(pack_stream([lengths], 4096, seed, 64))
    cut = list(pack_stream(np.array_split(lengths, parts), 4096, seed, 64))
    assert [pack.tolist() for pack in whole] == [pack.tolist() for pack in cut]


def test_another_seed_is_another_packing():
    packs = [[pack.tolist() for pack in pack_stream([web_lengths(500)], 4096, seed)] for seed in (0, 1)]
    assert packs[0] != packs[1]


@pytest.mark.parametrize("buffer", [BUFFER, BUFFER // 16])
def test_hardly_anything_is_wasted_and_it_takes_seconds(buffer):
    lengths = web_lengths(200_000)
    begun = time.perf_counter()
    packs = list(pack_stream(np.array_split(lengths, 50), 4096, 0, buffer))
    assert time.perf_counter() - begun < 10
    waste = 1 - lengths.sum() / (4096 * len(packs))
    assert waste < 0.0003


@pytest.mark.parametrize(
    ("low", "high", "capacity", "most"),
    [(276, 340, 4096, 0.001), (208, 522, 4096, 0.001), (76, 90, 512, 0.034)],  # of the last no pack can hold seven
)
def test_packs_hold_documents_of_many_lengths(low, high, capacity, most):
    lengths = np.random.default_rng(0).integers(low, high, 20_000)
    packs = list(pack_stream([lengths], capacity, 0))
    assert np.mean([len(set(lengths[pack].tolist())) == 1 for pack in packs]) < 0.02
    assert np.median([lengths[pack].std() for pack in packs]) > 0.3 * lengths.std()
    assert 1 - lengths.sum() / (capacity * len(packs)) < most


def test_neighbouring_packs_are_not_alike():
    """Best-fit decreasing makes bins of the longest documents first."""
    lengths = web_lengths(20_000)
    documents = np.array([len(pack) for pack in pack_stream([lengths], 4096, 0)])
    halves = documents[: len(documents) // 2].mean(), documents[len(documents) // 2 :].mean()
    assert abs(halves[0] - halves[1]) < 0.05 * documents.mean()
