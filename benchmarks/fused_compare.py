"""Gates and times the fused memory-bound ops against plain PyTorch: what their two benchmarks measure with.

The yardstick is a copy of as many bytes as an op must read and write at least, timed in the same run. Results are held
to the specification in fp64: fp32 by 2e-6 of its root mean square, a gradient by 1e-5; half precision by twice the
error of plain PyTorch, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import memory
import torch
from measure import FAILURES, NOT_MEASURED, Effort, Step, Timing, autograd_step, failure_reason, time_steps
from torch import Tensor

from transfusion_fast.kernels.reference import Rotary

Forward = Callable[..., Tensor | tuple[Tensor, ...]]

OURS = ("triton", "torch")
PLAIN, COMPILED = "plain", "plain, compiled"
_COPY = "copy"


@dataclass(frozen=True, eq=False)
class Problem:
    """One op at one shape and dtype, on one device."""

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    """They ask for gradients."""
    specification: Forward
    """Of the inputs in fp64."""
    ours: Callable[[str], Forward]
    """The op on the backend of that name."""
    plain: Forward
    """As one would write it in PyTorch."""
    least: tuple[int, int]
    """Bytes that forward and backward must read or write: each input and each output once."""


@dataclass(frozen=True)
class Outcome:
    """What one backend did on one problem: with times, if it computed the right thing."""

    backend: str
    status: str
    timing: Timing | None = None
    peak_bytes: int | None = None

    @property
    def failed(self) -> bool:
        """Whether something of ours broke, or anything computed something wrong."""
        return self.status.startswith("FAILED")


def bytes_of(*values: Tensor | Rotary) -> int:
    """Bytes of all elements."""
    tensors = [x for value in values for x in ((value,) if isinstance(value, Tensor) else value)]
    return sum(x.numel() * x.element_size() for x in tensors)


def compare(problem: Problem, backends: Sequence[str], effort: Effort) -> tuple[list[Outcome], Timing]:
    """The outcome of every backend, and the time of the copies."""
    device = problem.inputs[0].device
    upstream = _upstream(problem)
    exact = _run(problem.specification, problem.inputs, upstream, torch.float64)
    rough = _run(problem.plain, problem.inputs, upstream)
    checked = {name: _check(name, problem, upstream, exact, rough) for name in backends}
    steps = {
        name: autograd_step(forward, problem.inputs, upstream)
        for name, forward in checked.items()
        if not isinstance(forward, Outcome)
    }
    timings = _time(steps | {_COPY: _copies(problem.least, device)}, device, effort)
    outcomes = []
    for name, forward in checked.items():
        if isinstance(forward, Outcome):
            outcomes.append(forward)
        else:
            outcomes.append(Outcome(name, "ok", timings[name], memory.peak_bytes(steps[name], device)))
    return outcomes, timings[_COPY]


def _time(steps: dict[str, Step], device: torch.device, effort: Effort) -> dict[str, Timing]:
    """In turns on a CPU, each by itself on a GPU."""
    if device.type == "cpu":
        return time_steps(steps, device, effort)
    return {name: time_steps({name: step}, device, effort)[name] for name, step in steps.items()}


def _check(
    name: str, problem: Problem, upstream: Sequence[Tensor], exact: list[Tensor], rough: list[Tensor]
) -> Forward | Outcome:
    """What to time, or why not."""
    if name == "triton" and problem.inputs[0].device.type == "cpu":
        return Outcome(name, f"{NOT_MEASURED}: needs a CUDA device")
    try:
        forward = _forward(name, problem)
        results = _run(forward, problem.inputs, upstream)
    except FAILURES as error:
        reason = failure_reason(error)
        return Outcome(name, f"FAILED: {reason}" if name in OURS else f"{NOT_MEASURED}: {reason}")
    outputs = len(upstream)
    for number, (got, right, plain) in enumerate(zip(results, exact, rough, strict=True)):
        size = _rms(right)
        allowed = (2e-6 if number < outputs else 1e-5) * size
        if got.dtype != torch.float32:
            allowed = 2 * _rms(plain.double() - right) + torch.finfo(got.dtype).eps / 2 * size
        error = _rms(got.double() - right)
        if not error <= allowed:  # so that NaN fails
            what = f"output {number}" if number < outputs else f"the gradient of input {number - outputs}"
            return Outcome(name, f"FAILED: {what} is off by {error:.3g}, above {allowed:.3g}")
    return forward


def _forward(name: str, problem: Problem) -> Forward:
    if name == PLAIN:
        return problem.plain
    if name == COMPILED:
        torch.compiler.reset()  # every problem is compiled for its own shape
        return torch.compile(problem.plain, dynamic=False)
    return problem.ours(name)


def _upstream(problem: Problem) -> tuple[Tensor, ...]:
    """Gradients of the outputs."""
    with torch.no_grad():
        outputs = _tuple(problem.plain(*problem.inputs))
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs)


def _run(
    forward: Forward, inputs: Sequence[Tensor], upstream: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs, then gradients of the inputs; with `dtype`, all computed in it."""
    if dtype is not None:
        inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
        upstream = [x.to(dtype) for x in upstream]
    outputs = _tuple(forward(*inputs))
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return [x.detach() for x in (*outputs, *gradients)]


def _copies(least: tuple[int, int], device: torch.device) -> Step:
    """Reads and writes half of the bytes each."""
    forward, backward = (
        [torch.empty(count // 2, dtype=torch.uint8, device=device).zero_() for _ in range(2)] for count in least
    )

    def step() -> Callable[[], object]:
        forward[0].copy_(forward[1])
        return lambda: backward[0].copy_(backward[1])

    return step


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
