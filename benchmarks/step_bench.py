"""Times whole training steps: forward, backward and AdamW, the fused ops against the same model on plain references.

    python benchmarks/step_bench.py --out DIR [--preset mini|0.16b|..] [--device cuda|cpu] [--peer transfusion-pytorch]

Writes DIR/step.csv, step.md and step.png. Before anything is timed, the losses of all rows must be equal to 1e-5 in
fp32, compiled ones included. In bf16 the weights are bf16 and the optimizer keeps them in fp32, as the trainer does.
"plain" is the same model as one would write it: the ops one by one, and one scaled_dot_product_attention under a dense
mask that is made once a step. What the machine reaches in the matrix products of a linear layer, forward and backward,
is what the steps are held to. On a CPU all of these take turns, each right after an untimed one of its kind.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    # Before triton is imported: kernels are compiled here, whatever the shell says.
    os.environ["TRITON_INTERPRET"] = "0"
    # Compilation is measured, which a cache of an earlier run would hide.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import measure
import memory
import step_report
import step_workload
import torch
from measure import Effort, Step
from step_report import MATMUL, Facts, Row
from torch import Tensor, nn

from transfusion_fast import Transfusion
from transfusion_fast.errors import InputError
from transfusion_fast.model.loss import Losses
from transfusion_fast.model.ops import IMPLEMENTATIONS
from transfusion_fast.model.sequence import PackedBatch
from transfusion_fast.training.ranks import keep_freed_memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKPOINTING = ("none", "selective", "full")
EQUAL = 1e-5  # of the losses in fp32
PEER = "transfusion-pytorch"
PLAIN = "plain"
_MATMULS = 10


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    dtype: str
    backend: str
    compiled: bool = False
    checkpointing: str = "none"

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        kept = "" if self.checkpointing == "none" else f", {self.checkpointing} checkpointing"
        return f"{self.dtype} {self.backend}{compiled}{kept}"


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to be timed, and what is known of it already."""

    facts: Facts
    step: Step


class MasterAdamW:
    """AdamW on fp32 copies of half-precision weights, which follow them; on the weights themselves in fp32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.weights = list(parameters)
        self.in_place = self.weights[0].dtype == torch.float32
        self.masters = self.weights if self.in_place else [p.detach().float().requires_grad_() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)

    def step(self) -> None:
        if not self.in_place:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        self.optimizer.step()
        if not self.in_place:
            torch._foreach_copy_([p.data for p in self.weights], self.masters)
        for weight in self.weights:
            weight.grad = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    try:
        device = measure.choose_device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = _measure(options, device)
    except (InputError, OSError) as error:
        print(f"step_bench: {error}", file=sys.stderr)
        return 2
    step_report.write(rows, options.out)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--preset", choices=step_workload.TRANSFORMERS, help="default: mini on a CPU, 0.37b on cuda")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peer", choices=(PEER,), help="time this package too, if it is installed")
    parser.add_argument("--seconds", type=float, default=20, help="to time each step for (default: 20)")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace, device: torch.device) -> list[Row]:
    preset = options.preset or ("0.37b" if device.type == "cuda" else step_workload.RAGGED_PRESET)
    ragged = preset == step_workload.RAGGED_PRESET
    documents = step_workload.ragged_documents() if ragged else step_workload.mix_documents("mixed", 16384)
    if device.type == "cpu":
        keep_freed_memory()
    ours = "triton" if device.type == "cuda" else "torch"
    _check_losses(preset, documents, device, ours)
    variants = [v for dtype in options.dtypes for v in _variants(dtype, ours)]
    makers = {str(v): partial(_prepare, v, preset, documents, device) for v in variants}
    if options.peer:
        makers[PEER] = partial(_prepare_peer, preset, documents, device)
    machine = measure.describe_machine(device)
    prepared: list[Prepared] = []
    for name, make in makers.items():
        print(f"{name}: preparing", file=sys.stderr)
        prepared.append(make())
    effort = Effort(30, options.seconds)
    steps = {p.facts.name: p.step for p in prepared} | _matmuls(device)
    if device.type == "cpu":
        timings = measure.time_steps(steps, device, effort, rehearse=True)
    else:
        timings = {name: measure.time_steps({name: step}, device, effort)[name] for name, step in steps.items()}
    rates = {dtype: _MATMULS * 6 * prod(MATMUL) / timings[dtype].total / 1e6 for dtype in DTYPES}
    return [step_report.row(p.facts, timings[p.facts.name], rates, machine) for p in prepared]


def _variants(dtype: str, ours: str) -> list[Variant]:
    """Plain PyTorch, then ours."""
    settings = [Variant(dtype, ours, checkpointing=c) for c in CHECKPOINTING]
    return [Variant(dtype, PLAIN), *settings, Variant(dtype, ours, compiled=True)]


def _model(preset: str, variant: Variant, device: torch.device) -> Transfusion:
    torch.manual_seed(0)
    backend = "reference" if variant.backend == PLAIN else variant.backend
    model = Transfusion(step_workload.model_config(preset, backend, variant.checkpointing))
    return model.to(device, DTYPES[variant.dtype])


def _forward(model: Transfusion, variant: Variant, batch: PackedBatch) -> Losses:
    if variant.backend != PLAIN:
        return model(batch)
    with patch.dict(IMPLEMENTATIONS["reference"], hybrid_attention=step_workload.plain_attention):
        return model(batch)


def _compile(model: Transfusion) -> None:
    """Anew, for the one shape that comes."""
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(dynamic=False)


def _check_losses(preset: str, documents: step_workload.Documents, device: torch.device, ours: str) -> None:
    """Raises InputError where losses differ from the reference's in fp32."""
    checked = [Variant("fp32", backend) for backend in dict.fromkeys(["reference", ours, "torch", PLAIN])]
    losses = {}
    for variant in [*checked, Variant("fp32", ours, compiled=True)]:
        model = _model(preset, variant, device)
        if variant.compiled:
            _compile(model)
        found = _forward(model, variant, step_workload.pack(model, documents[:24]).to(device))
        losses[str(variant)] = torch.stack([found.text, found.diffusion]).detach()
    expected = losses["fp32 reference"]
    for name, found in losses.items():
        difference = (found - expected).abs().max() / expected.abs().max()
        if not difference <= EQUAL:
            raise InputError(f"losses of {name} must be the reference's to {EQUAL}, they differ by {difference:.2e}")


