"""What `sass` reads off machine code: small listings written by hand, and kernels that Triton compiles offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass


def listing(*lines: str) -> list[sass.Instruction]:
    """Instructions 16 bytes apart; lines that end in a colon are labels, as nvdisasm prints both."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/              {line} ;")
            address += 16
    return sass.parse_sass("\n".join(text))


HGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
EX2 = "MUFU.EX2 R0, R0"


def wait(groups: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, 0x{groups:x}"


def test_instructions_are_parsed():
    text = """
    .text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R8, R4.reuse, R2, RZ ;
        /*0020*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0030*/              @P1  BRA `(.L_x_2);
    .L_x_2:
        /*0040*/                   NOP;
    """
    load, matrix, back, forward, nop = sass.parse_sass(text)
    assert load == sass.Instruction(0, "", "LDC", "R1, c[0x0][0x28]")
    assert matrix == sass.Instruction(16, "!P0", "HMMA.16816.F32.BF16", "R8, R4.reuse, R2, RZ")
    assert (back.target, forward.target) == (0x10, 0x40)
    assert (load.target, nop) == (None, sass.Instruction(64, "", "NOP", ""))


def test_branches_may_go_to_addresses():
    text = """
        /*0000*/                   MUFU.EX2 R0, R0 ;        /* 0x0000000000007308 */
                                                            /* 0x000fe20000000000 */
        /*0010*/              @!P0 BRA 0x0 ;                /* 0xfffffffc00f88947 */
    """
    (loop,) = sass.loops(sass.parse_sass(text))
    assert (loop.first, loop.last) == (0, 16)


def test_two_functions_are_refused():
    text = "/*0000*/ EXIT ;\n/*0010*/ NOP ;\n/*0000*/ EXIT ;"
    with pytest.raises(ValueError, match="one function"):
        sass.parse_sass(text)


def test_loops_nest_and_the_innermost_with_a_matrix_instruction_is_reported():
    code = listing(
        ".L_outer:", "NOP", ".L_inner:", HGMMA, ".L_spin:", "NOP", "@P2 BRA `(.L_spin)", "@P0 BRA `(.L_inner)",
        ".L_second:", HGMMA, "@P3 BRA `(.L_second)", "@P1 BRA `(.L_outer)", "EXIT", ".L_end:", "BRA `(.L_end)",
    )  # fmt: skip
    assert [(loop.first, loop.last) for loop in sass.loops(code)] == [
        (0x00, 0x70), (0x10, 0x40), (0x20, 0x30), (0x50, 0x60),
    ]  # fmt: skip
    assert [(loop.first, loop.last) for loop in sass.matrix_loops(code)] == [(0x10, 0x40), (0x50, 0x60)]


def test_a_branch_back_from_code_out_of_line_makes_no_loop():
    code = listing(
        ".L_loop:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R1", "@!P1 BRA `(.L_spin)", ".L_come:", HGMMA,
        "@!P0 BRA `(.L_loop)", "EXIT",
        ".L_spin:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R1", "@!P1 BRA `(.L_spin)", "BRA `(.L_come)",
    )  # fmt: skip
    assert [(loop.first, loop.last) for loop in sass.loops(code)] == [(0x00, 0x30), (0x50, 0x60)]
    (loop,) = sass.matrix_loops(code)
    assert [i.address for i in loop.instructions] == [0x00, 0x10, 0x20, 0x30]


def test_code_that_leaves_a_loop_is_no_part_of_it():
    code = listing(".L_loop:", HGMMA, "@P0 BRA `(.L_more)", "NOP", "EXIT", ".L_more:", "BRA `(.L_loop)")
    (loop,) = sass.matrix_loops(code)
    assert [i.address for i in loop.instructions] == [0x00, 0x10, 0x40]


def test_every_instruction_is_in_one_class():
    code = listing(
        HGMMA, "HMMA.16816.F32 R0", "UTCHMMA gdesc[UR10]", EX2, EX2, "MUFU.RCP R0, R0", "FMUL R0", "FMUL2 R0",
        "FFMA R0", "FADD R0", "FADD2 R0", "FMNMX R0", "FMNMX3 R0", "F2FP.BF16.F32.PACK_AB R0", "ISETP.GE.AND P0",
        "UISETP.GE.AND UP0", "SEL R0", "FSEL R0", "LDS R0", "STS R0", "LDSM.16.M88.4 R0", "LDGSTS.E.BYPASS.128 R0",
        "UTMALDG.2D UR0", "LDTM.x64 R0", wait(0), "BAR.SYNC 0x0", "SYNCS.ARRIVE.TRANS64 RZ", "STL R0", "NOP",
        "IMAD R0", "LOP3.LUT R0",
    )  # fmt: skip
    mix = sass.count(code)
    assert mix == sass.Mix(
        total=31, matrix=3, mufu=3, fmul=2, ffma=1, fadd=2, fmnmx=2, convert=1, integer_compare=1, uniform_compare=1,
        select=2, shared=3, global_memory=2, tensor_memory=1, barrier=3, local=1, nop=1, other=2,
        mufu_kinds={"MUFU.EX2": 2, "MUFU.RCP": 1},
        matrix_kinds={"HGMMA.64x128x16.F32.BF16": 1, "HMMA.16816.F32": 1, "UTCHMMA": 1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("opcode", "num_warps", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 8, 2 * 2 * 64 * 128 * 16),
        ("HGMMA.64x64x8.F32.TF32", 4, 2 * 64 * 64 * 8),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", 4, 2 * 64 * 256 * 32),
        ("HMMA.16816.F32.BF16", 4, 4 * 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 1, 2 * 16 * 8 * 8),
        ("IMMA.8816.S8.S8", 1, 2 * 8 * 8 * 16),
        ("UTCHMMA", 4, None),
        ("FFMA", 4, 0),
    ],
)
def test_flops_of_a_block(opcode, num_warps, flops):
    assert sass.matrix_flops(listing(f"{opcode} R0"), num_warps) == flops


def test_a_matrix_instruction_of_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        sass.matrix_flops(listing("HMMA.NEW R0"), 4)


def test_cycles_of_a_hopper_forward_loop():
    """The 128x128 loop at head dim 128: 502 instructions, 66 MUFU, 16 HGMMA, 8 warps."""
    code = listing(*[HGMMA] * 16, *[EX2] * 66, *["FADD R0"] * 420)
    flops = sass.matrix_flops(code, 8)
    assert flops == 2 * 2 * 128**3
    cycles = sass.cycles(sass.count(code), flops, num_warps=8, arch=90)
    assert cycles == sass.Cycles(matrix=2048, issue=1004, mufu=1056)
    assert cycles.serial_bound == pytest.approx(0.66, abs=0.001)
    assert cycles.overlapped_bound == 1
    assert cycles.ratio == pytest.approx(1056 / 2048)


def test_the_matrix_rate_follows_the_inputs_and_the_architecture():
    def matrix_cycles(opcode: str, arch: int) -> float:
        return sass.cycles(sass.count(listing(f"{opcode} R0")), 2**20, num_warps=4, arch=arch).matrix

    assert matrix_cycles("HMMA.16816.F32.BF16", 80) == 512
    assert matrix_cycles("HMMA.1688.F32.TF32", 80) == 1024
    assert matrix_cycles("HGMMA.64x64x16.F32", 90) == 256
    assert matrix_cycles("QGMMA.64x64x32.F32.E4M3.E4M3", 90) == 128
    assert matrix_cycles("UTCHMMA", 100) == 128
    with pytest.raises(ValueError, match="arch"):
        matrix_cycles("HMMA.16816.F32.BF16", 75)


def test_a_loop_without_matrix_instructions_has_no_bound():
    with pytest.raises(ValueError, match="matrix"):
        sass.cycles(sass.count(listing("NOP")), 0, num_warps=4, arch=90)


def test_order_is_run_length_coded():
    code = listing(*[HGMMA] * 8, wait(0), *[EX2, "FADD R0"] * 3, "MUFU.RCP R0", "BAR.SYNC 0x0", HGMMA, "LDGDEPBAR")
    assert sass.order(code) == "H8 W E3 M B H"
    assert sass.order(listing("NOP")) == ""


CLOSED = f"{HGMMA}, gsb0"


@pytest.mark.parametrize(
    ("loop", "in_flight"),
    [
        ([HGMMA, CLOSED, wait(0), EX2, EX2], 0),
        ([HGMMA, EX2, CLOSED, EX2, wait(0), EX2], 2),
        # Two groups, of which the wait leaves the later one.
        ([CLOSED, CLOSED, wait(1), EX2, EX2, wait(0), EX2], 2),
        # One group, which the wait may leave.
        ([CLOSED, wait(1), EX2, wait(0)], 1),
        # None left to wait for.
        ([wait(1), EX2, CLOSED, wait(0)], 0),
        # Issued at the end of one iteration, waited for in the next.
        ([EX2, EX2, wait(0), EX2, CLOSED], 2),
        # A wait is for closed groups only.
        ([HGMMA, wait(0), EX2, CLOSED, wait(0)], 1),
        (["HMMA.16816.F32 R0", EX2], 0),
    ],
)
def test_exponentials_in_flight(loop, in_flight):
    assert sass.exponentials_in_flight(listing(*loop)) == in_flight


def test_resources_are_parsed():
    usage = """
    Resource usage:
     Common:
      GLOBAL:11 CONSTANT[4]:8
     Function kernel:
      REG:255 STACK:144 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
    """
    resources = sass.parse_resources(usage, listing("STL [R1], R0", "LDL R0, [R1]", "LDL.64 R2, [R1+0x8]"))
    assert resources == sass.Resources(255, 144, 1024, local_loads=2, local_stores=1)
    assert resources.spills == 3
    with pytest.raises(ValueError, match="one kernel"):
        sass.parse_resources("", [])


KERNEL = """
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def products(a_ptr, b_ptr, c_ptr, steps):
    tile = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    c = tl.zeros([64, 64], tl.float32)
    for step in range(steps):
        c = tl.dot(tl.load(a_ptr + tile + step * 4096), tl.load(b_ptr + tile + step * 4096), c)
    tl.store(c_ptr + tile, c)


for arch in (80, 90):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "steps": "i32"}
    source = ASTSource(products, signature, attrs={(i,): [["tt.divisibility", 16]] for i in range(3)})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 2})
    with open(f"{sys.argv[1]}/{arch}.cubin", "wb") as file:
        file.write(compiled.asm["cubin"])
"""


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> dict[int, bytes]:
    """A product of 64x64x64 in a loop for each architecture; a process of its own compiles even under the interpreter.

    The cache is its own too, so that what is read is what this Triton makes.
    """
    folder: Path = tmp_path_factory.mktemp("cubins")
    (folder / "kernel.py").write_text(KERNEL)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    subprocess.run([sys.executable, folder / "kernel.py", folder], env=environment, check=True)
    return {arch: (folder / f"{arch}.cubin").read_bytes() for arch in (80, 90)}


@pytest.mark.parametrize(("arch", "root"), [(80, "HMMA"), (90, "HGMMA")])
def test_a_compiled_loop(cubins, arch, root):
    (loop,) = sass.matrix_loops(sass.disassemble(cubins[arch]))
    assert {i.root for i in loop.instructions if i.is_matrix} == {root}
    assert sass.matrix_flops(loop.instructions, num_warps=4) == 2 * 64**3
    resources = sass.resources(cubins[arch], sass.disassemble(cubins[arch]))
    assert resources.spills == resources.stack_bytes == 0
    assert 32 < resources.registers <= 255


def test_what_is_no_cubin_is_refused():
    with pytest.raises(RuntimeError, match="nvdisasm"):
        sass.disassemble(b"not a cubin")
