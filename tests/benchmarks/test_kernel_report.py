"""What the offline compiler makes of every shipped configuration, and the rules that it is held to."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pointwise_launches import CASES

from transfusion_fast.kernels.attention_configs import ARCHITECTURES, KERNELS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a report of all targets, made by another process: in this one kernels are interpreted."""
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, ROOT / "benchmarks" / "kernel_report.py", "--rules-only", "--out", folder]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    (folder / "errors").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def kernels(report):
    return rows(report / "kernels.csv")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_keeps_the_rules(report, kernels, kernel, arch):
    chosen = [row for row in kernels if row["kernel"] == kernel and int(row["arch"]) == arch]
    assert {(row["dtype"], int(row["head_dim"])) for row in chosen} >= {
        (dtype, head_dim) for dtype in ("bf16", "fp32") for head_dim in (32, 64, 128, 256)
    }
    assert [f"{row['name']}: {row['broken_rules']}" for row in chosen if row["broken_rules"]] == []


@pytest.mark.parametrize("arch", ["80", "90"])
def test_memory_bound_kernels_move_16_bytes_a_thread_without_spills(report, arch):
    chosen = [row for row in rows(report / "pointwise.csv") if (row["arch"], row["dtype"]) == (arch, "bf16")]
    assert {row["case"] for row in chosen} == CASES.keys()
    assert [f"{row['name']}: {row['broken_rules']}" for row in chosen if row["broken_rules"]] == []
    # The mean of the diffusion error reads one number of each 4 KiB that forward reads, wherever an image starts.
    for row in (row for row in chosen if row["case"] != "diffusion_mse mean"):
        assert row["load_bits"] == "128"
        assert row["store_bits"] == ("" if row["case"].startswith("diffusion_mse forward") else "128")
        assert float(row["wide_share"]) > 0.99, row["name"]


def test_memory_bound_kernels_touch_device_memory_once_in_and_once_out(report):
    for row in rows(report / "pointwise.csv"):
        # Beyond that, through the norm, each program's sums of the weights' gradients: written, and read again.
        assert 1 <= float(row["once_by_least"]) < (1.02 if "norm backward" in row["case"] else 1.002), row["name"]
        # With four chunks of heads of q and one of k, reading the table anew adds 4/21, the weights of a norm 1/34.
        most = 1.25 if row["case"].startswith("rope") else 1.01
        assert 1 <= float(row["moved_by_least"]) < most, row["name"]


def test_the_forward_loop_on_hopper_works_on_matrices_during_exponentials(kernels):
    chosen = [r for r in kernels if (r["kernel"], r["arch"], r["dtype"]) == ("forward", "90", "bf16")]
    chosen = [row for row in chosen if row["head_dim"] in ("64", "128")]
    assert len(chosen) == 4
    for row in chosen:
        assert int(row["whole_exponentials_in_flight"]) >= 28, row["name"]
        assert float(row["whole_ratio"]) <= {"64": 1.06, "128": 0.53}[row["head_dim"]]


def test_whole_steps_have_no_mask(kernels):
    """A mask compares every value: a step of 32 columns of 64 rows has 16 values a thread of 128, at least."""
    chosen = [row for row in kernels if row["arch"] == "90" and row["dtype"] == "bf16"]
    assert len(chosen) == 3 * 5 * 2 + 8
    for row in chosen:
        assert int(row["whole_compares"]) <= 12 < int(row["edge_compares"]), row["name"]


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
    assert all(name.startswith(("estimated_", "gpu", "kernel", "mix")) or "us" not in name
               for name in rows(report / "estimates.csv")[0] if name != "memory_us")  # fmt: skip
    assert (report / "kernel_report.png").stat().st_size > 10_000


def test_a_broken_rule_is_reported():
    """In the process that compiles: an absurd configuration spills, and the report says so."""
    script = """
import os
os.environ["TRITON_INTERPRET"] = "0"
from transfusion_fast.kernels import attention_configs
import kernel_rows, offline
attention_configs._SHAPES["sm_90", "forward", 128] = ((128, 128, 64, 4, 2),) * 2
row = kernel_rows.row_of(offline.Variant("forward", 90, "bf16", 128, 128))
print(row.broken_rules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "spills" in done.stdout, done.stderr


TTIR = """
    %k = tt.load %k_ptr : tensor<64x64x!tt.ptr<bf16>>
    %k_1 = tt.reshape %k : tensor<64x64xbf16>
    %k_2 = tt.trans %k_1 {order = array<i32: 1, 0>} : tensor<64x64xbf16>
    %s = tt.dot %q, %k_2, %zero : tensor<64x64xf32>
    %p = arith.truncf %s : tensor<64x64xf32> to tensor<64x64xbf16>
"""


def test_a_transposed_product_is_found(offline):
    assert offline.transposed_products(TTIR) == []
    swapped = TTIR + "    %h = tt.trans %r {order = array<i32: 0, 2, 1>} : tensor<64x2x32xf32>\n"
    assert offline.transposed_products(swapped) == []
    transposed = TTIR + "    %t = tt.trans %p {order = array<i32: 1, 0>} : tensor<64x64xbf16>\n"
    [line] = offline.transposed_products(transposed)
    assert line.startswith("%t")


def test_a_product_without_a_matrix_unit_is_found(offline):
    good = "%a = tt.dot %q, %k, %c : t<#ttg.dot_op> * t<#ttg.dot_op> -> tensor<16x16xf32, #mma>"
    bad = "%a = tt.dot %q, %k, %c : t<#ttg.dot_op> * t<#ttg.dot_op> -> tensor<16x16xf32, #blocked>"
    assert offline.products_without_matrix_unit(good) == []
    assert offline.products_without_matrix_unit(bad) == [bad]


@pytest.fixture
def offline():
    import offline

    return offline
