"""One compiled memory-bound kernel as a row: resources, widths of its loads and stores, bytes, broken rules.

Loads and stores are told by tensor, as in `sass_memory`. Widths are of the large tensors, of at least 1 % of the least
bytes of the pass; the smaller ones (offsets, weights of a norm, sums of programs) are listed apart. The rules are

    no spilled register and no stack; every load and store of a large tensor moves 16 bytes a thread. Where the length
    of a row is no multiple of 16, that holds for its whole tiles: for what one thread executes together with the
    widest access of the tensor, and not for the branch that ends the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import offline
import pointwise_launches
import sass
import sass_memory
from sass_memory import Access

WIDE = 128  # bits
LARGE = 100  # a tensor with one in so many of the least bytes
GATED = (80, 90)


@dataclass(frozen=True)
class Variant:
    """One compilation of a case of `pointwise_launches`."""

    case: str
    arch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.case} sm_{self.arch} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """`load_bits` and `store_bits` are the narrowest in whole tiles of the large tensors, None where there are none.

    `wide_share` is the share of `moved_bytes` that whole tiles move by 16 bytes or more. Bytes are of the kernel,
    except `least_bytes` and the two ratios, which are of its pass: see `pointwise_bytes`.
    """

    name: str
    case: str
    arch: int
    dtype: str
    shape: str
    warps: int
    registers: int
    spills: int
    stack_bytes: int
    shared_kib: float
    load_bits: int | None
    store_bits: int | None
    narrow_at_ends: str
    small_tensors: str
    wide_share: float
    moved_bytes: int
    least_bytes: int
    moved_by_least: float
    once_by_least: float
    broken_rules: str


def variants(architectures: Sequence[int], rules_only: bool = False) -> Iterator[Variant]:
    """All cases in bf16, and in fp32 on sm_90; with `rules_only` in bf16 on sm_80 and sm_90."""
    for arch, name in product(architectures, pointwise_launches.CASES):
        if arch in GATED or not rules_only:
            yield Variant(name, arch, "bf16")
        if arch == 90 and not rules_only:
            yield Variant(name, arch, "fp32")


def row_of(variant: Variant) -> Row:
    """Compiles a case and reads its code."""
    case = pointwise_launches.case(variant.case, variant.dtype)
    compiled = offline.compile_kernel(
        case.function, case.types(variant.dtype), case.constants, case.aligned, case.options, variant.arch
    )
    instructions = sass.disassemble(compiled.cubin)
    resources = sass.resources(compiled.cubin, instructions)
    by_tensor = _accesses(case, compiled.cubin, instructions)
    whole = {
        name: sass_memory.with_widest(found, instructions) if case.ragged else found
        for name, found in by_tensor.items()
    }
    large = {name: found for name, found in whole.items() if _is_large(case, name)}
    wide = {name for name, found in whole.items() if _narrowest(found) >= WIDE}
    moved = sum(tensor.moved for tensor in case.tensors)
    return Row(
        name=str(variant),
        case=variant.case,
        arch=variant.arch,
        dtype=variant.dtype,
        shape=case.shape,
        warps=case.options["num_warps"],
        registers=resources.registers,
        spills=resources.spills,
        stack_bytes=resources.stack_bytes,
        shared_kib=round(compiled.shared_bytes / 1024, 1),
        load_bits=_narrowest_of(large, store=False),
        store_bits=_narrowest_of(large, store=True),
        narrow_at_ends=_widths({name: sorted(set(by_tensor[name]) - set(whole[name]), key=str) for name in large}),
        small_tensors=_widths({name: found for name, found in whole.items() if name not in large}),
        wide_share=round(sum(tensor.moved for tensor in case.tensors if tensor.name in wide) / moved, 4),
        moved_bytes=moved,
        least_bytes=case.least,
        moved_by_least=_by_least(case, (tensor.moved for tensor in (*case.tensors, *case.rest))),
        once_by_least=_by_least(case, (tensor.once for tensor in (*case.tensors, *case.rest))),
        broken_rules="; ".join(_broken_rules(resources, large)),
    )


def _accesses(
    case: pointwise_launches.Case, cubin: bytes, instructions: Sequence[sass.Instruction]
) -> dict[str, list[Access]]:
    """Loads and stores of every tensor. One that is never touched was overlooked: all are."""
    arguments = sass_memory.argument_offsets(cubin, case.arguments)
    pointers = {offset: name for offset, name in arguments.items() if name.endswith("_ptr")}
    found = sass_memory.accesses(instructions, pointers)
    by_tensor = {tensor.name: [access for access in found if tensor.name in access.tensors] for tensor in case.tensors}
    missing = [name for name, of_tensor in by_tensor.items() if not of_tensor]
    assert not missing and by_tensor.keys() == set(pointers.values()), f"unread: {missing}, {pointers.values()}"
    return by_tensor


def _is_large(case: pointwise_launches.Case, name: str) -> bool:
    return any(tensor.once * LARGE >= case.least for tensor in case.tensors if tensor.name == name)


def _narrowest(found: Iterable[Access]) -> int:
    return min(access.bits for access in found)


def _narrowest_of(large: dict[str, list[Access]], store: bool) -> int | None:
    return min((access.bits for found in large.values() for access in found if access.store == store), default=None)


def _by_least(case: pointwise_launches.Case, sizes: Iterable[int]) -> float:
    return round(sum(sizes) / case.least, 4)


def _widths(by_tensor: dict[str, list[Access]]) -> str:
    """As in `offsets 32, weight 64 128`."""
    bits = {name.removesuffix("_ptr"): sorted({access.bits for access in found}) for name, found in by_tensor.items()}
    return ", ".join(f"{name} {' '.join(map(str, widths))}" for name, widths in bits.items() if widths)


def _broken_rules(resources: sass.Resources, large: dict[str, list[Access]]) -> list[str]:
    broken = []
    if resources.spills or resources.stack_bytes:
        broken.append(f"{resources.spills} spills, {resources.stack_bytes} bytes of stack")
    for name, found in large.items():
        if (bits := _narrowest(found)) < WIDE:
            broken.append(f"{name.removesuffix('_ptr')} moves by {bits} bits, not {WIDE}")
    return broken
