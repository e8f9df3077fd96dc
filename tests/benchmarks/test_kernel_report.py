"""The kernel report: what the compiler makes of every shipped configuration, its rules, and counted bytes."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import mixes
import pytest
import torch
from pointwise_report import PYTORCH, cases, mse_bytes, norm_bytes, rope_bytes, swiglu_bytes

from transfusion_fast.kernels import swiglu
from transfusion_fast.kernels.attention_configs import ARCHITECTURES, KERNELS

ROOT = Path(__file__).resolve().parents[2]


def make_report(folder, *options):
    """Write a report from another process, because kernels are interpreted in this one."""
    command = [sys.executable, ROOT / "benchmarks" / "kernel_report.py", "--out", folder, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return the folder of a report of a sample for all targets at one head dimension."""
    return make_report(tmp_path_factory.mktemp("report"), "--rules-only", "--head-dims", "128")


@pytest.fixture(scope="module")
def hopper(report):
    """Return the rows of sm_90 in bf16, whose loops are read."""
    return [row for row in rows(report / "kernels.csv") if (row["arch"], row["dtype"]) == ("90", "bf16")]


def check_rules(kernels, archs, head_dims):
    for arch in archs:
        for kernel in KERNELS:
            chosen = [row for row in kernels if row["kernel"] == kernel and int(row["arch"]) == arch]
            found = {(row["dtype"], int(row["head_dim"])) for row in chosen}
            assert found >= {(dtype, head_dim) for dtype in ("bf16", "fp32") for head_dim in head_dims}
    assert [f"{row['name']}: {row['broken_rules']}" for row in kernels if row["broken_rules"]] == []


def test_configurations_keep_the_rules(report):
    check_rules(rows(report / "kernels.csv"), ARCHITECTURES, (128,))


@pytest.mark.slow
def test_every_configuration_keeps_the_rules(tmp_path):
    report = make_report(tmp_path)
    check_rules(rows(report / "kernels.csv"), ARCHITECTURES, (32, 64, 128, 256))
    for arch in ARCHITECTURES:
        check_widths(report, arch)


def test_the_bound_of_weights_in_fp32_keeps_what_is_no_number():
    """The interpreter keeps it in any case."""
    script = "import kernel_report as r; print(r.compile_variant(r.Variant('backward_dq', 90, 'fp32', 64, 64)).ptx)"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "min.NaN.f32" in done.stdout and "min.f32" not in done.stdout, done.stderr


def test_memory_bound_kernels_move_16_bytes_a_thread_without_spills(report):
    check_widths(report, 90)


def check_widths(report, arch):
    chosen = [row for row in rows(report / "pointwise.csv") if (row["arch"], row["dtype"]) == (str(arch), "bf16")]
    assert {row["case"] for row in chosen} == cases(2).keys()
    assert [f"{row['name']}: {row['broken_rules']}" for row in chosen if row["broken_rules"]] == []
    # The mean of the diffusion error reads one number of each 4 KiB that forward reads, wherever an image starts.
    for row in (row for row in chosen if row["case"] != "diffusion_mse mean"):
        assert row["load_bits"] == "128"
        assert row["store_bits"] == ("" if row["case"].startswith("diffusion_mse forward") else "128")
        assert float(row["wide_share"]) > 0.99, row["name"]


def test_memory_bound_kernels_touch_device_memory_once_in_and_once_out(report):
    for row in rows(report / "pointwise.csv"):
        # Beyond that, through the norm, each program's sums of the weights' gradients: written, and read again.
        assert 1 <= float(row["once_by_least"]) < (1.025 if "norm backward" in row["case"] else 1.002), row["name"]
        # With four chunks of heads of q and one of k, reading the table again adds 4/21, the weights of a norm 1/34.
        # A tile of RMS norm with 4,096 columns is one row, and reads as many weights as numbers, from a cache.
        # Each program of its backward reads the weights, and writes sums that are read again: 2.6 % of three tensors.
        most = {"rope": 1.25, "rms_norm forward,": 1.51, "rms_norm backward": 1.03}
        most = next((limit for name, limit in most.items() if row["case"].startswith(name)), 1.01)
        assert 1 <= float(row["moved_by_least"]) < most, row["name"]


