"""The attention benchmark runs as a command, holds every backend to the reference, and names what it left out."""

import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import attention_backends
import attn_bench
import gate
import mixes
import numpy as np
import pytest
import torch
from attention_backends import BACKENDS, Problem, attention_gate
from gate import Backend, run
from timing import COLUMNS as TIMES
from timing import NOT_MEASURED

from transfusion_fast.kernels import attention_cpu_plan, reference
from transfusion_fast.kernels.layout import AttentionLayout

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MEASURED_ON_CPU = ["torch", "sdpa_dense", "sdpa_documents"]
H100 = dict.fromkeys(("torch", "triton", "flash_attn", "git"), "-") | {"hardware": "NVIDIA H100 80GB HBM3"}


def make_problem(kv_heads=1, dtype=torch.float32, total_length=330):
    layout = AttentionLayout.from_spans([40, 300 - 40, 1], [(0, 16), (44, 200)], total_length)
    return Problem(layout, heads=2, kv_heads=kv_heads, head_dim=16, dtype=dtype)


def gate_and_results(problem, name="torch"):
    qkv, upstream = problem.inputs()
    return attention_gate(problem, qkv, upstream), run(BACKENDS[name].prepare(problem), qkv, (upstream,))


def rows_in(out):
    with (out / "attention.csv").open(encoding="utf-8", newline="") as file:
        return {row["backend"]: row for row in csv.DictReader(file)}


