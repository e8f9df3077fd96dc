"""Attention that is causal over text and bidirectional within images, over packed documents, exact and in O(T) memory.

    S = scale Q K^T,   P = softmax(S + mask),   O = P V
    dV = P^T dO,   dP = dO V^T,   dS = P (dP - rowsum(dO O)),   dQ = scale dS K,   dK = scale dS^T Q

The mask is one interval of keys a token, or two with noised copies (`layout.py`), and no block outside of a document is
visited. A program owns a tile of rows and loops over the intervals that they see: full blocks without a mask, and
smaller partial blocks with one. The inputs, o and the log-sum-exp in base 2, fp32 [H, T], are saved for backward, and P
is recomputed (FlashAttention, arXiv 2205.14135).

Backward is two kernels, dQ over tiles of queries, and dK and dV over tiles of keys. One program computes each sum, so
there are no atomics, no fp32 copy of dQ, and equal inputs give equal bits. The dQ kernel runs first and stores
rowsum(dO O) for the other. dK and dV loop over the query heads of their group: K and V are never repeated in memory.

Infinities and NaN stay in their document, except that documents of up to 64 positions in one tile can share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from transfusion_fast.kernels import attention_kernels as kernels
from transfusion_fast.kernels.attention_configs import Config, config, padded_head_dim
from transfusion_fast.kernels.launch import INTERPRETED, addressable, architecture, check_inputs, on_device
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.tiles import TILE_HEIGHTS


def hybrid_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """Compute softmax(scale Q K^T + mask) V, differentiable.

    Args:
        q: [T, H, D], fp16, bf16 or fp32, D a multiple of 16 up to 256. k, v: [T, G, D] in q's dtype, G divides H.
            Query head h reads key/value head h // (H / G).
        layout: The mask, on q's device.
        scale: Factor of the scores, positive; default D ** -0.5.

    Returns:
        [T, H, D] in q's dtype; zero at padding.

    Raises:
        ValueError: The kernels do not support the device, dtype or head dimension.
    """
    check_inputs("hybrid_attention", q=q)
    padded_head_dim(q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Attention.apply(q, k, v, scale, *tables_of(layout))


Tables = Sequence[Tensor | None]
"""The tensors of a layout that the ops take; None for the second intervals of a layout without copies."""


def tables_of(layout: AttentionLayout) -> Tables:
    """Return the tensors of a layout that the ops take."""
    intervals = (layout.key_start, layout.key_end, layout.query_start, layout.query_end)
    copies = (layout.own_start, layout.own_end, layout.copies_start, layout.copies_end)
    return *intervals, *copies, layout.query_tiles, layout.key_tiles, layout.tile_counts


@torch.library.custom_op("transfusion_fast::hybrid_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor | None], scale: float) -> tuple[Tensor, Tensor]:
    """Return o [T, H, D] and lse fp32 [H, T]."""
    return attend(q, k, v, tables, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, tables: Tables, scale: float) -> tuple[Tensor, Tensor]:
    """Return o and lse, without a gradient; `tables` are those of `tables_of`."""
    key_start, key_end, _, _, own_start, own_end, _, _, query_tiles, _, tile_counts = tables
    assert tile_counts is not None
    T, H, _ = q.shape
    q, k, v = (addressable(x) for x in (q, k, v))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)
    counts = tile_counts.tolist()
    _zero_padding(counts[-1], o)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    describe = cache(_descriptor)  # the launches share descriptors
    with on_device(q):
        for variant, first_tile, grid in _launches("forward", q, k, counts):
            c = variant.config
            loaded = (describe(k, c.step), describe(v, c.value_rows)) if c.descriptors else (None, None)
            tensors = q, k, v, *loaded, o, lse, key_start, key_end, own_start, own_end, query_tiles
            variant.start(grid, tensors, first_tile, T, scale, strides)
    return o, lse


@torch.library.custom_op("transfusion_fast::hybrid_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: Sequence[Tensor | None], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous (dq, dk, dv) with the shapes of q, k, v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    differentiate(do, q, k, v, o, lse, tables, scale, (dq, dk, dv))
    return dq, dk, dv


def differentiate(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: Tables, scale: float,
    gradients: tuple[Tensor, Tensor, Tensor], packed: bool = False,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, which are contiguous, or if `packed` heads of one tensor [T, H + 2G, D]."""
    key_start, key_end, query_start, query_end, *copies, query_tiles, key_tiles, tile_counts = tables
    own_start, own_end, copies_start, copies_end = copies
    assert tile_counts is not None
    dq, dk, dv = gradients
    T = q.shape[0]
    do, q, k, v = (addressable(x) for x in (do, q, k, v))
    delta = torch.empty_like(lse)
    counts = tile_counts.tolist()
    _zero_padding(counts[-1], dq, dk, dv)
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:2]]
    describe = cache(_descriptor)
    with on_device(q):
        for variant, first_tile, grid in _launches("backward_dq", q, k, counts, packed):
            c = variant.config
            loaded = (describe(k, c.step), describe(v, c.step)) if c.descriptors else (None, None)
            tensors = q, k, v, *loaded, o, do, lse, delta, dq, key_start, key_end, own_start, own_end, query_tiles
            variant.start(grid, tensors, first_tile, T, scale, strides)
        for variant, first_tile, grid in _launches("backward_dkdv", q, k, counts, packed):
            c = variant.config
            loaded = (describe(q, c.step), describe(do, c.step)) if c.descriptors else (None, None)
            intervals = query_start, query_end, copies_start, copies_end
            tensors = q, k, v, *loaded, do, lse, delta, dk, dv, *intervals, key_tiles
            variant.start(grid, tensors, first_tile, T, scale, strides)


