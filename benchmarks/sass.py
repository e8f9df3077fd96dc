"""What the inner loops of a compiled kernel cost, read off its machine code (SASS); needs no GPU.

Per iteration and multiprocessor, a loop cannot be faster than any of

    matrix = FLOPs / (dense FLOPs a cycle)    issue = instructions * warps / 4    mufu = MUFU * 32 * warps / 16

cycles: a multiprocessor has four schedulers, each issuing one instruction of one warp a cycle, and 16 lanes for special
functions (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"). Instructions are counted per
warp, FLOPs per block. Latencies, memory and bank conflicts are left out, so these are bounds that rank kernels, not
predictions of time. The tools that disassemble come with Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

import triton


@dataclass(frozen=True)
class Resources:
    """What a thread and a block occupy.

    `shared_bytes` is static shared memory only: Triton's own is dynamic, and in `CompiledKernel.metadata.shared`.
    `local_loads` and `local_stores` are LDL and STL instructions: spilled registers, or arrays indexed at run time.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    local_loads: int
    local_stores: int

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return self.local_loads + self.local_stores


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction; `predicate` is as in `!P0` or empty; labels in `operands` are replaced by addresses."""

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
        """Address that a direct branch or call goes to; None for every other instruction."""
        if self.root not in _BRANCHES or not (target := re.search(r"(0x[0-9a-f]+)$", self.operands)):
            return None
        return int(target[1], 16)

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor cores execute it."""
        return _MATRIX.fullmatch(self.root) is not None


@dataclass(frozen=True)
class Loop:
    """A natural loop: address of its header and of its last backward branch, instructions from one to the other."""

    first: int
    last: int
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Mix:
    """Instructions by class, per warp. The classes do not overlap, and `total` is their sum.

    `mufu_kinds` and `matrix_kinds` split two classes by opcode. FADD2, which adds two, and FMNMX3 count as one: they
    issue as one.
    """

    total: int
    matrix: int
    mufu: int
    fmul: int
    ffma: int
    fadd: int
    fmnmx: int
    convert: int
    integer_compare: int
    uniform_compare: int
    select: int
    shared: int
    global_memory: int
    tensor_memory: int
    barrier: int
    local: int
    nop: int
    other: int
    mufu_kinds: Mapping[str, int]
    matrix_kinds: Mapping[str, int]


@dataclass(frozen=True)
class Cycles:
    """Least cycles an iteration and multiprocessor that each unit is busy for one block."""

    matrix: float
    issue: float
    mufu: float

    @property
    def serial_bound(self) -> float:
        """Share of the peak rate if the matrix unit idles while the rest runs: one block, no overlap."""
        return self.matrix / (self.matrix + max(self.issue, self.mufu))

    @property
    def overlapped_bound(self) -> float:
        """Share of the peak rate if everything overlaps perfectly: two blocks, or a pipelined loop."""
        return self.matrix / max(self.matrix, self.issue, self.mufu)

    @property
    def ratio(self) -> float:
        """Cycles of the rest per cycle of the matrix unit; above 1 the matrix unit cannot be kept busy."""
        return max(self.issue, self.mufu) / self.matrix


_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_BRANCHES = {"BRA", "JMP", "CALL"}
# After these, if not predicated, the next instruction is not executed; the target of BRX and JMX is in a register.
_ENDS = {"BRA", "JMP", "EXIT", "RET", "BRX", "JMX"}

# Four warps execute a wgmma together, one warp a mma, one thread issues a tcgen05.mma for the block.
_WARP_GROUP_MATRIX = re.compile(r"[BHIQ]GMMA")
_BLOCK_MATRIX = re.compile(r"UTC\w*MMA")
_MATRIX = re.compile(rf"{_WARP_GROUP_MATRIX.pattern}|[BDHIOQ]MMA|{_BLOCK_MATRIX.pattern}")

