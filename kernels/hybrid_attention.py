"""Attention that is causal over text and bidirectional within images, over packed documents: exact, in O(T) memory.

    S = scale Q K^T,   P = softmax(S + mask),   O = P V
    dV = P^T dO,   dP = dO V^T,   dS = P (dP - rowsum(dO O)),   dQ = scale dS K,   dK = scale dS^T Q

The mask is two integers a token (`layout.py`), and no tile outside a document is visited. A program takes a tile of
rows and walks the interval that they see: whole steps without any mask, then narrow steps with one. Saved for backward
are o and the log-sum-exp, in powers of two, fp32 [H, T]; P is computed anew (FlashAttention, arXiv 2205.14135).

Backward is two kernels, dQ by tiles of queries and dK, dV by tiles of keys: each sum has one owner, so there are no
atomics, no fp32 copy of dQ, and equal inputs give equal bits. dQ runs first and leaves rowsum(dO O) to the other.
Grouped heads: dK and dV loop over the query heads of their group; K and V are never repeated in memory.

A document that holds infinities or NaN spoils no other, except documents of up to 64 positions in the same tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from transfusion_fast.kernels import attention_kernels as kernels
from transfusion_fast.kernels.attention_configs import Config, config, padded_head_dim
from transfusion_fast.kernels.launch import INTERPRETED, addressable, architecture, check_device, check_dtype, on_device
from transfusion_fast.kernels.layout import TILE_HEIGHTS, AttentionLayout

LOG2_E = math.log2(math.e)


def hybrid_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """softmax(scale Q K^T + mask) V, differentiable.

    Args:
        q: [T, H, D], fp16, bf16 or fp32, D a multiple of 16 up to 256. k, v: [T, G, D] of q's dtype, G divides H.
            Query head h reads key/value head h // (H / G).
        layout: what each of the T positions sees, on q's device.
        scale: of the scores, positive; default D ** -0.5.

    Returns:
        [T, H, D] in q's dtype; zero at padding.

    Raises:
        ValueError: a device, dtype or head dimension that the kernels do not run.
    """
    check_device("hybrid_attention", q)
    padded_head_dim(q.shape[-1])
    check_dtype("q", q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tables = (layout.key_start, layout.key_end, layout.query_start, layout.query_end)
    return _forward(q, k, v, *tables, layout.query_tiles, layout.key_tiles, layout.tile_counts, scale)[0]


@torch.library.custom_op("transfusion_fast::hybrid_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor,
    key_start: Tensor, key_end: Tensor, query_start: Tensor, query_end: Tensor,
    query_tiles: Tensor, key_tiles: Tensor, tile_counts: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [T, H, D], lse fp32 [H, T]). The intervals and tiles of keys are for backward."""
    T, H, _ = q.shape
    q, k, v = (addressable(x) for x in (q, k, v))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)
    _zero_padding(tile_counts, o)
    for launch in _launches("forward", q, k, tile_counts):
        c = launch.config
        launch.start(
            kernels.hybrid_attention_forward_kernel,
            q, k, v, launch.descriptor(k, c.step), launch.descriptor(v, c.value_rows), o, lse,
            key_start, key_end, query_tiles, launch.first_tile, T, scale * LOG2_E,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        )  # fmt: skip
    return o, lse


@torch.library.custom_op("transfusion_fast::hybrid_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    key_start: Tensor, key_end: Tensor, query_start: Tensor, query_end: Tensor,
    query_tiles: Tensor, key_tiles: Tensor, tile_counts: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, of the shapes of q, k, v."""
    T = q.shape[0]
    do, q, k, v = (addressable(x) for x in (do, q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    _zero_padding(tile_counts, dq, dk, dv)
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:2]]
    for launch in _launches("backward_dq", q, k, tile_counts):
        step = launch.config.step
        launch.start(
            kernels.hybrid_attention_backward_dq_kernel,
            q, k, v, launch.descriptor(k, step), launch.descriptor(v, step), o, do, lse, delta, dq,
            key_start, key_end, query_tiles, launch.first_tile, T, scale, *strides,
        )  # fmt: skip
    for launch in _launches("backward_dkdv", q, k, tile_counts):
        step = launch.config.step
        launch.start(
            kernels.hybrid_attention_backward_dkdv_kernel,
            q, k, v, launch.descriptor(q, step), launch.descriptor(do, step), do, lse, delta, dk, dv,
            query_start, query_end, key_tiles, launch.first_tile, T, scale, *strides,
        )  # fmt: skip
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, *tables, o, lse = ctx.saved_tensors
    gradients = (None,) * 3 if do is None else _backward(do, q, k, v, o, lse, *tables, ctx.scale)
    return *gradients, *(None for _ in tables), None


_forward.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True)
class _Launch:
    """A kernel over the tiles of one height."""

    config: Config
    first_tile: int
    grid: tuple[int, ...]
    options: dict[str, Any]

    def start(self, kernel: Any, q: Tensor, *arguments: Any) -> None:
        """Queues the kernel on the device of q, which need not be the current one."""
        with on_device(q):
            kernel[self.grid](q, *arguments, **self.options)

    def descriptor(self, x: Tensor, rows: int) -> TensorDescriptor | None:
        """What the copy engine loads [rows, D] of one head of x [T, heads, D] by; None where pointers are used."""
        if not self.config.descriptors:
            return None
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, padded_head_dim(x.shape[-1])])


def _launches(kernel: str, q: Tensor, k: Tensor, tile_counts: Tensor) -> Iterator[_Launch]:
    _, H, D = q.shape
    G = k.shape[1]
    by_keys = kernel == "backward_dkdv"
    counts = tile_counts.tolist()[2:4] if by_keys else tile_counts.tolist()[:2]
    first_tile = 0
    for height, count in zip(TILE_HEIGHTS, counts, strict=True):
        c = config(kernel, architecture(q.device), D, q.element_size(), height)
        options = {**constants(kernel, c, H, G, D, height), **compiler_options(c)}
        if count:
            programs = count * (height // c.block)
            yield _Launch(c, first_tile, (G, programs) if by_keys else (programs * H,), options)
        first_tile += count


def constants(kernel: str, c: Config, H: int, G: int, D: int, height: int) -> dict[str, Any]:
    """What a kernel over tiles of `height` positions is compiled for, besides the number types."""
    halves = {"HALVES": c.halves} if kernel == "forward" else {}
    return halves | {
        "H": H, "G": G, "D": D, "BLOCK_D": padded_head_dim(D), "BLOCK": c.block, "SUBTILES": height // c.block,
        "STEP": c.step, "EDGE_STEP": c.edge_step, "CHUNK": c.chunk,
        "SHARED": height == TILE_HEIGHTS[-1], "INTERPRET": INTERPRETED,
    }  # fmt: skip


def compiler_options(c: Config) -> dict[str, Any]:
    """Multiply-adds are fused whatever Triton's default is, which changes with 3.10."""
    return {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}


def _zero_padding(tile_counts: Tensor, *outputs: Tensor) -> None:
    """No tile covers the positions behind the last document."""
    used = int(tile_counts[-1])
    for output in outputs:
        if used < len(output):
            output[used:].zero_()