def _train_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward, then what runs backward and the optimizer."""
    optimizer = MasterAdamW(list(model.parameters()))

    def step() -> Callable[[], None]:
        value = loss()

        def finish() -> None:
            value.backward()
            optimizer.step()

        return finish

    return step


def _prepare(variant: Variant, preset: str, documents: step_workload.Documents, device: torch.device) -> Prepared:
    model = _model(preset, variant, device)
    batch = step_workload.pack(model, documents).to(device)
    _forward(model, variant, batch)  # makes what is made once a batch
    kept = None if variant.compiled else memory.kept_bytes(lambda: _forward(model, variant, batch).total)
    if variant.compiled:
        _compile(model)
    step = _train_step(model, lambda: _forward(model, variant, batch).total)
    first, second = (_seconds(step, device) for _ in range(2))
    facts = Facts(
        name=str(variant),
        preset=preset,
        dtype=variant.dtype,
        parameters=_count(model),
        tokens=batch.num_tokens,
        flops=step_workload.model_flops(model, batch),
        peak_bytes=memory.peak_bytes(step, device),
        kept_bytes=kept,
        compile_s=first - second if variant.compiled else None,
    )
    return Prepared(facts, step)


def _prepare_peer(preset: str, documents: step_workload.Documents, device: torch.device) -> Prepared:
    """The other package's model of about as many parameters: our width and heads, as deep as that takes; fp32."""
    try:
        from transfusion_pytorch import Transfusion as Peer
    except ImportError as error:
        raise InputError(f"--peer {PEER} needs that package: {error}; install it, or leave --peer out") from error
    config = step_workload.TRANSFORMERS[preset]
    ours = _model(preset, Variant("fp32", "torch"), torch.device("cpu"))

    def build(depth: int) -> nn.Module:
        transformer = {"dim": config.dim, "depth": depth, "heads": config.num_heads, "dim_head": config.head_dim}
        return Peer(
            num_text_tokens=step_workload.TEXT_TOKENS,
            dim_latent=step_workload.CHANNELS,
            transformer=transformer,
            modality_default_shape=(step_workload.PATCHES,),
        )

    depth = min(range(1, config.depth + 1), key=lambda d: abs(_count(build(d)) - _count(ours)))
    torch.manual_seed(0)
    model = build(depth).to(device)
    moved = [[piece.to(device) for piece in document] for document in documents]
    step = _train_step(model, lambda: model(moved))
    facts = Facts(
        name=f"fp32 {PEER}, depth {depth}",
        preset=preset,
        dtype="fp32",
        parameters=_count(model),
        tokens=step_workload.pack(ours, documents).num_tokens,
        flops=None,
        peak_bytes=memory.peak_bytes(step, device),
        kept_bytes=None,
        compile_s=None,
    )
    return Prepared(facts, step)


def _matmuls(device: torch.device) -> dict[str, Step]:
    """The matrix products of one linear layer, forward and backward, `_MATMULS` times each, by dtype."""
    T, K, N = MATMUL

    def step(a: Tensor, b: Tensor, g: Tensor) -> Callable[[], None]:
        for _ in range(_MATMULS):
            a @ b.t()

        def backward() -> None:
            for _ in range(_MATMULS):
                g @ b
                g.t() @ a

        return backward

    return {
        name: partial(step, *(torch.randn(shape, device=device, dtype=dtype) for shape in ((T, K), (N, K), (T, N))))
        for name, dtype in DTYPES.items()
    }


def _seconds(step: Step, device: torch.device) -> float:
    begun = time.perf_counter()
    step()()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
