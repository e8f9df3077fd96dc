"""The attention layout: two intervals a position, compared with the definition of the mask in plain loops."""

import pytest
import torch
from attention_cases import COPIES, any_spans, layout_of, with_copies
from hypothesis import example, given

from transfusion_fast.kernels.layout import AttentionLayout

INTERVALS = ("key_start", "key_end", "query_start", "query_end")
SECOND = ("own_start", "own_end", "copies_start", "copies_end")


def visible_by_definition(lengths, spans, total, copies=()):
    """A query sees a key of its document that is not later, or lies in the same image.

    A copy sees itself and the context before its place, and nothing else sees it.
    """
    visible = [[False] * total for _ in range(total)]
    copy_of = {position: copy for copy in copies for position in range(copy[0], sum(copy[:2]))}
    start = 0
    for length in lengths:
        for query in range(start, start + length):
            for key in range(start, start + length):
                same_image = any(s <= query < s + n and s <= key < s + n for s, n in spans)
                sees = key < copy_of[query][2] if query in copy_of else key <= query or same_image
                same_copy = copy_of.get(query) == copy_of.get(key)
                visible[query][key] = same_copy if key in copy_of else sees
        start += length
    return visible


def positions_of(flags):
    return [i for i, flag in enumerate(flags) if flag]


@given(any_spans())
def test_the_intervals_the_dense_mask_and_the_area_are_those_of_the_definition(spans):
    layout, visible = layout_of(spans), visible_by_definition(*spans)
    assert layout.dense_mask().tolist() == visible
    assert layout.area == sum(map(sum, visible))
    for query, row in enumerate(visible):
        assert list(range(layout.key_start[query], layout.key_end[query])) == positions_of(row)
    for key, column in enumerate(zip(*visible, strict=True)):
        assert list(range(layout.query_start[key], layout.query_end[key])) == positions_of(column)


@given(with_copies(any_spans()))
@example(COPIES["a document that is its copy"])
def test_with_copies_two_intervals_the_dense_mask_and_the_area_are_those_of_the_definition(spans):
    layout, visible = layout_of(spans), visible_by_definition(*spans)
    assert layout.dense_mask().tolist() == visible
    assert layout.area == sum(map(sum, visible))
    if not spans[3]:
        assert all(getattr(layout, name) is None for name in SECOND)
        return
    key_start, key_end, query_start, query_end, *second = (getattr(layout, n).tolist() for n in INTERVALS + SECOND)
    own_start, own_end, copies_start, copies_end = second
    for query, row in enumerate(visible):
        seen = [*range(key_start[query], key_end[query]), *range(own_start[query], own_end[query])]
        assert seen == positions_of(row)
    for key, column in enumerate(zip(*visible, strict=True)):
        seen = [*range(query_start[key], query_end[key]), *range(copies_start[key], copies_end[key])]
        assert seen == positions_of(column)


def test_an_empty_list_of_copies_changes_nothing():
    layout = AttentionLayout.from_spans([70, 4], [(1, 3)], 80)
    same = AttentionLayout.from_spans([70, 4], [(1, 3)], 80, noised_copies=[])
    for name, value in vars(layout).items():
        assert getattr(same, name) is None if value is None else torch.equal(value, vars(same)[name])
    assert all(getattr(same, name) is None for name in SECOND)


def test_intervals_of_a_small_example():
    """`text image image image text` and `image image` next to each other, then one position of padding."""
    layout = AttentionLayout.from_spans([5, 4], [(6, 3), (1, 3), (5, 1)], total_length=10)
    assert layout.key_start.tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 5, 9]
    assert layout.key_end.tolist() == [1, 4, 4, 4, 5, 6, 9, 9, 9, 9]
    assert layout.query_start.tolist() == [0, 1, 1, 1, 4, 5, 6, 6, 6, 9]
    assert layout.query_end.tolist() == [5, 5, 5, 5, 5, 9, 9, 9, 9, 9]
    assert layout.image_spans.tolist() == [[1, 3], [5, 1], [6, 3]]
    assert layout.area == 15 + 3 + 10 + 3
    assert {getattr(layout, name).dtype for name in INTERVALS} == {torch.int32}


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
        ([3], [(2, 1, 0)], None, r"image_spans must be a list of \(start, length\), got int64 of shape \(1, 3\)"),
        ([3, 0, 2], [], None, r"document_lengths\[1\] must be positive, got 0"),
        ([3, -2], [], None, r"document_lengths\[1\] must be positive, got -2"),
        ([2.5], [], None, r"document_lengths must be a list of integers, got float64 of shape \(1,\)"),
        ([3, 3], [], 5, r"total_length must be at least the documents' 6 positions, got 5"),
    ],
)
def test_wrong_documents_and_spans_are_refused_by_name(lengths, spans, total, message):
    with pytest.raises(ValueError, match=message):
        AttentionLayout.from_spans(lengths, spans, total)


