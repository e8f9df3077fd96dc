"""Documents in packs: each once, none overfilled, little wasted, and the cuts of the stream do not matter."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.errors import InputError
from transfusion_fast.prepare.packing import (
    BUFFER,
    best_fit_decreasing,
    fullest_subset,
    pack_bins,
    pack_stream,
    subset_fit,
)

lengths_and_capacity = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


def in_their_order(lengths, capacity):
    return subset_fit(range(len(lengths)), lengths, capacity)


@given(lengths_and_capacity)
def test_each_document_is_placed_once_and_no_bin_overfilled(case):
    lengths, capacity = case
    bins = {rule: rule(lengths, capacity) for rule in (best_fit_decreasing, in_their_order, pack_bins)}
    for rule, found in bins.items():
        assert sorted(itertools.chain.from_iterable(found)) == list(range(len(lengths)))
        assert all(0 < sum(lengths[document] for document in members) <= capacity for members in found)
        assert found == rule(lengths, capacity)
    filled = [sum(lengths[document] for document in members) for members in bins[best_fit_decreasing]]
    assert sum(2 * fill <= capacity for fill in filled) <= 1, "no two bins fit into one"
    assert len(bins[pack_bins]) <= len(filled), "filling bins again never makes more of them"
    left = list(range(len(lengths)))
    for members in bins[in_their_order]:
        assert members[0] == left[0] and members == sorted(members), "the first document left is in the next bin"
        left = [document for document in left if document not in members]


def test_best_fit_takes_the_longest_first_and_the_fullest_bin_that_has_room():
    assert best_fit_decreasing([30, 40, 60, 70, 50], 100) == [[3, 0], [2, 1], [4]]


def test_bins_of_small_documents_mix_their_lengths():
    lengths = [20, 24] * 500
    bins = best_fit_decreasing(lengths, 512)
    assert all({lengths[document] for document in members} == {20, 24} for members in bins)


@pytest.mark.parametrize(("lengths", "named"), [([3, 11], "document 1 .* got 11"), ([0], "document 0 .* got 0")])
def test_a_document_that_fits_no_pack_is_named(lengths, named):
    with pytest.raises(InputError, match=f"{named}; give a larger sequence length or a shorter document"):
        best_fit_decreasing(lengths, 10)


@given(st.lists(st.integers(1, 60), max_size=10), st.integers(0, 200))
def test_no_subset_is_fuller_than_the_fullest(lengths, room):
    places = fullest_subset(lengths, room)
    sums = [sum(some) for size in range(len(lengths) + 1) for some in itertools.combinations(lengths, size)]
    assert sum(lengths[place] for place in places) == max(total for total in sums if total <= room)
    assert places == sorted(set(places))


def test_the_fullest_subset_prefers_what_comes_first():
    assert fullest_subset([5, 5, 3, 2, 5], 10) == [0, 1]
    assert fullest_subset([7, 6, 4, 3], 10) == [1, 2]


@pytest.mark.parametrize("capacity", [4096, 8192])
@pytest.mark.parametrize("typical", [15, 60])
def test_captioned_images_fill_packs_where_best_fit_leaves_gaps(typical, capacity):
    """Images of 256 patches, captions of `typical` tokens."""
    captions = np.random.default_rng(0).lognormal(np.log(typical), 0.6, 30_000)
    lengths = (256 + 4 + np.clip(captions, 1, 800)).astype(int).tolist()
    least = -(-sum(lengths) // capacity)
    assert len(best_fit_decreasing(lengths, capacity)) > 1.005 * least
    assert len(pack_bins(lengths, capacity)) <= least + 1


def test_long_documents_find_the_short_ones_that_fit_beside_them():
    """Lengths of 1 to all of a pack: in their order, short ones would be gone before their gap comes."""
    lengths = np.random.default_rng(0).integers(1, 4097, 30_000).tolist()
    bound = sum(lengths) / 4096
    assert len(pack_bins(lengths, 4096)) < 1.005 * bound < 1.02 * bound < len(in_their_order(lengths, 4096))


def test_tiny_documents_fill_a_large_pack():
    lengths = np.random.default_rng(0).integers(3, 45, 20_000).tolist()
    assert len(pack_bins(lengths, 16384)) == -(-sum(lengths) // 16384)


def web_lengths(count):
    """Documents with half of them under 292 positions and one in twenty above 1107."""
    lengths = np.random.default_rng(0).lognormal(np.log(292), np.log(1107 / 292) / 1.645, count)
    return np.clip(lengths, 4, 4096).astype(np.int64)


def packed(lengths, *settings):
    return [pack.tolist() for pack in pack_stream(lengths, *settings)]


@given(st.lists(st.lists(st.integers(1, 50), max_size=9), max_size=6), st.integers(1, 12), st.integers(0, 3))
def test_every_document_is_in_one_pack_and_every_pack_fits(parts, buffer, seed):
    packs = packed([np.array(part, dtype=np.int64) for part in parts], 50, seed, buffer)
    lengths = list(itertools.chain.from_iterable(parts))
    assert sorted(itertools.chain.from_iterable(packs)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in pack) <= 50 for pack in packs)


def test_the_cuts_of_the_stream_do_not_matter_and_the_seed_does():
    lengths = web_lengths(300)
    wholes = [packed([lengths], 4096, seed, 64) for seed in range(3)]
    assert wholes[0] != wholes[1] != wholes[2]
    for seed, parts in itertools.product(range(3), range(1, 8)):
        assert packed(np.array_split(lengths, parts), 4096, seed, 64) == wholes[seed]


@pytest.mark.parametrize("buffer", [BUFFER, BUFFER // 16])
def test_hardly_anything_is_wasted_and_it_takes_seconds(buffer):
    lengths = web_lengths(200_000)
    begun = time.perf_counter()
    packs = list(pack_stream(np.array_split(lengths, 50), 4096, 0, buffer))
    assert time.perf_counter() - begun < 10
    assert 1 - lengths.sum() / (4096 * len(packs)) < 0.0003


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


def test_neighbouring_packs_differ():
    """Best-fit decreasing makes bins of the longest documents first."""
    documents = np.array([len(pack) for pack in pack_stream([web_lengths(20_000)], 4096, 0)])
    halves = documents[: len(documents) // 2].mean(), documents[len(documents) // 2 :].mean()
    assert abs(halves[0] - halves[1]) < 0.05 * documents.mean()
