"""The benchmark of the memory-bound ops runs as a command, holds every backend to the specification, counts bytes."""

import csv
import subprocess
import sys
from pathlib import Path

import pointwise_bench
import pytest
import torch
from pointwise_bench import PLAIN, Setting, measure_problem
from timing import COLUMNS, NOT_MEASURED, both_ms

from transfusion_fast.kernels import reference
from transfusion_fast.model import ops

ROOT = Path(__file__).parents[2]
MACHINE = {"hardware": "a CPU", "torch": "2.13", "triton": "-", "flash_attn": "-", "git": "abc"}
BF16 = Setting(torch.device("cpu"), torch.bfloat16, tiny=True)
REPORTS = {"rope_swiglu": 6, "diffusion_mse": 4}  # problems


def rows_in(out, name):
    with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_op_is_measured_on_a_cpu_and_what_needs_a_gpu_is_named(tmp_path):
    options = ["--quick", "--device", "cpu", "--seconds", "0.01", "--backends", "triton", "torch", "plain"]
    command = [sys.executable, "benchmarks/pointwise_bench.py", "--out", str(tmp_path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, problems in REPORTS.items():
        rows = rows_in(tmp_path, name)
        assert len(rows) == problems * 2 * 3  # dtypes, backends
        for row in rows:
            if row["backend"] == "triton":
                assert row["status"] == "not measured: needs a CUDA device"
                assert row["forward_p50"] == row["peak_mib"] == row["times_plain"] == NOT_MEASURED
            else:
                assert row["status"] == "ok"
                assert float(row["forward_p20"]) <= float(row["forward_p50"]) <= float(row["forward_p80"])
                assert float(row["peak_mib"]) > 0
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert "not measured: needs a CUDA device" in text


@pytest.mark.parametrize("spoil", ["output", "gradient"])
def test_a_wrong_backend_is_not_timed_and_fails_the_run(tmp_path, monkeypatch, capsys, spoil):
    def wrong(gate, up):
        gate, up = (gate, up) if up is not None else gate.chunk(2, dim=-1)
        if spoil == "gradient":
            up = up.detach() + 1.1 * (up - up.detach())
        out = reference.swiglu(gate, up)
        return 1.05 * out if spoil == "output" else out

    monkeypatch.setitem(ops.IMPLEMENTATIONS["torch"], "swiglu", wrong)
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--backends", "torch", "--dtypes", "bf16"]
    assert pointwise_bench.main([*arguments, "--seconds", "0", "--reports", "rope_swiglu"]) == 1
    status = {row["op"]: row["status"] for row in rows_in(tmp_path, "rope_swiglu")}
    assert status["rope"] == "ok"
    expected = {"output": "FAILED: rms error of output 0", "gradient": "FAILED: rms error of the gradient of input 1"}
    assert status["swiglu"].startswith(expected[spoil])


@pytest.mark.parametrize("flow", [False, True])
def test_a_diffusion_error_that_is_off_by_a_hundredth_is_found_in_every_precision(monkeypatch, flow):
    right = ops.IMPLEMENTATIONS["torch"]["diffusion_mse"]
    monkeypatch.setitem(ops.IMPLEMENTATIONS["torch"], "diffusion_mse", lambda *tensors: 1.01 * right(*tensors))
    for dtype in (torch.bfloat16, torch.float32):
        problem = pointwise_bench.diffusion_mse(Setting(BF16.device, dtype, tiny=True), ragged=True, flow=flow)
        outcomes, _ = measure_problem(problem, ["torch"], 0)
        assert outcomes["torch"]["status"].startswith("FAILED: rms error of output 0")


def test_ours_that_breaks_fails_and_a_compiler_that_breaks_is_left_out(monkeypatch):
    problem = pointwise_bench.swiglu(BF16, fused=False)

    def broken(*arguments, **options):
        raise RuntimeError("it fell over\nin its second line")

    monkeypatch.setitem(ops.IMPLEMENTATIONS["torch"], "swiglu", broken)
    monkeypatch.setattr(torch, "compile", broken)
    outcomes, copies = measure_problem(problem, ["torch", PLAIN, "plain, compiled"], 0)
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "torch": "FAILED: RuntimeError: it fell over",
        PLAIN: "ok",
        "plain, compiled": "not measured: RuntimeError: it fell over",
    }
    assert both_ms(copies) > 0


def test_bytes_are_those_of_each_input_and_each_output_once():
    """In bf16; the rotary table, images' targets, errors and offsets have four bytes a number."""
    T, H, G, D = 64, 16, 4, 128
    qk, table, weights = T * (H + G) * D * 2, T * D * 4, 2 * D * 2
    assert pointwise_bench.rope(BF16, H, G, D, norm=False).least == (2 * qk + table, 2 * qk + table)
    norm = (2 * qk + table + weights, 3 * qk + table + 2 * weights)  # backward also reads q, k and the weights
    assert pointwise_bench.rope(BF16, H, G, D, norm=True).least == norm
    half = 64 * 256 * 2
    assert all(pointwise_bench.swiglu(BF16, fused).least == (3 * half, 5 * half) for fused in (False, True))
    prediction, read = 4 * 256 * 32 * 2, 4 * 256 * 32 * (2 + 4 + 4) + 5 * 4 + 4 * 4
    assert pointwise_bench.diffusion_mse(BF16, ragged=False, flow=True).least == (read, read + prediction)


def test_a_row_holds_the_bytes_of_both_passes_to_the_copies():
    problem = pointwise_bench.swiglu(BF16, fused=True)

    def times(forward, backward):
        return dict(zip(COLUMNS, [forward] * 3 + [backward] * 3, strict=True))

    outcomes = {
        "torch": {"status": "ok", **times(2, 4), "peak_mib": 2},
        PLAIN: {"status": "ok", **times(4, 8), "peak_mib": 4},
    }
    row, plain = pointwise_bench.make_rows(problem, outcomes, times(1, 2), MACHINE)
    half = 64 * 256 * 2  # bytes of one [T, F] tensor
    assert (row["forward_least_bytes"], row["backward_least_bytes"]) == (3 * half, 5 * half)
    assert row["forward_gbs"] == pytest.approx(3 * half / 2e-3 / 1e9)
    assert row["backward_copy_gbs"] == pytest.approx(5 * half / 2e-3 / 1e9)
    assert (row["forward_of_copy"], row["backward_of_copy"], row["peak_mib"]) == (0.5, 0.5, 2)
    assert (row["times_plain"], plain["times_plain"]) == (2, 1)