def test_the_forward_loop_on_hopper_works_on_matrices_during_exponentials(hopper):
    chosen = [row for row in hopper if row["kernel"] == "forward" and row["head_dim"] == "128"]
    assert len(chosen) == 2 * 2
    for row in chosen:
        assert int(row["full_exponentials_in_flight"]) >= 28, row["name"]
        assert float(row["full_ratio"]) <= 0.53


def test_full_steps_have_no_mask(hopper):
    """A mask compares every value: a step of 32 columns of 64 rows has 16 values a thread of 128, at least."""
    assert len(hopper) == 2 * (3 * 2 + 2)  # without and with copies
    for row in hopper:
        assert int(row["full_compares"]) <= 12 < int(row["partial_compares"]), row["name"]


@pytest.mark.parametrize(
    ("mix", "most"),
    [("pairs", 0.85), ("text", 0.85), ("mixed", 0.85), ("interleaved", 1.0), ("long", 1.0), ("tiny", 0.45)],
)
def test_tiles_on_hopper_visit_less_than_a_fixed_grid(report, mix, most):
    ratios = {
        row["direction"]: float(row["visited_by_flex"])
        for row in rows(report / "areas.csv")
        if (row["mix"], row["arch"], row["head_dim"]) == (mix, "90", "128")
    }
    assert ratios["forward"] <= most
    assert ratios["backward"] <= 1.1 * ratios["forward"]


def test_estimates_are_called_estimates(report):
    text = (report / "kernel_report.md").read_text()
    assert "nothing here ran on a GPU" in text
    assert "An estimate, not a measurement" in text
    columns = rows(report / "estimates.csv")[0].keys() - {"memory_us"}
    assert all(name.startswith("estimated_") for name in columns if "us" in name.split("_"))
    assert (report / "kernel_report.png").stat().st_size > 10_000