_CLASSES = {
    "mufu": "MUFU",
    "fmul": "FMUL FMUL2",
    "ffma": "FFMA FFMA2",
    "fadd": "FADD FADD2",
    "fmnmx": "FMNMX FMNMX3",
    "convert": "F2FP F2F F2I I2F I2FP",
    "integer_compare": "ISETP",
    "uniform_compare": "UISETP",
    "select": "SEL FSEL USEL",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global_memory": "LDG STG LDGSTS UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED ATOM ATOMG RED REDG LD ST",
    "tensor_memory": "LDTM STTM UTCCP",
    "barrier": "WARPGROUP WARPSYNC BAR SYNCS DEPBAR LDGDEPBAR MEMBAR FENCE UTCBAR",
    "local": "LDL STL",
    "nop": "NOP",
}
_CLASS_OF = {root: name for name, roots in _CLASSES.items() for root in roots.split()}

_INPUT_BITS = dict.fromkeys(("HMMA", "HGMMA", "UTCHMMA"), 16)
_INPUT_BITS |= dict.fromkeys(("QMMA", "IMMA", "QGMMA", "IGMMA", "UTCQMMA", "UTCIMMA"), 8)

# How `order` shows opcodes that begin like this.
_LETTERS = {"E": r"MUFU\.EX2", "M": r"MUFU\.(?!EX2)", "W": r"WARPGROUP\.DEPBAR", "B": r"BAR\.|SYNCS\.PHASECHK"}
_LETTERS["H"] = _MATRIX.pattern

# Dense 16-bit FLOPs a cycle and multiprocessor with fp32 accumulation: published peak / (multiprocessors * clock).
_MATRIX_RATE = {
    80: 2048,  # A100: 312e12 / (108 * 1.41e9)
    90: 4096,  # H100 SXM: 989e12 / (132 * 1.83e9)
    100: 8192,  # B200: 2250e12 / (148 * 1.85e9), rounded
    120: 1024,  # RTX PRO 6000: 504e12 / (188 * 2.62e9); a GeForce accumulates in fp32 at half of it
}


def resources(cubin: bytes, instructions: Sequence[Instruction]) -> Resources:
    """Registers, stack, static shared memory and spills of the only kernel in `cubin`; `instructions` are its own."""
    return parse_resources(run_tool("cuobjdump", "-res-usage", cubin), instructions)


def parse_resources(usage: str, instructions: Sequence[Instruction]) -> Resources:
    """The same from the text of `cuobjdump -res-usage` and the disassembled kernel."""
    functions = [dict(re.findall(r"(\w+):(\d+)", line)) for line in usage.splitlines() if " REG:" in line]
    if len(functions) != 1:
        raise ValueError(f"the cubin must hold one kernel, got {len(functions)}; compile one kernel at a time")
    roots = Counter(instruction.root for instruction in instructions)
    registers, stack_bytes, shared_bytes = (int(functions[0][name]) for name in ("REG", "STACK", "SHARED"))
    return Resources(registers, stack_bytes, shared_bytes, local_loads=roots["LDL"], local_stores=roots["STL"])


def disassemble(cubin: bytes) -> list[Instruction]:
    """Instructions of the only kernel in `cubin`, by address."""
    return parse_sass(run_tool("nvdisasm", "-c", cubin))


