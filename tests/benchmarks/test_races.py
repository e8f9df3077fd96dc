"""The search for registers that are written while a wgmma still reads them: on small listings, and in our kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import races
from offline import parse_sass

ROOT = Path(__file__).resolve().parents[2]
MATRIX = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"
CLOSED = MATRIX + ", gsb0"


def wait(groups):
    return f"WARPGROUP.DEPBAR.LE gsb0, 0x{groups:x}"


def listing(*lines):
    """Instructions 16 bytes apart; lines that end in a colon are labels, as nvdisasm prints both."""
    numbers = iter(range(0, 16 * len(lines), 16))
    return parse_sass("\n".join(x if x.endswith(":") else f"/*{next(numbers):04x}*/ {x} ;" for x in lines))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([CLOSED, "F2FP.BF16.F32.PACK_AB R7, R1, R0"], 1),
        ([MATRIX, "F2FP.BF16.F32.PACK_AB R7, R1, R0"], 1),
        ([CLOSED, wait(0), "F2FP.BF16.F32.PACK_AB R7, R1, R0"], 0),
        ([CLOSED, "F2FP.BF16.F32.PACK_AB R8, R1, R0"], 0),
        ([CLOSED, "LDS.128 R2, [R9]"], 1),
        ([CLOSED, "LDSM.16.M88.4 R2, [R9]"], 1),
        ([CLOSED, "STS [R9], R4", "ISETP.NE.AND P0, PT, R4, RZ, PT"], 0),
        ([CLOSED, "HGMMA.64x64x16.F32.BF16 R4, gdesc[UR4], gdesc[UR8], R4, gsb0", wait(1), "MOV R4, R1"], 0),
        ([CLOSED, "HGMMA.64x64x16.F32.BF16 R40, R8, gdesc[UR8], R40, gsb0", wait(1), "MOV R8, R1"], 1),
        # Only the next time around does the write come after the wgmma.
        ([".L:", "MOV R5, R1", CLOSED, "@P0 BRA `(.L)"], 1),
        ([".L:", "MOV R5, R1", CLOSED, wait(0), "@P0 BRA `(.L)"], 0),
    ],
)
def test_a_write_to_a_left_operand_is_found_until_its_group_was_waited_for(lines, found):
    assert len(races.races(listing(*lines, "EXIT"))) == found


COMPILE = """
import kernel_report
for kernel in ("forward", "backward_dkdv"):
    row = kernel_report.row_of(kernel_report.Variant(kernel, 90, "bf16", 64, 64))
    print(row["races"], row["races_without_waits"], row["wgmma_of_registers"])
"""


def test_our_kernels_have_no_race_and_would_have_one_at_every_wgmma_without_their_waits():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 2, done.stderr
    assert all(found == 0 and without == all_of_them > 3 for found, without, all_of_them in counts), counts
