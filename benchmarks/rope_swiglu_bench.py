"""Times rotary embedding, with and without a norm of the heads, and SwiGLU against plain PyTorch.

    python benchmarks/rope_swiglu_bench.py --out DIR [--device cuda|cpu] [--dtypes bf16 ..] [--backends ..]

Writes DIR/rope_swiglu.csv, rope_swiglu.md and rope_swiglu.png. On a GPU: 16,384 tokens; on a CPU 4,096, in minutes.
q and k are views of one projection to queries, keys and values, as in the model. Exit status 1 where a backend computed
something wrong, or one of ours broke.
"""

from __future__ import annotations

import os
import sys
from functools import partial

if __name__ == "__main__":
    # Before triton is imported: kernels are compiled here, whatever the shell says.
    os.environ["TRITON_INTERPRET"] = "0"

import fused_bench
import torch
import torch.nn.functional as F
from fused_bench import Where
from fused_compare import Forward, Problem, bytes_of
from torch import Tensor

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.reference import Rotary
from transfusion_fast.model import ops

EPS = 1e-6  # of the norm, as the op has it


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the command line asks for; returns the exit code."""
    heads = [(16, 16, 64), (16, 4, 128)]
    problems = [partial(rope, H=H, G=G, D=D, norm=norm) for H, G, D in heads for norm in (False, True)]
    problems += [partial(swiglu, fused=fused) for fused in (False, True)]
    return fused_bench.main("rope_swiglu", "Rotary embedding and SwiGLU", __doc__, problems, arguments)


def rope(where: Where, H: int, G: int, D: int, norm: bool) -> Problem:
    """T tokens of H query heads and G key heads of D numbers."""
    T = _tokens(where)
    projection = where.normal(0, T, H + 2 * G, D)
    q, k = projection[:, :H], projection[:, H : H + G]
    weights = [1 + 0.1 * where.normal(seed, D) for seed in (1, 2)] if norm else []
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, *weights))
    table = ops.rotary(torch.arange(T, device=where.device), D)
    # In and out, and through a norm backward also what was normed.
    once = 2 * bytes_of(q, k) + bytes_of(table)
    least = (once + bytes_of(*weights), once + (bytes_of(q, k) + 2 * bytes_of(*weights) if norm else 0))

    def ours(backend: str) -> Forward:
        return lambda q, k, *w: ops.rope(q, k, table, **_named(w), backend=backend)

    return Problem(
        op="rope with norm" if norm else "rope",
        shape=f"T={T} H={H} G={G} D={D}",
        inputs=inputs,
        specification=lambda q, k, *w: reference.rope(q, k, table, **_named(w)),
        ours=ours,
        plain=partial(_plain_rope, table),
        least=least,
    )


def swiglu(where: Where, fused: bool) -> Problem:
    """Of two tensors [T, F], or of one [T, 2F] that has both."""
    T, width = _tokens(where), 256 if where.tiny else 4096 if where.device.type == "cuda" else 1408
    both = where.normal(0, T, 2 * width)
    tensors = (both,) if fused else tuple(x.contiguous() for x in both.chunk(2, dim=-1))
    half = bytes_of(both) // 2

    def ours(backend: str) -> Forward:
        return lambda *x: ops.swiglu(*x, backend=backend)

    return Problem(
        op="swiglu of one tensor" if fused else "swiglu",
        shape=f"T={T} F={width}",
        inputs=tuple(x.detach().requires_grad_() for x in tensors),
        specification=lambda *x: reference.swiglu(*_halves(*x)),
        ours=ours,
        plain=_plain_swiglu,
        least=(3 * half, 5 * half),
    )


def _tokens(where: Where) -> int:
    return 64 if where.tiny else 16384 if where.device.type == "cuda" else 4096


def _plain_rope(table: Rotary, q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """In the precision of q and k throughout."""
    cos, sin = (angles[:, None].to(q.dtype) for angles in table)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, EPS)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    q_weight, k_weight = weights or (None, None)
    return turned(q, q_weight), turned(k, k_weight)


def _plain_swiglu(*x: Tensor) -> Tensor:
    gate, up = _halves(*x)
    return F.silu(gate) * up


def _halves(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, ...]:
    return gate.chunk(2, dim=-1) if up is None else (gate, up)


def _named(weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("q_weight", "k_weight"), weights, strict=False))


if __name__ == "__main__":
    sys.exit(main())
