"""Which tensor each load and store of a compiled kernel belongs to, and how wide it is, read off its machine code.

An address is computed from a pointer that the kernel takes as an argument, and arguments lie in a constant bank at
offsets that the cubin names. So the registers that depend on a pointer are followed from there, forward through the
control-flow graph, until a load or store uses them as its address. What is loaded depends on no pointer: these kernels
take no pointers from memory. Small loads (offsets of images, weights) are thus told from those of the large tensors
exactly, and not by their width or number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sass

# Registers, and words of the stack, that hold a pointer or part of one, and the arguments that it may come from.
Origins = dict[str, frozenset[str]]


@dataclass(frozen=True)
class Access:
    """One load or store of global memory: `bits` of a thread. Two tensors only where two branches share its code."""

    address: int
    tensors: frozenset[str]
    store: bool
    bits: int


_ROOTS = {"LDG": False, "STG": True}  # and whether it stores
# What else may touch global memory: not attributed, so not to be overlooked.
_UNREAD = {"LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UTMALDG", "UTMASTG", "UBLKCP"}
_REGISTER = re.compile(r"\b(UR|R)(\d+)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")


def argument_offsets(cubin: bytes, names: Sequence[str]) -> dict[int, str]:
    """Where the arguments of the only kernel in `cubin` lie in constant bank 0; `names` are those it was given."""
    return parse_argument_offsets(sass.run_tool("cuobjdump", "-elf", cubin), names)


def parse_argument_offsets(elf: str, names: Sequence[str]) -> dict[int, str]:
    """The same from the text of `cuobjdump -elf`; arguments that Triton adds after `names` are left out."""
    base = re.search(
        r"EIATTR_PARAM_CBANK\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x[0-9a-f]+ 0x[0-9a-f]*([0-9a-f]{4})\b", elf
    )
    offsets = {int(n, 16): int(at, 16) for n, at in re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)", elf)}
    if base is None or len(offsets) < len(names):
        raise ValueError(f"the cubin must name where its {len(names)} arguments lie, got {len(offsets)} of them")
    return {int(base[1], 16) + offsets[ordinal]: name for ordinal, name in enumerate(names)}


def accesses(instructions: Sequence[sass.Instruction], pointers: Mapping[int, str]) -> list[Access]:
    """Every load and store of global memory, by address; `pointers` are offsets in constant bank 0."""
    if unread := sorted({i.root for i in instructions} & _UNREAD):
        raise ValueError(f"global memory must be accessed by LDG and STG alone, got {unread}; teach sass_memory those")
    found = []
    for instruction, origins in zip(instructions, _origins(instructions, pointers), strict=True):
        if instruction.root not in _ROOTS:
            continue
        address = instruction.operands[: instruction.operands.rindex("]")].rpartition("[")[2]
        tensors = _depends_on([address], origins, pointers)
        if not tensors:
            raise ValueError(f"no argument reaches the address of {instruction}; teach sass_memory the code before it")
        found.append(Access(instruction.address, tensors, _ROOTS[instruction.root], width(instruction.opcode)))
    return found


def width(opcode: str) -> int:
    """Bits that one thread loads or stores: LDG.E.128 moves 128, LDG.E 32, LDG.E.U16 16."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(sizes[-1]) if sizes else 32


def with_widest(found: Sequence[Access], instructions: Sequence[sass.Instruction]) -> list[Access]:
    """Of the accesses of one tensor, those that one thread can execute together with a widest one.

    The others lie on a branch that excludes it, as the last block of a row does.
    """
    bits = max((access.bits for access in found), default=0)
    widest = {access.address for access in found if access.bits == bits}
    reached = {address: _reachable(address, instructions) for address in {access.address for access in found}}
    return [a for a in found if any(w in reached[a.address] or a.address in reached[w] for w in widest)]


def _reachable(address: int, instructions: Sequence[sass.Instruction]) -> set[int]:
    """Addresses of the instructions that may run after the one at `address`, itself included."""
    successors = sass.control_flow(instructions)
    start = next(i for i, instruction in enumerate(instructions) if instruction.address == address)
    seen, pending = {start}, [start]
    while pending:
        new = set(successors[pending.pop()]) - seen
        seen |= new
        pending += new
    return {instructions[i].address for i in seen}