def test_the_command_measures_what_a_cpu_has_and_names_the_rest(tmp_path):
    command = [sys.executable, "benchmarks/attn_bench.py", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = rows_in(tmp_path)
    assert list(rows) == list(BACKENDS)
    published = (ROOT / "docs/benchmarks/attention.csv").read_text(encoding="utf-8").splitlines()[0]
    assert ",".join(rows["torch"]) == published
    for name, row in rows.items():
        if name in MEASURED_ON_CPU:
            assert row["status"] == "ok"
            assert row["kernel"] == {"sdpa_dense": "flash 1", "sdpa_documents": "flash 2"}.get(name, "")
            assert float(row["forward_p20"]) <= float(row["forward_p50"]) <= float(row["forward_p80"])
            assert float(row["peak_mib"]) > 0 and float(row["prepare_ms"]) > 0
        else:
            assert row["status"].startswith("not measured: needs a CUDA device")
            assert row["forward_p50"] == row["times_sdpa_dense"] == NOT_MEASURED
    assert float(rows["sdpa_dense"]["times_sdpa_dense"]) == 1
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    for text in ((tmp_path / "attention.md").read_text(encoding="utf-8"), done.stdout):
        assert "- flashmask, all problems: not measured: needs a CUDA device; flash_mask is not installed\n" in text
        assert "Not applicable: measured on" in text


@pytest.mark.parametrize(
    ("kind", "message"),
    [("output", "rms error of output"), ("gradient", "rms error of dk"), ("error", "RuntimeError: the kernel")],
)
def test_a_wrong_backend_of_ours_fails_the_run(tmp_path, monkeypatch, kind, message):
    right = BACKENDS["torch"]

    def prepare(problem):
        forward = right.prepare(problem)

        def wrong(q, k, v):
            if kind == "error":
                raise RuntimeError("the kernel fell over\nin its second line")
            if kind == "gradient":
                k = k.detach() + 0.99 * (k - k.detach())
            out = forward(q, k, v)
            return out * torch.linspace(1, 1.001, len(out))[:, None, None] if kind == "output" else out

        return wrong

    monkeypatch.setitem(BACKENDS, "torch", right._replace(prepare=prepare))
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--backends", "torch", "sdpa_documents"]
    assert attn_bench.main(options) == 1
    status = {name: row["status"] for name, row in rows_in(tmp_path).items()}
    assert status["sdpa_documents"] == "ok"
    assert status["torch"].startswith(f"FAILED: {message}") and "\n" not in status["torch"]
    assert "- torch, all problems: FAILED" in (tmp_path / "attention.md").read_text(encoding="utf-8")


def test_a_missing_kernel_and_too_little_memory_do_not_fail_the_run():
    def raises(error):
        def prepare(problem):
            raise error

        return Backend(prepare, is_ours=True)

    errors = {"a": NotImplementedError("no kernel yet"), "b": torch.cuda.OutOfMemoryError("tried to allocate")}
    backends = {name: raises(error) for name, error in errors.items()}
    outcomes = attn_bench.compare_backends(make_problem(), backends, CPU, 0, time.monotonic() + 60)
    assert [o["status"] for o in outcomes.values()] == ["not measured: no kernel yet", "not measured: out of memory"]


def test_nothing_starts_after_the_deadline(monkeypatch):
    backends = {name: BACKENDS[name] for name in ("torch", "triton")}
    outcomes = attn_bench.compare_backends(make_problem(), backends, CPU, 0, time.monotonic() - 1)
    assert {o["status"] for o in outcomes.values()} == {"not measured: time budget"}
    clock = iter([0, 0, 2])  # the deadline passes while the first backend is checked
    monkeypatch.setattr(gate.time, "monotonic", lambda: next(clock))
    late = {"torch": BACKENDS["torch"], "sdpa_dense": BACKENDS["sdpa_dense"]}
    outcomes = attn_bench.compare_backends(make_problem(), late, CPU, 0, 1)
    assert [o["status"] for o in outcomes.values()] == ["ok", "not measured: time budget"]


def test_masks_that_do_not_fit_are_left_out_with_their_size():
    problem = make_problem(total_length=2**21)
    assert "its masks would take 20480.0 GiB" in BACKENDS["sdpa_dense"].missing(problem)
    assert BACKENDS["sdpa_documents"].missing(problem) is None


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_gate_holds_to_the_definition(kv_heads):
    """A result passes that the reference gives in double precision, and none that differs from it by 3e-5."""
    problem = make_problem(kv_heads)
    qkv, upstream = problem.inputs()
    exact = [x.detach().double().requires_grad_() for x in qkv]
    right = run(lambda *qkv: reference.hybrid_attention(*qkv, problem.layout), exact, (upstream.double(),))
    wrong_with = attention_gate(problem, qkv, upstream)
    assert wrong_with(right) is None
    for number in range(4):
        wrong = [x + (i == number) * 3e-5 * x.square().mean().sqrt() for i, x in enumerate(right)]
        assert "rms error" in wrong_with(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEASURED_ON_CPU)
def test_the_gate_lets_right_backends_through_with_and_without_sdpa_of_documents(monkeypatch, name, dtype):
    problem = make_problem(kv_heads=2, dtype=dtype)
    wrong_with, results = gate_and_results(problem, name)
    assert wrong_with(results) is None
    monkeypatch.setattr(attention_backends, "_masks_too_large", lambda *_: "too large")
    wrong_with, _ = gate_and_results(problem, "torch")
    assert wrong_with(results) is None


def test_the_yardstick_of_half_precision_is_the_error_of_sdpa_of_documents(monkeypatch):
    """If that were exact, less would be allowed."""
    problem = make_problem(kv_heads=2, dtype=torch.bfloat16)
    wrong_with, results = gate_and_results(problem)
    noise = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(0))
    assert wrong_with([results[0] + 0.002 * noise, *results[1:]]).startswith("rms error of output")
    results[0] = results[0] + 0.001 * noise
    assert wrong_with(results) is None
    documents = attention_backends._documents

    def precise(problem):
        forward = documents(problem)
        return lambda *qkv: forward(*(x.double() for x in qkv))

    monkeypatch.setattr(attention_backends, "_documents", precise)
    assert attention_gate(problem, *problem.inputs())(results).startswith("rms error of output")


def test_the_gate_stops_nan_causal_masks_large_errors_and_gradients_of_padding():
    problem = make_problem(kv_heads=2)
    wrong_with, right = gate_and_results(problem)
    assert "output is nan" in wrong_with([torch.full_like(right[0], float("nan")), *right[1:]])
    causal = AttentionLayout.from_spans(problem.lengths, [], problem.layout.total_length)
    assert "output" in wrong_with(gate_and_results(replace(problem, layout=causal))[1])
    right[0][-1] += 1  # the output at padding is not defined
    assert wrong_with(right) is None
    right[3][-1] += 1  # dv at padding
    assert "dv" in wrong_with(right)
    wrong_with, right = gate_and_results(make_problem(kv_heads=2, dtype=torch.bfloat16))
    right[0][7, 1, 3] += 0.1
    assert wrong_with(right).startswith("largest error of output")


