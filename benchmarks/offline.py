"""Compile Triton kernels for real GPU targets on any machine, and read what their code costs and moves: no GPU needed.

Run this in a process without TRITON_INTERPRET, where the kernels are compiled functions and not interpreted ones.

The machine code (SASS) says what the inner loops cost. Per iteration and multiprocessor, a loop takes at least

    matrix = FLOPs / (dense FLOPs a cycle)    issue = instructions * warps / 4    mufu = MUFU * 32 * warps / 16

cycles: a multiprocessor has four schedulers, each issuing one instruction of one warp a cycle, and 16 lanes for special
functions (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"). Instructions are counted per
warp, FLOPs per block. Latencies, memory and bank conflicts are left out: these bounds rank kernels and predict no time.

The assembler's input (PTX) says which tensors are loaded and stored, because it names the arguments and gives every
value a register of its own. Loaded values depend on no pointer, because the memory-bound kernels load no pointers.
"""

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# Bytes of shared memory that a block may take (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": the maximum less the 1 KiB that the system keeps).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


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


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """Return what a tool that comes with Triton prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {option} failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Compiled:
    """The output of the compiler for one kernel."""

    cubin: bytes
    shared_bytes: int
    ttir: str
    ttgir: str
    ptx: str

    @cached_property
    def instructions(self) -> list[Instruction]:
        """The disassembled kernel."""
        return parse_sass(run_tool("nvdisasm", "-c", self.cubin))

    @cached_property
    def usage(self) -> str:
        """The assembler's statement of registers and stack."""
        return run_tool("cuobjdump", "-res-usage", self.cubin)

    def columns(self, instructions: list[Instruction]) -> dict[str, Any]:
        """Return the columns of resources; spills are counted among the instructions given."""
        return parse_resources(self.usage, instructions) | {"shared_kib": round(self.shared_bytes / 1024, 1)}

    def accesses(self, arguments: Sequence[str]) -> list[Access]:
        """Return every load and store of global memory, whose widths the assembler keeps; `arguments` are in order."""
        found = accesses(parse_ptx(self.ptx), arguments)
        machine = {(i.root == "STG", width(i.opcode)) for i in self.instructions if i.root in ("LDG", "STG")}
        assert machine == {(access.store, access.bits) for access in found}, f"{machine} in SASS, {found} in PTX"
        return found


def spill_rule(row: Mapping[str, Any]) -> list[str]:
    """Return how a row breaks the rule of all kernels: no instruction moves a register to or from local memory.

    Stack that is reserved is none by itself, and neither are zeros that are stored to it and never loaded.
    """
    return [f"{row['spills']} spills"] if row["spills"] else []


def known_multiples(function: triton.JITFunction) -> set[str]:
    """Return the arguments that the compiler knows to be multiples of 16 at a launch of a kernel: pointers, strides."""
    return {name for name in function.arg_names if name.endswith("_ptr") or name.startswith("stride")}


def compile_kernel(
    function: triton.JITFunction,
    dtype: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    multiples: Collection[str],
    options: Mapping[str, Any],
    arch: int,
) -> Compiled:
    """Compile a kernel for sm_`arch`.

    Args:
        types: Triton's types of the arguments that are neither pointers to numbers of `dtype` nor integers.
        constants: arguments whose values the compiler knows; None for an absent tensor or stride.
        multiples: arguments that the compiler knows to be multiples of 16.
    """
    names = list(function.arg_names)
    default = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, default[name]) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in set(multiples) - constants.keys()}
    source = ASTSource(function, signature, constexprs=values, attrs=divisible)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    return Compiled(kernel.asm["cubin"], kernel.metadata.shared, *(kernel.asm[x] for x in ("ttir", "ttgir", "ptx")))


def products_without_matrix_unit(ttgir: str) -> list[str]:
    """Return the matrix products left to ordinary arithmetic: their results are not laid out for a matrix unit."""
    dots = [line.strip() for line in ttgir.splitlines() if re.search(r"= (tt\.dot|ttng\.warp_group_dot)\b", line)]
    return [line for line in dots if "#mma" not in line]