CONTEXT = ([4, 9, 3], [(5, 2)])  # the second document is at 4; its image lies within its first five positions


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([(9, 0, 5)], r"\(start=9, length=0, place=5\) must have a positive length"),
        ([(9, 5, 5)], r"\(start=9, length=5, place=5\) must lie inside one document, but crosses a document's end"),
        ([(16, 1, 5)], r"\(start=16, length=1, place=5\) must lie inside one document, got documents over \[0, 16\)"),
        ([(2**62, 2**62, 5)], r"\(start=4611686018427387904, .* must lie inside one document, got documents over"),
        ([(-1, 1, 0)], r"\(start=-1, length=1, place=0\) must lie inside one document"),
        ([(9, 2, 5), (10, 3, 5)], r"\(start=10, length=3, place=5\) overlaps the copy before it"),
        ([(11, 2, 5), (9, 2, 5)], r"\(start=9, length=2, place=5\) must start behind the copy before it"),
        ([(9, 2, 5), (12, 1, 5)], r"\(start=9, length=2, place=5\) must end where the next copy begins.* leave no gap"),
        ([(9, 2, 5)], r"\(start=9, length=2, place=5\) must end where the next copy begins, the last one with its doc"),
        ([(9, 4, 10)], r"\(start=9, length=4, place=10\) stands before its place"),
        (
            [(9, 2, 9), (11, 2, 10)],
            r"\(start=11, length=2, place=10\) must have a place in the context of its document",
        ),
        ([(9, 4, 3)], r"\(start=9, length=4, place=3\) must have a place in the context of its document"),
        ([(9, 4, -1)], r"\(start=9, length=4, place=-1\) must have a place in the context of its document"),
        (
            [(9, 2, 8), (11, 2, 7)],
            r"\(start=11, length=2, place=7\) must have no place before that of the copy before it",
        ),
        ([(9, 4, 6)], r"\(start=9, length=4, place=6\) must not have its place inside an image"),
        ([(6, 7, 5)], r"\(start=6, length=7, place=5\) overlaps an image of the context"),
        ([(4, 9, 4)], r"\(start=4, length=9, place=4\) overlaps an image of the context"),
        ([(9, 4)], r"noised_copies must be a list of \(start, length, place\), got int64 of shape \(1, 2\)"),
        ([(9, 4, 5.5)], r"noised_copies must be a list of \(start, length, place\), got float64"),
    ],
)
def test_wrong_copies_are_refused_with_the_span_and_the_rule(copies, message):
    AttentionLayout.from_spans(*CONTEXT, noised_copies=[(9, 2, 5), (11, 2, 9)])
    with pytest.raises(ValueError, match=message):
        AttentionLayout.from_spans(*CONTEXT, noised_copies=copies)


def test_another_device_has_its_own_tables_and_leaves_spans_and_counts_on_the_cpu():
    layout = AttentionLayout.from_spans([3], [(1, 2)])
    copied = AttentionLayout.from_spans([6], [(1, 2)], noised_copies=[(3, 3, 1)]).to("meta")
    assert {getattr(copied, name).device.type for name in INTERVALS + SECOND} == {"meta"}
    assert copied.area == 7 + 12
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    for name in (*INTERVALS, "query_tiles", "key_tiles"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(layout, name).shape
    assert moved.image_spans.tolist() == [[1, 2]] and moved.document_offsets.tolist() == [0, 3]
    assert moved.tile_counts.tolist() == layout.tile_counts.tolist() == [0, 1, 0, 1, 3]
