"""The machine code (SASS) of a compiled kernel: what its inner loops cost, and which tensors it loads and stores.

Nothing here needs a GPU; the tools that disassemble come with Triton. Per iteration and multiprocessor, a loop takes at
least

    matrix = FLOPs / (dense FLOPs a cycle)    issue = instructions * warps / 4    mufu = MUFU * 32 * warps / 16

cycles: a multiprocessor has four schedulers, each issuing one instruction of one warp a cycle, and 16 lanes for special
functions (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"). Instructions are counted per
warp, FLOPs per block. Latencies, memory and bank conflicts are left out: these bounds rank kernels and predict no time.

Loads and stores are attributed to tensors by their addresses: from the pointers among the arguments, which lie in a
constant bank at offsets that the cubin names, the registers that depend on them are followed through the control flow.
Loaded values depend on no pointer, because the memory-bound kernels load no pointers from memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import triton


class Instruction(NamedTuple):
    """One instruction; `predicate` is like `!P0` or empty, and labels in `operands` are replaced by addresses."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def root(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a direct branch or call goes to."""
        target = re.search(r"(0x[0-9a-f]+)$", self.operands)
        return int(target[1], 16) if target and self.root in ("BRA", "JMP", "CALL") else None

    @property
    def is_matrix(self) -> bool:
        """True if the tensor cores execute it."""
        return _MATRIX.fullmatch(self.root) is not None


class Access(NamedTuple):
    """One load or store of global memory, of `bits` per thread; two tensors only where two branches share its code."""

    address: int
    tensors: frozenset[str]
    store: bool
    bits: int


_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# The instruction after one of these is not executed, unless they are predicated.
_ENDS = {"BRA", "JMP", "EXIT", "RET", "BRX", "JMX"}
# Four warps execute a wgmma (HGMMA) together, one warp an mma (HMMA), one thread issues a tcgen05.mma for the block.
_MATRIX = re.compile(r"[BHIQ]GMMA|[BDHIOQ]MMA|UTC\w*MMA")
_16_BIT_MATRIX = {"HMMA", "HGMMA", "UTCHMMA"}
# The letters of `order`, by the beginning of an opcode.
_LETTERS = {
    "E": r"MUFU\.EX2", "M": r"MUFU\.(?!EX2)", "W": r"WARPGROUP\.DEPBAR", "B": r"BAR\.|SYNCS\.PHASECHK",
    "H": _MATRIX.pattern,
}  # fmt: skip
# Dense 16-bit FLOPs a cycle and multiprocessor with fp32 accumulation: published peak / (multiprocessors * clock).
_MATRIX_RATE = {
    80: 2048,  # A100: 312e12 / (108 * 1.41e9)
    90: 4096,  # H100 SXM: 989e12 / (132 * 1.83e9)
    100: 8192,  # B200: 2250e12 / (148 * 1.85e9), rounded
    120: 1024,  # RTX PRO 6000: 504e12 / (188 * 2.62e9); a GeForce accumulates in fp32 at half of it
}
# Instructions that may access global memory but cannot be attributed here.
_UNREAD = {"LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UTMALDG", "UTMASTG", "UBLKCP"}
_REGISTER = re.compile(r"\b(UR|R)(\d+)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")

# The arguments that a register, or a word of the stack, may depend on.
Origins = dict[str, frozenset[str]]
_NOTHING: frozenset[str] = frozenset()


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """Return what a tool that comes with Triton prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {option} failed: {done.stderr.strip()}")
    return done.stdout


def parse_resources(usage: str, instructions: Iterable[Instruction]) -> dict[str, int]:
    """Return registers, spills and stack of the only kernel in the output of `cuobjdump -res-usage`.

    Spills are the instructions that move registers to or from local memory.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if len(found) != 1:
        raise ValueError(f"the cubin must hold one kernel, got {len(found)}; compile one kernel at a time")
    registers, stack_bytes = map(int, found[0])
    spills = sum(i.root in ("LDL", "STL") for i in instructions)
    return {"registers": registers, "spills": spills, "stack_bytes": stack_bytes}