def parse_sass(text: str) -> list[Instruction]:
    """Instructions in the output of `nvdisasm -c` (branches to labels) or `cuobjdump -sass` (branches to addresses)."""
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
        raise ValueError("the code must be of one function, got addresses that start anew; compile one kernel a cubin")
    resolved = (re.sub(r"`\(([^)]*)\)", lambda label: labels.get(label[1], label[0]), i.operands) for i in parsed)
    return [replace(i, operands=operands) for i, operands in zip(parsed, resolved, strict=True)]


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every natural loop, nested ones included, by address of its header.

    A backward branch alone makes no loop: ptxas puts the spin on an mbarrier behind the end of the kernel, and the
    branch from there back into the code is no iteration. So loops come from the control-flow graph, and of a loop only
    what lies between its header and its last branch back to it is kept. What is placed out of line (those spins) is
    taken not to run. Both sides of a branch inside the loop count, and so does what one elected warp runs alone.

    Not handled: indirect branches; loops whose header is not their lowest address; loops entered other than by their
    header. Two loops with one header are taken as one.
    """
    successors = control_flow(instructions)
    found = []
    for header, latches in sorted(_latches(successors).items()):
        body = _natural_loop(successors, header, latches)
        members = tuple(instructions[i] for i in sorted(body) if header <= i <= max(latches))
        if members:
            found.append(Loop(members[0].address, members[-1].address, members))
    return found


def matrix_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops that hold a matrix instruction and no other such loop, by address."""
    candidates = [loop for loop in loops(instructions) if any(i.is_matrix for i in loop.instructions)]
    headers = {loop.first for loop in candidates}
    return [loop for loop in candidates if not any(i.address in headers for i in loop.instructions[1:])]


def count(code: Loop | Iterable[Instruction]) -> Mix:
    """Instructions by class, per warp."""
    instructions = list(code.instructions if isinstance(code, Loop) else code)
    classes = Counter("matrix" if i.is_matrix else _CLASS_OF.get(i.root, "other") for i in instructions)
    return Mix(
        total=len(instructions),
        matrix=classes["matrix"],
        other=classes["other"],
        mufu_kinds=Counter(i.opcode for i in instructions if i.root == "MUFU"),
        matrix_kinds=Counter(i.opcode for i in instructions if i.is_matrix),
        **{name: classes[name] for name in _CLASSES},
    )


def matrix_flops(instructions: Iterable[Instruction], num_warps: int) -> int | None:
    """FLOPs that a block of `num_warps` warps does in these matrix instructions, a multiply-add counted as two.

    None with tcgen05, whose shape is in a descriptor and not in the opcode.
    """
    flops = 0
    for instruction in instructions:
        if _BLOCK_MATRIX.fullmatch(instruction.root):
            return None
        if instruction.is_matrix:
            warps = 4 if _WARP_GROUP_MATRIX.fullmatch(instruction.root) else 1
            m, n, k = _shape(instruction.opcode)
            flops += 2 * m * n * k * num_warps // warps
    return flops


def cycles(mix: Mix, flops_per_iteration: int, num_warps: int, arch: int) -> Cycles:
    """Least cycles of one iteration of a block, on `arch` as in sm_90, at the published dense peak rate.

    `flops_per_iteration` is of the block: `matrix_flops`, or from the tile's shape where that is None. 8-bit inputs
    double the 16-bit rate and tf32 halves it; a loop that mixes them is taken at the rate of its widest. tcgen05
    opcodes do not tell tf32 from 16-bit inputs: taken as 16-bit.
    """
    if arch not in _MATRIX_RATE:
        raise ValueError(f"arch must be one of {sorted(_MATRIX_RATE)}, got {arch}; add its published rate")
    if flops_per_iteration <= 0 or not mix.matrix:
        raise ValueError(f"the loop must hold matrix instructions, got {flops_per_iteration} FLOPs in {mix.matrix}")
    widest = max(_element_bits(opcode) for opcode in mix.matrix_kinds)
    return Cycles(
        matrix=flops_per_iteration / (_MATRIX_RATE[arch] * 16 / widest),
        issue=mix.total * num_warps / 4,
        mufu=mix.mufu * num_warps * 32 / 16,
    )


def order(instructions: Iterable[Instruction]) -> str:
    """How a loop orders what should overlap, run-length coded, as in `H8 W E64 H8 W`.

    H: matrix instruction; E: exponential; M: other MUFU; W: wait for wgmma; B: block barrier, or wait on an mbarrier
    (the only wait for tcgen05). On Ampere and sm_120 matrix instructions are waited for by their registers: no W.
    """
    letters = (letter for i in instructions for letter, kind in _LETTERS.items() if re.match(kind, i.opcode))
    runs = ((letter, len(list(run))) for letter, run in groupby(letters))
    return " ".join(f"{letter}{length}" if length > 1 else letter for letter, length in runs)


