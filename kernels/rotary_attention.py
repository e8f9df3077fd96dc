"""Rotary embedding and hybrid attention of one projection of queries, keys and values.

    q, k, v = split(qkv),   o = hybrid_attention(rope(q), rope(k), v)

The kernels are those of `rope.py` and `hybrid_attention.py`, but backward writes the gradients of q, k and v into one
tensor, the gradient of the projection: attention writes its three gradients side by side, and rope rotates two of them
in place. As separate ops they would return tensors that autograd copies into one.

The op takes the rotated q and k as inputs, so that selective checkpointing can recompute them and keep o. They are
computed outside of autograd, because the op's own formula covers rope.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion_fast.kernels import hybrid_attention as attention
from transfusion_fast.kernels import rope
from transfusion_fast.kernels.attention_configs import padded_head_dim
from transfusion_fast.kernels.launch import check_inputs
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.reference import Rotary


def rotary_attention(
    qkv: Tensor,
    kv_heads: int,
    rotary: Rotary,
    layout: AttentionLayout,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> Tensor:
    """Compute hybrid attention of rotated queries and keys, differentiable.

    Args:
        qkv: [T, H + 2G, D], fp16, bf16 or fp32: the heads of q, of k and of v.
        kv_heads: G, which divides H.
        rotary: cos and sin, fp32 [T, D / 2].
        layout: The mask, on the device of qkv.
        q_weight, k_weight: [D], weights of an RMS norm of each head before the rotation, both or neither.

    Returns:
        [T, H, D] in the dtype of qkv; zero at padding.

    Raises:
        ValueError: The kernels do not support the device, a dtype or the head dimension.
    """
    check_inputs("rotary_attention", qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    padded_head_dim(qkv.shape[-1])
    q, k, _ = _split(qkv.detach(), kv_heads)
    weights = [weight if weight is None else weight.detach() for weight in (q_weight, k_weight)]
    q, k = rope.rope(q, k, rotary, *weights)
    return _RotaryAttention.apply(qkv, q, k, *rotary, q_weight, k_weight, *attention.tables_of(layout))


def _split(qkv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)


@torch.library.custom_op("transfusion_fast::rotary_attention", mutates_args=())
def _forward(
    qkv: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    tables: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o [T, H, D] and lse fp32 [H, T] for q and k that are rotated and v of qkv; the rest is for backward."""
    return attention.attend(q, k, _split(qkv, k.shape[1])[2], tables, q.shape[-1] ** -0.5)


@torch.library.custom_op("transfusion_fast::rotary_attention_backward", mutates_args=())
def _backward(
    do: Tensor, qkv: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, tables: Sequence[Tensor | None], o: Tensor, lse: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Return [dqkv], contiguous, or [dqkv, dq_weight, dk_weight]."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    gradients = dq, dk, _ = _split(dqkv, k.shape[1])
    q_in, k_in, v = _split(qkv, k.shape[1])
    attention.differentiate(do, q, k, v, o, lse, tables, q.shape[-1] ** -0.5, gradients, packed=True)
    if q_weight is None or k_weight is None:
        rope.rotate(dq, dk, cos, sin, None, None, True, dq, dk, packed=True)
        return [dqkv]
    weights = rope.differentiate_norm(dq, dk, q_in, k_in, cos, sin, q_weight, k_weight, dq, dk, packed=True)
    return [dqkv, *weights]


_forward.register_fake(
    lambda _, q, *__: (q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32))
)


@_backward.register_fake
def _(_do: Tensor, qkv: Tensor, _q: Tensor, _k: Tensor, _cos: Tensor, _sin: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (qkv, *rest[:2]) if x is not None]


class _RotaryAttention(torch.autograd.Function):
    """The formula of autograd, which differentiates through the rotation that was computed before."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        o, lse = _forward(*inputs[:7], list(inputs[7:]))
        ctx.save_for_backward(*inputs, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, o, lse = ctx.saved_tensors
        gradients = [*_backward(do, *inputs[:7], inputs[7:], o, lse), None, None][:3]
        return gradients[0], None, None, None, None, *gradients[1:], *(None for _ in inputs[7:])