def parse_sass(text: str) -> list[Instruction]:
    """Return the instructions in the output of `nvdisasm -c`, by address."""
    labels: dict[str, str] = {}
    pending: list[str] = []
    parsed: list[Instruction] = []
    for line in text.splitlines():
        if label := re.match(r"\s*([.$\w]+):\s*$", line):
            pending.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", line):
            address, predicate, opcode, operands = found.groups(default="")
            labels |= dict.fromkeys(pending, f"0x{address}")
            pending.clear()
            parsed.append(Instruction(int(address, 16), predicate, opcode, operands))
    if any(later.address <= earlier.address for earlier, later in pairwise(parsed)):
        raise ValueError("the code must be of one function, got addresses that start again; compile one kernel a cubin")
    resolved = (re.sub(r"`\(([^)]*)\)", lambda label: labels.get(label[1], label[0]), i.operands) for i in parsed)
    return [i._replace(operands=operands) for i, operands in zip(parsed, resolved, strict=True)]


def control_flow(instructions: Sequence[Instruction]) -> nx.DiGraph:
    """Return the graph of the instructions that can follow each, by index. BSYNC continues with the next one."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(instructions)))
    for i, instruction in enumerate(instructions):
        if instruction.target in index:
            graph.add_edge(i, index[instruction.target])
        # A branch can also be conditional by an operand: `BRA.U !UP0, 0x1b0`.
        conditional = instruction.predicate or "," in instruction.operands
        if (instruction.root not in _ENDS or conditional) and i + 1 < len(instructions):
            graph.add_edge(i, i + 1)
    return graph


def loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return every natural loop, including nested ones, by address of its header.

    Loops come from the control-flow graph, because a backward branch alone makes no loop: ptxas puts the spin on an
    mbarrier behind the end of the kernel. Only what lies between a loop's header and its last branch back to it is
    kept, so that code out of line (those spins) is taken not to run. Both sides of a branch inside the loop count.

    Not handled: indirect branches; loops whose header is not their lowest address, or that are entered elsewhere.
    """
    graph = control_flow(instructions)
    dominators = nx.immediate_dominators(graph, 0) if instructions else {}
    latches: dict[int, list[int]] = {}
    for source, header in graph.edges:
        node = source
        while node not in (header, 0, None):
            node = dominators.get(node)
        if node == header <= source and (source == 0 or source in dominators):
            latches.setdefault(header, []).append(source)
    found = []
    for header, sources in sorted(latches.items()):
        inside = nx.restricted_view(graph, [header], [])
        body = {header}.union(*({s} | nx.ancestors(inside, s) for s in sources if s != header))
        found.append([instructions[i] for i in sorted(body) if header <= i <= max(sources)])
    return found


