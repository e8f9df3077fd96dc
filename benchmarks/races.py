"""Search machine code of sm_90 for a race: a register is written while an unfinished wgmma still reads it.

A wgmma whose left operand is in registers reads them until a wait retires its group. ptxas before 13.3 may move a write
to such a register above that wait (triton issue 9433), which gives wrong products now and then.
"""

import re
from collections.abc import Iterator, Sequence

from offline import Instruction, matrix_loops
from tables import Row

_LEFT_REGISTERS = 4  # of a thread, for 64 rows by 32 bytes of the left operand
# Opcodes whose first vector register is a source.
_NO_RESULT = re.compile(
    r"ST|RED|BAR|SYNCS|BRA|EXIT|RET|CALL|WARP|FENCE|[A-Z]*DEPBAR|LDGSTS|NOP|BSYNC|BSSY|R2UR|R2P|[A-Z]*SETP|PLOP3|"
    r"MEMBAR|ERRBAR|CCTL|U[A-Z]|ELECT|VOTE|YIELD|NANOSLEEP"
)
_WAIT = "WARPGROUP.DEPBAR"


def races(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Return the addresses of each wgmma and of a write to its left operand before it is retired.

    Instructions are followed by address, and each loop with a wgmma twice around.
    """
    paths = [instructions, *([*loop, *loop] for loop in matrix_loops(instructions))]
    return sorted({race for path in paths for race in _races_on(path)})


def without_waits(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Return the code as if nothing waited for a wgmma: the search must find races in it."""
    return [i for i in instructions if not i.opcode.startswith(_WAIT)]


def columns(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Count the wgmma with left operands in registers, those with a race, and those with one if nothing waited."""
    found = (instructions, without_waits(instructions))
    races_now, races_then = (len({matrix for matrix, _ in races(code)}) for code in found)
    left = sum(bool(_left(i)) for i in instructions)
    return {"wgmma_of_registers": left, "races": races_now, "races_without_waits": races_then}


def section(hopper: Sequence[Row]) -> list[str]:
    """Return the section on registers that are written too early for the kernel report, if sm_90 was compiled."""
    left, found, without = (
        sum(row[name] for row in hopper) for name in ("wgmma_of_registers", "races", "races_without_waits")
    )
    text = (
        f"{len(hopper)} variants in bf16 have {left} matrix instructions that read their left operand from registers. "
        f"In {found} of them, such a register is written before the instruction is retired; with the waits removed "
        f"from the same code, in {without}."
    )
    return ["## Register races on sm_90", text] if hopper else []


def _races_on(path: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    groups: list[list[Instruction]] = [[]]  # unfinished; the last one is not closed yet
    for instruction in path:
        if instruction.root.endswith("GMMA"):
            groups[-1].append(instruction)
            if "gsb0" in instruction.operands:
                groups.append([])
        elif instruction.opcode.startswith(_WAIT):
            left = int(instruction.operands.split(",")[-1], 16)
            groups = groups[max(len(groups) - 1 - left, 0) :]
        elif written := _written(instruction):
            for matrix in (matrix for group in groups for matrix in group):
                if set(written) & set(_left(matrix)):
                    yield matrix.address, instruction.address


def _left(instruction: Instruction) -> range:
    """Return the registers of a wgmma's left operand, none if it is in shared memory."""
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    found = len(operands) > 1 and re.fullmatch(r"R(\d+)(\.reuse)?", operands[1])
    if not found or not instruction.root.endswith("GMMA"):
        return range(0)
    return range(int(found[1]), int(found[1]) + _LEFT_REGISTERS)


def _written(instruction: Instruction) -> range:
    """Return the registers that an instruction other than a wgmma writes."""
    found = re.match(r"(?:!?P[T\d]\s*,\s*)*R(\d+)", instruction.operands)
    if not found or _NO_RESULT.match(instruction.opcode):
        return range(0)
    if matrices := re.search(r"^LDSM.*\.([24])$", instruction.opcode):
        count = int(matrices[1])
    else:
        count = 4 if ".128" in instruction.opcode else 2 if re.search(r"\.(64|WIDE)", instruction.opcode) else 1
    return range(int(found[1]), int(found[1]) + count)
