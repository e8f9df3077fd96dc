"""The correctness gate: a backend is timed only after its results were checked against a reference in high precision.

In half precision, a result may differ from the reference by twice the error of plain PyTorch plus one rounding, both by
root mean square and by the largest difference. In fp32, where two correct orders of summation differ by more than that,
it may differ by 2e-6 of the reference, and a gradient by 1e-5.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from tables import Row
from timing import NOT_MEASURED, Step, Times, allocated_bytes, time_steps
from torch import Tensor
from torch.utils import benchmark
from triton.errors import TritonError

Forward = Callable[..., Tensor | tuple[Tensor, ...]]
Results = Sequence[Tensor]
Gate = Callable[[Results], str | None]

# Errors that a backend may raise for a shape that it cannot do. NotImplementedError and running out of memory are
# RuntimeErrors.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError, TritonError)
OVER_BUDGET = "time budget"
OUT_OF_MEMORY = "out of memory"


def make_gate(
    names: Sequence[str], references: Results, plain: Results, select: Callable[[Results], Results] = lambda x: x
) -> Gate:
    """Return the function that checks the results of one problem: it returns what is wrong with them, or None.

    Args:
        names: of the outputs and gradients; those of outputs begin with "output".
        references: the results in high precision. A shorter one is compared with the beginning of a result.
        plain: the same results of plain PyTorch, in the dtypes that backends return.
        select: picks what is compared out of a backend's results.

    Raises:
        RuntimeError: plain PyTorch is too far from the reference to serve as a yardstick.
    """
    measured = []
    for name, reference, rough in zip(names, references, plain, strict=True):
        size, error, rounding = _size(reference), _error(rough, reference), torch.finfo(rough.dtype).eps
        if not error[0] <= (limit := rounding**0.5 * size[0]):
            raise RuntimeError(f"plain PyTorch's own error of {name} is {error[0]:.3g}, above {limit:.3g}")
        allowed = 2 * error + rounding / 2 * size
        if rough.dtype == torch.float32:
            allowed = (2e-6 if name.startswith("output") else 1e-5) * size
        measured.append((name, reference, error, allowed))

    def check(results: Results) -> str | None:
        for (name, reference, *known), got in zip(measured, select(results), strict=True):
            for kind, error, plain, allowed in zip(("rms", "largest"), _error(got, reference), *known, strict=True):
                if not error <= allowed:  # so that NaN fails
                    return f"{kind} error of {name} is {error:.3g}, above {allowed:.3g} (plain PyTorch: {plain:.3g})"
        return None

    return check


def _error(got: Tensor, reference: Tensor) -> Tensor:
    return _size(got[: len(reference)].to(reference.dtype) - reference)


def _size(x: Tensor) -> Tensor:
    """Return the root mean square of a tensor, and its largest value."""
    return torch.stack([x.square().mean().sqrt(), x.abs().max()]).double().cpu()


def run(forward: Forward, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of one pass, then the gradients of the inputs."""
    outputs = forward(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, upstream))]


class Backend(NamedTuple):
    """One way to compute an op."""

    prepare: Callable[[Any], Forward]
    """Does what a micro-batch needs once for all layers; takes the problem."""
    missing: Callable[[Any], str | None] = lambda problem: None
    """Returns why the backend cannot do a problem, or None."""
    is_ours: bool = False
    """An error of this backend fails the benchmark."""
    ungated: str | None = None
    """Why the results are not checked."""
    kernel: Callable[[Any, Callable[[], Any]], str] | None = None
    """Returns which of several kernels computes a problem; takes it and a function that runs the forward pass."""


