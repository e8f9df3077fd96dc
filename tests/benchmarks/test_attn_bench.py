"""The attention benchmark runs as a command, holds every backend to the reference, and names what it left out."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import attn_bench
import pytest
import torch
from attention_backends import BACKENDS, Backend, Problem, attention_gate
from gate import Forward, run
from timing import COLUMNS as TIMES
from timing import NOT_MEASURED

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MEASURED_ON_CPU = ["torch", "sdpa_dense", "sdpa_documents"]
H100 = {
    "hardware": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "flash_attn": "not installed",
    "git": "abc1234",
}  # fmt: skip
COLUMNS = (
    "op,mix,T,H,G,D,dtype,backend,hardware,torch,triton,flash_attn,git,visible_area,prepare_ms,forward_p20,forward_p50,"
    "forward_p80,backward_p20,backward_p50,backward_p80,peak_mib,forward_tflops,backward_tflops,"
    "forward_percent_of_peak,backward_percent_of_peak,forward_gbs,forward_percent_of_bandwidth,times_sdpa_dense,"
    "times_sdpa_documents,status"
)


def make_problem(kv_heads: int = 1, dtype: torch.dtype = torch.float32, total_length: int = 330) -> Problem:
    layout = AttentionLayout.from_spans([40, 300 - 40, 1], [(0, 16), (44, 200)], total_length)
    return Problem(layout, heads=2, kv_heads=kv_heads, head_dim=16, dtype=dtype)


def results_of(name: str, problem: Problem) -> list[torch.Tensor]:
    qkv, upstream = problem.inputs()
    return run(BACKENDS[name].prepare(problem), qkv, (upstream,))


def spoiled(kind: str) -> Backend:
    """Return our op with one result spoiled."""
    right = BACKENDS["torch"]

    def prepare(problem: Problem) -> Forward:
        forward = right.prepare(problem)

        def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if kind == "error":
                raise RuntimeError("the kernel fell over\nin its second line")
            if kind == "gradient":
                k = k.detach() + 0.99 * (k - k.detach())
            out = forward(q, k, v)
            return out * torch.linspace(1, 1.001, len(out))[:, None, None] if kind == "output" else out

        return wrong

    return replace(right, prepare=prepare)


def rows_in(out: Path) -> list[dict[str, str]]:
    with (out / "attention.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_measures_what_a_cpu_has_and_names_the_rest(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/attn_bench.py", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in rows_in(tmp_path)}
    assert list(rows) == list(BACKENDS)
    assert ",".join(rows["torch"]) == COLUMNS
    for name, row in rows.items():
        if name in MEASURED_ON_CPU:
            assert row["status"] == "ok"
            assert float(row["forward_p20"]) <= float(row["forward_p50"]) <= float(row["forward_p80"])
            assert float(row["peak_mib"]) > 0 and float(row["prepare_ms"]) > 0
        else:
            assert row["status"] == "not measured: needs a CUDA device"
            assert row["forward_p50"] == row["times_sdpa_dense"] == NOT_MEASURED
    assert float(rows["sdpa_dense"]["times_sdpa_dense"]) == 1
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    for text in ((tmp_path / "attention.md").read_text(encoding="utf-8"), done.stdout):
        assert "- flex, all shapes: not measured: needs a CUDA device" in text


@pytest.mark.parametrize("kind", ["output", "gradient", "error"])
def test_a_wrong_backend_of_ours_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(BACKENDS, "torch", spoiled(kind))
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--backends", "torch", "sdpa_documents"]
    assert attn_bench.main(options) == 1
    status = {row["backend"]: row["status"] for row in rows_in(tmp_path)}
    assert status["sdpa_documents"] == "ok"
    expected = {"output": "rms error of output", "gradient": "rms error of dk", "error": "RuntimeError: the kernel"}
    assert status["torch"].startswith(f"FAILED: {expected[kind]}")
    assert "\n" not in status["torch"]
    assert "- torch, all shapes: FAILED" in (tmp_path / "attention.md").read_text(encoding="utf-8")


def test_a_missing_kernel_and_too_little_memory_do_not_fail_the_run() -> None:
    def raises(error: Exception) -> Backend:
        def prepare(problem: Problem) -> Forward:
            raise error

        return Backend(prepare, is_ours=True)

    errors = {"a": NotImplementedError("no kernel yet"), "b": torch.cuda.OutOfMemoryError("tried to allocate")}
    backends = {name: raises(error) for name, error in errors.items()}
    outcomes = attn_bench.compare_backends(make_problem(), backends, CPU, 0, time.monotonic() + 60)
    assert [o["status"] for o in outcomes.values()] == ["not measured: no kernel yet", "not measured: out of memory"]


def test_nothing_starts_after_the_deadline() -> None:
    backends = {name: BACKENDS[name] for name in ("torch", "triton")}
    outcomes = attn_bench.compare_backends(make_problem(), backends, CPU, 0, time.monotonic() - 1)
    assert {o["status"] for o in outcomes.values()} == {"not measured: time budget"}


def test_masks_that_do_not_fit_are_left_out_with_their_size() -> None:
    problem = make_problem(total_length=2**21)
    assert "its masks would take 20480.0 GiB" in BACKENDS["sdpa_dense"].missing(problem)
    assert BACKENDS["sdpa_documents"].missing(problem) is None


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_gate_holds_to_the_definition(kv_heads: int) -> None:
    """A result passes that the reference gives in double precision, and none that differs from it by 1e-5."""
    problem = make_problem(kv_heads)
    qkv, upstream = problem.inputs()
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = reference.hybrid_attention(*exact, problem.layout)
    right = [x.detach() for x in (out, *torch.autograd.grad(out, exact, upstream.double()))]
    gate = attention_gate(problem, qkv, upstream)
    assert gate(right) is None
    for number in range(4):
        wrong = [x + (i == number) * 3e-5 * x.square().mean().sqrt() for i, x in enumerate(right)]
        assert "rms error" in gate(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEASURED_ON_CPU)
def test_the_gate_lets_right_backends_through(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(kv_heads=2, dtype=dtype)
    qkv, upstream = problem.inputs()
    assert attention_gate(problem, qkv, upstream)(results_of(name, problem)) is None


def test_the_gate_stops_nan_causal_masks_and_gradients_of_padding() -> None:
    problem = make_problem(kv_heads=2)
    gate, right = attention_gate(problem, *problem.inputs()), results_of("torch", problem)
    assert "output is nan" in gate([torch.full_like(right[0], float("nan")), *right[1:]])
    offsets = problem.layout.document_offsets
    causal = AttentionLayout.from_spans(offsets.diff().numpy(), [], problem.layout.total_length)
    assert "output" in gate(results_of("torch", replace(problem, layout=causal)))
    right[0][-1] += 1  # the output at padding is not defined
    assert gate(right) is None
    right[3][-1] += 1  # dv at padding
    assert "dv" in gate(right)


def test_a_single_large_error_is_stopped_by_its_size() -> None:
    problem = make_problem(kv_heads=2, dtype=torch.bfloat16)
    gate, right = attention_gate(problem, *problem.inputs()), results_of("torch", problem)
    right[0][7, 1, 3] += 0.1
    assert gate(right).startswith("largest error of output")


def test_long_packs_are_gated_on_their_first_and_last_heads() -> None:
    layout = AttentionLayout.from_spans([30, 50], [(4, 20)], 16385)
    problem = Problem(layout, heads=8, kv_heads=4, head_dim=8, dtype=torch.float32)
    gate, right = attention_gate(problem, *problem.inputs()), results_of("torch", problem)
    assert gate(right) is None
    for head, wrong in ((0, True), (1, True), (2, False), (5, False), (6, True), (7, True)):
        spoiled = right[0].clone()
        spoiled[7, head] += 0.1
        assert (gate([spoiled, *right[1:]]) is not None) == wrong


def test_preparing_again_builds_the_plans_that_the_passes_needed() -> None:
    problem = make_problem()
    built: list[AttentionLayout] = []
    plan = AttentionLayout.plan

    def counted(layout: AttentionLayout, build):
        built.append(layout)
        return plan(layout, build)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionLayout, "plan", counted)
        results_of("torch", problem)
        built.clear()
        BACKENDS["torch"].prepare(problem)
        assert len(built) == 1
        BACKENDS["torch"].prepare(make_problem())
        assert len(built) == 1


def test_rates_count_the_visible_area_against_the_peak_of_the_gpu(tmp_path: Path) -> None:
    problem = make_problem(kv_heads=2, dtype=torch.bfloat16)

    def outcome(status: str, *times: float) -> dict[str, object]:
        return {"status": status, **dict(zip(TIMES, times, strict=True)), "peak_mib": 10.0, "prepare_ms": 1.0}

    outcomes = {
        "sdpa_dense": outcome("ok", 1, 2, 3, 3, 4, 5),
        "torch": outcome("ok", 1, 1, 1, 2, 2, 2),
        "flash_varlen_causal": outcome("ok: reference rate of a causal mask, not gated", 1, 2, 3, 3, 4, 5),
        "flex": {"status": "not measured: out of memory"},
    }
    rows = attn_bench.make_rows("mixed", problem, outcomes, BACKENDS, H100)
    dense, ours, causal, flex = rows
    area = int(problem.layout.dense_mask().sum())
    assert dense["forward_tflops"] == pytest.approx(4 * 2 * 16 * area / 2e-3 / 1e12)
    assert dense["backward_tflops"] == pytest.approx(10 * 2 * 16 * area / 4e-3 / 1e12)
    assert dense["forward_percent_of_peak"] == pytest.approx(100 * dense["forward_tflops"] / 989.4)
    # q, k, v and the output in 16 bits, and the log-sum-exp, in 2 ms.
    assert dense["forward_gbs"] == pytest.approx((4 * 330 * 2 * 16 * 2 + 330 * 2 * 4) / 2e-3 / 1e9)
    assert dense["forward_percent_of_bandwidth"] == pytest.approx(100 * dense["forward_gbs"] / 3350)
    assert (dense["prepare_ms"], dense["peak_mib"], dense["backward_p80"]) == (1, 10, 5)
    assert causal["visible_area"] == area - (16 * 15 + 200 * 199) // 2
    assert ours["times_sdpa_dense"] == 2
    assert ours["times_sdpa_documents"] == flex["times_sdpa_dense"] == NOT_MEASURED
    attn_bench.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_given_the_mask_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and forward only, because FlexAttention has no backward on a CPU."""
    from torch.nn.attention import flex_attention

    create = flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, _compile, **named: create(*a, **named))
    monkeypatch.setattr("attention_backends._compiled_flex", lambda: flex_attention.flex_attention)
    problem = make_problem()
    q, k, v = (x.detach() for x in problem.inputs()[0])
    expected = reference.hybrid_attention(q, k, v, problem.layout)
    torch.testing.assert_close(BACKENDS["flex"].prepare(problem)(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "6", "--kv-heads", "4"], "--heads must be a multiple of --kv-heads, both at least 1, got 6 and 4"),
        (["--lengths", "0"], "must be at least 1"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert attn_bench.main(["--out", str(tmp_path), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
