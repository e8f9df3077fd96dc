"""The bytes that a layer moves and what the host pays for launches, without a GPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, folder):
    """Run Python in another process, because kernels are interpreted in this one."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fused_ops_alone_move_bytes_outside_of_products_and_attention_and_few_of_them(tmp_path):
    script = """
import fake_driver, json, layer_bench
with fake_driver.fake_gpu():
    print(json.dumps(layer_bench.byte_rows(layer_bench.PRESETS["1.4b"], 16384)))
"""
    rows = json.loads(run("-c", script, folder=tmp_path))
    units = {(row["pass"], row["op"]): row["units"] for row in rows}
    pointwise = {key for row in rows if row["kind"] == "pointwise" for key in [(row["pass"], row["op"])]}
    assert {op for _, op in pointwise} == {
        "rms_norm", "rope", "swiglu", "rms_norm_backward", "rope_backward", "swiglu_backward"
    }  # fmt: skip
    assert sum(units[key] for key in pointwise) <= 44
    assert sum(units.values()) <= 112
    # Two norms of x, dy, the residual's gradient and dx, and the sums of the weights' gradients.
    assert units["backward", "rms_norm_backward"] == pytest.approx(2 * 4, abs=0.2)


def test_a_known_binary_is_launched_only_for_strides_alignments_and_intervals_that_it_was_compiled_for(tmp_path):
    script = """
import dataclasses, fake_driver, torch
from transfusion_fast.kernels import attention_kernels
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops

layout, copies = (AttentionLayout.from_spans([9], [], noised_copies=c) for c in ([], [(5, 4, 2)]))
moved = dataclasses.replace(layout, key_start=torch.cat([layout.key_start[:1], layout.key_start])[1:])
with fake_driver.fake_gpu():
    for layout, stride in ((layout, 16), (layout, 16), (layout, 24), (moved, 16), (copies, 16), (layout, 16)):
        q = torch.zeros(9, 1, stride, dtype=torch.float16)[..., :16]
        ops.hybrid_attention(q, q, q, layout, backend="triton")
        print(fake_driver.compilations(attention_kernels).total(), fake_driver.launches.total())
"""
    counts = [tuple(map(int, line.split())) for line in run("-c", script, folder=tmp_path).splitlines()]
    assert counts == [(1, 1), (1, 2), (2, 3), (3, 4), (4, 5), (4, 6)]


@pytest.mark.slow
def test_other_batches_compile_nothing_and_launches_cost_the_host_little(tmp_path):
    """Exit status 0 says that nothing was compiled again."""
    run(ROOT / "benchmarks" / "layer_bench.py", "--out", tmp_path, folder=tmp_path)
    with (tmp_path / "layer_host.csv").open(newline="") as file:
        rows = {(row["op"], row["pass"]): row for row in csv.DictReader(file)}
    # Without the cache of compiled variants they cost 105 and 153.
    most = {"forward": 75, "backward": 115}
    for name, limit in most.items():
        row = rows["hybrid_attention", name]
        assert float(row["linears"]) < limit
        assert row["launches"] == {"forward": "2", "backward": "4"}[name]