def matrix_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the loops that hold a matrix instruction and no other such loop, by address."""
    candidates = [loop for loop in loops(instructions) if any(i.is_matrix for i in loop)]
    headers = {loop[0] for loop in candidates}
    return [loop for loop in candidates if headers.isdisjoint(loop[1:])]


def cost(loop: Sequence[Instruction], flops: int, warps: int, arch: int) -> dict[str, float]:
    """Return the columns of a loop whose iteration does `flops` per block, at the published dense peak rate of `arch`.

    `compares` are integer compares. `exponentials` are all MUFU instructions. `ratio` is the cycles of the other units
    per cycle of the matrix units; above 1, these must wait. The bounds are shares of the peak rate: `serial_bound` if
    the matrix units idle while the rest runs (one block), `overlapped_bound` if everything overlaps perfectly.

    TF32 inputs halve the 16-bit rate. Opcodes of tcgen05 do not tell TF32 from 16 bits: they are taken as 16-bit.
    """
    kinds = {i.opcode for i in loop if i.is_matrix}
    if arch not in _MATRIX_RATE:
        raise ValueError(f"arch must be one of {sorted(_MATRIX_RATE)}, got {arch}; add its published rate")
    if not kinds or {kind.partition(".")[0] for kind in kinds} - _16_BIT_MATRIX:
        raise ValueError(f"the loop must hold 16-bit or TF32 matrix instructions, got {kinds}; add their rate")
    mufu = sum(i.root == "MUFU" for i in loop)
    matrix = flops / _MATRIX_RATE[arch] * (2 if any(".TF32" in kind for kind in kinds) else 1)
    issue, special = len(loop) * warps / 4, mufu * warps * 32 / 16
    ratio = max(issue, special) / matrix
    return {
        "instructions": len(loop), "compares": sum(i.root == "ISETP" for i in loop), "matrix_cycles": matrix,
        "issue_cycles": issue, "mufu_cycles": special, "ratio": ratio, "serial_bound": 1 / (1 + ratio),
        "overlapped_bound": 1 / max(1, ratio), "exponentials": mufu,
    }  # fmt: skip


def order(instructions: Iterable[Instruction]) -> str:
    """Return how a loop orders what should overlap, run-length coded, as in `H8 W E64 H8 W`.

    H: matrix instruction; E: exponential; M: other MUFU; W: wait for wgmma; B: block barrier, or wait on an mbarrier
    (the only wait for tcgen05). On Ampere and sm_120, registers make matrix instructions wait, so there is no W.
    """
    letters = (letter for i in instructions for letter, kind in _LETTERS.items() if re.match(kind, i.opcode))
    runs = ((letter, len(list(run))) for letter, run in groupby(letters))
    return " ".join(f"{letter}{length}" if length > 1 else letter for letter, length in runs)


def exponentials_in_flight(instructions: Sequence[Instruction]) -> int:
    """Return how many exponentials of one iteration issue while a wgmma (sm_90) may still run; 0 means no overlap.

    A wgmma is in flight from its issue; `gsb0` among its operands closes a group, and `WARPGROUP.DEPBAR.LE gsb0, N`
    waits until at most N closed groups are left. The count is 0 for mma, and says nothing of tcgen05.
    """
    groups, group_open, in_flight = 0, False, 0
    # The first pass over the loop only finds what the iteration before leaves in flight.
    for counted in (False, True):
        for instruction in instructions:
            if instruction.root.endswith("GMMA"):
                group_open = "gsb0" not in instruction.operands
                groups += not group_open
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(instruction.operands.split(",")[-1], 16))
            elif counted and instruction.opcode.startswith("MUFU.EX2"):
                in_flight += group_open or groups > 0
    return in_flight


def parse_argument_offsets(elf: str, names: Sequence[str]) -> dict[int, str]:
    """Return the offsets in constant bank 0 of a kernel's arguments, from the output of `cuobjdump -elf`.

    Arguments that Triton adds after `names` are left out.
    """
    base = re.search(r"EIATTR_PARAM_CBANK\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x\w+ 0x\w*(\w{4})\b", elf)
    offsets = {int(n, 16): int(at, 16) for n, at in re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)", elf)}
    if base is None or len(offsets) < len(names):
        raise ValueError(f"the cubin must list the offsets of its {len(names)} arguments, got {len(offsets)} of them")
    return {int(base[1], 16) + offsets[ordinal]: name for ordinal, name in enumerate(names)}


def accesses(instructions: Sequence[Instruction], pointers: Mapping[int, str]) -> list[Access]:
    """Return every load and store of global memory, by address; `pointers` are offsets in constant bank 0."""
    if unread := sorted({i.root for i in instructions} & _UNREAD):
        raise ValueError(f"global memory must be accessed by LDG and STG alone, got {unread}; teach sass.py those")
    found = []
    for instruction, origins in zip(instructions, _origins(instructions, pointers), strict=True):
        if instruction.root in ("LDG", "STG"):
            address = instruction.operands[: instruction.operands.rindex("]")].rpartition("[")[2]
            tensors = _depends_on(address, origins, pointers)
            if not tensors:
                raise ValueError(f"no argument reaches the address of {instruction}; teach sass.py the code before it")
            found.append(Access(instruction.address, tensors, instruction.root == "STG", width(instruction.opcode)))
    return found


def width(opcode: str) -> int:
    """Return the bits that one thread loads or stores: LDG.E.128 moves 128, LDG.E 32, LDG.E.U16 16."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(sizes[-1]) if sizes else 32


