"""Reading machine code: loops, their costs, and the tensors of loads and stores, on small listings."""

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


def test_two_functions_are_refused():
    text = "/*0000*/ EXIT ;\n/*0010*/ NOP ;\n/*0000*/ EXIT ;"
    with pytest.raises(ValueError, match="one function"):
        sass.parse_sass(text)


def test_loops_nest_and_the_innermost_with_a_matrix_instruction_is_reported():
    code = listing(
        ".L_outer:", "NOP", ".L_inner:", HGMMA, ".L_spin:", "NOP", "@P2 BRA `(.L_spin)", "@P0 BRA `(.L_inner)",
        ".L_second:", HGMMA, "@P3 BRA `(.L_second)", "@P1 BRA `(.L_outer)", "EXIT", ".L_end:", "BRA `(.L_end)",
    )  # fmt: skip
    assert [(loop[0].address, loop[-1].address) for loop in sass.loops(code)] == [
        (0x00, 0x70), (0x10, 0x40), (0x20, 0x30), (0x50, 0x60),
    ]  # fmt: skip
    assert [(loop[0].address, loop[-1].address) for loop in sass.matrix_loops(code)] == [(0x10, 0x40), (0x50, 0x60)]


def test_a_branch_back_from_code_out_of_line_makes_no_loop():
    code = listing(
        ".L_loop:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R1", "@!P1 BRA `(.L_spin)", ".L_come:", HGMMA,
        "@!P0 BRA `(.L_loop)", "EXIT",
        ".L_spin:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R1", "@!P1 BRA `(.L_spin)", "BRA `(.L_come)",
    )  # fmt: skip
    assert [(loop[0].address, loop[-1].address) for loop in sass.loops(code)] == [(0x00, 0x30), (0x50, 0x60)]
    (loop,) = sass.matrix_loops(code)
    assert [i.address for i in loop] == [0x00, 0x10, 0x20, 0x30]


def test_code_that_leaves_a_loop_is_no_part_of_it():
    code = listing(".L_loop:", HGMMA, "@P0 BRA `(.L_more)", "NOP", "EXIT", ".L_more:", "BRA `(.L_loop)")
    (loop,) = sass.matrix_loops(code)
    assert [i.address for i in loop] == [0x00, 0x10, 0x40]


def test_cycles_of_a_hopper_forward_loop():
    """The 128x128 loop at head dim 128: 502 instructions, 66 MUFU, 16 HGMMA, 8 warps."""
    code = listing(*[HGMMA] * 16, *[EX2] * 65, "MUFU.RCP R0, R0", "ISETP.GE.AND P0", *["FADD R0"] * 419)
    cost = sass.cost(code, 2 * 2 * 128**3, warps=8, arch=90)
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
    assert sass.cost(listing(f"{opcode} R0"), 2**20, warps=4, arch=arch)["matrix_cycles"] == cycles


@pytest.mark.parametrize(
    ("opcode", "arch", "message"), [("HMMA.16816", 75, "arch"), ("NOP", 90, "matrix"), ("IMMA.8816.S8.S8", 80, "IMMA")]
)
def test_a_loop_of_unknown_rate_is_refused(opcode, arch, message):
    with pytest.raises(ValueError, match=message):
        sass.cost(listing(f"{opcode} R0"), 1, warps=4, arch=arch)


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
    assert resources == {"registers": 255, "spills": 3, "stack_bytes": 144}
    with pytest.raises(ValueError, match="one kernel"):
        sass.parse_resources("", [])


