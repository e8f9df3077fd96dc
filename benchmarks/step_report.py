"""Rows of the step benchmark: a table, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measure import Machine, Timing, peaks_of, write_csv

MATMUL = (1424, 256, 1024)  # positions, inputs, outputs of the linear layer that a machine's rate is measured with


@dataclass(frozen=True)
class Facts:
    """What is known of a step before it is timed. None where it was not measured or does not apply."""

    name: str
    preset: str
    dtype: str
    parameters: int
    tokens: int
    flops: int | None
    peak_bytes: float
    kept_bytes: int | None
    compile_s: float | None


@dataclass(frozen=True)
class Row:
    """One way to run the model, on one machine. None where it was not measured or does not apply."""

    op: str
    name: str
    preset: str
    dtype: str
    parameters: int
    tokens: int
    forward_p20_ms: float
    forward_p50_ms: float
    forward_p80_ms: float
    backward_p20_ms: float
    backward_p50_ms: float
    backward_p80_ms: float
    tokens_per_s: float
    weight_gflops: float
    matmul_gflops: float
    share_of_matmul: float
    share_of_fp32_matmul: float
    mfu: float | None
    peak_mib: float
    kept_bytes_per_token: float | None
    compile_s: float | None
    hardware: str
    torch: str
    triton: str
    git: str


def row(facts: Facts, timing: Timing, rates: dict[str, float], machine: Machine) -> Row:
    """`backward` is backward and optimizer; `weight_gflops` are 6 FLOPs a parameter and token; `mfu` counts exactly.

    `rates` are the GFLOP/s of matrix products by dtype.
    """
    seconds = timing.total / 1e3
    tokens, dtype, flops, kept = facts.tokens, facts.dtype, facts.flops, facts.kept_bytes
    weight_gflops = 6 * facts.parameters * tokens / seconds / 1e9
    peaks = peaks_of(machine.hardware)
    peak_gflops = peaks[0] * 1e3 if peaks and dtype != "fp32" else rates[dtype]
    passes = {
        f"{which}_{quantile}_ms": value
        for which in ("forward", "backward")
        for quantile, value in asdict(getattr(timing, which)).items()
    }
    return Row(
        op="step",
        name=facts.name,
        preset=facts.preset,
        dtype=dtype,
        parameters=facts.parameters,
        tokens=tokens,
        **passes,
        tokens_per_s=tokens / seconds,
        weight_gflops=weight_gflops,
        matmul_gflops=rates[dtype],
        share_of_matmul=weight_gflops / rates[dtype],
        share_of_fp32_matmul=weight_gflops / rates["fp32"],
        mfu=None if flops is None else flops / seconds / 1e9 / peak_gflops,
        peak_mib=facts.peak_bytes / 2**20,
        kept_bytes_per_token=None if kept is None else kept / tokens,
        compile_s=facts.compile_s,
        hardware=machine.hardware,
        torch=machine.torch,
        triton=machine.triton,
        git=machine.git,
    )


def write(rows: Sequence[Row], out: Path) -> None:
    """step.csv, step.md, step.png."""
    write_csv(rows, out / "step.csv")
    text = markdown(rows)
    (out / "step.md").write_text(text, encoding="utf-8")
    _draw(rows, out / "step.png")
    print(text)


def markdown(rows: Sequence[Row]) -> str:
    """The table, and what its columns mean."""
    first, (T, K, N) = rows[0], MATMUL
    lines = [
        "# Whole training steps",
        "",
        f"{first.hardware}; torch {first.torch}, triton {first.triton}, revision {first.git}; preset {first.preset}, "
        f"{first.tokens:,} tokens in one micro-batch. Forward, backward and AdamW. Losses of all rows were equal "
        "to 1e-5 in fp32 before anything was timed.",
        "",
        "![Tokens a second](step.png)",
        "",
        "| step | parameters | forward ms | backward and optimizer ms | tokens/s | "
        "of the matmul rate in its dtype | of the fp32 matmul rate | MFU | peak MiB | "
        "kept for backward, bytes a token | compilation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        mfu, kept = _or_not(r.mfu, "{:.1%}"), _or_not(r.kept_bytes_per_token, "{:,.0f}")
        compiled = "-" if r.compile_s is None else f"{r.compile_s:.1f} s"
        lines.append(
            f"| {r.name} | {r.parameters / 1e6:.2f} M | {_spread(r, 'forward')} | {_spread(r, 'backward')} | "
            f"{r.tokens_per_s:,.0f} | {r.share_of_matmul:.1%} | "
            f"{r.share_of_fp32_matmul:.2f} | {mfu} | {r.peak_mib:,.0f} | {kept} | {compiled} |"
        )
    lines += [
        "",
        "Times are medians (20th to 80th percentile). The matmul rate is that of a linear layer, forward and backward, "
        f"at [{T}, {K}] x [{K}, {N}] in the same run; a step's is 6 FLOPs a parameter and token. MFU counts each use "
        "of a weight and each visible pair, of the GPU's peak or, where that is not known, of that rate. Peak memory "
        "is what a step takes beyond weights and the optimizer's state. Compilation starts without a cache; the first "
        "row that compiles also pays for starting the compiler. Times of a CPU that others use too are worth nothing "
        "where their spread is wide, and otherwise no more than their ratios.",
        "",
    ]
    return "\n".join(lines)


def _spread(r: Row, name: str) -> str:
    p20, p50, p80 = (getattr(r, f"{name}_{quantile}_ms") for quantile in ("p20", "p50", "p80"))
    return f"{p50:.0f} ({p20:.0f}-{p80:.0f})"


def _or_not(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def _draw(rows: Sequence[Row], path: Path) -> None:
    figure, panel = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.2))
    names = [r.name for r in rows]
    panel.barh(names, [r.tokens_per_s for r in rows], color=["C0" if r.dtype == "bf16" else "C1" for r in rows])
    panel.invert_yaxis()
    panel.set_xlabel(f"tokens a second, {rows[0].preset}, {rows[0].hardware}")
    panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
