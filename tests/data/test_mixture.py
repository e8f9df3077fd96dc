"""Mixtures: tokens have their shares at every prefix, and every dataset keeps its own order and epochs."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.data.folder import LocalFolder, ShardCache
from transfusion_fast.data.index import Index
from transfusion_fast.data.mixture import Dataset, Mixture, MixtureOrder, open_mixture
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.pack import ModalityInfo, TextSegment
from transfusion_fast.data.shards import ShardInfo
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
NO_CACHE = ShardCache(Path("unused"), 0)
HALVES = [Fraction(1, 2)] * 2

fractions = st.builds(Fraction, st.integers(1, 1000), st.integers(1, 1000))


def index_of(pack_counts=(3, 2), tokens_of_a_pack=50, modalities=()):
    shards = tuple(ShardInfo(f"s{i}.tar", 10**9, "", n, 10**8, 0) for i, n in enumerate(pack_counts))
    tokens = sum(pack_counts) * tokens_of_a_pack
    return Index(64, ByteTokenizer().describe(), tuple(modalities), 1, tokens, shards)


def mixture_of(*datasets: tuple[Index, Fraction]) -> Mixture:
    return Mixture(
        tuple(Dataset(LocalFolder(Path(f"d{i}")), index, f"{i}", share) for i, (index, share) in enumerate(datasets))
    )


@given(st.lists(st.tuples(fractions, st.integers(1, 64)), min_size=1, max_size=6), st.integers(0, 10**18))
def test_tokens_differ_from_their_shares_by_less_than_a_pack_for_each_dataset(datasets, start):
    """In any stretch of the stream, if every pack has the average tokens of its dataset."""
    total = sum(weight for weight, _ in datasets)
    mixture = mixture_of(*((index_of((5,), tokens), weight / total) for weight, tokens in datasets))
    order = mixture.order(seed=0, window=1)
    packs_of_all = sum(d.share / Fraction(d.index.tokens, d.index.num_packs) for d in mixture.datasets)
    taken = {}
    for position in range(start, start + 40):
        dataset, before = order.locate(position)
        assert taken.get(dataset, before) == before, "packs of a dataset are counted one by one"
        taken[dataset] = before + 1
        share = mixture.datasets[dataset].share
        tokens = datasets[dataset][1]
        assert abs(before * tokens - position / packs_of_all * share) < len(datasets) * tokens


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=2, max_size=4), st.integers(0, 5))
def test_each_dataset_gives_each_pack_once_an_epoch(pack_counts, seed):
    order = MixtureOrder(seed, pack_counts, [Fraction(1)] * len(pack_counts), window=2)
    sizes = [sum(counts) for counts in pack_counts]
    stream = [order[position] for position in range(3 * len(sizes) * max(sizes))]
    first = 0
    for size in sizes:
        own = [(epoch, number - first) for epoch, number in stream if first <= number < first + size]
        for epoch in range(3):
            packs = own[epoch * size : (epoch + 1) * size]
            assert sorted(packs) == [(epoch, number) for number in range(size)]
        first += size


def test_equal_datasets_have_different_orders_that_depend_on_the_seed_and_the_first_has_that_of_a_single_one():
    seen = set()
    for seed in range(4):
        order = MixtureOrder(seed, [[10] * 4] * 3, [Fraction(1)] * 3, window=2)
        stream = [order[position][1] for position in range(120)]
        own = [tuple(number - first for number in stream if first <= number < first + 40) for first in (0, 40, 80)]
        assert list(own[0]) == [PackOrder(seed, [10] * 4, window=2)[position][1] for position in range(40)]
        seen.update(own)
    assert len(seen) == 12


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 2**70), st.integers(0, 10**15))
def test_a_single_dataset_has_the_order_of_a_data_folder(counts, seed, position):
    assert MixtureOrder(seed, [counts], [Fraction(1, 3)], 3)[position] == PackOrder(seed, counts, 3)[position]


@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(2, 6))
def test_every_nth_pack_of_each_dataset_is_held_out_whatever_its_shards_and_the_others_are_read_once(counts, every):
    datasets = [(index_of(own), Fraction(sum(own), sum(map(sum, counts)))) for own in counts]
    mixture, held, kept, first = replace(mixture_of(*datasets), held_out_every=every), [], [], 0
    for own in counts:
        held += range(first + every - 1, first + sum(own), every)
        kept.append({*range(first, first + sum(own))} - {*held})
        first += sum(own)
    assert mixture.held_out == held
    order = mixture.order(seed=1, window=2)
    stream = [order[position] for position in range(3 * first)]
    for dataset in kept:
        own = [(epoch, number) for epoch, number in stream if number in dataset]
        epoch = [number for _, number in own[: len(dataset)]]
        assert sorted(epoch) == sorted(dataset)
    assert {number for _, number in stream}.isdisjoint(held)


def test_the_order_is_the_same_on_every_machine_and_release():
    order = MixtureOrder(0, [[3, 2], [4]], [Fraction(1, 4), Fraction(3, 4)], window=2)
    expected = [(0, 5), (0, 8), (0, 7), (0, 3), (0, 6), (1, 6), (1, 8), (0, 4), (1, 7), (1, 5)]
    assert [order[position] for position in range(10)] == expected
    with pytest.raises(IndexError, match="got -1"):
        order[-1]


def write_text(folder: Path, sequence_length: int = 32) -> Path:
    documents = [(TextSegment(ByteTokenizer().encode(f"{i} and {i}")),) for i in range(30)]
    prepare(documents, folder, sequence_length=sequence_length, tokenizer=ByteTokenizer(), modalities=())
    return folder


def test_weights_become_exact_shares_of_tokens(tmp_path):
    a, b = (str(write_text(tmp_path / name)) for name in "ab")
    for weights in ((0.1, 0.3), (1, 3), (2.5e300, 7.5e300)):
        mixture = open_mixture(dict(zip((a, b), weights, strict=True)), NO_CACHE)
        assert mixture.shares == ("1/4", "3/4")
        assert str(mixture) == f"{a} (25 % of the tokens), {b} (75 % of the tokens)"
    assert open_mixture({a: 3}, NO_CACHE).shares == ("1",)
    assert str(open_mixture({a: 3}, NO_CACHE)) == a


def test_the_fingerprint_depends_on_the_indexes_and_not_on_the_paths(tmp_path):
    a, b, c = (str(write_text(tmp_path / name, length)) for name, length in (("a", 32), ("b", 32), ("c", 48)))
    prints = [open_mixture(dict.fromkeys(f, 1), NO_CACHE).fingerprint for f in ([a], [b], [c], [a, b])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    mixture = mixture_of((index_of(), Fraction(1, 2)), (index_of(), Fraction(1, 2)))
    assert mixture.fingerprint != replace(mixture, datasets=mixture.datasets[::-1]).fingerprint, "packs are renumbered"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"tokenizer": {"name": "bytes", "num_text_tokens": 300, "sha256": "0"}}, "tokenizer"),
        ({"sequence_length": 65}, "sequence_length"),
        ({"modalities": (replace(GREY, patch_size=4),)}, "modalities"),
        ({"modalities": (replace(GREY, encoding="latents"),)}, "modalities"),
        ({"modalities": (GREY, GREY)}, "modalities"),
    ],
)
def test_folders_that_do_not_fit_one_model_are_refused(change, name):
    index = index_of(modalities=(GREY,))
    text = index_of()  # text alone goes with any images
    for indexes in ((text, index), (index, text)):
        assert mixture_of(*((each, Fraction(1, 2)) for each in indexes)).modalities == (GREY,)
    reason = rf"{name} of mixed data folders must be the same, got .* in d0 and .* in d2; (repack|prepare) one of them"
    with pytest.raises(InputError, match=reason):
        mixture_of((index, Fraction(1, 3)), (index, Fraction(1, 3)), (replace(index, **change), Fraction(1, 3)))
    if name == "modalities":
        with pytest.raises(InputError, match=rf"{name} of mixed data folders .* in d1 and .* in d2"):
            mixture_of((text, Fraction(1, 3)), (index, Fraction(1, 3)), (replace(index, **change), Fraction(1, 3)))