def _origins(instructions: Sequence[sass.Instruction], pointers: Mapping[int, str]) -> list[Origins]:
    """What the registers hold before each instruction, over all paths that lead there."""
    successors = sass.control_flow(instructions)
    before: list[Origins] = [{} for _ in instructions]
    pending, waiting = list(range(len(instructions)))[::-1], set(range(len(instructions)))
    while pending:
        index = pending.pop()
        waiting.discard(index)
        after = _step(instructions[index], before[index], pointers)
        for successor in successors[index]:
            if _join(before[successor], after) and successor not in waiting:
                waiting.add(successor)
                pending.append(successor)
    return before


def _join(into: Origins, origins: Origins) -> bool:
    """Adds the origins along one more path; whether any were new."""
    grown = False
    for register, names in origins.items():
        if not names <= into.get(register, frozenset()):
            into[register] = into.get(register, frozenset()) | names
            grown = True
    return grown


def _step(instruction: sass.Instruction, before: Origins, pointers: Mapping[int, str]) -> Origins:
    """What the registers hold after an instruction: its results depend on what its operands depend on."""
    written, operands = _results(instruction)
    if not written and instruction.root != "STL":
        return before
    after = dict(before)
    if instruction.root == "STL":
        after |= {slot: before.get(register, frozenset()) for slot, register in _spilled(instruction, operands[0])}
        return after
    constant = _CONSTANT.search(instruction.operands)
    for place, register in enumerate(written):
        if instruction.root in ("LDC", "ULDC", "LDCU") and constant:
            # A wide one loads several arguments at once, a word to each register.
            names = _argument(int(constant[1], 16) + 4 * place, pointers)
        elif instruction.root == "LDL":
            names = before.get(_slot(operands[0], place), frozenset())
        elif instruction.root in ("LDG", "LDS"):
            names = frozenset()
        else:
            names = _depends_on(operands, before, pointers)
        # One that is predicated may leave what was there.
        after[register] = names | before.get(register, frozenset()) if instruction.predicate else names
    return {register: names for register, names in after.items() if names}


def _spilled(instruction: sass.Instruction, stored: str) -> list[tuple[str, str]]:
    """(word of the stack, register stored there); RZ is zero."""
    address = instruction.operands.partition(",")[0]
    slots = [_slot(address, place) for place in range(width(instruction.opcode) // 32)]
    register = _REGISTER.search(stored)
    return [(s, f"{register[1]}{int(register[2]) + place}" if register else "RZ") for place, s in enumerate(slots)]


def _slot(address: str, place: int) -> str:
    """The name of a word of the stack, whose address is R1 plus a constant."""
    offset = re.search(r"\+(0x[0-9a-f]+)\]", address)
    return f"stack {(int(offset[1], 16) if offset else 0) + 4 * place}"


def _results(instruction: sass.Instruction) -> tuple[list[str], list[str]]:
    """(registers written, operands read). The first operand is the result, and may name the lowest of several."""
    first, *operands = (operand.strip() for operand in instruction.operands.split(","))
    result = re.fullmatch(r"(UR|R)(\d+)(?:\.\w+)*", first)
    if not result:
        return [], operands
    modifiers = instruction.opcode.split(".")
    count = 4 if "128" in modifiers else 2 if _writes_pair(modifiers) else 1
    return [f"{result[1]}{int(result[2]) + place}" for place in range(count)], operands


def _writes_pair(modifiers: Sequence[str]) -> bool:
    root = modifiers[0]
    return "64" in modifiers or "WIDE" in modifiers or root in ("CS2R", "FADD2", "FMUL2", "FFMA2")


def _depends_on(operands: Iterable[str], origins: Origins, pointers: Mapping[int, str]) -> frozenset[str]:
    text = ", ".join(operands)
    names: frozenset[str] = frozenset()
    for kind, number in _REGISTER.findall(text):
        names |= origins.get(kind + number, frozenset())
    for offset in _CONSTANT.findall(text):
        names |= _argument(int(offset, 16), pointers)
    return names


def _argument(offset: int, pointers: Mapping[int, str]) -> frozenset[str]:
    """The pointer whose low or high word lies at `offset`."""
    return frozenset(pointers[start] for start in (offset, offset - 4) if start in pointers)