def with_widest(found: Sequence[Access], instructions: Sequence[Instruction]) -> list[Access]:
    """Return those accesses of one tensor that one thread can execute together with a widest one.

    The others lie on a branch that excludes it, like the last block of a row.
    """
    graph = control_flow(instructions)
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    after = {a: nx.descendants(graph, index[a.address]) | {index[a.address]} for a in found}
    widest = [a for a in found if a.bits == max(access.bits for access in found)]
    return [a for a in found if any(index[w.address] in after[a] or index[a.address] in after[w] for w in widest)]


def _origins(instructions: Sequence[Instruction], pointers: Mapping[int, str]) -> list[Origins]:
    """Return what the registers depend on before each instruction, over all paths that lead there."""
    graph = control_flow(instructions)
    before: list[Origins] = [{} for _ in instructions]
    pending = dict.fromkeys(reversed(range(len(instructions))))  # an ordered set, taken from its end
    while pending:
        index, _ = pending.popitem()
        after = _step(instructions[index], before[index], pointers)
        for successor in graph[index]:
            known = before[successor]
            joined = {register: names | known.get(register, _NOTHING) for register, names in after.items()}
            if known | joined != known:
                before[successor] = known | joined
                pending[successor] = None
    return before


def _step(instruction: Instruction, before: Origins, pointers: Mapping[int, str]) -> Origins:
    """Return what the registers depend on after an instruction: results depend on what its operands depend on."""
    root, modifiers = instruction.root, instruction.opcode.split(".")
    first, *operands = (operand.strip() for operand in instruction.operands.split(","))
    if root == "STL":  # a spill: the registers from `operands[0]` on go to the stack
        words = range(max(1, width(instruction.opcode) // 32))
        return before | {_slot(first, i): before.get(_register(operands[0], i), _NOTHING) for i in words}
    if not re.fullmatch(r"(UR|R)\d+(\.\w+)*", first):
        return before
    pairs = {"64", "WIDE"} & set(modifiers) or root in ("CS2R", "FADD2", "FMUL2", "FFMA2")
    constant = _CONSTANT.search(instruction.operands)
    names = _NOTHING if root in ("LDG", "LDS") else _depends_on(", ".join(operands), before, pointers)
    after = dict(before)
    for i in range(4 if "128" in modifiers else 2 if pairs else 1):
        if root in ("LDC", "ULDC", "LDCU") and constant:
            # A wide one loads several arguments at once, one word into each register.
            names = _argument(int(constant[1], 16) + 4 * i, pointers)
        elif root == "LDL":
            names = before.get(_slot(operands[0], i), _NOTHING)
        register = _register(first, i)
        # A predicated instruction may leave the register as it was.
        after[register] = names | before.get(register, _NOTHING) if instruction.predicate else names
    return after


def _register(operand: str, offset: int) -> str:
    """Return the register that lies `offset` after the one in an operand; RZ is zero."""
    found = _REGISTER.search(operand)
    return f"{found[1]}{int(found[2]) + offset}" if found else "RZ"


def _slot(address: str, offset: int) -> str:
    """Return the name of a word of the stack, whose address is R1 plus a constant."""
    found = re.search(r"\+(0x[0-9a-f]+)\]", address)
    return f"stack {(int(found[1], 16) if found else 0) + 4 * offset}"


def _depends_on(operands: str, origins: Origins, pointers: Mapping[int, str]) -> frozenset[str]:
    registers = (origins.get(kind + number, _NOTHING) for kind, number in _REGISTER.findall(operands))
    return _NOTHING.union(*registers, *(_argument(int(at, 16), pointers) for at in _CONSTANT.findall(operands)))


def _argument(offset: int, pointers: Mapping[int, str]) -> frozenset[str]:
    """Return the pointer whose low or high word lies at `offset`."""
    return frozenset(pointers[start] for start in (offset, offset - 4) if start in pointers)