_forward.register_fake(lambda q, *_: (q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)))
_backward.register_fake(lambda _, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]))


class _Attention(torch.autograd.Function):
    """The formula of autograd. Registered with the op, it would cost the host more than the launches."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, *tables: Tensor | None) -> Tensor:
        o, lse = _forward(q, k, v, tables, scale)
        ctx.save_for_backward(q, k, v, *tables, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *tables, o, lse = ctx.saved_tensors
        return *_backward(do, q, k, v, o, lse, tables, ctx.scale), None, *(None for _ in tables)


@dataclass(frozen=True)
class _Variant:
    """A kernel for the tiles of one height, with all that it is compiled for."""

    name: str
    config: Config
    options: dict[str, Any]
    binaries: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def start(
        self, grid: tuple[int, ...], tensors: tuple[Any, ...], first_tile: int, T: int, scale: float, strides: list[int]
    ) -> None:
        """Queue the kernel, by Triton at first, and then by its binary: Triton's own look-up costs 7 times as much.

        A binary depends on the strides and on which tensors are aligned to 16 bytes.
        """
        key = (*strides, *(x.data_ptr() % 16 for x in tensors if isinstance(x, Tensor)))
        arguments = *tensors, first_tile, T, scale, *strides
        if key in self.binaries:
            self.binaries[key][grid](*arguments, *self.constants)
            return
        binary = getattr(kernels, f"hybrid_attention_{self.name}_kernel")[grid](*arguments, **self.options)
        if not INTERPRETED:
            self.binaries[key] = binary

    @cached_property
    def constants(self) -> list[Any]:
        """The constants in the order of the kernel's arguments."""
        names = getattr(kernels, f"hybrid_attention_{self.name}_kernel").arg_names
        return [self.options[name] for name in names if name in self.options]


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Return a descriptor to load [rows, D] of one head of x [T, heads, D]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, padded_head_dim(x.shape[-1])])


def _launches(
    kernel: str, q: Tensor, k: Tensor, counts: list[int], packed: bool = False
) -> Iterator[tuple[_Variant, int, tuple[int, int, int]]]:
    """Yield the variant, the first tile and the grid of each launch."""
    by_keys = kernel == "backward_dkdv"
    H, G, first_tile = q.shape[1], k.shape[1], 0
    for height, count in zip(TILE_HEIGHTS, counts[2:4] if by_keys else counts[:2], strict=True):
        if count:
            variant = _variant(kernel, q.device, q.dtype, H, G, q.shape[2], height, packed)
            programs = count * (height // variant.config.block)
            yield variant, first_tile, (G, programs, 1) if by_keys else (programs * H, 1, 1)
        first_tile += count


@cache
def _variant(
    kernel: str, device: torch.device, dtype: torch.dtype, H: int, G: int, D: int, height: int, packed: bool
) -> _Variant:
    c = config(kernel, architecture(device), D, dtype.itemsize, height)
    options = {**constants(kernel, c, H, G, D, height, packed), **compiler_options(c)}
    return _Variant(kernel, c, options)


def constants(kernel: str, c: Config, H: int, G: int, D: int, height: int, packed: bool = True) -> dict[str, Any]:
    """Return the constants to compile a kernel with, for tiles of `height` positions; `packed` as in training."""
    own = {"HALVES": c.halves} if kernel == "forward" else {"PACKED": packed}
    return own | {
        "H": H, "G": G, "D": D, "BLOCK_D": padded_head_dim(D), "BLOCK": c.block, "SUBTILES": height // c.block,
        "STEP": c.step, "PARTIAL_STEP": c.partial_step, "CHUNK": c.chunk,
        "SHARED": height == TILE_HEIGHTS[-1], "INTERPRET": INTERPRETED,
    }  # fmt: skip


def compiler_options(c: Config) -> dict[str, Any]:
    """Return the options to compile a kernel with."""
    # Multiply-adds are fused explicitly, because Triton's default changes with 3.10.
    return {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}


def _zero_padding(used: int, *outputs: Tensor) -> None:
    """Set the positions behind the last document to zero, which no tile covers."""
    for output in outputs:
        if used < output.shape[0]:
            output[used:].zero_()