# A loop over x, with an index read from a table, then a branch: sixteen bytes to y, or one number.
LISTING = (
    "LDC.64 R2, c[0x0][0x210]", "ULDC.64 UR4, c[0x0][0x208]", "LDC.64 R6, c[0x0][0x218]",
    ".L_loop:", "LDG.E R0, desc[UR4][R2.64]", "IMAD.WIDE R8, R0, 0x2, R6", "LDG.E.128 R12, desc[UR4][R8.64+0x10]",
    "IADD3 R2, P1, R2, 0x4, RZ", "@P0 BRA `(.L_loop)",
    "MOV R2, R12", "LDCU.128 UR8, c[0x0][0x220]", "IMAD.WIDE R4, R12, 0x2, UR8", "@P2 BRA `(.L_end)",
    "STG.E.128 desc[UR4][R4.64], R12", "EXIT",
    ".L_end:", "STG.E.U16 desc[UR4][R4.64], R12", "IADD3 R4, P0, R0, UR10, RZ", "STG.E.64 desc[UR4][R4.64], R2", "EXIT",
)  # fmt: skip
POINTERS = {0x210: "table", 0x218: "x", 0x220: "y", 0x228: "z"}


def test_every_access_belongs_to_the_argument_that_its_address_comes_from():
    found = sass.accesses(listing(*LISTING), POINTERS)
    assert [(access.address, set(access.tensors), access.store, access.bits) for access in found] == [
        (0x30, {"table"}, False, 32),
        (0x50, {"x"}, False, 128),
        (0xC0, {"y"}, True, 128),
        (0xE0, {"y"}, True, 16),
        (0x100, {"z"}, True, 64),
    ]


@pytest.mark.parametrize(("before_the_end", "bits"), [("EXIT", [128]), ("NOP", [128, 16])])
def test_accesses_on_a_branch_that_excludes_the_widest_are_left_out(before_the_end, bits):
    end = LISTING.index(".L_end:")
    code = listing(*LISTING[: end - 1], before_the_end, *LISTING[end:])
    of_y = [access for access in sass.accesses(code, POINTERS) if "y" in access.tensors]
    assert [access.bits for access in sass.with_widest(of_y, code)] == bits


def test_code_that_two_branches_share_counts_for_both_tensors():
    code = ("LDC.64 R2, c[0x0][0x210]", "@P0 LDC.64 R2, c[0x0][0x218]", "LDG.E.64 R4, desc[UR4][R2.64]", "EXIT")
    (access,) = sass.accesses(listing(*code), POINTERS)
    assert access.tensors == {"table", "x"}


def test_a_pointer_is_followed_through_the_stack():
    code = (
        "LDC.64 R2, c[0x0][0x218]", "STL.64 [R1+0x8], R2", "LDC.64 R2, c[0x0][0x210]", "STL.64 [R1], R2",
        "LDL.64 R2, [R1+0x8]", "LDG.E.64 R4, desc[UR4][R2.64]", "EXIT",
    )  # fmt: skip
    (access,) = sass.accesses(listing(*code), POINTERS)
    assert access.tensors == {"x"}


@pytest.mark.parametrize("line", ["LDG.E.128 R4, desc[UR4][R4.64]", "RED.E.ADD.F32 desc[UR4][R2.64], R0"])
def test_an_access_that_cannot_be_told_is_an_error(line):
    with pytest.raises(ValueError, match="teach sass"):
        sass.accesses(listing(line, "EXIT"), POINTERS)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E.128.CONSTANT", 128), ("LDG.E.U8", 8), ("STG.E.U16", 16), ("LDG.E.S16", 16), ("STG.E", 32),
     ("LDG.E.64.SYS", 64), ("LDG.E.ENL2.256", 256)],
)  # fmt: skip
def test_the_width_is_read_off_the_opcode(opcode, bits):
    assert sass.width(opcode) == bits


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
    assert sass.parse_argument_offsets(elf, ["x", "n"]) == {0x210: "x", 0x218: "n"}
    with pytest.raises(ValueError, match="arguments"):
        sass.parse_argument_offsets(elf, ["a", "b", "c", "d"])


def test_what_is_no_cubin_is_refused():
    with pytest.raises(RuntimeError, match="nvdisasm"):
        sass.run_tool("nvdisasm", "-c", b"not a cubin")
