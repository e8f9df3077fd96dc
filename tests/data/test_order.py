"""The order of packs: a permutation an epoch, keyed by seed and epoch, near-sequential in the shards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.data.order import PackOrder, keyed_permutation
from transfusion_fast.errors import InputError

pack_counts = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def epoch_of(order, epoch=0):
    """Return the packs of an epoch in their order."""
    read = [order[position] for position in range(epoch * order.num_packs, (epoch + 1) * order.num_packs)]
    assert {found for found, _ in read} == {epoch}
    return [pack for _, pack in read]


@given(pack_counts, st.integers(0, 2**63), st.integers(0, 50), st.integers(1, 14))
def test_an_epoch_reads_each_pack_once(counts, seed, epoch, window):
    order = PackOrder(seed, counts, window)
    assert order.num_packs == sum(counts)
    assert sorted(epoch_of(order, epoch)) == list(range(sum(counts)))


@given(pack_counts, st.data())
def test_any_access_pattern_sees_the_same_order(counts, data):
    order = PackOrder(3, counts, window=2)
    sequential = [order[position] for position in range(3 * order.num_packs)]
    for position in data.draw(st.lists(st.integers(0, 3 * order.num_packs - 1), max_size=30)):
        assert order[position] == sequential[position]


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = [
        tuple(epoch_of(PackOrder(seed, counts), epoch))
        for counts in ([20] * 8, np.full(8, 20))
        for seed in (0, 1, 2**32, 2**32 + 1)
        for epoch in range(3)
    ]
    assert orders[:12] == orders[12:] and len(set(orders)) == 12


def test_the_order_is_the_same_on_every_machine_and_release():
    order = PackOrder(0, [3, 2, 4], window=2)
    assert epoch_of(order) == [8, 0, 5, 2, 1, 7, 6, 3, 4]
    assert epoch_of(order, 1) == [6, 3, 5, 7, 4, 8, 0, 1, 2]


def test_a_window_of_reads_stays_in_a_window_of_shards():
    shards = np.array(epoch_of(PackOrder(5, [10] * 23, window=4))) // 10
    for start in range(0, 230, 40):
        assert len(set(shards[start : start + 40])) == min(4, (230 - start) // 10)
    assert list(shards) != sorted(shards)
    assert len(set(shards[:10])) > 1, "packs of one window are not mixed"


def test_every_pack_is_equally_likely_at_every_position():
    positions = np.array([epoch_of(PackOrder(seed, [2, 2], window=2)) for seed in range(2000)])
    frequency = np.stack([(positions == pack).mean(axis=0) for pack in range(4)])
    np.testing.assert_allclose(frequency, 0.25, atol=0.05)  # five standard deviations


@pytest.mark.parametrize(
    ("seed", "counts", "window", "reason"),
    [
        (-1, [1], 1, "seed must be 0 or more, got -1"),
        (0, [1], 0, "window must be 1 shard or more, got 0"),
        (0, [], 1, "pack counts"),
        (0, [3, 0], 1, "pack counts"),
    ],
)
def test_settings_that_define_no_order_are_refused(seed, counts, window, reason):
    with pytest.raises(InputError, match=reason):
        PackOrder(seed, counts, window)
    with pytest.raises(IndexError, match="got -1"):
        PackOrder(0, [2, 3])[-1]


@given(st.integers(0, 200), st.integers(0, 2**70))
def test_a_keyed_permutation_is_a_pure_permutation(length, seed):
    permutation = keyed_permutation(length, seed, 4)
    assert sorted(permutation.tolist()) == list(range(length))
    np.testing.assert_array_equal(permutation, keyed_permutation(length, seed, 4))
