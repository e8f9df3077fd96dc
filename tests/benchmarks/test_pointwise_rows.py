"""Widths of loads and stores by tensor, bytes counted, and broken rules of the memory-bound kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass
import sass_memory

ROOT = Path(__file__).resolve().parents[2]

# A loop over x, with an index read from a table, then a branch: sixteen bytes to y, or one number.
LISTING = """
        /*0000*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0020*/                   LDC.64 R6, c[0x0][0x218] ;
    .L_loop:
        /*0030*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0040*/                   IMAD.WIDE R8, R0, 0x2, R6 ;
        /*0050*/                   LDG.E.128 R12, desc[UR4][R8.64+0x10] ;
        /*0060*/                   IADD3 R2, P1, R2, 0x4, RZ ;
        /*0070*/               @P0 BRA `(.L_loop) ;
        /*0080*/                   MOV R2, R12 ;
        /*0090*/                   LDCU.128 UR8, c[0x0][0x220] ;
        /*00a0*/                   IMAD.WIDE R4, R12, 0x2, UR8 ;
        /*00b0*/               @P2 BRA `(.L_end) ;
        /*00c0*/                   STG.E.128 desc[UR4][R4.64], R12 ;
        /*00d0*/                   EXIT ;
    .L_end:
        /*00e0*/                   STG.E.U16 desc[UR4][R4.64], R12 ;
        /*00f0*/                   IADD3 R4, P0, R0, UR10, RZ ;
        /*0100*/                   STG.E.64 desc[UR4][R4.64], R2 ;
        /*0110*/                   EXIT ;
