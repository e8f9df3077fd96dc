"""The benchmarks of the fused ops: they run as commands, hold every backend to the specification, and count bytes."""

import csv
import subprocess
import sys
from pathlib import Path

import diffusion_mse_bench
import fused_compare
import fused_report
import pointwise_bytes
import pytest
import rope_swiglu_bench
import torch
from fused_bench import Where
from fused_compare import COMPILED, PLAIN, Outcome, compare
from measure import NOT_MEASURED, Effort, Machine, Quantiles, Timing

from transfusion_fast.kernels import reference
from transfusion_fast.model import ops

ROOT = Path(__file__).parents[2]
MACHINE = Machine("a CPU", "2.13", "-", "-", "abc")
BF16 = Where(torch.device("cpu"), torch.bfloat16, tiny=True)
BENCHMARKS = {"rope_swiglu": (rope_swiglu_bench, 6), "diffusion_mse": (diffusion_mse_bench, 4)}


def rows_in(out, name):
    with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_op_is_measured_on_a_cpu_and_what_needs_a_gpu_is_named(tmp_path, name):
    script = f"benchmarks/{name}_bench.py"
    options = ["--quick", "--device", "cpu", "--seconds", "0.01", "--backends", "triton", "torch", "plain"]
    command = [sys.executable, script, "--out", str(tmp_path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = rows_in(tmp_path, name)
    assert len(rows) == BENCHMARKS[name][1] * 2 * 3  # dtypes, backends
    for row in rows:
        if row["backend"] == "triton":
            assert row["status"] == "not measured: needs a CUDA device"
            assert row["forward_p50"] == row["peak_mib"] == row["times_plain"] == NOT_MEASURED
        else:
            assert row["status"] == "ok"
            assert float(row["forward_p20"]) <= float(row["forward_p50"]) <= float(row["forward_p80"])
            assert float(row["peak_mib"]) > 0
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "triton: not measured: needs a CUDA device" in (tmp_path / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("spoil", ["output", "gradient"])
def test_a_wrong_backend_is_not_timed_and_fails_the_run(tmp_path, monkeypatch, capsys, spoil):
    def wrong(gate, up):
        gate, up = ops._halves(gate, up)
        if spoil == "gradient":
            up = up.detach() + 1.1 * (up - up.detach())
        out = reference.swiglu(gate, up)
        return 1.05 * out if spoil == "output" else out

    monkeypatch.setitem(ops.IMPLEMENTATIONS["torch"], "swiglu", wrong)
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--backends", "torch", "--dtypes", "bf16"]
    assert rope_swiglu_bench.main([*arguments, "--seconds", "0.01"]) == 1
    status = {row["op"]: row["status"] for row in rows_in(tmp_path, "rope_swiglu")}
    assert status["rope"] == "ok"
    expected = {"output": "FAILED: output 0 is off by", "gradient": "FAILED: the gradient of input 1 is off by"}
    assert status["swiglu"].startswith(expected[spoil])


@pytest.mark.parametrize("flow", [False, True])
def test_a_diffusion_error_that_is_off_by_a_hundredth_is_found_in_every_precision(monkeypatch, flow):
    right = ops.IMPLEMENTATIONS["torch"]["diffusion_mse"]
    monkeypatch.setitem(ops.IMPLEMENTATIONS["torch"], "diffusion_mse", lambda *tensors: 1.01 * right(*tensors))
    for dtype in (torch.bfloat16, torch.float32):
        problem = diffusion_mse_bench.error(Where(BF16.device, dtype, tiny=True), ragged=True, flow=flow)
        [outcome], _ = compare(problem, ["torch"], Effort(1, 0))
        assert outcome.status.startswith("FAILED: output 0 is off by")


def test_ours_that_breaks_fails_and_a_compiler_that_breaks_is_left_out(monkeypatch):
    problem = rope_swiglu_bench.swiglu(BF16, fused=False)

    def broken(*arguments, **options):
        raise RuntimeError("it fell over\nin its second line")

    monkeypatch.setitem(ops.IMPLEMENTATIONS["torch"], "swiglu", broken)
    monkeypatch.setattr(fused_compare.torch, "compile", broken)
    outcomes, _ = compare(problem, ["torch", PLAIN, COMPILED], Effort(1, 0))
    assert [o.status for o in outcomes] == [
        "FAILED: RuntimeError: it fell over",
        "ok",
        "not measured: RuntimeError: it fell over",
    ]


def least(*passes):
    return tuple(sum(tensor.least for tensor in tensors) for tensors in passes)


@pytest.mark.parametrize("norm", [False, True])
def test_bytes_of_rope_are_those_that_the_kernels_are_held_to(norm):
    shape = (64, 16, 4, 128)
    forward = pointwise_bytes.rope_forward(*shape, 2, norm)
    backward = pointwise_bytes.rope_backward(*shape, 2) if norm else forward
    assert rope_swiglu_bench.rope(BF16, *shape[1:], norm=norm).least == least(forward, backward)


def test_bytes_of_swiglu_and_of_the_diffusion_error_are_those_that_the_kernels_are_held_to():
    swiglu = least(pointwise_bytes.swiglu_forward(64 * 256, 2), pointwise_bytes.swiglu_backward(64 * 256, 2))
    assert all(rope_swiglu_bench.swiglu(BF16, fused).least == swiglu for fused in (False, True))
    offsets, targets = range(0, 4 * 256 + 1, 256), {"target_ptr": 4, "x_0_ptr": 4}
    forward, mean, backward = (
        pointwise_bytes.mse_forward(offsets, 32, 2, targets),
        pointwise_bytes.mse_mean(offsets, 32),
        pointwise_bytes.mse_backward(offsets, 32, 2, targets),
    )
    assert diffusion_mse_bench.error(BF16, ragged=False, flow=True).least == least([*forward, *mean], backward)


def test_a_row_holds_the_bytes_of_both_passes_to_the_copies():
    problem = rope_swiglu_bench.swiglu(BF16, fused=True)

    def timing(forward, backward):
        return Timing(Quantiles(forward, forward, forward), Quantiles(backward, backward, backward))

    outcomes = [Outcome("torch", "ok", timing(2, 4), 2**21), Outcome(PLAIN, "ok", timing(4, 8), 2**22)]
    row, plain = fused_report.rows_of(problem, outcomes, timing(1, 2), MACHINE)
    assert row.forward_gbs == problem.least[0] / 2e6
    assert (row.forward_of_copy, row.backward_of_copy, row.peak_mib) == (0.5, 0.5, 2)
    assert (row.times_plain, plain.times_plain) == (2, 1)
