"""The Triton kernels of hybrid attention. What they compute and why they are cut so: `hybrid_attention.py`.

Letters: T tokens, D head dimension, H query heads, G key/value heads. Every program owns one tile of rows, [start,
end), and walks an interval of the other side in steps: whole steps that every row of the tile sees, without a mask, and
narrower steps at the edge, which compare every pair with the rows' intervals.

Rows and columns beyond a tile are loaded as zeros, never as what lies there: a matrix product with P = 0 would still
spread the infinities of an invisible key. A `place` is where such rows lie: (pointer to the head, first row, limit of
the rows, stride of a row).
"""

import triton
import triton.language as tl

from transfusion_fast.kernels.launch import dot

# Where the row maximum starts: below any score, but finite, so that a row which sees nothing of its first step takes
# no infinity from another.
LOWEST = tl.constexpr(-3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_bounds(tiles_ptr, tile, SUBTILES: tl.constexpr, BLOCK: tl.constexpr):
    """(start, end) of a program's rows: a piece of BLOCK rows of a tile of the table, empty beyond the tile's end."""
    entry = tiles_ptr + 2 * (tile // SUBTILES)
    start = tl.load(entry) + (tile % SUBTILES) * BLOCK
    return start, tl.minimum(start + BLOCK, tl.load(entry + 1))


@triton.jit
def _key_bounds(key_start_ptr, key_end_ptr, start, end, STEP: tl.constexpr):
    """(first, edge, last) of a tile of queries [start, end): whole steps of keys up to `edge`, edge steps up to `last`.

    Both ends of the rows' intervals ascend, so the first and the last row bound what the tile sees. What all its rows
    see ends with the first row's interval, or is nothing where the tile is shared by documents.
    """
    first = tl.load(key_start_ptr + start)
    last = tl.load(key_end_ptr + end - 1)
    full = tl.where(tl.load(key_start_ptr + end - 1) == first, tl.load(key_end_ptr + start), first)
    return first, first + (full - first) // STEP * STEP, last


@triton.jit
def _load_edge(place, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] rows of one head, zeros at rows >= limit and at dimensions >= D."""
    ptr, start, limit, stride = place
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    # One 64-bit base for the tile, 32-bit offsets in it: a 64-bit offset a row costs registers.
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    mask = (rows < limit - start)[:, None]
    if D != BLOCK_D:
        mask = mask & (dims < D)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _load_whole(place, descriptor, head, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] rows of one head, all inside the tensor; zeros at dimensions >= D."""
    ptr, start, _, stride = place
    if descriptor is not None:
        return descriptor.load([start, head.to(tl.int32), 0]).reshape(BLOCK, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (tl.arange(0, BLOCK)[:, None] * stride + dims[None, :])
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _product(x, x_place, y, y_place, D: tl.constexpr, CHUNK: tl.constexpr, INTERPRET: tl.constexpr):
    """x y^T, contracted over the head dimension: of tiles, or CHUNK dimensions of them at a time.

    The operands of an fp32 product are in registers, with their low parts, and do not fit there where heads are wide.
    Then their rows are loaded anew by chunks, and x and y themselves are loads of which nothing is used or left.
    """
    product = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    if CHUNK is None:
        product = dot(x, tl.trans(y), product, INTERPRET)
    else:
        x_ptr, x_start, x_limit, x_stride = x_place
        y_ptr, y_start, y_limit, y_stride = y_place
        for d in tl.range(0, D, CHUNK):
            x_chunk = _load_edge((x_ptr + d, x_start, x_limit, x_stride), CHUNK, x.shape[0], CHUNK)
            y_chunk = _load_edge((y_ptr + d, y_start, y_limit, y_stride), CHUNK, y.shape[0], CHUNK)
            product = dot(x_chunk, tl.trans(y_chunk), product, INTERPRET)
    return product


@triton.jit
def _store(ptr, rows, end, stride, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(rows < end)[:, None] & (dims < D)[None, :])


@triton.jit
def _hide(scores, keys, first, last, SHARED: tl.constexpr):
    """-inf where a key is outside the interval [first, last) of its query; all of one shape after broadcasting.

    Every key that a tile visits is at or after the start of its first document. So the lower end is compared only in
    tiles that documents share.
    """
    visible = keys < last
    if SHARED:
        visible = visible & (keys >= first)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _new_top(scores, top, scale_log2):
    """The row maximum with this step's scores, and by how much what was summed relative to the old one shrinks.

    FlashAttention-2, arXiv 2307.08691, algorithm 1, with base-2 exponentials.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    return new_top, tl.exp2(top - new_top)


@triton.jit(do_not_specialize=["first_tile", "T"])
def hybrid_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, o_ptr, lse_ptr,
    key_start_ptr, key_end_ptr, tiles_ptr, first_tile, T, scale_log2,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SUBTILES: tl.constexpr, STEP: tl.constexpr, EDGE_STEP: tl.constexpr,
    CHUNK: tl.constexpr, HALVES: tl.constexpr, SHARED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale Q K^T) V and lse = log2 of its denominator, for one tile of queries and one head."""
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end = _tile_bounds(tiles_ptr + 2 * first_tile, tl.program_id(0) // H, SUBTILES, BLOCK)
    if start >= end:
        return
    kv_head = head // (H // G)
    k_ptr += kv_head * stride_kg
    v_ptr += kv_head * stride_vg

    rows = start + tl.arange(0, BLOCK)
    q_place = (q_ptr + head * stride_qh, start, end, stride_qt)
    q = _load_edge(q_place, D, BLOCK, BLOCK_D)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], LOWEST, tl.float32)

    first, edge, last = _key_bounds(key_start_ptr, key_end_ptr, start, end, STEP)
    V_ROWS: tl.constexpr = STEP // 2 if HALVES else STEP
    for at in tl.range(first, edge, STEP):
        k_place = (k_ptr, at, edge, stride_kt)
        k = _load_whole(k_place, k_descriptor, kv_head, D, STEP, BLOCK_D)
        scores = _product(q, q_place, k, k_place, D, CHUNK, INTERPRET)
        top, shrink = _new_top(scores, top, scale_log2)
        acc *= shrink[:, None]
        if HALVES:
            # The matrix units work on P V of the first half during the exponentials of the second.
            scores, later = scores.reshape(BLOCK, 2, V_ROWS).permute(0, 2, 1).split()
        p = tl.exp2(scores * scale_log2 - top[:, None])
        v = _load_whole((v_ptr, at, edge, stride_vt), v_descriptor, kv_head, D, V_ROWS, BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc, INTERPRET)
        if HALVES:
            p_later = tl.exp2(later * scale_log2 - top[:, None])
            v = _load_whole((v_ptr, at + V_ROWS, edge, stride_vt), v_descriptor, kv_head, D, V_ROWS, BLOCK_D)
            acc = dot(p_later.to(v.dtype), v, acc, INTERPRET)
            p += p_later
        total = total * shrink + tl.sum(p, 1)

    row_first = tl.load(key_start_ptr + rows, mask=rows < end, other=0)
    # Rows beyond the tile see all keys, and so have a denominator.
    row_last = tl.load(key_end_ptr + rows, mask=rows < end, other=2**31 - 1)
    for at in tl.range(edge, last, EDGE_STEP):
        k_place = (k_ptr, at, last, stride_kt)
        k = _load_edge(k_place, D, EDGE_STEP, BLOCK_D)
        scores = _product(q, q_place, k, k_place, D, CHUNK, INTERPRET)
        scores = _hide(scores, at + tl.arange(0, EDGE_STEP)[None, :], row_first[:, None], row_last[:, None], SHARED)
        top, shrink = _new_top(scores, top, scale_log2)
        p = tl.exp2(scores * scale_log2 - top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = _load_edge((v_ptr, at, last, stride_vt), D, EDGE_STEP, BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRET)

    _store(o_ptr + head * D, rows, end, H * D, acc / total[:, None], D, BLOCK_D)
    tl.store(lse_ptr + head * T + rows, top + tl.log2(total), mask=rows < end)


@triton.jit
def _dq_step(scores, dp, k, dq, lse, delta, scale_log2, INTERPRET: tl.constexpr):
    """dq + dS K for one step of keys: dS = P (dP - delta), P = 2^(scores - lse)."""
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq, INTERPRET)


@triton.jit(do_not_specialize=["first_tile", "T"])
def hybrid_attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    key_start_ptr, key_end_ptr, tiles_ptr, first_tile, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dot, stride_doh,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SUBTILES: tl.constexpr, STEP: tl.constexpr, EDGE_STEP: tl.constexpr,
    CHUNK: tl.constexpr, SHARED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K for one tile of queries and one head; leaves delta = rowsum(dO O) for the other kernel."""
    head = (tl.program_id(0) % H).to(tl.int64)
    start, end = _tile_bounds(tiles_ptr + 2 * first_tile, tl.program_id(0) // H, SUBTILES, BLOCK)
    if start >= end:
        return
    kv_head = head // (H // G)
    k_ptr += kv_head * stride_kg
    v_ptr += kv_head * stride_vg

    rows = start + tl.arange(0, BLOCK)
    q_place = (q_ptr + head * stride_qh, start, end, stride_qt)
    q = _load_edge(q_place, D, BLOCK, BLOCK_D)
    do_place = (do_ptr + head * stride_doh, start, end, stride_dot)
    do = _load_edge(do_place, D, BLOCK, BLOCK_D)
    o = _load_edge((o_ptr + head * D, start, end, H * D), D, BLOCK, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + rows, delta, mask=rows < end)
    lse = tl.load(lse_ptr + head * T + rows, mask=rows < end, other=float("inf"))
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E

    first, edge, last = _key_bounds(key_start_ptr, key_end_ptr, start, end, STEP)
    for at in tl.range(first, edge, STEP):
        k_place = (k_ptr, at, edge, stride_kt)
        k = _load_whole(k_place, k_descriptor, kv_head, D, STEP, BLOCK_D)
        v_place = (v_ptr, at, edge, stride_vt)
        v = _load_whole(v_place, v_descriptor, kv_head, D, STEP, BLOCK_D)
        scores = _product(q, q_place, k, k_place, D, CHUNK, INTERPRET)
        dp = _product(do, do_place, v, v_place, D, CHUNK, INTERPRET)
        dq = _dq_step(scores, dp, k, dq, lse, delta, scale_log2, INTERPRET)

    row_first = tl.load(key_start_ptr + rows, mask=rows < end, other=0)
    row_last = tl.load(key_end_ptr + rows, mask=rows < end, other=0)
    for at in tl.range(edge, last, EDGE_STEP):
        k_place = (k_ptr, at, last, stride_kt)
        k = _load_edge(k_place, D, EDGE_STEP, BLOCK_D)
        v_place = (v_ptr, at, last, stride_vt)
        v = _load_edge(v_place, D, EDGE_STEP, BLOCK_D)
        scores = _product(q, q_place, k, k_place, D, CHUNK, INTERPRET)
        scores = _hide(scores, at + tl.arange(0, EDGE_STEP)[None, :], row_first[:, None], row_last[:, None], SHARED)
        dp = _product(do, do_place, v, v_place, D, CHUNK, INTERPRET)
        dq = _dq_step(scores, dp, k, dq, lse, delta, scale_log2, INTERPRET)

    _store(dq_ptr + head * D, rows, end, H * D, dq * scale, D, BLOCK_D)


@triton.jit
def _dkdv_step(
    scores, v, v_place, q, do, do_place, dk, dv, lse, delta, scale_log2,
    D: tl.constexpr, CHUNK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dv + P^T dO and dk + dS^T Q for one step of queries.

    The scores are computed transposed, so that P^T and dS^T are left operands as they come: a transposed result of a
    matrix product gives wrong gradients on sm_90 in some versions of Triton.
    """
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    dv = dot(p.to(do.dtype), do, dv, INTERPRET)
    dp = _product(v, v_place, do, do_place, D, CHUNK, INTERPRET)
    ds = p * (dp - delta[None, :])
    dk = dot(ds.to(q.dtype), q, dk, INTERPRET)
    return dk, dv


@triton.jit(do_not_specialize=["first_tile", "T"])
def hybrid_attention_backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_descriptor, do_descriptor, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    query_start_ptr, query_end_ptr, tiles_ptr, first_tile, T, scale,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg, stride_dot, stride_doh,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SUBTILES: tl.constexpr, STEP: tl.constexpr, EDGE_STEP: tl.constexpr,
    CHUNK: tl.constexpr, SHARED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T dO for one tile of keys and one key/value head, over all its query heads."""
    kv_head = tl.program_id(0)  # an axis of its own: the code is the same for one key/value head and for many
    start, end = _tile_bounds(tiles_ptr + 2 * first_tile, tl.program_id(1), SUBTILES, BLOCK)
    if start >= end:
        return
    cols = start + tl.arange(0, BLOCK)
    k_place = (k_ptr + kv_head.to(tl.int64) * stride_kg, start, end, stride_kt)
    k = _load_edge(k_place, D, BLOCK, BLOCK_D)
    v_place = (v_ptr + kv_head.to(tl.int64) * stride_vg, start, end, stride_vt)
    v = _load_edge(v_place, D, BLOCK, BLOCK_D)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    col_first = tl.load(query_start_ptr + cols, mask=cols < end, other=0)
    col_last = tl.load(query_end_ptr + cols, mask=cols < end, other=0)
    scale_log2 = scale * LOG2_E

    # The transpose of the forward's bounds: what all keys are seen by begins where the last one's interval does, and
    # whole steps are laid from the end of the document backwards.
    first = tl.load(query_start_ptr + start)
    last = tl.load(query_end_ptr + end - 1)
    full = tl.where(tl.load(query_end_ptr + start) == last, tl.load(query_start_ptr + end - 1), last)
    edge = last - (last - full) // STEP * STEP
    first_head = kv_head * (H // G)
    # One loop over all query heads of the group, so that loads run ahead across heads.
    steps = tl.cdiv(edge - first, EDGE_STEP)
    head, at = first_head, first
    for _ in tl.range(0, steps * (H // G)):
        q_place = (q_ptr + head.to(tl.int64) * stride_qh, at, edge, stride_qt)
        q = _load_edge(q_place, D, EDGE_STEP, BLOCK_D)
        do_place = (do_ptr + head.to(tl.int64) * stride_doh, at, edge, stride_dot)
        do = _load_edge(do_place, D, EDGE_STEP, BLOCK_D)
        rows = at + tl.arange(0, EDGE_STEP)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < edge, other=float("inf"))
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < edge, other=0.0)
        scores = _product(k, k_place, q, q_place, D, CHUNK, INTERPRET)
        visible = rows[None, :] >= col_first[:, None]
        if SHARED:
            visible = visible & (rows[None, :] < col_last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        dk, dv = _dkdv_step(
            scores, v, v_place, q, do, do_place, dk, dv, lse, delta, scale_log2, D, CHUNK, INTERPRET
        )  # fmt: skip
        at += EDGE_STEP
        if H > G:
            head = tl.where(at < edge, head, head + 1)
            at = tl.where(at < edge, at, first)

    steps = (last - edge) // STEP
    head, at = first_head, edge
    for _ in tl.range(0, steps * (H // G)):
        q_place = (q_ptr + head.to(tl.int64) * stride_qh, at, last, stride_qt)
        q = _load_whole(q_place, q_descriptor, head, D, STEP, BLOCK_D)
        do_place = (do_ptr + head.to(tl.int64) * stride_doh, at, last, stride_dot)
        do = _load_whole(do_place, do_descriptor, head, D, STEP, BLOCK_D)
        rows = at + tl.arange(0, STEP)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows)
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows)
        scores = _product(k, k_place, q, q_place, D, CHUNK, INTERPRET)
        dk, dv = _dkdv_step(
            scores, v, v_place, q, do, do_place, dk, dv, lse, delta, scale_log2, D, CHUNK, INTERPRET
        )  # fmt: skip
        at += STEP
        if H > G:
            head = tl.where(at < last, head, head + 1)
            at = tl.where(at < last, at, edge)

    _store(dk_ptr + kv_head * D, cols, end, G * D, dk * scale, D, BLOCK_D)
    _store(dv_ptr + kv_head * D, cols, end, G * D, dv, D, BLOCK_D)