def test_as_many_blocks_share_a_multiprocessor_as_fit(report):
    for row in rows(report / "kernels.csv"):
        warps, blocks = int(row["warps"]), int(row["blocks_per_multiprocessor"])
        registers = -(-int(row["registers"]) // 8) * 8 * 32 * warps  # given out by 256 to a warp
        shared = {"80": 164, "90": 228, "100": 228, "120": 100}[row["arch"]]  # KiB, of which each block takes 1 more

        def fits(count, row=row, registers=registers, shared=shared, warps=warps):
            memory = count * (float(row["shared_kib"]) + 1) <= shared + 0.1 * count
            return count * registers <= 65536 and memory and count * warps <= 64

        assert fits(blocks) and not fits(blocks + 1), row["name"]


def test_an_estimate_follows_from_the_cycles_and_the_tiles(report):
    """One figure by hand: the forward pass at D = 128 on an H100, from the columns of the compiled loops."""
    chosen = [row for row in rows(report / "kernels.csv") if row["heads"] == "16/4"]
    compiled = {row["height"]: row for row in chosen if row["name"].startswith("forward sm_90 bf16")}
    layout = mixes.sample("pairs", mixes.FIXED_LENGTH)
    best = loaded = 0.0
    for (_, programs, *columns), height in zip(
        layout.tile_work("forward", head_dim=128, arch=90), ("128", "64"), strict=True
    ):
        row = compiled[height]
        for loop, count, step in zip(("full", "partial"), columns, (row["step"], row["partial_step"]), strict=True):
            cycles = max(float(row[f"{loop}_{unit}_cycles"]) for unit in ("matrix", "issue", "mufu"))
            best += 16 * count / float(step) * cycles
            loaded += 16 * count * 2 * 128 * 2
        loaded += programs * float(row["block"]) * 16 * 2 * 128 * 2
    [estimate] = [
        row for row in rows(report / "estimates.csv")
        if (row["gpu"], row["kernel"], row["mix"], row["head_dim"]) == ("H100 SXM", "forward", "pairs", "128")
    ]  # fmt: skip
    least = 2 * layout.total_length * 128 * (2 * 16 + 2 * 4) + 4 * layout.total_length * 16
    assert float(estimate["memory_us"]) == pytest.approx(least / 3350e3, abs=0.06)
    expected = max(best / 132 / 1.83e3, least / 3350e3)
    assert float(estimate["estimated_us_best"]) == pytest.approx(expected, abs=0.06)
    assert float(estimate["loaded_by_least"]) == pytest.approx(loaded / least, abs=0.06)


def test_broken_rules_are_reported():
    """An absurd configuration spills; unaligned tensors make narrow accesses, and crowded warps spill."""
    script = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import kernel_report, pointwise_report
from transfusion_fast.kernels.attention_configs import Config
class Absurd(kernel_report.Variant):
    config = Config(128, 128, 64, 4, 2, descriptors=True)
print(kernel_report.row_of(Absurd("forward", 90, "bf16", 128, 128))["broken_rules"])
name = "swiglu backward, halves of one"
case = pointwise_report.cases(2)[name]
class AnyAddress(pointwise_report.Case):
    multiples = set()
crowded = case._replace(options=case.options | {"num_warps": 1}, constants={"BLOCK": 4096})
for changed in (case, AnyAddress(*case), crowded):
    pointwise_report.cases = lambda itemsize: {name: changed}
    print(repr(pointwise_report.row_of((name, 90, "bf16"))["broken_rules"]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    absurd, right, unaligned, crowded = done.stdout.splitlines()
    assert "spills" in absurd
    assert right == "''"
    narrow = [f"{name} moves by 16 bits, not 128" for name in ("dy", "gate", "up", "dgate", "dup")]
    assert unaligned == repr("; ".join(narrow))
    assert "spills" in crowded


@pytest.mark.parametrize("words", ["two tensors", "odd length", "halves of one"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_compiler_knows_of_swiglu_what_it_knows_at_a_launch(monkeypatch, words, kernel):
    """The report takes those strides and row lengths as multiples of 16 that the op passes as such."""
    calls = {name: MagicMock() for name in ("swiglu_forward_kernel", "swiglu_backward_kernel")}
    case = cases(2)[f"swiglu {kernel}, {words}"]
    for name, launched in calls.items():
        monkeypatch.setattr(swiglu, name, launched)
    tensors = {
        "two tensors": [torch.zeros(3, 16), torch.zeros(3, 16)],
        "odd length": [torch.zeros(49), torch.zeros(49)],
        "halves of one": [torch.zeros(3, 64)],
    }[words]
    out = swiglu.swiglu(*(x.requires_grad_() for x in tensors))
    torch.autograd.grad(out, tensors, torch.zeros_like(out))
    passed = calls[f"swiglu_{kernel}_kernel"].__getitem__.return_value.call_args.args
    numbers = {n: v for n, v in zip(case.function.arg_names, passed, strict=False) if isinstance(v, int)}
    assert {name for name, value in numbers.items() if value % 16 == 0} == case.multiples & numbers.keys()


def totals(tensors):
    return tuple(sum(getattr(tensor, field) for tensor in tensors) for field in ("least", "once", "moved"))


def by_name(tensors):
    return {tensor.name: (tensor.least, tensor.once, tensor.moved) for tensor in tensors}


def test_swiglu_moves_each_number_once():
    assert totals(swiglu_bytes("forward", 10, 2)) == (60, 60, 60)
    assert totals(swiglu_bytes("backward", 10, 4)) == (200, 200, 200)


def test_the_norms_backward_reads_and_writes_each_number_once_and_leaves_a_sum_for_each_64_rows():
    found = by_name(norm_bytes("backward", 130, 96, 2))
    rows, weight, sums = (130 * 96 * 2,) * 3, 96 * 2, 3 * 96 * 4
    assert [found[f"{name}_ptr"] for name in ("dy", "dresidual", "x", "dx")] == [rows] * 4
    assert found["weight_ptr"] == (weight, weight, 3 * weight)
    assert found["sums_ptr"] == (0, sums, sums) and found[PYTORCH] == (weight, sums + weight, sums + weight)
    assert totals(norm_bytes("forward", 130, 96, 2))[0] == 2 * rows[0] + weight


def test_each_chunk_of_heads_reads_the_rotary_table():
    """8 and 4 heads of 8 numbers are cut into chunks of 4: two of q, one of k, for all 70 tokens."""
    found = by_name(rope_bytes(70, 8, 4, 8, 2, norm=False))
    table = 70 * 4 * 4
    assert found["cos_ptr"] == found["sin_ptr"] == (table, table, 3 * table)
    assert found["q_out_ptr"] == (70 * 8 * 8 * 2,) * 3
    assert found["k_ptr"] == (70 * 4 * 8 * 2,) * 3
    assert len(found) == 6


def test_each_program_reads_the_weights_of_its_norm_and_leaves_sums_for_pytorch():
    """130 tokens are three tiles of 64, which a program a chunk walks backward: 3 programs a chunk forward, 1 there."""
    weight = 8 * 2
    found = by_name(rope_bytes(130, 8, 4, 8, 2, norm=True))
    assert (found["q_weight_ptr"], found["k_weight_ptr"]) == (
        (weight, weight, 6 * weight),
        (weight, weight, 3 * weight),
    )
    found = by_name(rope_bytes(130, 8, 4, 8, 2, norm=True, backward=True))
    assert (found["q_weight_ptr"], found["k_weight_ptr"]) == ((weight, weight, 2 * weight), (weight,) * 3)
    sums = 3 * 8 * 4
    assert found["sums_ptr"] == (0, sums, sums)
    assert found[PYTORCH] == (2 * weight, sums + 2 * weight, sums + 2 * weight)


def test_programs_of_the_diffusion_error_read_the_offsets_on_their_way_to_an_image():
    """Tiles of 2 patches of 1024 values; images of 3 and 2 patches at 0 and 3.

    Image 0 has the pieces 0 and 1; image 1 begins in block 1 and has piece 2; piece 3 finds nothing. All four programs
    look at the middle offset; those of image 0 also at the first, the others also at the last.
    """
    offsets, values = [0, 3, 5], 5 * 1024
    found = by_name(mse_bytes("forward", offsets, 1024, 2, {"target_ptr": 4}))
    assert found == {
        "prediction_ptr": (values * 2,) * 3,
        "target_ptr": (values * 4,) * 3,
        "offsets_ptr": (12, 12, 4 * 2 * 4),
        "sums_ptr": (0, 12, 12),
    }
    found = by_name(mse_bytes("mean", offsets, 1024, 2, {}))
    assert found == {"sums_ptr": (0, 12, 12), "offsets_ptr": (0, 12, 16), "loss_ptr": (8, 8, 8)}
    found = by_name(mse_bytes("backward", offsets, 1024, 2, {"target_ptr": 2, "x_0_ptr": 2}, coefficients=True))
    assert found["dloss_ptr"] == (8, 8, 12) and found["coefficients_ptr"] == (16, 16, 24)
    assert found["dprediction_ptr"] == found["x_0_ptr"] == (values * 2,) * 3


def test_an_empty_list_of_images_moves_nothing():
    assert totals(mse_bytes("mean", [0], 16, 2, {})) == (0, 0, 0)
    assert totals(mse_bytes("backward", [0], 16, 2, {"target_ptr": 2}))[1:] == (0, 0)