def exponentials_in_flight(instructions: Sequence[Instruction]) -> int:
    """Exponentials of one iteration that issue while a wgmma may still run: 0 means that nothing overlaps.

    A wgmma is in flight from its issue; `gsb0` among its operands closes a group, and `WARPGROUP.DEPBAR.LE gsb0, N`
    waits until at most N closed groups are left. The loop is walked in address order and circularly. Only wgmma (sm_90)
    is asynchronous in this way: the count is 0 for mma, and says nothing of tcgen05.
    """
    groups, group_open, in_flight = 0, False, 0
    # The first pass only finds what the iteration before leaves in flight.
    for counted in (False, True):
        for instruction in instructions:
            if _WARP_GROUP_MATRIX.fullmatch(instruction.root):
                group_open = "gsb0" not in instruction.operands
                groups += not group_open
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(instruction.operands.split(",")[-1], 16))
            elif counted and instruction.opcode.startswith("MUFU.EX2"):
                in_flight += group_open or groups > 0
    return in_flight


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with Triton prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {option} failed: {done.stderr.strip()}")
    return done.stdout


def control_flow(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Indices of the instructions that can follow each. BSYNC waits just before its target, so it falls through."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    successors = []
    for i, instruction in enumerate(instructions):
        following = [index[instruction.target]] if instruction.target in index else []
        # A branch can also be conditional by an operand: `BRA.U !UP0, 0x1b0`.
        conditional = instruction.predicate or "," in instruction.operands
        if (instruction.root not in _ENDS or conditional) and i + 1 < len(instructions):
            following.append(i + 1)
        successors.append(following)
    return successors


def _latches(successors: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Sources of the branches back to each loop header: the edges to an ancestor in a depth-first search."""
    found: dict[int, list[int]] = {}
    path, visited = {0: iter(successors[0] if successors else ())}, {0}
    while path:
        node, remaining = next(reversed(path.items()))
        following = next(remaining, None)
        if following is None:
            path.popitem()
        elif following in path:
            found.setdefault(following, []).append(node)
        elif following not in visited:
            visited.add(following)
            path[following] = iter(successors[following])
    return found


def _natural_loop(successors: Sequence[Sequence[int]], header: int, latches: Iterable[int]) -> set[int]:
    """Nodes that reach a latch without passing the header, and the header."""
    predecessors: dict[int, list[int]] = {}
    for source, target in ((source, target) for source, targets in enumerate(successors) for target in targets):
        predecessors.setdefault(target, []).append(source)
    body, open_nodes = {header}, list(latches)
    while open_nodes:
        node = open_nodes.pop()
        if node not in body:
            body.add(node)
            open_nodes += predecessors.get(node, [])
    return body


def _shape(opcode: str) -> tuple[int, int, int]:
    """Rows, columns and depth of one product: `64x128x16` of a warp group, `16816` (16, 8, 16) of a warp."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)\b", opcode) or re.search(r"\.(16|8)(8)(4|8|16|32|64|128|256)\b", opcode)
    if not shape:
        raise ValueError(f"a matrix instruction must name its shape, got {opcode}; teach _shape how to read it")
    m, n, k = (int(size) for size in shape.groups())
    return m, n, k


def _element_bits(opcode: str) -> int:
    """Width of the inputs as they move, by which the rate scales: 32 for tf32."""
    bits = 32 if ".TF32" in opcode else _INPUT_BITS.get(opcode.partition(".")[0])
    if bits is None:
        raise ValueError(f"the rate is known of 8-bit, 16-bit and tf32 inputs, got {opcode}; add it to _INPUT_BITS")
    return bits