def transposed_products(ttir: str) -> list[str]:
    """Return the transposed operands that do not come straight from memory, in Triton's first form of a kernel.

    The transposed result of a matrix product gives wrong results on sm_90 in Triton 3.4 to 3.7.0. Swapping the last two
    of three axes is no such transposition: it only names the halves of the columns.
    """
    sources: dict[str, tuple[str, str]] = {}  # of a value: the operation, and its first operand
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\w+)(?::\d+)? = (\S+) (?:(%\w+)(?:#\d+)?)?", line)
        if not match:
            continue
        result, kind, operand = match.groups()
        sources[result] = kind, operand
        if kind == "tt.trans" and "array<i32: 1, 0>" in line and not _from_memory(operand, sources):
            found.append(line.strip())
    return found


def _from_memory(value: str, sources: Mapping[str, tuple[str, str]]) -> bool:
    kind, operand = sources.get(value, ("", ""))
    return kind in ("tt.load", "tt.descriptor_load") or (kind == "tt.reshape" and _from_memory(operand, sources))


def parse_resources(usage: str, instructions: Iterable[Instruction]) -> dict[str, int]:
    """Return registers, spills (moves to or from local memory) and stack of a kernel from `cuobjdump -res-usage`."""
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if len(found) != 1:
        raise ValueError(f"the cubin must hold one kernel, got {len(found)}; compile one kernel at a time")
    registers, stack_bytes = map(int, found[0])
    # ptxas 12.8 stores zeros that nothing loads on sm_120; they hold no register.
    spills = sum(i.root == "LDL" or (i.root == "STL" and ", RZ" not in i.operands) for i in instructions)
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
    for source, header in ((source, header) for source, header in graph.edges if header <= source):
        node = source
        while node not in (header, 0, None):
            node = dominators.get(node)
        if node == header and (source == 0 or source in dominators):
            latches.setdefault(header, []).append(source)
    found = []
    for header, sources in sorted(latches.items()):
        inside = nx.restricted_view(graph, [header], [])
        body = {header}.union(*({s} | nx.ancestors(inside, s) for s in sources if s != header))
        found.append([instructions[i] for i in sorted(body) if header <= i <= max(sources)])
    return found


def matrix_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the loops that hold a matrix instruction and no other such loop, by address."""
    candidates = [loop for loop in loops(instructions) if any(_MATRIX.fullmatch(i.root) for i in loop)]
    headers = {loop[0] for loop in candidates}
    return [loop for loop in candidates if headers.isdisjoint(loop[1:])]


def cost(loop: Sequence[Instruction], flops: int, warps: int, arch: int) -> dict[str, float]:
    """Return the columns of a loop whose iteration does `flops` per block, at the published dense peak rate of `arch`.

    `compares` are integer compares. `exponentials` are all MUFU instructions. `ratio` is the cycles of the other units
    per cycle of the matrix units; above 1, these must wait. The bounds are shares of the peak rate: `serial_bound` if
    the matrix units idle while the rest runs (one block), `overlapped_bound` if everything overlaps perfectly.

    TF32 inputs halve the 16-bit rate. Opcodes of tcgen05 do not tell TF32 from 16 bits: they are taken as 16-bit.
    """
    kinds = {i.opcode for i in loop if _MATRIX.fullmatch(i.root)}
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


def parse_ptx(text: str) -> list[Instruction]:
    """Return the instructions of a kernel in PTX, numbered, with opcodes in capital letters as in machine code."""
    labels: dict[str, str] = {}
    parsed: list[Instruction] = []
    for line in text.splitlines():
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = f"0x{len(parsed):x}"
        elif found := re.match(r"\s*(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);", line):
            predicate, opcode, operands = found.groups(default="")
            parsed.append(Instruction(len(parsed), predicate, opcode.upper(), operands))
    return [i._replace(operands=re.sub(r"\$\w+", lambda x: labels.get(x[0], x[0]), i.operands)) for i in parsed]


def accesses(instructions: Sequence[Instruction], arguments: Sequence[str]) -> list[Access]:
    """Return every load and store of global memory in PTX; each belongs to the arguments that its address comes from.

    Raises:
        ValueError: global memory is accessed in another way, or no argument reaches an address.
    """
    flow, memory = nx.DiGraph(), []
    flow.add_nodes_from(arguments)
    for i in instructions:
        target, *sources = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", i.operands) or [""]
        if parameter := re.search(r"_param_(\d+)\]", i.operands):
            sources = arguments[int(parameter[1]) :][:1]
        elif i.root in ("LD", "ST") and ".GLOBAL" in i.opcode:
            memory.append(i)
        elif i.root in ("LD", "ST", "ATOM", "RED", "CP") and not re.search(r"\.(SHARED|LOCAL|PARAM)", i.opcode):
            raise ValueError(f"global memory must be accessed by ld.global and st.global, got {i}; teach offline.py it")
        if i.root not in ("LD", "ST") or parameter:
            names = [name for source in sources for name in re.findall(r"%\w+|^\w+_ptr$", source)]
            flow.add_edges_from(product(names, re.findall(r"%\w+", target)))
    found = []
    for i in memory:
        registers = re.findall(r"%\w+", re.search(r"\[([^]]*)\]", i.operands)[1])
        reached = set().union(*(nx.ancestors(flow, register) for register in registers if register in flow))
        if not (tensors := frozenset(name for name in arguments if name in reached and name.endswith("_ptr"))):
            raise ValueError(f"no argument reaches the address of {i}; teach offline.py the code before it")
        found.append(Access(i.address, tensors, i.root == "ST", width(i.opcode)))
    return found


def width(opcode: str) -> int:
    """Return the bits that one thread loads or stores: LDG.E.128 and LD.GLOBAL.V4.B32 move 128, LDG.E 32."""
    size = re.findall(r"\.[BFSU]?(8|16|32|64|128|256)\b", opcode)
    vector = re.findall(r"\.V(\d)\b", opcode)
    return int(size[-1] if size else 32) * int(vector[0] if vector else 1)


def with_widest(found: Sequence[Access], instructions: Sequence[Instruction]) -> list[Access]:
    """Return the accesses of one tensor, but those on a branch that excludes its widest one, like the end of a row."""
    graph = control_flow(instructions)
    after = {a: nx.descendants(graph, a.address) | {a.address} for a in found}
    widest = [a for a in found if a.bits == max(access.bits for access in found)]
    return [a for a in found if any(w.address in after[a] or a.address in after[w] for w in widest)]
