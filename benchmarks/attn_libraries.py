"""Attention libraries that a machine may have, as backends of the comparison: all need a GPU and 16-bit inputs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from attn_problem import NEEDS_CUDA, Forward, Problem
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout

_NO_VARLEN = "neither flash-attn nor torch's varlen_attn is there"


class FlashVarlenCausal:
    """flash-attn's varlen kernel, causal on the same documents: FA3 or FA2 if installed, else torch's copy of it."""

    name, causal_only = "flash_varlen_causal", True

    def available(self, problem: Problem) -> str | None:
        return _needs_half(problem) or (None if _flash_varlen() else _NO_VARLEN)

    def prepare(self, problem: Problem) -> Forward:
        offsets = problem.layout.document_offsets.to(problem.device, torch.int32)
        longest = max(problem.lengths)
        found = _flash_varlen()
        if found is None:
            raise NotImplementedError(_NO_VARLEN)
        function, arguments = found
        if "enable_gqa" in arguments:
            arguments = {**arguments, "enable_gqa": problem.heads != problem.kv_heads}

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _first(function(q, k, v, offsets, offsets, longest, longest, **arguments))

        return forward


class FlashMask:
    """Paddle's FlashMask, its tensors shared with torch's. Untested: written from its documentation."""

    name, causal_only = "flashmask", False

    def available(self, problem: Problem) -> str | None:
        return _needs_half(problem) or _missing("paddle")

    def prepare(self, problem: Problem) -> Forward:
        paddle = importlib.import_module("paddle")
        # A key is hidden from the queries at and after query_end, and from those before query_start.
        hidden = torch.stack([problem.layout.query_end, problem.layout.query_start], dim=-1)[None, None].contiguous()
        bounds = paddle.utils.dlpack.from_dlpack(hidden)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *qkv: Tensor) -> Tensor:
                ctx.inputs = [paddle.utils.dlpack.from_dlpack(x.detach()[None].contiguous()) for x in qkv]
                for x in ctx.inputs:
                    x.stop_gradient = False
                ctx.out = _first(paddle.nn.functional.flashmask_attention(*ctx.inputs, bounds, causal=False))
                return torch.from_dlpack(ctx.out.detach())[0]

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
                gradient = paddle.utils.dlpack.from_dlpack(gradient[None].contiguous())
                gradients = paddle.grad([ctx.out], ctx.inputs, [gradient])
                return tuple(torch.from_dlpack(x.detach())[0] for x in gradients)

        return Function.apply


class FlexFlashAttention:
    """MagiAttention's flex-flash-attention: a slice for each run of text and for each image. Untested."""

    name, causal_only = "flex_flash_attention", False

    def available(self, problem: Problem) -> str | None:
        return _needs_half(problem) or _missing("magi_attention")

    def prepare(self, problem: Problem) -> Forward:
        function = importlib.import_module("magi_attention.api").flex_flash_attn_func
        slices = torch.tensor(attention_slices(problem.layout), dtype=torch.int32)
        queries, keys, kinds = (x.to(problem.device) for x in (slices[:, :2], slices[:, 2:4], slices[:, 4]))
        arguments: dict[str, Any] = {
            "q_ranges": queries.contiguous(),
            "k_ranges": keys.contiguous(),
            "attn_type_map": kinds.contiguous(),
        }
        # Required by early releases, gone or optional in later ones.
        parameters = inspect.signature(function).parameters
        if "max_seqlen_q" in parameters and parameters["max_seqlen_q"].default is inspect.Parameter.empty:
            arguments["max_seqlen_q"] = int((slices[:, 1] - slices[:, 0]).max())
            arguments["max_seqlen_k"] = int((slices[:, 3] - slices[:, 2]).max())
        return lambda q, k, v: _first(function(q, k, v, **arguments))


def attention_slices(layout: AttentionLayout) -> list[tuple[int, int, int, int, int]]:
    """Rectangles (query start, end, key start, end, kind) that make up the mask; kind 0 is full, 1 causal from the end.

    A run of text [a, b) is causal over [document start, b), its diagonal ending in the lower right corner; an image
    [s, e) sees all of [document start, e).
    """
    starts, ends = layout.document_offsets[:-1].tolist(), layout.document_offsets[1:].tolist()
    images = iter([*layout.image_spans.tolist(), (layout.total_length + 1, 0)])
    image, length = next(images)
    slices = []
    for start, end in zip(starts, ends, strict=True):
        position = start
        while position < end:
            text_end = min(image, end)
            if position < text_end:
                slices.append((position, text_end, start, text_end, 1))
            position = text_end
            if position < end:
                position = image + length
                slices.append((image, position, start, position, 0))
                image, length = next(images)
    return slices


@cache
def _flash_varlen() -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """The fastest varlen function installed, and what makes it causal."""
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            return importlib.import_module(module).flash_attn_varlen_func, {"causal": True}
        except ImportError:
            continue
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(function).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    return function, {**causal, **({"enable_gqa": False} if "enable_gqa" in parameters else {})}


def _needs_half(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return NEEDS_CUDA
    return None if problem.dtype.itemsize == 2 else "takes fp16 and bf16 only"


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    return None


def _first(result: Any) -> Any:
    """Some releases return the output alone, some with the log-sum-exp."""
    return result[0] if isinstance(result, tuple | list) else result
