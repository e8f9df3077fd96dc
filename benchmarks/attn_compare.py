"""One problem on every backend: gate first, then time. What one backend cannot do never stops the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import memory
import torch
from attn_gate import Gate, Inputs, Tensors, make_gate, make_inputs, run
from attn_problem import Backend, Forward, Problem
from attn_report import Measured, Outcome
from backends import Ours, SdpaDocuments
from measure import (
    FAILURES,
    NOT_MEASURED,
    Effort,
    Step,
    Timing,
    autograd_step,
    failure_reason,
    is_out_of_memory,
    time_host,
    time_steps,
)

_OVER_BUDGET = "time budget"


def compare(
    problem: Problem, backends: Sequence[Backend], device: torch.device, effort: Effort, deadline: float
) -> dict[str, Outcome]:
    """The outcome of every backend on `device`, in their order; none starts after `deadline` of time.monotonic()."""
    try:
        return _compare(replace(problem, layout=problem.layout.to(device)), backends, effort, deadline)
    except RuntimeError as error:
        # The reference did not fit or is wrong, or an earlier error has left the device unusable.
        return {backend.name: _left_out(f"no reference: {failure_reason(error)}") for backend in backends}


def _compare(problem: Problem, backends: Sequence[Backend], effort: Effort, deadline: float) -> dict[str, Outcome]:
    reasons = {b.name: _OVER_BUDGET if time.monotonic() > deadline else b.available(problem) for b in backends}
    outcomes = {name: _left_out(reason) for name, reason in reasons.items() if reason}
    able = [backend for backend in backends if backend.name not in outcomes]
    if able:
        inputs = make_inputs(problem)
        gate = make_gate(problem, inputs, _plain(problem, inputs))
        # On a GPU one after the other, each with the memory to itself; on a CPU in turns, against the noise.
        for group in [[backend] for backend in able] if problem.device.type == "cuda" else [able]:
            outcomes |= _measure(group, problem, inputs, gate, effort, deadline)
    return {backend.name: outcomes[backend.name] for backend in backends}


def _plain(problem: Problem, inputs: Inputs) -> Tensors | None:
    """What plain PyTorch computes, if it fits."""
    documents = SdpaDocuments()
    if documents.available(problem):
        return None
    try:
        return run(documents.prepare(problem), inputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def _measure(
    group: Sequence[Backend], problem: Problem, inputs: Inputs, gate: Gate, effort: Effort, deadline: float
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    passed: dict[Backend, Forward] = {}
    for backend in group:
        checked = _left_out(_OVER_BUDGET) if time.monotonic() > deadline else _check(backend, problem, inputs, gate)
        if isinstance(checked, Outcome):
            outcomes[backend.name] = checked
        else:
            passed[backend] = checked
    steps = {b.name: autograd_step(forward, inputs.qkv, inputs.gradient) for b, forward in passed.items()}
    try:
        timings = time_steps(steps, problem.device, effort)
    except FAILURES as error:
        return outcomes | {backend.name: _broken(backend, error) for backend in passed}
    for backend in passed:
        try:
            outcomes[backend.name] = _finish(backend, problem, timings[backend.name], steps[backend.name])
        except FAILURES as error:
            outcomes[backend.name] = _broken(backend, error)
    return outcomes


def _check(backend: Backend, problem: Problem, inputs: Inputs, gate: Gate) -> Forward | Outcome:
    """The backend's forward pass if it computes what it must, else what is wrong."""
    try:
        forward = backend.prepare(problem)
        results = run(forward, inputs)
        wrong = None if backend.causal_only else gate.check(results)
    except FAILURES as error:
        return _broken(backend, error)
    return Outcome(f"FAILED: {wrong}") if wrong else forward


def _finish(backend: Backend, problem: Problem, timing: Timing, step: Step) -> Outcome:
    peak_mib = memory.peak_bytes(step, problem.device) / 2**20
    prepare_ms = time_host(lambda: backend.prepare(problem), problem.device)
    status = "ok: reference rate of a causal mask, not gated" if backend.causal_only else "ok"
    return Outcome(status, Measured(prepare_ms, timing, peak_mib))


def _left_out(reason: str) -> Outcome:
    return Outcome(f"{NOT_MEASURED}: {reason}")


def _broken(backend: Backend, error: Exception) -> Outcome:
    """An error of ours fails the run; a kernel that does not exist, too little memory or another's error does not."""
    if isinstance(error, NotImplementedError) or is_out_of_memory(error) or not isinstance(backend, Ours):
        return _left_out(failure_reason(error))
    return Outcome(f"FAILED: {failure_reason(error)}")
