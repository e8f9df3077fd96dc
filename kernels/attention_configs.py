"""Sizes of the attention kernels' tiles for each architecture, head dimension and width of the numbers.

The sizes were picked by hand from the output of the offline compiler (`make kernel-report`): no spilled registers,
shared memory within the limit, then the fewest cycles in the loop of full blocks. Nothing is tuned at run time, so
equal inputs give equal results on every machine of an architecture with the same Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

KERNELS = ("forward", "backward_dq", "backward_dkdv")
ARCHITECTURES = (80, 90, 100, 120)


@dataclass(frozen=True)
class Config:
    """The sizes of one kernel for the tiles of one height."""

    block: int  # rows of a program; a taller tile is shared by several programs
    step: int  # columns of a full block, which all rows of the program see
    partial_step: int  # columns of a partial block; fewer, so that fewer invisible pairs are computed
    warps: int
    stages: int  # blocks in flight; loads run ahead of the matrix units by one less
    descriptors: bool  # load full blocks by tensor descriptors (the bulk copies of sm_90 and later)
    chunk: int | None = None  # head dimensions loaded at a time for Q K^T and dO V^T; None loads all of them
    halves: bool = False  # forward: compute P V in two halves of a block; one runs during the exponentials of the other

    @property
    def value_rows(self) -> int:
        """Rows of V that the forward kernel loads at a time in full blocks."""
        return self.step // 2 if self.halves else self.step


def padded_head_dim(head_dim: int) -> int:
    """Return the head dimension of a tile in registers, a power of two of at least 32.

    Raises:
        ValueError: The kernels do not support this head dimension.
    """
    if head_dim % 16 or not 16 <= head_dim <= 256:
        rule = 'a multiple of 16 of at most 256 for backend="triton"'
        raise ValueError(f'the head dimension must be {rule}, got {head_dim}; use backend="torch"')
    return max(32, 1 << (head_dim - 1).bit_length())


def config(kernel: str, architecture: int | str, head_dim: int, itemsize: int, height: int) -> Config:
    """Return the configuration of `kernel` for tiles of `height` (128 or 64) positions of `itemsize`-byte numbers.

    Args:
        kernel: One of `KERNELS`.
        architecture: One of `ARCHITECTURES`, as 90 or "sm_90".

    Raises:
        ValueError: An unknown kernel, or an architecture or head dimension without a configuration.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    sm = f"sm_{str(architecture).removeprefix('sm_')}"
    targets = [f"sm_{a}" for a in ARCHITECTURES]
    if sm not in targets:
        raise ValueError(f"architecture must be one of {', '.join(targets)}, got {architecture!r}")
    width = padded_head_dim(head_dim)
    key = {2: sm, 4: "fp32"}[itemsize], kernel, width
    version = triton_version()
    own = _BEFORE_3_7 if version < (3, 7) else _SINCE_3_8 if version >= (3, 8) else {}
    shapes = own.get(key, _SHAPES[key])
    chunk = 16 if itemsize == 4 and width >= 128 else None
    halves = kernel == "forward" and sm == "sm_90" and itemsize == 2
    return Config(*shapes[height != 128], descriptors=sm != "sm_80", chunk=chunk, halves=halves)