"""
POINTERS = {0x210: "table", 0x218: "x", 0x220: "y", 0x228: "z"}


def test_every_access_is_told_by_the_argument_that_its_address_comes_from():
    found = sass_memory.accesses(sass.parse_sass(LISTING), POINTERS)
    assert [(access.address, set(access.tensors), access.store, access.bits) for access in found] == [
        (0x30, {"table"}, False, 32),
        (0x50, {"x"}, False, 128),
        (0xC0, {"y"}, True, 128),
        (0xE0, {"y"}, True, 16),
        (0x100, {"z"}, True, 64),
    ]


def test_accesses_on_a_branch_that_excludes_the_widest_are_left_out():
    code = sass.parse_sass(LISTING)
    of_y = [access for access in sass_memory.accesses(code, POINTERS) if "y" in access.tensors]
    assert [access.bits for access in sass_memory.with_widest(of_y, code)] == [128]
    joined = sass.parse_sass(LISTING.replace("/*00d0*/                   EXIT", "/*00d0*/                   NOP"))
    of_y = [access for access in sass_memory.accesses(joined, POINTERS) if "y" in access.tensors]
    assert [access.bits for access in sass_memory.with_widest(of_y, joined)] == [128, 16]


def test_code_that_two_branches_share_counts_for_both_tensors():
    shared = """
        /*0000*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0010*/               @P0 LDC.64 R2, c[0x0][0x218] ;
        /*0020*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/                   EXIT ;
    """
    (access,) = sass_memory.accesses(sass.parse_sass(shared), POINTERS)
    assert access.tensors == {"table", "x"}


def test_a_pointer_is_followed_through_the_stack():
    spilled = """
        /*0000*/                   LDC.64 R2, c[0x0][0x218] ;
        /*0010*/                   STL.64 [R1+0x8], R2 ;
        /*0020*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0030*/                   STL.64 [R1], R2 ;
        /*0040*/                   LDL.64 R2, [R1+0x8] ;
        /*0050*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0060*/                   EXIT ;
    """
    (access,) = sass_memory.accesses(sass.parse_sass(spilled), POINTERS)
    assert access.tensors == {"x"}


@pytest.mark.parametrize("line", ["LDG.E.128 R4, desc[UR4][R4.64]", "RED.E.ADD.F32 desc[UR4][R2.64], R0"])
def test_an_access_that_cannot_be_told_is_an_error(line):
    with pytest.raises(ValueError, match="teach sass_memory"):
        sass_memory.accesses(sass.parse_sass(f"/*0000*/ {line} ;\n/*0010*/ EXIT ;"), POINTERS)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E.128.CONSTANT", 128), ("LDG.E.U8", 8), ("STG.E.U16", 16), ("LDG.E.S16", 16), ("STG.E", 32),
     ("LDG.E.64.SYS", 64), ("LDG.E.ENL2.256", 256)],
)  # fmt: skip
def test_the_width_is_read_off_the_opcode(opcode, bits):
    assert sass_memory.width(opcode) == bits


def test_arguments_lie_where_the_cubin_says():
    elf = """
	Attribute:	EIATTR_PARAM_CBANK
	Format:	EIFMT_SVAL
	Value:	0xa 0x180210
	Attribute:	EIATTR_KPARAM_INFO
	Value:	Index : 0x0	Ordinal : 0x2	Offset  : 0x10	Size    : 0x8
	Value:	Index : 0x0	Ordinal : 0x1	Offset  : 0x8	Size    : 0x4
	Value:	Index : 0x0	Ordinal : 0x0	Offset  : 0x0	Size    : 0x8
    """
    assert sass_memory.parse_argument_offsets(elf, ["x", "n"]) == {0x210: "x", 0x218: "n"}
    with pytest.raises(ValueError, match="arguments"):
        sass_memory.parse_argument_offsets(elf, ["a", "b", "c", "d"])


def totals(tensors):
    return tuple(sum(getattr(tensor, field) for tensor in tensors) for field in ("least", "once", "moved"))


def by_name(tensors):
    return {tensor.name: (tensor.least, tensor.once, tensor.moved) for tensor in tensors}


def test_swiglu_moves_each_number_once():
    import pointwise_bytes

    assert totals(pointwise_bytes.swiglu_forward(10, 2)) == (60, 60, 60)
    assert totals(pointwise_bytes.swiglu_backward(10, 4)) == (200, 200, 200)


def test_each_chunk_of_heads_reads_the_rotary_table():
    """8 and 4 heads of 8 numbers are cut into chunks of 4: two of q, one of k, for all 70 tokens."""
    import pointwise_bytes

    found = by_name(pointwise_bytes.rope_forward(70, 8, 4, 8, 2, norm=False))
    table = 70 * 4 * 4
    assert found["cos_ptr"] == found["sin_ptr"] == (table, table, 3 * table)
    assert found["q_out_ptr"] == (70 * 8 * 8 * 2,) * 3
    assert found["k_ptr"] == (70 * 4 * 8 * 2,) * 3
    assert len(found) == 6


def test_each_program_reads_the_weights_of_its_norm_and_leaves_sums_for_pytorch():
    """130 tokens are three tiles of 64, which a program a chunk walks backward: 3 programs a chunk forward, 1 there."""
    import pointwise_bytes

    weight = 8 * 2
    found = by_name(pointwise_bytes.rope_forward(130, 8, 4, 8, 2, norm=True))
    assert (found["q_weight_ptr"], found["k_weight_ptr"]) == (
        (weight, weight, 6 * weight),
        (weight, weight, 3 * weight),
    )
    found = by_name(pointwise_bytes.rope_backward(130, 8, 4, 8, 2))
    assert (found["q_weight_ptr"], found["k_weight_ptr"]) == ((weight, weight, 2 * weight), (weight,) * 3)
    sums = 3 * 8 * 4
    assert found["sums_ptr"] == (0, sums, sums)
    assert found[pointwise_bytes.PYTORCH] == (2 * weight, sums + 2 * weight, sums + 2 * weight)


def test_programs_of_the_diffusion_error_read_the_offsets_on_their_way_to_an_image():
    """Tiles of 2 patches of 1024 values; images of 3 and 2 patches at 0 and 3.

    Image 0 has the pieces 0 and 1; image 1 begins in block 1 and has piece 2; piece 3 finds nothing. All four programs
    look at the middle offset; those of image 0 also at the first, the others also at the last.
    """
    import pointwise_bytes

    offsets, values = [0, 3, 5], 5 * 1024
    found = by_name(pointwise_bytes.mse_forward(offsets, 1024, 2, {"target_ptr": 4}))
    assert found == {
        "prediction_ptr": (values * 2,) * 3,
        "target_ptr": (values * 4,) * 3,
        "offsets_ptr": (12, 12, 4 * 2 * 4),
        "sums_ptr": (0, 12, 12),
    }
    found = by_name(pointwise_bytes.mse_mean(offsets, 1024))
    assert found == {"sums_ptr": (0, 12, 12), "offsets_ptr": (0, 12, 16), "loss_ptr": (8, 8, 8)}
    found = by_name(pointwise_bytes.mse_backward(offsets, 1024, 2, {"target_ptr": 2, "x_0_ptr": 2}))
    assert found["dloss_ptr"] == (8, 8, 12)
    assert found["dprediction_ptr"] == found["x_0_ptr"] == (values * 2,) * 3


def test_an_empty_list_of_images_moves_nothing():
    import pointwise_bytes

    assert totals(pointwise_bytes.mse_mean([0], 16)) == (0, 0, 0)
    assert totals(pointwise_bytes.mse_backward([0], 16, 2, {"target_ptr": 2}))[1:] == (0, 0)


def run_where_kernels_compile(script: str) -> str:
    """What a script prints in a process that does not interpret kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_narrow_accesses_and_spills_break_the_rules():
    """SwiGLU's backward as shipped, then of tensors at any address, then with more numbers than one warp can hold."""
    script = """
from dataclasses import replace
import pointwise_launches, pointwise_rows
name = "swiglu backward, halves of one"
print(repr(pointwise_rows.row_of(pointwise_rows.Variant(name, 90, "bf16")).broken_rules))
class AnyAddress(pointwise_launches.Case):
    aligned = set()
case = pointwise_launches.case(name, "bf16")
pointwise_launches.CASES[name] = lambda itemsize: AnyAddress(**vars(case))
print(pointwise_rows.row_of(pointwise_rows.Variant(name, 90, "bf16")).broken_rules)
crowded = replace(case, options=case.options | {"num_warps": 1}, constants={"BLOCK": 4096})
pointwise_launches.CASES[name] = lambda itemsize: crowded
print(pointwise_rows.row_of(pointwise_rows.Variant(name, 90, "bf16")).broken_rules)
"""
    aligned, unaligned, crowded = run_where_kernels_compile(script).splitlines()
    assert aligned == "''"
    assert unaligned.split("; ") == [
        f"{name} moves by 16 bits, not 128" for name in ("dy", "gate", "up", "dgate", "dup")
    ]
    assert "spills" in crowded
