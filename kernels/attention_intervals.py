"""What the attention kernels visit: the tile of a program, and the blocks of columns in one interval or in two.

In layouts with noised copies a tile sees a second interval. The loops over full and over partial blocks then continue
from the first interval to the second, so that loads run ahead from one to the other. Without copies the pointers of
the second interval, and `second` here, are None, and the kernels are compiled without the code of second intervals.
"""

import triton
import triton.language as tl


@triton.jit
def tile_bounds(tiles_ptr, tile, SUBTILES: tl.constexpr, BLOCK: tl.constexpr):
    """Return (start, end) of a program's rows: BLOCK rows of a tile of the table, or none beyond the tile's end."""
    entry = tiles_ptr + 2 * (tile // SUBTILES)
    start = tl.load(entry) + (tile % SUBTILES) * BLOCK
    return start, tl.minimum(start + BLOCK, tl.load(entry + 1))


@triton.jit
def key_bounds(key_start_ptr, key_end_ptr, start, end, STEP: tl.constexpr):
    """Return (first, full_end, last) for queries [start, end): full blocks of keys end at `full_end`, all at `last`.

    Both ends of the rows' intervals ascend, so the first and the last row bound what the tile sees. The keys that all
    of its rows see end with the first row's interval; if documents share the tile, there are none.
    """
    first = tl.load(key_start_ptr + start)
    last = tl.load(key_end_ptr + end - 1)
    common_end = tl.where(tl.load(key_start_ptr + end - 1) == first, tl.load(key_end_ptr + start), first)
    return first, first + (common_end - first) // STEP * STEP, last


@triton.jit
def query_bounds(query_start_ptr, query_end_ptr, start, end, STEP: tl.constexpr):
    """Return (first, full_start, last) for keys [start, end): the transpose of `key_bounds`.

    The queries that see all keys begin with the last key's interval, and full blocks are aligned to its end.
    """
    first = tl.load(query_start_ptr + start)
    last = tl.load(query_end_ptr + end - 1)
    common_start = tl.where(tl.load(query_end_ptr + start) == last, tl.load(query_start_ptr + end - 1), last)
    return first, last - (last - common_start) // STEP * STEP, last


@triton.jit
def loop_end(first, last, second, STEP: tl.constexpr):
    """Return the end of a loop in steps of STEP over [first, last) and then over the interval `second`."""
    if second is None:
        return last
    else:
        return first + tl.cdiv(last - first, STEP) * STEP + (second[1] - second[0])


@triton.jit
def offset_at(position, first, last, second, STEP: tl.constexpr):
    """Return the offset that a position of such a loop stands for."""
    if second is None:
        return position
    else:
        joint = first + tl.cdiv(last - first, STEP) * STEP
        return tl.where(position < joint, position, position - joint + second[0])


@triton.jit
def loop_bounds(first, last, second, STEP: tl.constexpr, FULL: tl.constexpr):
    """Return (first offset, end of the last block, steps) of a loop over [first, last) and then over `second`.

    With FULL, both intervals are multiples of STEP.
    """
    ROUND_UP: tl.constexpr = 0 if FULL else STEP - 1
    steps = (last - first + ROUND_UP) // STEP
    if second is None:
        return first, last, steps
    else:
        begin = tl.where(steps > 0, first, second[0])
        return begin, second[1], steps + (second[1] - second[0] + ROUND_UP) // STEP


@triton.jit
def next_offset(offset, last, second, STEP: tl.constexpr):
    """Return the offset after this one in a loop over an interval that ends at `last` and then over `second`."""
    if second is None:
        return offset + STEP
    else:
        return tl.where((offset < last) & (offset + STEP >= last), second[0], offset + STEP)


@triton.jit
def interval_end(offset, last, second):
    """Return the end of the interval that holds an offset: the second interval lies behind the first."""
    if second is None:
        return last
    else:
        return tl.where(offset < last, last, second[1])


@triton.jit
def load_intervals(ptrs, rows, end, OTHER: tl.constexpr):
    """Load the intervals of rows from (starts, ends); those of rows beyond the tile are [0, OTHER)."""
    mask = rows < end
    return tl.load(ptrs[0] + rows, mask=mask, other=0), tl.load(ptrs[1] + rows, mask=mask, other=OTHER)


@triton.jit
def intervals_at(offset, last, intervals, ptrs, second_ptrs, rows, end, OTHER: tl.constexpr):
    """Return the intervals of rows that a block at an offset is compared with."""
    if second_ptrs[0] is None:
        return intervals
    else:
        # Loaded for each block: keeping two intervals a row in registers would spill others.
        is_first = offset < last
        starts, ends = tl.where(is_first, ptrs[0], second_ptrs[0]), tl.where(is_first, ptrs[1], second_ptrs[1])
        return load_intervals((starts, ends), rows, end, OTHER)
