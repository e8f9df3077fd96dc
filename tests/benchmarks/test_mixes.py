"""The mixes: the fixed samples are the ones that bounds are stated on, and the generator makes packs like them."""

from __future__ import annotations

from math import isqrt

import mixes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.kernels.layout import AttentionLayout

# Visible pairs of the fixed samples, and the pairs in the 128 x 128 squares that hold them.
FIXED_AREAS = {
    "pairs": (4236131, 8339456),
    "text": (7630895, 10846208),
    "mixed": (4736409, 8224768),
    "interleaved": (29167461, 32178176),
    "tiny": (289619, 5423104),
    "long": (104365143, 106561536),
}
SEEDS = range(6)
# Of the positions at 8,192 and beyond; `long` ends early on purpose, like the sample.
MAX_PADDING = 0.05


def brute_force_area(layout: AttentionLayout, block: int) -> int:
    missing = -layout.total_length % block
    mask = torch.nn.functional.pad(layout.dense_mask(), (0, missing, 0, missing))
    squares = mask.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    return int(squares.any(dim=3).any(dim=1).sum()) * block * block


def images_share(lengths: list[int], spans: list[tuple[int, int]]) -> float:
    """Of the documents' positions: the fixed packs hold more padding than the generated ones."""
    return sum(length for _, length in spans) / sum(lengths)


@pytest.mark.parametrize("name", mixes.NAMES)
def test_fixed_samples_have_the_areas_that_bounds_are_stated_on(name: str) -> None:
    layout = mixes.sample(name, mixes.FIXED_LENGTH)
    assert (layout.area, mixes.flex_visited_area(layout)) == FIXED_AREAS[name]


@pytest.mark.parametrize("name", mixes.NAMES)
def test_generated_packs_are_like_the_fixed_sample(name: str) -> None:
    packs = [mixes.generate(name, mixes.FIXED_LENGTH, seed) for seed in SEEDS]
    layouts = [AttentionLayout.from_spans(*pack, mixes.FIXED_LENGTH) for pack in packs]
    fixed = mixes.sample(name, mixes.FIXED_LENGTH)
    lengths, spans = fixed.document_offsets.diff().tolist(), fixed.image_spans.tolist()
    mean_length = np.mean([length for pack in packs for length in pack[0]])
    visited = np.mean([mixes.flex_visited_area(layout) / layout.area for layout in layouts])
    area, fixed_visited = FIXED_AREAS[name]
    assert mean_length == pytest.approx(np.mean(lengths), rel=0.15)
    assert np.mean([images_share(*pack) for pack in packs]) == pytest.approx(images_share(lengths, spans), abs=0.1)
    assert visited == pytest.approx(fixed_visited / area, rel=0.15)


@pytest.mark.parametrize("total_length", [1024, 1531, 4096, 8192, 65536, 131072])
@pytest.mark.parametrize("name", mixes.NAMES)
def test_packs_of_any_length_are_valid_and_nearly_full(name: str, total_length: int) -> None:
    for seed in range(3):
        lengths, spans = mixes.generate(name, total_length, seed)
        layout = AttentionLayout.from_spans(lengths, spans, total_length)
        used = int(layout.document_offsets[-1])
        assert used > 0
        if total_length >= 8192:
            assert 1 - used / total_length < MAX_PADDING
            assert name != "long" or (len(lengths) == 1 and len(spans) >= 4)


@pytest.mark.parametrize("total_length", [4096, 16384, 65536])
@pytest.mark.parametrize("name", mixes.BY_MEAN)
def test_packs_have_the_mean_length_of_their_name(name: str, total_length: int) -> None:
    lengths, spans = mixes.generate(name, total_length)
    layout = AttentionLayout.from_spans(lengths, spans, total_length)
    assert sum(lengths) == total_length and np.mean(lengths) == mixes.BY_MEAN[name]
    illustrated = set(np.searchsorted(np.cumsum(lengths), layout.image_spans[:, 0].numpy(), side="right").tolist())
    assert len(illustrated) == -(-len(lengths) // 2)
    for document in illustrated:
        start, end = layout.document_offsets[document : document + 2].tolist()
        patches = [length for first, length in spans if start <= first < end]
        half, side = (end - start) // 2, isqrt(patches[0])
        assert side == 32 or side**2 <= half < (side + 1) ** 2
        assert patches == [side**2] * max(half // 1024, 1)


def test_lengths_around_a_mean_spread_by_their_sigma() -> None:
    logs = np.log(mixes.generate("mean256", 2**20)[0])
    assert logs.std() == pytest.approx(0.6, rel=0.03)


@given(name=st.sampled_from(mixes.ALL_NAMES), total_length=st.integers(1, 3000), seed=st.integers(0, 10**6))
def test_packs_fit_into_their_length(name: str, total_length: int, seed: int) -> None:
    lengths, spans = mixes.generate(name, total_length, seed)
    AttentionLayout.from_spans(lengths, spans, total_length)


def test_packs_depend_on_the_seed_alone() -> None:
    for name in mixes.NAMES:
        assert mixes.generate(name, 8192, 5) == mixes.generate(name, 8192, 5)
        assert mixes.generate(name, 8192, 5) != mixes.generate(name, 8192, 6)


@given(
    documents=st.lists(st.integers(1, 60), max_size=8),
    padding=st.integers(0, 40),
    block=st.sampled_from([1, 7, 16, 32]),
    data=st.data(),
)
def test_flex_area_is_that_of_the_squares_with_a_visible_pair(
    documents: list[int], padding: int, block: int, data: st.DataObject
) -> None:
    spans, start = [], 0
    for length in documents:
        first = data.draw(st.integers(0, length - 1))
        spans.append((start + first, data.draw(st.integers(1, length - first))))
        start += length
    layout = AttentionLayout.from_spans(documents, spans, sum(documents) + padding)
    assert mixes.flex_visited_area(layout, block) == brute_force_area(layout, block)
