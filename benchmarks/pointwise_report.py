"""The memory-bound kernels in the kernel report: widths of their loads and stores, and bytes of global memory.

The kernels are compiled as they are launched in training: the compiler knows which pointers, strides and row lengths
are multiples of 16. q and k of rope are views of one projection; separate tensors run the same code. A pass is one step
of autograd, forward or backward: one kernel, or two, or a kernel and a sum by PyTorch.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import triton
from offline import ITEMSIZE, Access, compile_kernel, known_multiples, parse_ptx, spill_rule, with_widest
from tables import Row, list_broken, markdown_table

from transfusion_fast.kernels import diffusion_mse, rms_norm, rope, swiglu

WIDE = 128  # bits
LARGE = 100  # a large tensor has at least one in so many of the least bytes
PYTORCH = "by PyTorch"
T, F = 16384, 4096
HEADS = ((16, 16, 64), (16, 4, 128))  # H, G, D
PASSES = ("forward", "backward")
OFFSETS, C = range(0, 64 * 256 + 1, 256), 32  # 64 images of 256 patches: 2 x 2 pixels of 8 latent channels
# Triton's types of tensors whose dtype is always the same.
FP32 = ("cos_ptr", "sin_ptr", "sums_ptr", "loss_ptr", "dloss_ptr", "coefficients_ptr")
TYPES = {"offsets_ptr": "*i32", **dict.fromkeys(FP32, "*fp32")}


class Moved(NamedTuple):
    """Bytes of one tensor, counted from shapes and grids. `name` is the kernel's argument, or PYTORCH."""

    name: str
    least: int
    """Once in or once out, if the tensor is an input or output of the pass and no other kernel of it counts it."""
    once: int
    """Bytes that the kernel touches at all: the traffic of device memory if the L2 cache keeps all that is reread."""
    moved: int
    """Bytes that each program touches, summed: the traffic of device memory if the L2 cache keeps nothing."""


def once_each(sizes: Mapping[str, int]) -> list[Moved]:
    """Return inputs and outputs that no two programs share."""
    return [Moved(name, size, size, size) for name, size in sizes.items()]


def swiglu_bytes(kernel: str, values: int, itemsize: int) -> list[Moved]:
    """Return the bytes of one pass for `values` numbers of the output."""
    names = {"forward": ("gate", "up", "y"), "backward": ("dy", "gate", "up", "dgate", "dup")}[kernel]
    return once_each({f"{name}_ptr": values * itemsize for name in names})


