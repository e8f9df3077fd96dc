"""The ways to compute hybrid attention that the benchmark compares, and the reference that they are held to.

A backend says why it cannot do a `Problem` (`missing`), does what a micro-batch needs once for all layers (`prepare`),
and returns the function from q [T, H, D], k and v [T, G, D] to [T, H, D] that autograd differentiates. What it returns
at padding is not defined.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from gate import Forward, Gate, Results, make_gate
from timing import NEEDS_CUDA
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model.ops import hybrid_attention

_USABLE_MEMORY = 0.6  # of the free memory: making the mask, gradients and the kernels' own buffers take the rest
_ROWS = 256  # of a block of the reference
_ALL_HEADS_UP_TO = 16384


@dataclass(frozen=True, eq=False)
class Problem:
    """One shape, on the device of its layout."""

    layout: AttentionLayout
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def lengths(self) -> list[int]:
        """The lengths of the documents."""
        return self.layout.document_offsets.diff().tolist()

    def inputs(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return q, k and v, and the gradient of the output: normal noise, the same for every backend."""
        generator = torch.Generator(self.layout.device).manual_seed(0)

        def normal(heads: int) -> Tensor:
            shape = (self.layout.total_length, heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=self.layout.device).to(self.dtype)

        upstream = normal(self.heads)
        upstream[int(self.layout.document_offsets[-1]) :] = 0  # padding
        q, k, v = (normal(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        return (q, k, v), upstream


@dataclass(frozen=True)
class Backend:
    """One row of the comparison."""

    prepare: Callable[[Problem], Forward]
    missing: Callable[[Problem], str | None] = lambda problem: None
    is_ours: bool = False
    causal_only: bool = False
    """The backend cannot express the mask: its rate on causal documents is a reference, and nothing is checked."""


def attention_gate(problem: Problem, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> Gate:
    """Return the gate of a problem, whose reference is plain PyTorch in float64.

    Beyond 16,384 positions, the first and the last key/value head stand for all heads, and float32 for float64 if the
    problem is in half precision.
    """
    G, group = problem.kv_heads, problem.heads // problem.kv_heads
    few = problem.layout.total_length > _ALL_HEADS_UP_TO
    kv = torch.tensor(sorted({0, G - 1}) if few else range(G), device=problem.layout.device)
    query = (kv[:, None] * group + torch.arange(group, device=problem.layout.device)).flatten()

    def select(results: Results) -> Results:
        out, dq, dk, dv = results
        return out[:, query], dq[:, query], dk[:, kv], dv[:, kv]

    q, k, v = (x.detach() for x in inputs)
    sampled = q[:, query], k[:, kv], v[:, kv], upstream[:, query]
    precise = torch.float32 if few and problem.dtype != torch.float32 else torch.float64
    out, *gradients = _by_blocks(problem, sampled, precise)
    # No output is defined at padding, but gradients must be zero there.
    references = (out[: int(problem.layout.document_offsets[-1])], *gradients)
    return make_gate(("output", "dq", "dk", "dv"), references, _by_blocks(problem, sampled, problem.dtype), select)


def _by_blocks(problem: Problem, inputs: Results, dtype: torch.dtype) -> Results:
    """Return output, dq, dk and dv as PyTorch computes them in `dtype`, from blocks of rows of one document."""
    q, k, v, upstream = (x.to(dtype) for x in inputs)
    out, dq, dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) for x in (q, q, k, v))
    key_end = problem.layout.key_end.cpu()
    for document_start, document_end in pairwise(problem.layout.document_offsets.tolist()):
        for start in range(document_start, document_end, _ROWS):
            rows = slice(start, min(start + _ROWS, document_end))
            keys = slice(document_start, int(key_end[rows].max()))
            visible = torch.arange(keys.start, keys.stop, device=q.device) < problem.layout.key_end[rows, None]
            block = [x.clone().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            out_rows = _sdpa(*block, visible, causal=False)
            dq_rows, dk_keys, dv_keys = torch.autograd.grad(out_rows, block, upstream[rows])
            out[rows], dq[rows] = out_rows.detach(), dq_rows
            dk[keys] += dk_keys
            dv[keys] += dv_keys
    return tuple(x.to(dtype) for x in (out, dq, dk, dv))


def _ours(name: str) -> Backend:
    """Return this repository's op; preparing it includes building the layout, which other backends are given."""
    last: list[tuple[Problem, AttentionLayout]] = []

    def prepare(problem: Problem) -> Forward:
        known = problem.layout
        offsets, spans = known.document_offsets.diff().numpy(), known.image_spans.numpy()
        layout = AttentionLayout.from_spans(offsets, spans, known.total_length, known.device)
        # A plan is built when a pass first needs it. Preparing the same problem again builds the plans that its passes
        # needed, so that it costs what preparing costs in every micro-batch.
        if last and last[0][0] is problem:
            for build in last[0][1]._plans:
                layout.plan(build)
        last[:] = [(problem, layout)]
        return lambda q, k, v: hybrid_attention(q, k, v, layout, backend=name)

    return Backend(prepare, _needs_cuda if name == "triton" else lambda problem: None, is_ours=True)


def _dense(problem: Problem) -> Forward:
    """scaled_dot_product_attention with one boolean [T, T] mask."""
    layout = problem.layout
    position = torch.arange(layout.total_length, device=layout.device)
    # Padding sees itself, because a row without any key is NaN in some of torch's kernels.
    key_end = torch.maximum(layout.key_end, layout.key_start + 1)
    mask_TT = position >= layout.key_start[:, None]
    mask_TT &= position < key_end[:, None]
    return lambda q, k, v: _sdpa(q, k, v, mask_TT, causal=False)


def _documents(problem: Problem) -> Forward:
    """One scaled_dot_product_attention per document: causal by flag, or with its own mask if it has images."""
    layout, lengths = problem.layout, problem.lengths
    padding = layout.total_length - sum(lengths)
    illustrated = torch.searchsorted(layout.document_offsets, layout.image_spans[:, 0].contiguous(), right=True) - 1
    masks: list[Tensor | None] = [None] * len(lengths)
    for number in set(illustrated.tolist()):
        start, end = layout.document_offsets[number : number + 2].tolist()
        masks[number] = torch.arange(start, end, device=layout.device) < layout.key_end[start:end, None]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Split at once: the gradient of a slice would be as long as the pack, for every document.
        pieces = zip(*(x.split([*lengths, padding])[:-1] for x in (q, k, v)), masks, strict=True)
        outs = [_sdpa(q_d, k_d, v_d, mask, causal=mask is None) for q_d, k_d, v_d, mask in pieces]
        return torch.cat([*outs, q.new_zeros(padding, *q.shape[1:])])

    return forward


def _masks_too_large(lengths: Sequence[int], problem: Problem) -> str | None:
    """Return why masks of these lengths do not fit into memory, all as booleans and the largest also as a bias."""
    squares = [length**2 for length in lengths]
    size = sum(squares) + max(squares, default=0) * problem.dtype.itemsize
    if problem.layout.device.type == "cuda":
        cached = torch.cuda.memory_reserved(problem.layout.device) - torch.cuda.memory_allocated(problem.layout.device)
        free = torch.cuda.mem_get_info(problem.layout.device)[0] + cached
    else:
        free = psutil.virtual_memory().available
    if size <= _USABLE_MEMORY * free:
        return None
    need, free_gib = size / 2**30, free / 2**30
    return f"its masks would take {need:.1f} GiB, more than {_USABLE_MEMORY:.0%} of the {free_gib:.1f} GiB free"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    # torch's fused kernels do not take grouped heads together with a mask.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)[0].transpose(0, 1)


def _needs_cuda(problem: Problem) -> str | None:
    """Return why compiled kernels cannot be measured; FlexAttention has no backward on a CPU."""
    return None if problem.layout.device.type == "cuda" else NEEDS_CUDA


def _flex(problem: Problem) -> Forward:
    """Compiled FlexAttention, given the interval form of the mask, which is its best case."""
    from torch.nn.attention.flex_attention import create_block_mask

    T, key_start, key_end = problem.layout.total_length, problem.layout.key_start, problem.layout.key_end

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= key_start[query]) & (key < key_end[query])

    block_mask = create_block_mask(visible, None, None, T, T, device=problem.layout.device, _compile=True)
    grouped = problem.heads != problem.kv_heads

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=grouped)[0].transpose(0, 1)

    return forward


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation per shape, because kernels for dynamic shapes are slower; the default stops at eight.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def _flash_varlen_causal(problem: Problem) -> Forward:
    """flash-attn's varlen kernel, causal on the same documents: FA3 or FA2 if installed, else torch's copy of it."""
    offsets = problem.layout.document_offsets.to(problem.layout.device, torch.int32)
    longest = max(problem.lengths)
    function = _varlen_function()
    parameters = inspect.signature(function).parameters
    flags = {name: True for name in ("causal", "is_causal") if name in parameters} or {"window_size": (-1, 0)}
    if "enable_gqa" in parameters:
        flags["enable_gqa"] = problem.heads != problem.kv_heads

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, offsets, offsets, longest, longest, **flags)
        return out[0] if isinstance(out, tuple | list) else out  # some releases return the log-sum-exp too

    return forward


@cache
def _varlen_function() -> Callable[..., Any] | None:
    """Return the fastest varlen function that is installed."""
    for name in ("flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"):
        with suppress(ImportError):
            module = importlib.import_module(name)
            return getattr(module, "flash_attn_varlen_func", None) or module.varlen_attn
    return None


def _flash_missing(problem: Problem) -> str | None:
    if problem.layout.device.type != "cuda":
        return NEEDS_CUDA
    if problem.dtype.itemsize != 2:
        return "takes fp16 and bf16 only"
    return None if _varlen_function() else "neither flash-attn nor torch's varlen_attn is there"


BACKENDS = {
    "triton": _ours("triton"),
    "torch": _ours("torch"),
    "sdpa_dense": Backend(_dense, lambda p: _masks_too_large([p.layout.total_length], p)),
    "sdpa_documents": Backend(_documents, lambda p: _masks_too_large(p.lengths, p)),
    "flex": Backend(_flex, _needs_cuda),
    "flash_varlen_causal": Backend(_flash_varlen_causal, _flash_missing, causal_only=True),
}
