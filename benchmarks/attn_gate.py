"""The correctness gate: what a backend computes is held against the definition in high precision before it is timed.

The reference takes one document at a time, a block of rows at a time, in float64 up to 16,384 positions and in float32
beyond, where the first and the last key/value head stand for all. In half precision a result may be off by twice the
error of plain PyTorch, plus one rounding, both by the root mean square and by the largest difference. In fp32, where
the errors of two right ways to add up differ by more than that, by 2e-6 of the reference, a gradient by 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from attn_problem import Forward, Problem
from torch import Tensor

NAMES = ("output", "dq", "dk", "dv")

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]

_ROWS = 256  # of the reference's blocks
_ALL_HEADS_UP_TO = 16384


@dataclass(frozen=True)
class Inputs:
    """q [T, H, D], k and v [T, G, D] that ask for gradients, and the gradient of the output, zero at padding."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a forward pass takes."""
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Error:
    """Of one tensor against the reference."""

    rms: float
    largest: float


@dataclass(frozen=True)
class HeadSample:
    """The heads that are compared: key/value heads, and the query heads that read them."""

    query: Tensor
    kv: Tensor

    @classmethod
    def of(cls, problem: Problem) -> HeadSample:
        """All heads of a short pack, two groups of a long one."""
        G, group = problem.kv_heads, problem.heads // problem.kv_heads
        few = problem.layout.total_length > _ALL_HEADS_UP_TO
        kv = torch.tensor(sorted({0, G - 1}) if few else range(G), device=problem.device)
        return cls((kv[:, None] * group + torch.arange(group, device=problem.device)).flatten(), kv)

    def inputs(self, inputs: Inputs) -> Tensors:
        """q, k, v and the gradient of the output."""
        q, k, v = (x.detach() for x in inputs.qkv)
        return q[:, self.query], k[:, self.kv], v[:, self.kv], inputs.gradient[:, self.query]

    def results(self, results: Tensors) -> Tensors:
        """Output, dq, dk, dv."""
        out, dq, dk, dv = results
        return out[:, self.query], dq[:, self.query], dk[:, self.kv], dv[:, self.kv]


@dataclass(frozen=True)
class Gate:
    """What is known of the right results of one problem."""

    problem: Problem
    heads: HeadSample
    reference: Tensors
    plain: tuple[Error, ...]

    def check(self, results: Tensors) -> str | None:
        """What is wrong with `results`; None where nothing is."""
        rounding = torch.finfo(self.problem.dtype).eps / 2
        compared = zip(NAMES, self.heads.results(results), self.reference, self.plain, strict=True)
        for name, got, reference, plain in compared:
            error, size = _error(self.problem, name, got, reference), _size(reference)
            for kind in ("rms", "largest"):
                value, of_plain = getattr(error, kind), getattr(plain, kind)
                bound = 2 * of_plain + rounding * getattr(size, kind)
                if self.problem.dtype == torch.float32:
                    bound = (2e-6 if name == "output" else 1e-5) * getattr(size, kind)
                if not value <= bound:  # so that NaN fails
                    return f"{kind} error of {name} is {value:.3g}, above {bound:.3g} (plain PyTorch: {of_plain:.3g})"
        return None


def make_inputs(problem: Problem) -> Inputs:
    """Normal noise, the same for every backend."""
    T, used = problem.layout.total_length, int(problem.layout.document_offsets[-1])
    generator = torch.Generator(problem.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (T, heads, problem.head_dim)
        return torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype)

    gradient = normal(problem.heads)
    gradient[used:] = 0
    q, k, v = (normal(heads).requires_grad_() for heads in (problem.heads, problem.kv_heads, problem.kv_heads))
    return Inputs(q, k, v, gradient)


def run(forward: Forward, inputs: Inputs) -> Tensors:
    """Output and gradients of one pass."""
    out = forward(*inputs.qkv)
    dq, dk, dv = torch.autograd.grad(out, inputs.qkv, inputs.gradient)
    return out.detach(), dq, dk, dv


def make_gate(problem: Problem, inputs: Inputs, plain: Tensors | None) -> Gate:
    """The reference, and the error of plain PyTorch: of `plain`, or where that does not fit, of a blockwise one.

    Raises:
        RuntimeError: plain PyTorch is so far off that it can hold nobody to anything.
    """
    heads = HeadSample.of(problem)
    sampled = heads.inputs(inputs)
    exact = problem.layout.total_length <= _ALL_HEADS_UP_TO or problem.dtype == torch.float32
    reference = _by_documents(problem, sampled, torch.float64 if exact else torch.float32)
    compared = heads.results(plain) if plain else _by_documents(problem, sampled, torch.float32, problem.dtype)
    errors = []
    for name, got, right in zip(NAMES, compared, reference, strict=True):
        errors.append(_error(problem, name, got, right))
        limit = torch.finfo(problem.dtype).eps ** 0.5 * _size(right).rms
        if not errors[-1].rms <= limit:
            raise RuntimeError(f"plain PyTorch's own error of {name} is {errors[-1].rms:.3g}, above {limit:.3g}")
    return Gate(problem, heads, reference, tuple(errors))


def _by_documents(problem: Problem, inputs: Tensors, wide: torch.dtype, narrow: torch.dtype | None = None) -> Tensors:
    """Output, dq, dk, dv in `wide`; with `narrow`, every step's result is rounded to it, as eager PyTorch does."""

    def rounded(x: Tensor) -> Tensor:
        return x if narrow is None else x.to(narrow).to(wide)

    q, k, v, gradient = (x.to(wide) for x in inputs)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    key_end = torch.from_numpy(problem.layout.key_ends())
    scale = problem.head_dim**-0.5
    for document_start, document_end in pairwise(problem.layout.document_offsets.tolist()):
        for start in range(document_start, document_end, _ROWS):
            end = min(start + _ROWS, document_end)
            rows, keys = slice(start, end), slice(document_start, int(key_end[start:end].max()))
            columns = torch.arange(keys.start, keys.stop, device=q.device)
            visible = columns < problem.layout.key_end[rows, None]
            q_tgrd, gradient_tgrd = (x[rows].unflatten(1, (k.shape[1], -1)) for x in (q, gradient))
            scores = rounded(torch.einsum("tgrd,sgd->grts", q_tgrd, k[keys]) * scale)
            weights = rounded(scores.masked_fill(~visible, float("-inf")).softmax(dim=-1))
            out[rows] = torch.einsum("grts,sgd->tgrd", weights, v[keys]).flatten(1, 2)
            dv[keys] += torch.einsum("grts,tgrd->sgd", weights, gradient_tgrd)
            dweights = rounded(torch.einsum("tgrd,sgd->grts", gradient_tgrd, v[keys]))
            # The mean of dweights under the weights is the softmax's pull back to a sum of one.
            dscores = rounded(weights * (dweights - (weights * dweights).sum(dim=-1, keepdim=True)))
            dq[rows] = torch.einsum("grts,sgd->tgrd", dscores, k[keys]).flatten(1, 2) * scale
            dk[keys] += torch.einsum("grts,tgrd->sgd", dscores, q_tgrd) * scale
    return rounded(out), rounded(dq), rounded(dk), rounded(dv)


def _error(problem: Problem, name: str, got: Tensor, reference: Tensor) -> Error:
    # At padding the output is left to each backend, but no gradient may come of it.
    used = int(problem.layout.document_offsets[-1]) if name == "output" else problem.layout.total_length
    return _size(got[:used].to(reference.dtype) - reference[:used])


def _size(x: Tensor) -> Error:
    return Error(rms=float(x.square().mean().sqrt()), largest=float(x.abs().max()))