def norm_bytes(kernel: str, T: int, E: int, itemsize: int, residual: bool = True) -> list[Moved]:
    """Return the bytes of RMS norm; every program reads the weights, and PyTorch adds the sums of their gradients."""
    sizes, _ = rms_norm.constants(kernel, E, 1e-5)
    programs, weight = -(-T // sizes.get("ROWS", sizes["BLOCK_T"])), E * itemsize
    names = {"forward": ("x", "y"), "backward": ("dy", "dresidual", "x", "dx")}[kernel]
    found = once_each({f"{name}_ptr": T * E * itemsize for name in names if residual or name != "dresidual"})
    found.append(Moved("weight_ptr", weight, weight, weight * programs))
    if kernel == "backward":
        sums = 4 * E * programs
        found += [Moved("sums_ptr", 0, sums, sums), Moved(PYTORCH, weight, sums + weight, sums + weight)]
    return found


def rope_bytes(T: int, H: int, G: int, D: int, itemsize: int, norm: bool, backward: bool = False) -> list[Moved]:
    """Return the bytes of one pass; backward without a norm rotates by the opposite angle, like forward.

    Every chunk of heads reads cos and sin, every program reads the norm's weights of its heads, and PyTorch adds up the
    programs' sums of the weights' gradients.
    """
    through_norm = norm and backward
    sizes, _ = rope.constants("backward" if through_norm else "forward", H, G, D)
    steps = -(-T // (sizes["BLOCK_T"] * sizes.get("TILES", 1)))
    chunks = {"q": -(-H // sizes["BLOCK_HEADS"]), "k": -(-G // sizes["BLOCK_HEADS"])}
    names = ("d{}_out_ptr", "{}_ptr", "d{}_ptr") if through_norm else ("{}_ptr", "{}_out_ptr")
    heads = {"q": H, "k": G}
    found = once_each({name.format(x): T * heads[x] * D * itemsize for x in heads for name in names})
    table, weight = T * D // 2 * 4, D * itemsize
    found += [Moved(name, table, table, table * sum(chunks.values())) for name in ("cos_ptr", "sin_ptr")]
    if norm:
        found += [Moved(f"{x}_weight_ptr", weight, weight, weight * steps * count) for x, count in chunks.items()]
    if through_norm:
        sums = 4 * D * steps * sum(chunks.values())
        total = sums + 2 * weight
        found += [Moved("sums_ptr", 0, sums, sums), Moved(PYTORCH, 2 * weight, total, total)]
    return found


def mse_bytes(
    kernel: str, offsets: Sequence[int], C: int, itemsize: int, targets: Mapping[str, int], coefficients: bool = False
) -> list[Moved]:
    """Return the bytes of the kernel "forward", "mean" or "backward" of the diffusion error.

    Args:
        targets: the tensors that the target is made of, and the bytes of their numbers.
        coefficients: two of each image make the target.
    """
    images, (live, bounds) = len(offsets) - 1, _programs(offsets, C)
    sums = Moved("sums_ptr", 0, 4 * live, 4 * live)
    if kernel == "mean":  # one program per image; forward counts the least bytes of the offsets
        read = Moved("offsets_ptr", 0, 4 * (images + 1) if images else 0, 8 * images)
        return [sums, read, *once_each({"loss_ptr": 4 * images})]
    outputs = ("dprediction_ptr",) if kernel == "backward" else ()
    itemsizes = dict.fromkeys(("prediction_ptr", *outputs), itemsize) | dict(targets)
    patches = once_each({name: offsets[-1] * C * size for name, size in itemsizes.items()})
    used = sum(b > a for a, b in pairwise(offsets))
    small = [Moved("dloss_ptr", 4 * images, 4 * used, 4 * live)] if kernel == "backward" else [sums]
    if coefficients:
        small.append(Moved("coefficients_ptr", 8 * images, 8 * used, 8 * live))
    return [*patches, bounds, *small]


def _programs(offsets: Sequence[int], C: int) -> tuple[int, Moved]:
    """Return how many programs find patches, and what all read of the offsets while they search for their image."""
    block = diffusion_mse.constants("forward", C)[0]["BLOCK_P"]
    images, patches = len(offsets) - 1, offsets[-1]
    live, read, ever = 0, 0, set()
    for piece in range(images + patches // block if images else 0):
        low, high, seen = 0, images, set()
        while high - low > 1:
            middle = (low + high) // 2
            seen.add(middle)
            low, high = (middle, high) if offsets[middle] // block + middle <= piece else (low, middle)
        seen |= {low, low + 1}
        live += (piece - offsets[low] // block - low) * block < offsets[low + 1] - offsets[low]
        read += len(seen)
        ever |= seen
    return live, Moved("offsets_ptr", 4 * len(offsets), 4 * len(ever), 4 * read)


class Case(NamedTuple):
    """One kernel and one shape."""

    shape: str
    function: triton.JITFunction
    constants: dict[str, Any]
    options: dict[str, Any]
    tensors: Sequence[Moved]
    rest: Sequence[Moved] = ()
    """Bytes that the other kernels of the pass touch."""
    types: Mapping[str, str] = TYPES
    ragged: bool = False
    """A row ends in a partial tile, on a branch of its own, and its length is no multiple of 16."""

    @property
    def multiples(self) -> set[str]:
        """Arguments that the compiler knows to be multiples of 16."""
        known = known_multiples(self.function)
        return known | {"F"} if "F" in self.function.arg_names and not self.ragged else known


def cases(itemsize: int) -> dict[str, Case]:
    """Return every kernel as training launches it, by name, for numbers of `itemsize` bytes."""
    found = {}
    for (H, G, D), norm, kernel in product(HEADS, (False, True), PASSES):
        case = _rope(itemsize, H, G, D, norm, kernel == "backward")
        found[f"rope{' with norm' if norm else ''} {kernel}, H={H} G={G} D={D}"] = case
    for E, kernel in product((1024, 4096), PASSES):
        found[f"rms_norm {kernel}, E={E}"] = _norm(itemsize, kernel, E, residual=True)
    found["rms_norm backward without residual"] = _norm(itemsize, "backward", 1024, residual=False)
    for kernel, layout in product(PASSES, ("two tensors", "halves of one", "odd length")):
        found[f"swiglu {kernel}, {layout}"] = _swiglu(itemsize, kernel, layout)
    for kernel, target in product(PASSES, ("", " with x_0", " with x_0 in fp32", " with coefficients")):
        found[f"diffusion_mse {kernel}{target}"] = _mse(itemsize, kernel, target)
    return found | {"diffusion_mse mean": _mse(itemsize, "mean", "")}


def _rope(itemsize: int, H: int, G: int, D: int, norm: bool, backward: bool) -> Case:
    tensors = rope_bytes(T, H, G, D, itemsize, norm, backward)
    # Backward writes the gradients of q and k into that of the projection.
    if norm and backward:
        known = rope.constants("backward", H, G, D, packed=True)
        return Case(f"T={T}", rope.rope_backward_kernel, *known, tensors[:-1], tensors[-1:])
    sizes, options = rope.constants("forward", H, G, D, packed=backward)
    absent = {} if norm else {"q_weight_ptr": None, "k_weight_ptr": None}
    return Case(f"T={T}", rope.rope_forward_kernel, sizes | absent | {"INVERSE": backward}, options, tensors)


def _norm(itemsize: int, kernel: str, E: int, residual: bool) -> Case:
    function, tensors = getattr(rms_norm, f"rms_norm_{kernel}_kernel"), norm_bytes(kernel, T, E, itemsize, residual)
    sizes, options = rms_norm.constants(kernel, E, 1e-5)
    absent = {} if residual else {"dresidual_ptr": None, "stride_dresidual": None}
    inside = [tensor for tensor in tensors if tensor.name != PYTORCH]
    return Case(f"T={T}", function, sizes | absent, options, inside, tensors[len(inside) :])


def _swiglu(itemsize: int, kernel: str, layout: str) -> Case:
    """Return the case of two contiguous tensors, which are one row, or of the halves of one projection."""
    values = T * F + (layout == "odd length")
    shape = {"two tensors": f"two {[T, F]}", "odd length": f"two {[values]}", "halves of one": f"one {[T, 2 * F]}"}
    function, width = getattr(swiglu, f"swiglu_{kernel}_kernel"), F if layout == "halves of one" else values
    moved = swiglu_bytes(kernel, values, itemsize)
    return Case(shape[layout], function, *swiglu.constants(kernel, width), moved, ragged=layout == "odd length")


def _mse(itemsize: int, kernel: str, target: str) -> Case:
    """Return the case of a target that is a tensor, or is made from noise and x_0 in the prediction's dtype or fp32.

    With coefficients, noise and x_0 are in the prediction's dtype.
    """
    names = ("target_ptr", "x_0_ptr") if target else ("target_ptr",)
    types = TYPES | dict.fromkeys(names, "*fp32") if "fp32" in target else TYPES
    targets = dict.fromkeys(names, 4 if "fp32" in target else itemsize)
    made = target == " with coefficients"
    moved = {name: mse_bytes(name, OFFSETS, C, itemsize, targets, made) for name in ("forward", "mean", "backward")}
    rest = {"forward": moved["mean"], "mean": moved["forward"]}.get(kernel, ())
    function = getattr(diffusion_mse, f"diffusion_mse_{kernel}_kernel")
    sizes, options = diffusion_mse.constants(kernel, C)
    # Contiguous rows are launched without a stride.
    absent = {"x_0_ptr": not target, "coefficients_ptr": not made}
    unused = [name for name in function.arg_names if name.startswith("stride") or absent.get(name)]
    shape = f"N={len(OFFSETS) - 1} P={OFFSETS[-1]} C={C}"
    return Case(shape, function, sizes | dict.fromkeys(unused), options, moved[kernel], rest, types)


def variants(architectures: Sequence[int], rules_only: bool = False) -> list[tuple[str, int, str]]:
    """Return (case, arch, dtype): bf16, and fp32 on sm_90; with `rules_only`, bf16 on sm_90 alone."""
    dtypes = {arch: ("bf16", "fp32") if arch == 90 and not rules_only else ("bf16",) for arch in architectures}
    chosen = [arch for arch in architectures if arch == 90 or not rules_only]
    return [(name, arch, dtype) for arch in chosen for name in cases(2) for dtype in dtypes[arch]]


def row_of(variant: tuple[str, int, str]) -> Row:
    """Compile a case and return its row: resources, widths of loads and stores, bytes, broken rules.

    `load_bits` and `store_bits` are the narrowest in full tiles of the large tensors, None where there are none. Small
    tensors (offsets, weights of a norm, sums of programs) are listed apart. `wide_share` is the share of `moved_bytes`
    that full tiles move by 16 bytes or more. Bytes are of the kernel; `least_bytes` and the two ratios, of its pass.
    """
    name, arch, dtype = variant
    case = cases(ITEMSIZE[dtype])[name]
    compiled = compile_kernel(case.function, dtype, case.types, case.constants, case.multiples, case.options, arch)
    accesses = compiled.accesses([n for n in case.function.arg_names if n not in case.constants])
    by_tensor = {
        tensor.name: [access for access in accesses if tensor.name in access.tensors] for tensor in case.tensors
    }
    # A tensor without a load or a store must have been overlooked.
    assert all(by_tensor.values()) and set().union(*(a.tensors for a in accesses)) == by_tensor.keys(), name
    # Where the length of a row is no multiple of 16, the rules hold for its full tiles: for what one thread executes
    # together with the widest access of the tensor, and not for the branch that ends the row.
    code = parse_ptx(compiled.ptx)
    full = {n: with_widest(found, code) if case.ragged else found for n, found in by_tensor.items()}
    in_pass = [*case.tensors, *case.rest]
    least, moved = sum(x.least for x in in_pass), sum(x.moved for x in case.tensors)
    large = {x.name: full[x.name] for x in case.tensors if x.once * LARGE >= least}
    narrow = {n.removesuffix("_ptr"): bits for n, found in large.items() if (bits := _narrowest(found)) < WIDE}
    every = [access for found in large.values() for access in found]
    resources = compiled.columns(compiled.instructions)
    too_narrow = [f"{n} moves by {bits} bits, not {WIDE}" for n, bits in narrow.items()]
    return {
        "name": f"{name} sm_{arch} {dtype}", "case": name, "arch": arch, "dtype": dtype, "shape": case.shape,
        "warps": case.options["num_warps"], **resources,
        "load_bits": _narrowest(a for a in every if not a.store),
        "store_bits": _narrowest(a for a in every if a.store),
        "narrow_at_ends": _widths({n: [a for a in by_tensor[n] if a not in full[n]] for n in large}),
        "small_tensors": _widths({n: full[n] for n in by_tensor if n not in large}),
        "wide_share": round(sum(x.moved for x in case.tensors if _narrowest(full[x.name]) >= WIDE) / moved, 4),
        "moved_bytes": moved, "least_bytes": least,
        "moved_by_least": round(sum(x.moved for x in in_pass) / least, 4),
        "once_by_least": round(sum(x.once for x in in_pass) / least, 4),
        "broken_rules": "; ".join(spill_rule(resources) + too_narrow),
    }  # fmt: skip


def _narrowest(found: Iterable[Access]) -> int | None:
    return min((access.bits for access in found), default=None)


def _widths(by_tensor: Mapping[str, Sequence[Access]]) -> str:
    """Return the widths of each tensor, as in `offsets 32, weight 64 128`."""
    bits = {name.removesuffix("_ptr"): sorted({access.bits for access in found}) for name, found in by_tensor.items()}
    return ", ".join(f"{name} {' '.join(map(str, widths))}" for name, widths in bits.items() if widths)


_LEGEND = """\
The fused rotary embedding, RMS norm, SwiGLU and diffusion error move bytes and compute little. Registers are given for
every target, one number where all agree. Loads and stores: bits that a thread moves at once, the narrowest of full
tiles of the large tensors (at least 1 % of the least bytes), read off the machine code. At 16 bytes: the share of the
bytes moved that goes at 128 bits or more. Narrower or smaller: widths of the tensors below 1 %, and of the ends of
rows.

Bytes are counted from the shape and the grid; they are no measurement. Least: every input read once, every output
written once. Touched: what the pass touches at all, including its own scratch memory, divided by the least; device
memory moves this much if the L2 cache keeps what is read again. Moved: the same if it keeps nothing and each program
reads for itself, like the rotary table for each chunk of heads, though programs of the same tokens are neighbours. Both
are of the whole pass: the mean of the diffusion error counts with its forward."""


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the section of the kernel report, with one line for each kernel and dtype on all targets."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        ends = f"at ends: {row['narrow_at_ends']}" if row["narrow_at_ends"] else ""
        small = ", ".join(filter(None, (row["small_tensors"], ends)))
        shown = row | {"small": small, "wide": f"{row['wide_share']:.1%}", "mib": row["least_bytes"] / 2**20}
        groups.setdefault((row["case"], row["dtype"]), []).append(shown)
    lines = []
    for group in groups.values():
        words = {name: ["" if row[name] is None else str(row[name]) for row in group] for name in _PER_TARGET}
        # One value if all targets share it, or one per target.
        shared = {name: found[0] if len(set(found)) == 1 else " / ".join(found) for name, found in words.items()}
        lines.append(group[0] | shared)
    targets = ", ".join(f"sm_{arch}" for arch in dict.fromkeys(row["arch"] for row in rows))
    columns = {heading.format(targets=targets): form for heading, form in _COLUMNS.items()}
    return ["## Memory-bound kernels", _LEGEND, list_broken(rows), markdown_table(lines, columns)]


_PER_TARGET = ("warps", "registers", "spills", "load_bits", "store_bits", "small", "wide")
_COLUMNS = {
    "kernel": "{case}", "shape": "{shape}", "type": "{dtype}", "warps": "{warps}",
    "registers on {targets}": "{registers}", "spills": "{spills}", "loads": "{load_bits}", "stores": "{store_bits}",
    "at 16 bytes": "{wide}", "narrower or smaller": "{small}", "touched / least": "{once_by_least:.4f}",
    "moved / least": "{moved_by_least:.4f}", "least MiB": "{mib:.1f}",
}  # fmt: skip
