"""The Triton kernels of hybrid attention; `hybrid_attention.py` explains what they compute and why.

Letters: T tokens, D head dimension, H query heads, G key/value heads. Every program owns one tile of rows,
[start, end), and loops over an interval of the other side: first in full blocks of STEP columns, which every row of the
tile sees, without a mask, and then in partial blocks of PARTIAL_STEP columns, which compare every pair with the mask
(the dK, dV kernel: partial blocks first).

Rows and columns outside of a tile are loaded as zeros, whatever memory holds there: a matrix product with P = 0 would
still spread the infinities of an invisible key. A `source` describes rows of one head: (pointer to the head, first row,
end of the rows, stride of a row). With PACKED the gradients are parts of one tensor [T, H + 2G, D].

Which tile a program owns and which blocks it visits is in attention_intervals.py.
"""

import triton
import triton.language as tl

from transfusion_fast.kernels.attention_intervals import (
    interval_end,
    intervals_at,
    key_bounds,
    load_intervals,
    loop_bounds,
    loop_end,
    next_offset,
    offset_at,
    query_bounds,
    tile_bounds,
)
from transfusion_fast.kernels.launch import dot

# Initial row maximum: below any score, but finite, so that a row which sees no key of its first block gets no NaN.
LOWEST = tl.constexpr(-3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_bounded(source, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head, [BLOCK, BLOCK_D], with zeros at rows >= limit and at dimensions >= D."""
    ptr, start, limit, stride = source
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    # A 64-bit base for the tile and 32-bit offsets within it: 64-bit offsets for every row would cost registers.
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    mask = (rows < limit - start)[:, None]
    if D != BLOCK_D:
        mask = mask & (dims < D)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _load_full(source, descriptor, head, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of one head, [BLOCK, BLOCK_D], all inside the tensor, with zeros at dimensions >= D."""
    ptr, start, _, stride = source
    if descriptor is not None:
        return descriptor.load([start, head.to(tl.int32), 0]).reshape(BLOCK, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (tl.arange(0, BLOCK)[:, None] * stride + dims[None, :])
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _product(x, x_source, y, y_source, D: tl.constexpr, CHUNK: tl.constexpr, INTERPRET: tl.constexpr):
    """Return x y^T, contracted over the head dimension at once or CHUNK dimensions at a time.

    The operands of an fp32 product are in registers together with their low parts, and large head dimensions do not fit
    there. So their rows are loaded again in chunks; the loads of x and y themselves are dead, and the compiler removes
    them.
    """
    product = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    if CHUNK is None:
        product = dot(x, tl.trans(y), product, INTERPRET)
    else:
        x_ptr, x_start, x_limit, x_stride = x_source
        y_ptr, y_start, y_limit, y_stride = y_source
        for d in tl.range(0, D, CHUNK):
            x_chunk = _load_bounded((x_ptr + d, x_start, x_limit, x_stride), CHUNK, x.shape[0], CHUNK)
            y_chunk = _load_bounded((y_ptr + d, y_start, y_limit, y_stride), CHUNK, y.shape[0], CHUNK)
            product = dot(x_chunk, tl.trans(y_chunk), product, INTERPRET)
    return product


@triton.jit
def _store(ptr, rows, end, stride, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(rows < end)[:, None] & (dims < D)[None, :])


@triton.jit
def _mask_scores(scores, keys, first, last, SHARED: tl.constexpr):
    """Set the scores to -inf where a key is outside of its query's interval [first, last).

    Every key that a tile visits lies behind the start of its first document. So the lower end is compared only in tiles
    that documents share.
    """
    visible = keys < last
    if SHARED:
        visible = visible & (keys >= first)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _update_row_max(scores, row_max, scale_log2):
    """Return the row maximum including this block, and the factor that rescales earlier sums to it.

    FlashAttention-2, arXiv 2307.08691, algorithm 1, with base-2 exponentials.
    """
    new_row_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    return new_row_max, tl.exp2(row_max - new_row_max)


@triton.jit(do_not_specialize=["first_tile", "T"])
def hybrid_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, o_ptr, lse_ptr,
    key_start_ptr, key_end_ptr, own_start_ptr, own_end_ptr, tiles_ptr, first_tile, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SUBTILES: tl.constexpr, STEP: tl.constexpr, PARTIAL_STEP: tl.constexpr,
    CHUNK: tl.constexpr, HALVES: tl.constexpr, SHARED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute o = softmax(scale Q K^T) V and lse = log2 of its denominator, for one tile of queries and one head."""
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end = tile_bounds(tiles_ptr + 2 * first_tile, tl.program_id(0) // H, SUBTILES, BLOCK)
    if start >= end:
        return
    kv_head = head // (H // G)
    k_ptr += kv_head * stride_kg
    v_ptr += kv_head * stride_vg

    rows = start + tl.arange(0, BLOCK)
    q_source = (q_ptr + head * stride_qh, start, end, stride_qt)
    q = _load_bounded(q_source, D, BLOCK, BLOCK_D)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    row_max = tl.full([BLOCK], LOWEST, tl.float32)
    scale_log2 = scale * LOG2_E  # in the kernel, as in backward, so that both multiply by the same bits

    first, full_end, last = key_bounds(key_start_ptr, key_end_ptr, start, end, STEP)
    own_full, own_partial = None, None
    if own_start_ptr is not None:
        own_first, own_full_end, own_last = key_bounds(own_start_ptr, own_end_ptr, start, end, STEP)
        own_full, own_partial = (own_first, own_full_end), (own_full_end, own_last)
    V_ROWS: tl.constexpr = STEP // 2 if HALVES else STEP
    for position in tl.range(first, loop_end(first, full_end, own_full, STEP), STEP):
        offset = offset_at(position, first, full_end, own_full, STEP)
        limit = interval_end(offset, full_end, own_full)
        k_source = (k_ptr, offset, limit, stride_kt)
        k = _load_full(k_source, k_descriptor, kv_head, D, STEP, BLOCK_D)
        scores = _product(q, q_source, k, k_source, D, CHUNK, INTERPRET)
        row_max, rescale = _update_row_max(scores, row_max, scale_log2)
        acc *= rescale[:, None]
        if HALVES:
            # The matrix units compute P V of the first half during the exponentials of the second.
            scores, scores_2 = scores.reshape(BLOCK, 2, V_ROWS).permute(0, 2, 1).split()
        p = tl.exp2(scores * scale_log2 - row_max[:, None])
        v = _load_full((v_ptr, offset, limit, stride_vt), v_descriptor, kv_head, D, V_ROWS, BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc, INTERPRET)
        if HALVES:
            p_2 = tl.exp2(scores_2 * scale_log2 - row_max[:, None])
            v = _load_full((v_ptr, offset + V_ROWS, limit, stride_vt), v_descriptor, kv_head, D, V_ROWS, BLOCK_D)
            acc = dot(p_2.to(v.dtype), v, acc, INTERPRET)
            p += p_2
        row_sum = row_sum * rescale + tl.sum(p, 1)

    # Rows beyond the tile see all keys, so that their denominator is not zero.
    keys_ptrs, own_ptrs = (key_start_ptr, key_end_ptr), (own_start_ptr, own_end_ptr)
    seen = load_intervals(keys_ptrs, rows, end, 2**31 - 1)
    for position in tl.range(full_end, loop_end(full_end, last, own_partial, PARTIAL_STEP), PARTIAL_STEP):
        offset = offset_at(position, full_end, last, own_partial, PARTIAL_STEP)
        limit = interval_end(offset, last, own_partial)
        k_source = (k_ptr, offset, limit, stride_kt)
        k = _load_bounded(k_source, D, PARTIAL_STEP, BLOCK_D)
        scores = _product(q, q_source, k, k_source, D, CHUNK, INTERPRET)
        keys = offset + tl.arange(0, PARTIAL_STEP)[None, :]
        row_first, row_last = intervals_at(offset, last, seen, keys_ptrs, own_ptrs, rows, end, 2**31 - 1)
        scores = _mask_scores(scores, keys, row_first[:, None], row_last[:, None], SHARED)
        row_max, rescale = _update_row_max(scores, row_max, scale_log2)
        p = tl.exp2(scores * scale_log2 - row_max[:, None])
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _load_bounded((v_ptr, offset, limit, stride_vt), D, PARTIAL_STEP, BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], INTERPRET)

    _store(o_ptr + head * D, rows, end, H * D, acc / row_sum[:, None], D, BLOCK_D)
    tl.store(lse_ptr + head * T + rows, row_max + tl.log2(row_sum), mask=rows < end)


@triton.jit
def _weights(scores, lse, scale_log2, FP32: tl.constexpr):
    """Return P = 2^(scores - lse), at most 1 in fp32.

    Rounding can make the difference of two large numbers positive. In half precision the rounding of P hides that, and
    the comparison would add 6 to 14 % to the instructions of a loop.
    """
    exponent = scores * scale_log2 - lse
    if FP32:
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent)


@triton.jit
def _dq_step(scores, dp, k, dq, lse, delta, scale_log2, INTERPRET: tl.constexpr):
    """Return dq + dS K for one block of keys: dS = P (dP - delta), P = 2^(scores - lse)."""
    p = _weights(scores, lse[:, None], scale_log2, k.dtype == tl.float32)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq, INTERPRET)


@triton.jit(do_not_specialize=["first_tile", "T"])
def hybrid_attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    key_start_ptr, key_end_ptr, own_start_ptr, own_end_ptr, tiles_ptr, first_tile, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dot, stride_doh,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SUBTILES: tl.constexpr, STEP: tl.constexpr, PARTIAL_STEP: tl.constexpr,
    CHUNK: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute dQ = scale dS K for one tile of queries and one head; store delta = rowsum(dO O) for the other kernel."""
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end = tile_bounds(tiles_ptr + 2 * first_tile, tl.program_id(0) // H, SUBTILES, BLOCK)
    if start >= end:
        return
    kv_head = head // (H // G)
    k_ptr += kv_head * stride_kg
    v_ptr += kv_head * stride_vg

    rows = start + tl.arange(0, BLOCK)
    q_source = (q_ptr + head * stride_qh, start, end, stride_qt)
    q = _load_bounded(q_source, D, BLOCK, BLOCK_D)
    do_source = (do_ptr + head * stride_doh, start, end, stride_dot)
    do = _load_bounded(do_source, D, BLOCK, BLOCK_D)
    o = _load_bounded((o_ptr + head * D, start, end, H * D), D, BLOCK, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + rows, delta, mask=rows < end)
    lse = tl.load(lse_ptr + head * T + rows, mask=rows < end, other=float("inf"))
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E

    first, full_end, last = key_bounds(key_start_ptr, key_end_ptr, start, end, STEP)
    own_full, own_partial = None, None
    if own_start_ptr is not None:
        own_first, own_full_end, own_last = key_bounds(own_start_ptr, own_end_ptr, start, end, STEP)
        own_full, own_partial = (own_first, own_full_end), (own_full_end, own_last)
    for position in tl.range(first, loop_end(first, full_end, own_full, STEP), STEP):
        offset = offset_at(position, first, full_end, own_full, STEP)
        limit = interval_end(offset, full_end, own_full)
        k_source = (k_ptr, offset, limit, stride_kt)
        k = _load_full(k_source, k_descriptor, kv_head, D, STEP, BLOCK_D)
        v_source = (v_ptr, offset, limit, stride_vt)
        v = _load_full(v_source, v_descriptor, kv_head, D, STEP, BLOCK_D)
        scores = _product(q, q_source, k, k_source, D, CHUNK, INTERPRET)
        dp = _product(do, do_source, v, v_source, D, CHUNK, INTERPRET)
        dq = _dq_step(scores, dp, k, dq, lse, delta, scale_log2, INTERPRET)

    keys_ptrs, own_ptrs = (key_start_ptr, key_end_ptr), (own_start_ptr, own_end_ptr)
    seen = load_intervals(keys_ptrs, rows, end, 0)
    for position in tl.range(full_end, loop_end(full_end, last, own_partial, PARTIAL_STEP), PARTIAL_STEP):
        offset = offset_at(position, full_end, last, own_partial, PARTIAL_STEP)
        limit = interval_end(offset, last, own_partial)
        k_source = (k_ptr, offset, limit, stride_kt)
        k = _load_bounded(k_source, D, PARTIAL_STEP, BLOCK_D)
        v_source = (v_ptr, offset, limit, stride_vt)
        v = _load_bounded(v_source, D, PARTIAL_STEP, BLOCK_D)
        scores = _product(q, q_source, k, k_source, D, CHUNK, INTERPRET)
        keys = offset + tl.arange(0, PARTIAL_STEP)[None, :]
        row_first, row_last = intervals_at(offset, last, seen, keys_ptrs, own_ptrs, rows, end, 0)
        scores = _mask_scores(scores, keys, row_first[:, None], row_last[:, None], SHARED)
        dp = _product(do, do_source, v, v_source, D, CHUNK, INTERPRET)
        dq = _dq_step(scores, dp, k, dq, lse, delta, scale_log2, INTERPRET)

    ROW: tl.constexpr = (H + 2 * G if PACKED else H) * D
    _store(dq_ptr + head * D, rows, end, ROW, dq * scale, D, BLOCK_D)


@triton.jit
def _dkdv_step(
    scores, v, v_source, q, do, do_source, dk, dv, lse, delta, scale_log2,
    D: tl.constexpr, CHUNK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return dk + dS^T Q and dv + P^T dO for one block of queries.

    The scores are computed transposed, so that P^T and dS^T are left operands without a transposition: transposing the
    result of a matrix product gives wrong gradients on sm_90 in some versions of Triton.
    """
    p = _weights(scores, lse[None, :], scale_log2, q.dtype == tl.float32)
    dv = dot(p.to(do.dtype), do, dv, INTERPRET)
    dp = _product(v, v_source, do, do_source, D, CHUNK, INTERPRET)
    ds = p * (dp - delta[None, :])
    dk = dot(ds.to(q.dtype), q, dk, INTERPRET)
    return dk, dv


@triton.jit(do_not_specialize=["first_tile", "T"])
def hybrid_attention_backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_descriptor, do_descriptor, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    query_start_ptr, query_end_ptr, copies_start_ptr, copies_end_ptr, tiles_ptr, first_tile, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dot, stride_doh,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SUBTILES: tl.constexpr, STEP: tl.constexpr, PARTIAL_STEP: tl.constexpr,
    CHUNK: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute dK = scale dS^T Q and dV = P^T dO for one tile of keys and one key/value head, over its query heads."""
    kv_head = tl.program_id(0)  # a grid axis of its own, so that the code does not depend on G
    start, end = tile_bounds(tiles_ptr + 2 * first_tile, tl.program_id(1), SUBTILES, BLOCK)
    if start >= end:
        return
    cols = start + tl.arange(0, BLOCK)
    k_source = (k_ptr + kv_head.to(tl.int64) * stride_kg, start, end, stride_kt)
    k = _load_bounded(k_source, D, BLOCK, BLOCK_D)
    v_source = (v_ptr + kv_head.to(tl.int64) * stride_vg, start, end, stride_vt)
    v = _load_bounded(v_source, D, BLOCK, BLOCK_D)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    queries_ptrs, copies_ptrs = (query_start_ptr, query_end_ptr), (copies_start_ptr, copies_end_ptr)
    seen_by = load_intervals(queries_ptrs, cols, end, 0)
    scale_log2 = scale * LOG2_E

    first, full_start, last = query_bounds(query_start_ptr, query_end_ptr, start, end, STEP)
    copies_partial, copies_full = None, None
    if copies_start_ptr is not None:
        copies_first, copies_full_start, copies_last = query_bounds(copies_start_ptr, copies_end_ptr, start, end, STEP)
        copies_partial, copies_full = (copies_first, copies_full_start), (copies_full_start, copies_last)
    # With copies also for H = G, where the code would spill without this.
    WRAPS: tl.constexpr = H > G or copies_start_ptr is not None
    first_head = kv_head * (H // G)
    # One loop over all query heads of the group, so that loads run ahead from one head to the next.
    begin, stop, steps = loop_bounds(first, full_start, copies_partial, PARTIAL_STEP, FULL=False)
    head, offset = first_head, begin
    for _ in tl.range(0, steps * (H // G)):
        limit = interval_end(offset, full_start, copies_partial)
        q_source = (q_ptr + head.to(tl.int64) * stride_qh, offset, limit, stride_qt)
        q = _load_bounded(q_source, D, PARTIAL_STEP, BLOCK_D)
        do_source = (do_ptr + head.to(tl.int64) * stride_doh, offset, limit, stride_dot)
        do = _load_bounded(do_source, D, PARTIAL_STEP, BLOCK_D)
        rows = offset + tl.arange(0, PARTIAL_STEP)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < limit, other=float("inf"))
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < limit, other=0.0)
        scores = _product(k, k_source, q, q_source, D, CHUNK, INTERPRET)
        col_first, col_last = intervals_at(offset, full_start, seen_by, queries_ptrs, copies_ptrs, cols, end, 0)
        visible = rows[None, :] >= col_first[:, None]
        if SHARED:
            visible = visible & (rows[None, :] < col_last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        dk, dv = _dkdv_step(
            scores, v, v_source, q, do, do_source, dk, dv, lse, delta, scale_log2, D, CHUNK, INTERPRET
        )  # fmt: skip
        offset = next_offset(offset, full_start, copies_partial, PARTIAL_STEP)
        if WRAPS:
            head = tl.where(offset < stop, head, head + 1)
            offset = tl.where(offset < stop, offset, begin)

    begin, stop, steps = loop_bounds(full_start, last, copies_full, STEP, FULL=True)
    head, offset = first_head, begin
    for _ in tl.range(0, steps * (H // G)):
        limit = interval_end(offset, last, copies_full)
        q_source = (q_ptr + head.to(tl.int64) * stride_qh, offset, limit, stride_qt)
        q = _load_full(q_source, q_descriptor, head, D, STEP, BLOCK_D)
        do_source = (do_ptr + head.to(tl.int64) * stride_doh, offset, limit, stride_dot)
        do = _load_full(do_source, do_descriptor, head, D, STEP, BLOCK_D)
        rows = offset + tl.arange(0, STEP)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows)
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows)
        scores = _product(k, k_source, q, q_source, D, CHUNK, INTERPRET)
        dk, dv = _dkdv_step(
            scores, v, v_source, q, do, do_source, dk, dv, lse, delta, scale_log2, D, CHUNK, INTERPRET
        )  # fmt: skip
        offset = next_offset(offset, last, copies_full, STEP)
        if WRAPS:
            head = tl.where(offset < stop, head, head + 1)
            offset = tl.where(offset < stop, offset, begin)

    ROW: tl.constexpr = (H + 2 * G if PACKED else G) * D
    _store(dk_ptr + kv_head * D, cols, end, ROW, dk * scale, D, BLOCK_D)
    _store(dv_ptr + kv_head * D, cols, end, ROW, dv, D, BLOCK_D)
