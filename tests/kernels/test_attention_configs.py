"""The configurations of the attention kernels: consistent, as published, and compiled with three products of TF32."""

import csv
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from itertools import product
from pathlib import Path

import pytest

from transfusion_fast.kernels import attention_configs
from transfusion_fast.kernels.attention_configs import ARCHITECTURES, KERNELS, config, triton_version
from transfusion_fast.kernels.tiles import TILE_HEIGHTS

ROOT = Path(__file__).resolve().parents[2]


def test_blocks_and_steps_divide_the_tiles_of_every_configuration():
    for kernel, architecture, dim, itemsize in product(KERNELS, ARCHITECTURES, range(16, 257, 16), (2, 4)):
        for height in TILE_HEIGHTS:
            c = config(kernel, architecture, dim, itemsize, height)
            assert height % c.block == 0 and c.step % c.partial_step == 0, c


def test_the_published_report_is_of_these_configurations():
    """Registers, spills and cycles were read off the machine code of these sizes: a change needs a new report."""
    with (ROOT / "docs" / "kernels" / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    published = {(r["kernel"], int(r["arch"]), r["dtype"], int(r["head_dim"])) for r in rows}
    assert published >= set(product(KERNELS, ARCHITECTURES, ("bf16", "fp32"), (32, 64, 128, 256)))
    for row in rows:
        itemsize = {"bf16": 2, "fp32": 4}[row["dtype"]]
        c = config(row["kernel"], row["arch"], int(row["head_dim"]), itemsize, int(row["height"]))
        sizes = {"block": c.block, "step": c.step, "warps": c.warps, "stages": c.stages}
        assert sizes == {name: int(row[name]) for name in sizes}, row["name"]


@pytest.mark.parametrize(
    ("version", "step", "partial_step"),
    [("3.6.0", 32, 32), ("3.7.1", 64, 64), ("3.8.0", 64, 32), ("3.10.0+git1", 64, 32), (None, 64, 64)],
)
def test_sizes_follow_the_version_of_triton(monkeypatch, version, step, partial_step):
    def installed(package):
        if version is None:
            raise PackageNotFoundError
        return version

    monkeypatch.setattr(attention_configs, "version", installed)
    monkeypatch.setattr(attention_configs, "triton_version", triton_version.__wrapped__)
    tall, low = (config("forward", 120, 64, 2, height) for height in (128, 64))
    assert (tall.step, low.partial_step) == (step, partial_step)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from transfusion_fast.kernels import attention_kernels, hybrid_attention
from transfusion_fast.kernels.attention_configs import config

c = config("forward", 80, 32, 4, 64)
kernel = attention_kernels.hybrid_attention_forward_kernel
absent = ("k_descriptor", "v_descriptor", "own_start_ptr", "own_end_ptr")
constants = hybrid_attention.constants("forward", c, 2, 1, 32, 64) | dict.fromkeys(absent)
types = {"key_start_ptr": "*i32", "key_end_ptr": "*i32", "tiles_ptr": "*i32", "scale": "fp32"}
signature = {
    name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
    for name in kernel.arg_names
}
values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
options = hybrid_attention.compiler_options(c)
source = ASTSource(kernel, signature, values)
print(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ttir"])
"""


def test_products_of_fp32_are_compiled_to_three_products_of_tf32():
    """The interpreter cannot tell: it multiplies in fp32. One product of TF32 has 10 bits of precision, not 21."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    products = [line for line in done.stdout.splitlines() if " tt.dot " in line]
    assert len(products) == 4, done.stderr  # Q K^T and P V, in full and in partial blocks
    assert all("inputPrecision = tf32x3" in line for line in products)


@pytest.mark.parametrize("architecture", [75, "sm_86"])
def test_an_architecture_is_given_by_number_or_name(architecture):
    assert config("forward", 90, 64, 2, 128) == config("forward", "sm_90", 64, 2, 128)
    with pytest.raises(ValueError, match=rf"architecture must be one of sm_80, .*got '?{architecture}"):
        config("forward", architecture, 64, 2, 128)
