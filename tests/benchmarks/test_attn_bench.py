"""The attention benchmark: it runs as a command, holds every backend to the reference, and says what it left out."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import attn_bench
import mixes
import numpy as np
import pytest
import torch
from attn_compare import compare
from attn_gate import NAMES, Gate, make_gate, make_inputs, run
from attn_libraries import attention_slices
from attn_plot import draw
from attn_problem import Forward, Problem
from attn_report import Measured, Outcome, make_rows, markdown
from backends import BACKENDS, Flex, Ours, SdpaDense, SdpaDocuments
from measure import NOT_MEASURED, Effort, Machine, Quantiles, Timing, autograd_step, peaks_of, time_steps

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MEASURED_ON_CPU = {"torch", "sdpa_dense", "sdpa_documents"}
H100 = Machine("NVIDIA H100 80GB HBM3", "2.11.0", "3.6.0", "not installed", "abc1234")


def make_problem(kv_heads: int = 1, dtype: torch.dtype = torch.float32, total_length: int = 330) -> Problem:
    layout = AttentionLayout.from_spans([40, 300 - 40, 1], [(0, 16), (44, 200)], total_length)
    return Problem(layout, heads=2, kv_heads=kv_heads, head_dim=16, dtype=dtype)


def gate_of(problem: Problem) -> Gate:
    inputs = make_inputs(problem)
    documents = SdpaDocuments()
    return make_gate(problem, inputs, run(documents.prepare(problem), inputs))


class Wrong(Ours):
    """Ours with one result spoiled."""

    def __init__(self, spoil: str) -> None:
        super().__init__("torch")
        self.spoil = spoil

    def prepare(self, problem: Problem) -> Forward:
        forward = super().prepare(problem)

        def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if self.spoil == "error":
                raise RuntimeError("the kernel fell over\nin its second line")
            if self.spoil == "gradient":
                k = k.detach() + 0.99 * (k - k.detach())
            out = forward(q, k, v)
            return out * torch.linspace(1, 1.001, len(out))[:, None, None] if self.spoil == "output" else out

        return wrong


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "benchmarks/attn_bench.py", "--quick", "--device", "cpu", "--out", str(out)]
    return out, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "attention.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_quick_measures_what_a_cpu_has_and_names_the_rest(quick) -> None:
    out, done = quick
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in rows_of(out)}
    assert list(rows) == list(BACKENDS)
    for name, row in rows.items():
        if name in MEASURED_ON_CPU:
            assert row["status"] == "ok"
            assert float(row["forward_p20"]) <= float(row["forward_p50"]) <= float(row["forward_p80"])
            assert float(row["peak_mib"]) > 0
        else:
            assert row["status"].startswith("not measured: needs a CUDA device")
            assert row["forward_p50"] == row["times_sdpa_dense"] == NOT_MEASURED
    assert float(rows["sdpa_dense"]["times_sdpa_dense"]) == 1


def test_quick_writes_a_picture_and_a_summary(quick) -> None:
    out, done = quick
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    summary = (out / "attention.md").read_text(encoding="utf-8")
    for text in (summary, done.stdout):
        assert "flex, all shapes: needs a CUDA device: FlexAttention has no backward on a CPU" in text


@pytest.mark.parametrize("spoil", ["output", "gradient", "error"])
def test_a_wrong_backend_of_ours_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    monkeypatch.setitem(BACKENDS, "torch", Wrong(spoil))
    code = attn_bench.main(
        ["--quick", "--device", "cpu", "--out", str(tmp_path), "--backends", "torch", "sdpa_documents"]
    )
    status = {row["backend"]: row["status"] for row in rows_of(tmp_path)}
    assert code == 1
    assert status["sdpa_documents"] == "ok"
    expected = {"output": "rms error of output", "gradient": "rms error of dk", "error": "RuntimeError: the kernel"}
    assert status["torch"].startswith(f"FAILED: {expected[spoil]}")
    assert "\n" not in status["torch"]
    assert "## Failed" in (tmp_path / "attention.md").read_text(encoding="utf-8")


def test_what_is_missing_does_not_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Ours):
        def prepare(self, problem: Problem) -> Forward:
            raise NotImplementedError("no kernel yet")

    class TooLarge(SdpaDense):
        def prepare(self, problem: Problem) -> Forward:
            raise torch.cuda.OutOfMemoryError("tried to allocate")

    outcomes = compare(make_problem(), [Missing("torch"), TooLarge()], CPU, Effort(1, 1), time.monotonic() + 60)
    assert [o.status for o in outcomes.values()] == ["not measured: no kernel yet", "not measured: out of memory"]


def test_nothing_starts_after_the_deadline() -> None:
    outcomes = compare(make_problem(), [BACKENDS["torch"], BACKENDS["triton"]], CPU, Effort(1, 1), time.monotonic() - 1)
    assert {o.status for o in outcomes.values()} == {"not measured: time budget"}


def test_masks_that_do_not_fit_are_left_out_with_their_size() -> None:
    problem = make_problem(total_length=2**21)
    assert "its [T, T] mask, as booleans and as a bias, would take 20480.0 GiB" in SdpaDense().available(problem)
    assert SdpaDocuments().available(problem) is None


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_gate_s_reference_is_the_definition(kv_heads: int) -> None:
    problem = make_problem(kv_heads)
    inputs = make_inputs(problem)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs.qkv)
    out = reference.hybrid_attention(q, k, v, problem.layout)
    expected = (out, *torch.autograd.grad(out, (q, k, v), inputs.gradient.double()))
    for name, got, right in zip(NAMES, gate_of(problem).reference, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MEASURED_ON_CPU))
def test_the_gate_lets_right_backends_through(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(kv_heads=2, dtype=dtype)
    assert gate_of(problem).check(run(BACKENDS[name].prepare(problem), make_inputs(problem))) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_needs_no_per_document_sdpa(dtype: torch.dtype) -> None:
    """Where its masks do not fit, a blockwise computation in the same dtype stands for it."""
    problem = make_problem(kv_heads=2, dtype=dtype)
    inputs = make_inputs(problem)
    gate, usual = make_gate(problem, inputs, plain=None), gate_of(problem)
    assert gate.check(run(BACKENDS["torch"].prepare(problem), inputs)) is None
    for error, other in zip(gate.plain, usual.plain, strict=True):
        assert 0.1 < error.rms / other.rms < 10


def test_the_gate_stops_nan_causal_masks_and_gradients_of_padding() -> None:
    problem = make_problem(kv_heads=2)
    inputs, gate = make_inputs(problem), gate_of(problem)
    right = run(BACKENDS["torch"].prepare(problem), inputs)
    assert "output is nan" in gate.check((torch.full_like(right[0], float("nan")), *right[1:]))
    offsets = problem.layout.document_offsets
    causal = AttentionLayout.from_spans(offsets.diff().numpy(), [], problem.layout.total_length)
    assert "output" in gate.check(run(BACKENDS["torch"].prepare(replace(problem, layout=causal)), inputs))
    right[3][-1] += 1  # dv at padding
    assert "dv" in gate.check(right)


def test_long_packs_are_gated_on_their_first_and_last_heads() -> None:
    """A mistake in the last head must not slip through the sample."""
    layout = AttentionLayout.from_spans([30, 50], [(4, 20)], 16385)
    problem = Problem(layout, heads=8, kv_heads=4, head_dim=8, dtype=torch.float32)
    inputs, gate = make_inputs(problem), gate_of(problem)
    assert gate.heads.kv.tolist() == [0, 3]
    assert gate.heads.query.tolist() == [0, 1, 6, 7]
    right = run(BACKENDS["torch"].prepare(problem), inputs)
    assert gate.check(right) is None
    right[0][7, 7] += 0.1
    assert "output" in gate.check(right)


@pytest.mark.parametrize("name", mixes.NAMES)
def test_slices_make_up_the_mask_exactly_once(name: str) -> None:
    layout = mixes.sample(name, 1531)
    count = np.zeros((1531, 1531), dtype=np.int64)
    for query_start, query_end, key_start, key_end, kind in attention_slices(layout):
        rows, columns = query_end - query_start, key_end - key_start
        square = np.ones((rows, columns), dtype=np.int64)
        count[query_start:query_end, key_start:key_end] += np.tril(square, columns - rows) if kind == 1 else square
    assert np.array_equal(count, layout.dense_mask().numpy())


def test_preparing_again_plans_what_the_passes_asked_for() -> None:
    problem, ours = make_problem(), Ours("torch")
    run(ours.prepare(problem), make_inputs(problem))
    ours.prepare(problem)
    assert len(ours._last[1]._plans) == 1
    ours.prepare(make_problem())
    assert not ours._last[1]._plans


def test_steps_take_turns_in_either_order() -> None:
    calls = []

    def step(name: str):
        def forward():
            calls.append(name)
            return lambda: calls.append(f"{name} backward")

        return forward

    timings = time_steps({"a": step("a"), "b": step("b")}, CPU, Effort(repeats=2, seconds=1))
    forth, back = ["a", "a backward", "b", "b backward"], ["b", "b backward", "a", "a backward"]
    assert calls == forth + back + forth  # the first is not timed
    assert timings["a"].forward.p20 <= timings["a"].forward.p80


def test_autograd_steps_return_every_gradient() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    gradients = autograd_step(torch.mul, (x, y), torch.ones(3))()()
    assert [g.tolist() for g in gradients] == [[2.0] * 3, [1.0] * 3]


def test_rates_count_the_visible_area_against_the_gpu_s_peak(tmp_path: Path) -> None:
    problem = make_problem(kv_heads=2, dtype=torch.bfloat16)
    timing = Timing(Quantiles(1, 2, 3), Quantiles(3, 4, 5))
    outcomes = {
        "sdpa_dense": Outcome("ok", Measured(1.0, timing, 10.0)),
        "torch": Outcome("ok", Measured(1.0, Timing(Quantiles(1, 1, 1), Quantiles(2, 2, 2)), 10.0)),
        "flash_varlen_causal": Outcome("ok: reference rate of a causal mask, not gated", Measured(1.0, timing, 10.0)),
        "flex": Outcome("not measured: out of memory"),
    }
    rows = make_rows("mixed", problem, outcomes, {"flash_varlen_causal"}, H100)
    dense, ours, causal, flex = rows
    area = int(problem.layout.dense_mask().sum())
    assert dense.forward_tflops == pytest.approx(4 * 2 * 16 * area / 2e-3 / 1e12)
    assert dense.backward_tflops == pytest.approx(10 * 2 * 16 * area / 4e-3 / 1e12)
    assert dense.forward_percent_of_peak == pytest.approx(100 * dense.forward_tflops / 989.4)
    assert causal.visible_area == area - (16 * 15 + 200 * 199) // 2
    assert ours.times_sdpa_dense == 2
    assert ours.times_sdpa_documents == flex.times_sdpa_dense == NOT_MEASURED
    draw(rows, tmp_path / "picture.png")
    assert "flex, all shapes: out of memory" in markdown(rows, H100, "picture.png")


def test_peaks_are_found_by_the_gpu_s_name() -> None:
    assert peaks_of("NVIDIA H200") == (989.4, 4800.0)
    assert peaks_of("NVIDIA A100-SXM4-40GB") == (312.0, 1555.0)
    assert peaks_of("NVIDIA GeForce RTX 5090") is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_given_the_mask_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and forward only, as far as a CPU goes."""
    from torch.nn.attention import flex_attention

    create = flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, _compile, **named: create(*a, **named))
    monkeypatch.setattr("backends._compiled_flex", lambda: flex_attention.flex_attention)
    problem = make_problem()
    q, k, v = (x.detach() for x in make_inputs(problem).qkv)
    expected = reference.hybrid_attention(q, k, v, problem.layout)
    torch.testing.assert_close(Flex().prepare(problem)(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixes", "prose"], "--mixes must be of pairs, text, mixed, interleaved, tiny, long, got 'prose'"),
        (["--backends", "fast"], "--backends must be of triton, torch,"),
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
