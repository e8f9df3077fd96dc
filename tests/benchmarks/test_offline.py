"""Reading compiled code: loops, their costs, and the tensors of loads and stores, on small listings."""

import offline
import pytest


def listing(*lines: str) -> list[offline.Instruction]:
    """Instructions 16 bytes apart; lines that end in a colon are labels, as nvdisasm prints both."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/              {line} ;")
            address += 16
    return offline.parse_sass("\n".join(text))


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
    load, matrix, back, forward, nop = offline.parse_sass(text)
    assert load == offline.Instruction(0, "", "LDC", "R1, c[0x0][0x28]")
    assert matrix == offline.Instruction(16, "!P0", "HMMA.16816.F32.BF16", "R8, R4.reuse, R2, RZ")
    assert (back.target, forward.target) == (0x10, 0x40)
    assert (load.target, nop) == (None, offline.Instruction(64, "", "NOP", ""))


def test_two_functions_are_refused():
    text = "/*0000*/ EXIT ;\n/*0010*/ NOP ;\n/*0000*/ EXIT ;"
    with pytest.raises(ValueError, match="one function"):
        offline.parse_sass(text)


def test_loops_nest_and_the_innermost_with_a_matrix_instruction_is_reported():
    code = listing(
        ".L_outer:", "NOP", ".L_inner:", HGMMA, ".L_spin:", "NOP", "@P2 BRA `(.L_spin)", "@P0 BRA `(.L_inner)",
        ".L_second:", HGMMA, "@P3 BRA `(.L_second)", "@P1 BRA `(.L_outer)", "EXIT", ".L_end:", "BRA `(.L_end)",
    )  # fmt: skip
    assert [(loop[0].address, loop[-1].address) for loop in offline.loops(code)] == [
        (0x00, 0x70), (0x10, 0x40), (0x20, 0x30), (0x50, 0x60),
    ]  # fmt: skip
    assert [(loop[0].address, loop[-1].address) for loop in offline.matrix_loops(code)] == [(0x10, 0x40), (0x50, 0x60)]


def test_a_branch_back_from_code_out_of_line_makes_no_loop():
    code = listing(
        ".L_loop:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R1", "@!P1 BRA `(.L_spin)", ".L_come:", HGMMA,
        "@!P0 BRA `(.L_loop)", "EXIT",
        ".L_spin:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R1", "@!P1 BRA `(.L_spin)", "BRA `(.L_come)",
    )  # fmt: skip
    assert [(loop[0].address, loop[-1].address) for loop in offline.loops(code)] == [(0x00, 0x30), (0x50, 0x60)]
    (loop,) = offline.matrix_loops(code)
    assert [i.address for i in loop] == [0x00, 0x10, 0x20, 0x30]


def test_code_that_leaves_a_loop_is_no_part_of_it():
    code = listing(".L_loop:", HGMMA, "@P0 BRA `(.L_more)", "NOP", "EXIT", ".L_more:", "BRA `(.L_loop)")
    (loop,) = offline.matrix_loops(code)
    assert [i.address for i in loop] == [0x00, 0x10, 0x40]


def test_cycles_of_a_hopper_forward_loop():
    """The 128x128 loop at head dim 128: 502 instructions, 66 MUFU, 16 HGMMA, 8 warps."""
    code = listing(*[HGMMA] * 16, *[EX2] * 65, "MUFU.RCP R0, R0", "ISETP.GE.AND P0", *["FADD R0"] * 419)
    cost = offline.cost(code, 2 * 2 * 128**3, warps=8, arch=90)
    assert cost | {"serial_bound": round(cost["serial_bound"], 3)} == {
        "instructions": 502, "compares": 1, "exponentials": 66, "matrix_cycles": 2048, "issue_cycles": 1004,
        "mufu_cycles": 1056, "ratio": 1056 / 2048, "serial_bound": 0.66, "overlapped_bound": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("opcode", "arch", "cycles"),
    [
        ("HMMA.16816.F32.BF16", 80, 512),
        ("HMMA.1688.F32.TF32", 80, 1024),
        ("HGMMA.64x64x16.F32", 90, 256),
        ("UTCHMMA", 100, 128),
    ],
)
def test_the_matrix_rate_follows_the_inputs_and_the_architecture(opcode, arch, cycles):
    assert offline.cost(listing(f"{opcode} R0"), 2**20, warps=4, arch=arch)["matrix_cycles"] == cycles


@pytest.mark.parametrize(
    ("opcode", "arch", "message"), [("HMMA.16816", 75, "arch"), ("NOP", 90, "matrix"), ("IMMA.8816.S8.S8", 80, "IMMA")]
)
def test_a_loop_of_unknown_rate_is_refused(opcode, arch, message):
    with pytest.raises(ValueError, match=message):
        offline.cost(listing(f"{opcode} R0"), 1, warps=4, arch=arch)


def test_order_is_run_length_coded():
    code = listing(*[HGMMA] * 8, wait(0), *[EX2, "FADD R0"] * 3, "MUFU.RCP R0", "BAR.SYNC 0x0", HGMMA, "LDGDEPBAR")
    assert offline.order(code) == "H8 W E3 M B H"
    assert offline.order(listing("NOP")) == ""


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
    assert offline.exponentials_in_flight(listing(*loop)) == in_flight


def test_resources_are_parsed():
    usage = """
    Resource usage:
     Common:
      GLOBAL:11 CONSTANT[4]:8
     Function kernel:
      REG:255 STACK:144 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
    """
    moves = ("STL [R1], R0", "LDL R0, [R1]", "STL [RZ], R2")
    resources = offline.parse_resources(usage, listing(*moves, "STL.64 [R1+0x8], RZ"))  # the last holds no register
    assert resources == {"registers": 255, "spills": 3, "stack_bytes": 144}
    assert [offline.spill_rule({**resources, "spills": n}) for n in (0, 1)] == [[], ["1 spills"]]
    with pytest.raises(ValueError, match="one kernel"):
        offline.parse_resources("", [])


# The kernel reads an index from a table in a loop, and at x what it names; then it branches: 16 bytes to y, or 2 and z.
KERNEL = """
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
)
{
\tld.param.b64 \t%rd1, [kernel_param_0];
\tld.param.b64 \t%rd2, [kernel_param_1];
\tld.param.b64 \t%rd3, [kernel_param_2];
\tld.param.b64 \t%rd4, [kernel_param_3];
\tld.param.b32 \t%r1, [kernel_param_4];
\tmov.b64 \t%rd5, %rd1;
$L__BB0_1:                               // %loop
\t// begin inline asm
\t@%p1 ld.global.b32 { %r2 }, [ %rd5 + 0 ];
\t// end inline asm
\tmad.wide.s32 \t%rd6, %r2, 2, %rd2;
\tld.global.L1::evict_last.v4.b32 \t{%r3, %r4, %r5, %r6}, [%rd6+16];
\tadd.s64 \t%rd7, %rd5, 4;
\tmov.b64 \t%rd5, %rd7;
\t@%p0 bra \t$L__BB0_1;
\tst.shared.v4.b32 \t[%r9], {%r3, %r4, %r5, %r6};
\tmad.wide.s32 \t%rd8, %r3, %r1, %rd3;
\t@!%p2 bra \t$L__BB0_3;
\tst.global.v4.b32 \t[%rd8], {%r3, %r4, %r5, %r6};
\tbra.uni \t$L__BB0_4;
$L__BB0_3:
\tst.global.b16 \t[%rd8], {%rs1};
\tselp.b64 \t%rd9, %rd4, %rd3, %p3;
\tst.global.v2.b32 \t[%rd9], {%r3, %r4};
$L__BB0_4:
\tret;
}
"""
ARGUMENTS = ["table_ptr", "x_ptr", "y_ptr", "z_ptr", "F"]


def test_every_access_belongs_to_the_arguments_that_its_address_comes_from():
    found = offline.accesses(offline.parse_ptx(KERNEL), ARGUMENTS)
    assert [(set(access.tensors), access.store, access.bits) for access in found] == [
        ({"table_ptr"}, False, 32), ({"x_ptr"}, False, 128), ({"y_ptr"}, True, 128), ({"y_ptr"}, True, 16),
        ({"y_ptr", "z_ptr"}, True, 64),
    ]  # fmt: skip


@pytest.mark.parametrize(("after_the_widest", "bits"), [("\tbra.uni \t$L__BB0_4;", [128]), ("", [128, 16, 64])])
def test_accesses_on_a_branch_that_excludes_the_widest_are_left_out(after_the_widest, bits):
    code = offline.parse_ptx(KERNEL.replace("\tbra.uni \t$L__BB0_4;", after_the_widest))
    of_y = [access for access in offline.accesses(code, ARGUMENTS) if "y_ptr" in access.tensors]
    assert [access.bits for access in offline.with_widest(of_y, code)] == bits


@pytest.mark.parametrize("line", ["ld.global.b32 %r0, [%rd99]", "red.global.add.f32 [%rd1], %r0", "st.b32 [%rd1], %r0"])
def test_an_access_that_cannot_be_attributed_is_an_error(line):
    with pytest.raises(ValueError, match="teach offline"):
        offline.accesses(offline.parse_ptx(f"\tld.param.b64 %rd1, [kernel_param_0];\n\t{line};"), ARGUMENTS)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E.128.CONSTANT", 128), ("LDG.E.U8", 8), ("STG.E.U16", 16), ("LDG.E.S16", 16), ("STG.E", 32),
     ("LDG.E.64.SYS", 64), ("LDG.E.ENL2.256", 256), ("LD.GLOBAL.V4.B32", 128), ("ST.GLOBAL.B16", 16)],
)  # fmt: skip
def test_the_width_is_read_off_the_opcode(opcode, bits):
    assert offline.width(opcode) == bits


def test_what_is_no_cubin_is_refused():
    with pytest.raises(RuntimeError, match="nvdisasm"):
        offline.run_tool("nvdisasm", "-c", b"not a cubin")


TTIR = """
    %k = tt.load %k_ptr : tensor<64x64x!tt.ptr<bf16>>
    %k_1 = tt.reshape %k : tensor<64x64xbf16>
    %k_2 = tt.trans %k_1 {order = array<i32: 1, 0>} : tensor<64x64xbf16>
    %s = tt.dot %q, %k_2, %zero : tensor<64x64xf32>
    %p = arith.truncf %s : tensor<64x64xf32> to tensor<64x64xbf16>
"""


def test_a_transposed_product_is_found():
    assert offline.transposed_products(TTIR) == []
    swapped = TTIR + "    %h = tt.trans %r {order = array<i32: 0, 2, 1>} : tensor<64x2x32xf32>\n"
    assert offline.transposed_products(swapped) == []
    transposed = TTIR + "    %t = tt.trans %p {order = array<i32: 1, 0>} : tensor<64x64xbf16>\n"
    [line] = offline.transposed_products(transposed)
    assert line.startswith("%t")


def test_a_product_without_a_matrix_unit_is_found():
    good = "%a = tt.dot %q, %k, %c : t<#ttg.dot_op> * t<#ttg.dot_op> -> tensor<16x16xf32, #mma>"
    bad = "%a = tt.dot %q, %k, %c : t<#ttg.dot_op> * t<#ttg.dot_op> -> tensor<16x16xf32, #blocked>"
    assert offline.products_without_matrix_unit(good) == []
    assert offline.products_without_matrix_unit(bad) == [bad]