def compare(
    problem: Any,
    backends: Mapping[str, Backend],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    gate: Callable[[], Gate],
    seconds: float,
    *,
    deadline: float = float("inf"),
    others: Mapping[str, Step] | None = None,
) -> tuple[dict[str, Row], dict[str, Times]]:
    """Check each backend and then time it; one that fails never stops the rest.

    Args:
        gate: makes the gate, if any backend can be measured.
        seconds: to time each backend for; none starts after `deadline` of time.monotonic().
        others: steps that are timed together with the backends, without a check.

    Returns:
        The columns of each backend, in order, and the times of the other steps: `status` and, if a backend was timed,
        those of `Times`, `peak_mib`, `prepare_ms` and, if the backend names it, `kernel`.
    """
    device, others = inputs[0].device, others or {}
    late = time.monotonic() > deadline
    reasons = {name: OVER_BUDGET if late else backend.missing(problem) for name, backend in backends.items()}
    outcomes = {name: {"status": f"{NOT_MEASURED}: {reason}"} for name, reason in reasons.items() if reason}
    able = {name: backend for name, backend in backends.items() if name not in outcomes}
    wrong = gate() if able else None
    timings: dict[str, Times] = {}
    kernels: dict[str, Row] = {}
    # On a GPU each backend has the memory to itself; on a CPU the backends and the other steps take turns.
    apart = device.type == "cuda"
    for group in [{name: backend} for name, backend in able.items()] if apart else [able]:
        steps: dict[str, Step] = {}
        for name, backend in group.items():
            outcomes[name] = {"status": f"{NOT_MEASURED}: {OVER_BUDGET}"}
            if time.monotonic() <= deadline:
                with _errors_in(outcomes, {name: backend}):
                    forward = backend.prepare(problem)
                    results = run(forward, inputs, upstream)
                    if found := None if backend.ungated else wrong(results):
                        outcomes[name] = {"status": f"FAILED: {found}"}
                    else:
                        if backend.kernel:
                            kernels[name] = {"kernel": backend.kernel(problem, partial(forward, *inputs))}
                        steps[name] = partial(_step, forward, inputs, upstream)
        with _errors_in(outcomes, {name: group[name] for name in steps}):
            timings |= time_steps(steps if apart else steps | others, device, seconds)
        for name in [name for name in steps if name in timings]:
            with _errors_in(outcomes, {name: group[name]}):
                finished = _finish(group[name], problem, steps[name], timings[name], device)
                outcomes[name] = finished | kernels.get(name, {})
    timings |= time_steps({name: step for name, step in others.items() if name not in timings}, device, seconds)
    return {name: outcomes[name] for name in backends}, {name: timings[name] for name in others}


def _step(forward: Forward, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> Callable[[], object]:
    outputs = forward(*inputs)
    return lambda: torch.autograd.grad(outputs, inputs, upstream)


def _finish(backend: Backend, problem: Any, step: Step, times: Times, device: torch.device) -> Row:
    call = {"prepare": lambda: backend.prepare(problem)}
    timer = benchmark.Timer("prepare()", globals=call, num_threads=torch.get_num_threads())
    _, peak = allocated_bytes(lambda: step()(), device)
    status = f"ok: {backend.ungated}" if backend.ungated else "ok"
    return {"status": status, **times, "peak_mib": peak / 2**20, "prepare_ms": 1e3 * timer.timeit(3).mean}


@contextmanager
def _errors_in(outcomes: dict[str, Row], backends: Mapping[str, Backend]) -> Iterator[None]:
    """Turn an error into outcomes: a failure of ours, but not for a missing kernel or too little memory."""
    try:
        yield
    except FAILURES as error:
        reason = failure_reason(error)
        excused = isinstance(error, NotImplementedError) or reason == OUT_OF_MEMORY
        for name, backend in backends.items():
            failed = backend.is_ours and not excused
            outcomes[name] = {"status": f"{'FAILED' if failed else NOT_MEASURED}: {reason}"}


def failure_reason(error: BaseException) -> str:
    """Return one line for a table."""
    # The CPU allocator has no exception of its own.
    if isinstance(error, torch.cuda.OutOfMemoryError) or "not enough memory" in str(error):
        return OUT_OF_MEMORY
    if isinstance(error, NotImplementedError):
        return str(error)
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first_line[:160]}"
