"""The ways to compute hybrid attention that the benchmark compares, and the reference that they are held to.

Preparing a backend for a `Problem` returns the function from q [T, H, D], k and v [T, G, D] to [T, H, D] that autograd
differentiates. What it returns at padding is not defined.
"""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import mixes
import psutil
import torch
import torch.nn.functional as F
from gate import OUT_OF_MEMORY, Backend, Forward, Gate, Results, failure_reason, make_gate, run
from timing import NEEDS_CUDA
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transfusion_fast.kernels import attention_cpu_plan
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
        T, device, D = self.layout.total_length, self.layout.device, self.head_dim
        generator = torch.Generator(device).manual_seed(0)
        counts = (self.heads, self.heads, self.kv_heads, self.kv_heads)
        drawn = [torch.randn((T, n, D), generator=generator, device=device).to(self.dtype) for n in counts]
        upstream, q, k, v = drawn
        upstream[int(self.layout.document_offsets[-1]) :] = 0  # padding
        return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), upstream


def attention_gate(problem: Problem, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> Gate:
    """Return the gate of a problem, whose reference is plain PyTorch in float64.

    Beyond 16,384 positions, the first and the last key/value head stand for all heads, and float32 for float64 if the
    problem is in half precision. The error of plain PyTorch is that of one SDPA per document or, where its masks do not
    fit into memory, of one per block of rows.
    """
    G, group = problem.kv_heads, problem.heads // problem.kv_heads
    few = problem.layout.total_length > _ALL_HEADS_UP_TO
    kv = torch.tensor(sorted({0, G - 1}) if few else range(G), device=problem.layout.device)
    query = (kv[:, None] * group + torch.arange(group, device=problem.layout.device)).flatten()

    def select(results: Results) -> Results:
        return [x[:, heads] for x, heads in zip(results, (query, query, kv, kv), strict=True)]

    q, k, v = (x.detach() for x in inputs)
    sampled = q[:, query], k[:, kv], v[:, kv], upstream[:, query]
    precise = torch.float32 if few and problem.dtype != torch.float32 else torch.float64
    out, *gradients = _by_blocks(problem, sampled, precise)
    # No output is defined at padding, but gradients must be zero there.
    references = (out[: int(problem.layout.document_offsets[-1])], *gradients)
    documents = _by_documents(problem, inputs, upstream)
    plain = select(documents) if documents else _by_blocks(problem, sampled, problem.dtype)
    return make_gate(("output", "dq", "dk", "dv"), references, plain, select)


def _by_documents(problem: Problem, inputs: Results, upstream: Tensor) -> Results | None:
    """Return output, dq, dk and dv of one SDPA per document, or None where that does not fit into memory."""
    if _masks_too_large(problem.lengths, problem):
        return None
    try:
        return run(_documents(problem), inputs, (upstream,))
    except RuntimeError as error:
        if failure_reason(error) != OUT_OF_MEMORY:
            raise
        return None


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


def _ours(name: str, missing: Callable[[Problem], str | None]) -> Backend:
    """Return this repository's op; preparing it includes building the layout, which other backends are given."""

    def prepare(problem: Problem) -> Forward:
        images, T, device = problem.layout.image_spans.numpy(), problem.layout.total_length, problem.layout.device
        layout = AttentionLayout.from_spans(problem.lengths, images, T, device)
        if name == "torch":  # its plan, which the first layer makes in every micro-batch
            attention_cpu_plan.forget_plans()
            spans = attention_cpu_plan.spans_of_layout(layout)
            attention_cpu_plan.kept_plan(spans, torch.empty(T, 1, 1, dtype=problem.dtype, device=device))
        return lambda q, k, v: hybrid_attention(q, k, v, layout, backend=name)

    return Backend(prepare, missing, is_ours=True)


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
    illustrated = {document_start for _, _, document_start, is_image in mixes.segments(layout) if is_image}
    masks = [
        torch.arange(start, end, device=layout.device) < layout.key_end[start:end, None]
        if start in illustrated
        else None
        for start, end in pairwise(layout.document_offsets.tolist())
    ]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Split at once: the gradient of a slice would be as long as the pack, for every document.
        pieces = zip(*(x.split([*lengths, padding])[:-1] for x in (q, k, v)), masks, strict=True)
        outs = [_sdpa(q_d, k_d, v_d, mask, causal=mask is None) for q_d, k_d, v_d, mask in pieces]
        return torch.cat([*outs, q.new_zeros(padding, *q.shape[1:])])

    return forward


def _documents_preferring_cudnn(problem: Problem) -> Forward:
    """The same by cuDNN's kernel; where PyTorch cannot use it, by the next one of its usual order."""
    documents = _documents(problem)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return documents(q, k, v)

    return forward


def _sdpa_kernels(problem: Problem, forward: Callable[[], Tensor]) -> str:
    """Return which of its kernels PyTorch chose, and how often, by the nodes that they leave for autograd."""
    pending, seen, chosen = [forward().grad_fn], set(), Counter[str]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [earlier for earlier, _ in node.next_functions]
        if kernel := re.match("ScaledDotProduct(?:Fused)?(.+?)Attention", node.name()):
            chosen[kernel[1].lower()] += 1
    return ", ".join(f"{kernel} {count}" for kernel, count in chosen.most_common()) or "math"


def _masks_too_large(lengths: Sequence[int], problem: Problem) -> str | None:
    """Return why masks of these lengths do not fit into memory, all as booleans and the largest also as a bias."""
    squares = [length**2 for length in lengths]
    size = sum(squares) + max(squares, default=0) * problem.dtype.itemsize
    free = psutil.virtual_memory().available
    if (device := problem.layout.device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    if size <= _USABLE_MEMORY * free:
        return None
    need, free_gib = size / 2**30, free / 2**30
    return f"its masks would take {need:.1f} GiB, more than {_USABLE_MEMORY:.0%} of the {free_gib:.1f} GiB free"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    # torch's fused kernels do not take grouped heads together with a mask.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)[0].transpose(0, 1)


def _flex(problem: Problem, kernel_options: Mapping[str, str] | None = None) -> Forward:
    """Compiled FlexAttention, given the interval form of the mask, which is its best case."""
    from torch.nn.attention.flex_attention import create_block_mask

    T, key_start, key_end = problem.layout.total_length, problem.layout.key_start, problem.layout.key_end

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= key_start[query]) & (key < key_end[query])

    # FlashAttention-4 takes two tiles of queries at once on B200, and its block mask must have blocks of that height.
    device, tall = problem.layout.device, bool(kernel_options) and _capability(problem)[0] == 10
    size = (256 if tall else 128, 128)
    block_mask = create_block_mask(visible, None, None, T, T, device=device, BLOCK_SIZE=size, _compile=True)
    grouped = problem.heads != problem.kv_heads

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        options = {"block_mask": block_mask, "enable_gqa": grouped, "kernel_options": kernel_options}
        return _compiled_flex()(q, k, v, **options)[0].transpose(0, 1)

    return forward


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation per shape, because kernels for dynamic shapes are slower; the default stops at eight.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def _flex_missing(problem: Problem) -> str | None:
    cpu = _on_gpu()(problem)
    return cpu and f"{cpu}: FlexAttention has no backward on a CPU"


def _flex_flash_missing(problem: Problem) -> str | None:
    options = getattr(importlib.import_module("torch.nn.attention.flex_attention"), "FlexKernelOptions", None)
    if "BACKEND" not in getattr(options, "__annotations__", {}):
        return f"torch {torch.__version__} has no FLASH backend of FlexAttention"
    return _on_gpu("flash_attn.cute", majors=(9, 10, 11, 12))(problem)


def _varlen(problem: Problem) -> tuple[str, Callable[..., Any]]:
    """Return the first installed varlen kernel of flash-attn that this GPU can run, and its module's name."""
    hopper = _capability(problem)[0] == 9
    names = [name for name in _VARLEN if hopper or name != "flash_attn_interface"]
    return next((name, f) for name in names if (f := getattr(_load(name)[0], _VARLEN[name], None)))


def _flash_varlen_causal(problem: Problem) -> Forward:
    """flash-attn's varlen kernel, causal on the same documents: FA3 or FA2 if installed, else torch's copy of it."""
    offsets = problem.layout.document_offsets.to(problem.layout.device, torch.int32)
    longest = max(problem.lengths)
    _, function = _varlen(problem)
    parameters = inspect.signature(function).parameters
    flags = {name: True for name in ("causal", "is_causal") if name in parameters} or {"window_size": (-1, 0)}
    if "enable_gqa" in parameters:
        flags["enable_gqa"] = problem.heads != problem.kv_heads
    return lambda q, k, v: _without_lse(function(q, k, v, offsets, offsets, longest, longest, **flags))


def _flashmask(problem: Problem) -> Forward:
    """FlashMask 4 in its build for PyTorch. Untested on a GPU: written from its documentation."""
    function = importlib.import_module(_FLASHMASK).flashmask_attention
    # A key is hidden from the queries at and after query_end, and from those before query_start.
    bounds = torch.stack([problem.layout.query_end, problem.layout.query_start], dim=-1)[None, None].contiguous()
    return lambda *qkv: _without_lse(function(*(x[None] for x in qkv), bounds, causal=False))[0]


def _flashmask_missing(problem: Problem) -> str | None:
    # The same module is built for one framework or the other.
    if hasattr(_load(_FLASHMASK)[0], "paddle"):
        return "flash_mask is built for PaddlePaddle, not for PyTorch"
    return _on_gpu(_FLASHMASK, majors=(9, 10))(problem)


def _flex_flash_attention(problem: Problem) -> Forward:
    """MagiAttention's flex-flash-attention: a slice for each run of text and for each image. Untested on a GPU."""
    function = importlib.import_module("magi_attention.api").flex_flash_attn_func
    # Kind 0 is full; kind 1 is causal, with the diagonal ending in the lower right corner of the rectangle.
    rows = [(start, end, first, end, int(not image)) for start, end, first, image in mixes.segments(problem.layout)]
    slices = torch.tensor(rows, dtype=torch.int32, device=problem.layout.device)
    queries, keys, kinds = (x.contiguous() for x in (slices[:, :2], slices[:, 2:4], slices[:, 4]))
    arguments: dict[str, Any] = {"q_ranges": queries, "k_ranges": keys, "attn_type_map": kinds}
    parameters = inspect.signature(function).parameters
    # Faster, and allowed because every query is in one slice only.
    if "disable_fwd_atomic_reduction" in parameters:
        arguments["disable_fwd_atomic_reduction"] = True
    # Early releases require the longest ranges; in later ones these are optional or gone.
    for name, ranges in (("max_seqlen_q", queries), ("max_seqlen_k", keys)):
        parameter = parameters.get(name)
        if parameter and parameter.default is inspect.Parameter.empty:
            arguments[name] = int(ranges.diff().max())
    return lambda q, k, v: _without_lse(function(q, k, v, **arguments))


def _without_lse(result: Any) -> Any:
    """Return the output alone; some releases return the log-sum-exp too."""
    return result[0] if isinstance(result, tuple | list) else result


@cache
def _load(name: str) -> tuple[Any, str]:
    """Return a module, or None, and why there is none."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None, f"{error.name} is not installed"
        return None, f"{name} cannot be imported: {failure_reason(error)}"
    except Exception as error:  # noqa: BLE001 - a library built for another torch must not end the run, whatever it raises
        return None, f"{name} cannot be imported: {failure_reason(error)}"


def _capability(problem: Problem) -> tuple[int, int]:
    device = problem.layout.device
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _on_gpu(*modules: str, majors: Sequence[int] = ()) -> Callable[[Problem], str | None]:
    """Return the function that says why compiled kernels cannot do a problem.

    Args:
        modules: one of a library's modules is enough.
        majors: compute capabilities that it has kernels for, without their minor version; by default all.
    """

    def missing(problem: Problem) -> str | None:
        major, minor = _capability(problem)
        reasons = [] if major else [NEEDS_CUDA]
        if major and majors and major not in majors:
            known = " or ".join(f"{known}.x" for known in majors)
            reasons.append(f"needs compute capability {known}, got {major}.{minor}")
        if modules and not any(_load(name)[0] for name in modules):
            reasons += dict.fromkeys(_load(name)[1] for name in modules)
        if not reasons and modules and problem.dtype.itemsize != 2:
            reasons.append("takes fp16 and bf16 only")
        return "; ".join(reasons) or None

    return missing


_FLASHMASK = "flash_mask.cute.interface"
_VARLEN = {
    "flash_attn_interface": "flash_attn_varlen_func",
    "flash_attn": "flash_attn_varlen_func",
    "torch.nn.attention.varlen": "varlen_attn",
}
_CAUSAL = "reference rate of a causal mask, not gated"

BACKENDS = {
    "triton": _ours("triton", _on_gpu()),
    "torch": _ours("torch", lambda problem: None),
    "sdpa_dense": Backend(_dense, lambda p: _masks_too_large([p.layout.total_length], p), kernel=_sdpa_kernels),
    "sdpa_documents": Backend(
        _documents_preferring_cudnn, lambda p: _masks_too_large(p.lengths, p), kernel=_sdpa_kernels
    ),
    "flex": Backend(_flex, _flex_missing),
    "flex_flash": Backend(partial(_flex, kernel_options={"BACKEND": "FLASH"}), _flex_flash_missing),
    "flash_varlen_causal": Backend(
        _flash_varlen_causal, _on_gpu(*_VARLEN), ungated=_CAUSAL, kernel=lambda problem, _: _varlen(problem)[0]
    ),
    "flashmask": Backend(_flashmask, _flashmask_missing),
    "flex_flash_attention": Backend(_flex_flash_attention, _on_gpu("magi_attention.api", majors=(9,))),
}
"""The rows of the comparison. A backend that is not gated cannot express the mask: its rate is only a reference."""
