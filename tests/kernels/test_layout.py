"""The attention layout: its two intervals a position, against the definition of the mask in plain loops."""

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.kernels.layout import AttentionLayout

INTERVALS = ("key_start", "key_end", "query_start", "query_end")


@st.composite
def layouts(draw):
    """(document lengths, image spans in any order, total length): segments that are images or text, end to end."""
    segment = st.tuples(st.booleans(), st.integers(1, 5))
    documents = draw(st.lists(st.lists(segment, min_size=1, max_size=5), max_size=5))
    spans, end = [], 0
    for is_image, length in (segment for document in documents for segment in document):
        if is_image:
            spans.append((end, length))
        end += length
    lengths = [sum(length for _, length in document) for document in documents]
    return lengths, draw(st.permutations(spans)), end + draw(st.integers(0, 4))


def visible_by_definition(lengths, spans, total):
    """Query sees key: of one document, and the key not later, or both in one image."""
    visible = [[False] * total for _ in range(total)]
    start = 0
    for length in lengths:
        for query in range(start, start + length):
            for key in range(start, start + length):
                same_image = any(s <= query < s + n and s <= key < s + n for s, n in spans)
                visible[query][key] = key <= query or same_image
        start += length
    return visible


def positions_of(flags):
    return [i for i, flag in enumerate(flags) if flag]


@given(layouts())
def test_dense_mask_is_the_definition(spans):
    assert AttentionLayout.from_spans(*spans).dense_mask().tolist() == visible_by_definition(*spans)


@given(layouts())
def test_each_query_sees_exactly_its_interval_of_keys(spans):
    layout = AttentionLayout.from_spans(*spans)
    for query, row in enumerate(visible_by_definition(*spans)):
        assert list(range(layout.key_start[query], layout.key_end[query])) == positions_of(row)
    assert layout.key_ends().tolist() == layout.key_end.tolist()


@given(layouts())
def test_each_key_is_seen_by_exactly_its_interval_of_queries(spans):
    layout = AttentionLayout.from_spans(*spans)
    for key, column in enumerate(zip(*visible_by_definition(*spans), strict=True)):
        assert list(range(layout.query_start[key], layout.query_end[key])) == positions_of(column)


@given(layouts())
def test_area_counts_the_visible_pairs(spans):
    assert AttentionLayout.from_spans(*spans).area == sum(map(sum, visible_by_definition(*spans)))


@given(layouts())
def test_the_two_kinds_of_intervals_are_transposes(spans):
    layout = AttentionLayout.from_spans(*spans)
    position = torch.arange(layout.total_length)
    by_query = (layout.key_start[:, None] <= position) & (position < layout.key_end[:, None])
    by_key = (layout.query_start[:, None] <= position) & (position < layout.query_end[:, None])
    assert torch.equal(by_query, by_key.T)


def test_intervals_written_out():
    """Two documents, `text image image image text` and `image image` next to each other, and one of padding."""
    layout = AttentionLayout.from_spans([5, 4], [(1, 3), (5, 1), (6, 3)], total_length=10)
    assert layout.key_start.tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 5, 9]
    assert layout.key_end.tolist() == [1, 4, 4, 4, 5, 6, 9, 9, 9, 9]
    assert layout.query_start.tolist() == [0, 1, 1, 1, 4, 5, 6, 6, 6, 9]
    assert layout.query_end.tolist() == [5, 5, 5, 5, 5, 9, 9, 9, 9, 9]
    assert layout.area == 15 + 3 + 10 + 3
    assert {getattr(layout, name).dtype for name in INTERVALS} == {torch.int32}


@given(layouts())
def test_the_order_of_the_spans_does_not_matter(spans):
    lengths, images, total = spans
    given_order, sorted_order = (AttentionLayout.from_spans(lengths, s, total) for s in (images, sorted(images)))
    assert given_order.image_spans.tolist() == [list(span) for span in sorted(images)]
    for name in INTERVALS:
        assert torch.equal(getattr(given_order, name), getattr(sorted_order, name))


def test_without_a_total_length_there_is_no_padding():
    layout = AttentionLayout.from_spans([2, 3], [])
    assert layout.total_length == 5
    assert (layout.key_end > layout.key_start).all()


def test_no_document_is_all_padding():
    layout = AttentionLayout.from_spans([], [], total_length=3)
    assert layout.area == 0
    assert torch.equal(layout.key_start, layout.key_end)
    assert torch.equal(layout.query_start, layout.query_end)


@pytest.mark.parametrize(
    ("lengths", "spans", "total", "message"),
    [
        ([6], [(0, 3), (2, 2)], None, r"image span \(start=2, length=2\) overlaps"),
        ([6], [(2, 2), (0, 6)], None, r"image span \(start=2, length=2\) overlaps"),
        ([6], [(2, 2), (2, 2)], None, r"image span \(start=2, length=2\) overlaps"),
        ([3, 3], [(0, 1), (2, 2)], None, r"image span \(start=2, length=2\) must lie inside one document.*crosses"),
        ([3, 3], [(5, 2)], None, r"image span \(start=5, length=2\) must lie inside one document"),
        ([3, 3], [(5, 2)], 9, r"image span \(start=5, length=2\) must lie inside one document"),
        ([3, 3], [(6, 1)], 9, r"image span \(start=6, length=1\) must lie inside one document"),
        ([], [(0, 1)], 4, r"image span \(start=0, length=1\) must lie inside one document"),
        ([3], [(-1, 2)], None, r"image span \(start=-1, length=2\) must lie inside one document"),
        ([3], [(-2, 1)], None, r"image span \(start=-2, length=1\) must lie inside one document"),
        ([3], [(1, 0)], None, r"image span \(start=1, length=0\) must have a positive length"),
        ([3], [(2, -1)], None, r"image span \(start=2, length=-1\) must have a positive length"),
        ([3, 0, 2], [], None, r"document_lengths\[1\] must be positive, got 0"),
        ([3, -2], [], None, r"document_lengths\[1\] must be positive, got -2"),
        ([3, 3], [], 5, r"total_length must be at least the documents' 6 positions, got 5"),
    ],
)
def test_what_cannot_be_laid_out_is_named(lengths, spans, total, message):
    with pytest.raises(ValueError, match=message):
        AttentionLayout.from_spans(lengths, spans, total)


def test_memory_is_linear_in_the_length():
    total = 131072
    tracemalloc.start()
    layout = AttentionLayout.from_spans([total // 2, total // 2], [(0, 1024), (total // 2, 1024)])
    assert layout.area > total**2 // 4
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 * total
    tensors = [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) < 17 * total


def test_a_plan_is_built_once_a_layout():
    calls = []

    def build(layout):
        calls.append(layout)
        return object()

    layout = AttentionLayout.from_spans([3], [])
    assert layout.plan(build) is layout.plan(build)
    assert calls == [layout]


def test_another_device_gets_its_own_plans_and_keeps_the_spans_on_the_cpu():
    layout = AttentionLayout.from_spans([3], [(1, 2)])
    assert layout.to("cpu") is layout
    layout.plan(lambda layout: layout.device)
    moved = layout.to("meta")
    assert moved.plan(lambda layout: layout.device.type) == "meta"
    assert {getattr(moved, name).device.type for name in INTERVALS} == {"meta"}
    assert moved.key_ends().tolist() == [1, 3, 3]
    assert moved.image_spans.tolist() == [[1, 2]] and moved.document_offsets.tolist() == [0, 3]