def test_long_packs_are_gated_on_their_first_and_last_heads():
    layout = AttentionLayout.from_spans([30, 50], [(4, 20)], 16385)
    wrong_with, right = gate_and_results(Problem(layout, heads=8, kv_heads=4, head_dim=8, dtype=torch.float32))
    assert wrong_with(right) is None
    for head, wrong in ((0, True), (1, True), (2, False), (5, False), (6, True), (7, True)):
        spoiled = right[0].clone()
        spoiled[7, head] += 0.1
        assert (wrong_with([spoiled, *right[1:]]) is not None) == wrong


def test_preparing_again_makes_the_plan_that_the_passes_use():
    problem = make_problem()
    for times in (1, 2):
        forward = BACKENDS["torch"].prepare(problem)
        forward(*problem.inputs()[0])
        info = attention_cpu_plan._plan.cache_info()
        assert (info.hits, info.misses) == (1, 1), times


def test_rates_count_the_visible_area_against_the_peak_of_the_gpu(tmp_path):
    problem = make_problem(kv_heads=2, dtype=torch.bfloat16)

    def outcome(status, *times):
        return {"status": status, **dict(zip(TIMES, times, strict=True)), "peak_mib": 10.0, "prepare_ms": 1.0}

    outcomes = {
        "sdpa_dense": outcome("ok", 1, 2, 3, 3, 4, 5),
        "torch": outcome("ok", 1, 1, 1, 2, 2, 2),
        "flash_varlen_causal": outcome("ok: reference rate of a causal mask, not gated", 1, 2, 3, 3, 4, 5),
        "flex": {"status": "not measured: out of memory"},
    }
    dense, ours, causal, flex = attn_bench.make_rows("mixed", problem, outcomes, BACKENDS, H100)
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


def test_rows_of_the_same_machine_and_code_are_kept_until_nothing_is_left(tmp_path, monkeypatch, capsys):
    machine = H100 | {"git": "abc1234"}
    monkeypatch.setattr(attn_bench.timing, "describe_machine", lambda device: machine)
    measured, compare = [], attn_bench.compare_backends

    def measure(problem, *rest):
        measured.append(problem.head_dim)
        deadline = 0 if measured == [16, 32] else float("inf")
        return compare(problem, *rest[:-1], deadline)

    def run_again():
        before, out = len(measured), ["--out", str(tmp_path)]
        options = ["--quick", "--device", "cpu", "--head-dim", "16", "32", "--backends", "torch"]
        return attn_bench.main(options + out), measured[before:]

    monkeypatch.setattr(attn_bench, "compare_backends", measure)
    assert run_again() == (3, [16, 32])
    assert "time ran out with 1 of 2 shapes left; run it again to go on" in capsys.readouterr().err
    first = (tmp_path / "attention.csv").read_text(encoding="utf-8").splitlines()[1]
    assert run_again() == (0, [32])
    assert (tmp_path / "attention.csv").read_text(encoding="utf-8").splitlines()[1] == first
    assert run_again() == (0, [])
    assert capsys.readouterr().out.count("| mixed | 512 |") == 2 + 2  # rows of two whole reports
    for machine["git"] in ("def5678", "def5678+", "def5678+"):  # another revision, then one that is not committed
        assert run_again() == (0, [16, 32])


def test_what_failed_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(attn_bench.timing, "describe_machine", lambda device: H100 | {"git": "abc1234"})
    options = ["--quick", "--device", "cpu", "--backends", "torch", "--out", str(tmp_path)]
    right = BACKENDS["torch"]
    monkeypatch.setitem(BACKENDS, "torch", right._replace(prepare=lambda problem: lambda *qkv: 2 * qkv[0]))
    assert attn_bench.main(options) == 1
    monkeypatch.setitem(BACKENDS, "torch", right)
    assert attn_bench.main(options) == 0
    assert rows_in(tmp_path)["torch"]["status"] == "ok"


@pytest.mark.parametrize("name", mixes.NAMES)
def test_segments_of_a_layout_make_up_its_mask(name):
    layout = mixes.sample(name, 1531)
    mask = np.zeros((1531, 1531), dtype=bool)
    for start, end, document_start, is_image in mixes.segments(layout):
        for row in range(start, end):
            mask[row, document_start : end if is_image else row + 1] = True
    assert np.array_equal(mask, layout.dense_mask().numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "6", "--kv-heads", "4"], "--heads must be a multiple of --kv-heads, both at least 1, got 6 and 4"),
        (["--lengths", "0"], "must be at least 1"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, arguments, message):
    assert attn_bench.main(["--out", str(tmp_path), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