@cache
def triton_version() -> tuple[int, int]:
    """Return the major and minor version of Triton, which compiles the kernels; 3.7 where it is missing."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return (3, 7)
    return int(major), int(minor)


# (block, step, partial_step, warps, stages) for tiles of 128 and of 64 positions, by target, kernel and padded head
# dimension. Two blocks of 64 rows share a multiprocessor where a block of 128 would fill it. Where the matrix units are
# fastest, 128 rows are better: they load less for each product.
#
# The operands of fp32 products are in registers together with their low parts, so tiles are small. A warp computes 16
# rows by 8 columns of a product. 4 warps need at least 16 rows by 32 columns; in smaller tiles they repeat work.
_Shape = tuple[int, int, int, int, int]
_SHAPES: dict[tuple[str, str, int], tuple[_Shape, _Shape]] = {
    ("sm_80", "forward", 32): ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3)),
    ("sm_80", "forward", 64): ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3)),
    ("sm_80", "forward", 128): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_80", "forward", 256): ((64, 16, 16, 4, 2), (64, 16, 16, 4, 2)),
    ("sm_80", "backward_dq", 32): ((128, 64, 64, 4, 2), (64, 64, 64, 4, 2)),
    ("sm_80", "backward_dq", 64): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_80", "backward_dq", 128): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_80", "backward_dq", 256): ((64, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    ("sm_80", "backward_dkdv", 32): ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    ("sm_80", "backward_dkdv", 64): ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    ("sm_80", "backward_dkdv", 128): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_80", "backward_dkdv", 256): ((32, 32, 32, 8, 2), (32, 32, 32, 8, 2)),
    ("sm_90", "forward", 32): ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
    ("sm_90", "forward", 64): ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
    ("sm_90", "forward", 128): ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
    ("sm_90", "forward", 256): ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_90", "backward_dq", 32): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_90", "backward_dq", 64): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_90", "backward_dq", 128): ((128, 128, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_90", "backward_dq", 256): ((128, 32, 32, 8, 2), (64, 64, 32, 8, 2)),
    ("sm_90", "backward_dkdv", 32): ((128, 32, 32, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_90", "backward_dkdv", 64): ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    ("sm_90", "backward_dkdv", 128): ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_90", "backward_dkdv", 256): ((64, 16, 16, 8, 2), (64, 16, 16, 8, 2)),
    ("sm_100", "forward", 32): ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
    ("sm_100", "forward", 64): ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
    ("sm_100", "forward", 128): ((128, 128, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_100", "forward", 256): ((128, 64, 32, 8, 2), (64, 32, 32, 4, 2)),
    ("sm_100", "backward_dq", 32): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_100", "backward_dq", 64): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_100", "backward_dq", 128): ((128, 64, 64, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_100", "backward_dq", 256): ((128, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    ("sm_100", "backward_dkdv", 32): ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_100", "backward_dkdv", 64): ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_100", "backward_dkdv", 128): ((128, 32, 32, 8, 2), (64, 32, 32, 4, 2)),
    ("sm_100", "backward_dkdv", 256): ((64, 32, 16, 8, 2), (64, 32, 16, 8, 2)),
    ("sm_120", "forward", 32): ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
    ("sm_120", "forward", 64): ((64, 64, 64, 4, 2), (64, 64, 64, 4, 2)),
    ("sm_120", "forward", 128): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_120", "forward", 256): ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
    ("sm_120", "backward_dq", 32): ((64, 64, 64, 4, 2), (64, 64, 64, 4, 2)),
    ("sm_120", "backward_dq", 64): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_120", "backward_dq", 128): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_120", "backward_dq", 256): ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1)),
    ("sm_120", "backward_dkdv", 32): ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    ("sm_120", "backward_dkdv", 64): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_120", "backward_dkdv", 128): ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
    ("sm_120", "backward_dkdv", 256): ((16, 16, 16, 4, 2), (16, 16, 16, 4, 2)),
    ("fp32", "forward", 32): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("fp32", "forward", 64): ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
    ("fp32", "forward", 128): ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
    ("fp32", "forward", 256): ((16, 32, 32, 8, 2), (16, 32, 32, 8, 2)),
    ("fp32", "backward_dq", 32): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("fp32", "backward_dq", 64): ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
    ("fp32", "backward_dq", 128): ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
    ("fp32", "backward_dq", 256): ((16, 32, 32, 8, 2), (16, 32, 32, 8, 2)),
    ("fp32", "backward_dkdv", 32): ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
    ("fp32", "backward_dkdv", 64): ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
    ("fp32", "backward_dkdv", 128): ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
    ("fp32", "backward_dkdv", 256): ((16, 32, 32, 8, 2), (16, 32, 32, 8, 2)),
}
# In place of these for Triton 3.6, which there spills registers or, on sm_90, waits after every single matrix
# instruction.
_BEFORE_3_7: dict[tuple[str, str, int], tuple[_Shape, _Shape]] = {
    ("sm_80", "forward", 128): ((128, 64, 64, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_80", "backward_dq", 32): ((128, 32, 32, 4, 2), (64, 64, 64, 4, 2)),
    ("sm_80", "backward_dkdv", 64): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_90", "backward_dq", 256): ((64, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
    ("sm_90", "backward_dkdv", 128): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_100", "forward", 128): ((128, 128, 64, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_100", "backward_dq", 128): ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_100", "backward_dkdv", 128): ((128, 32, 16, 8, 2), (64, 32, 32, 4, 2)),
    ("sm_120", "forward", 32): ((128, 64, 64, 8, 2), (64, 64, 32, 4, 2)),
    ("sm_120", "forward", 64): ((64, 32, 32, 4, 2), (64, 64, 32, 4, 2)),
    ("sm_120", "backward_dkdv", 32): ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
    ("sm_120", "backward_dkdv", 64): ((64, 16, 16, 4, 2), (64, 16, 16, 4, 2)),
}
# In place of these from Triton 3.8 on, which there spills registers.
_SINCE_3_8: dict[tuple[str, str, int], tuple[_Shape, _Shape]] = {
    ("sm_80", "forward", 64): ((128, 32, 32, 4, 3), (64, 64, 64, 4, 3)),
    ("sm_120", "forward", 64): ((64, 64, 64, 4, 2), (64, 64, 32, 4, 2)),
    ("fp32", "forward", 32): ((64, 32, 16, 4, 2), (64, 32, 16, 4, 2)),
    ("fp32", "backward_dq", 32): ((64, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    ("fp32", "backward_dq", 64): ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1)),
    ("fp32", "backward_dkdv", 32): ((16, 32, 16, 4, 2), (16, 32, 16, 4, 2)),
}
