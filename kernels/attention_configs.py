"""How the attention kernels are cut for each architecture, head dimension and width of the numbers: plain data.

Picked by hand from what the offline compiler makes of each (`make kernel-report`): no spilled register, shared memory
within the limit, then the fewest cycles of the full-tile loop. Nothing is tuned at run time, so equal inputs take equal
paths on every machine of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = ("forward", "backward_dq", "backward_dkdv")
ARCHITECTURES = (80, 90, 100, 120)


@dataclass(frozen=True)
class Config:
    """One way to run a kernel over tiles of one height."""

    block: int  # rows of a program; a tile taller than this is shared out to several programs
    step: int  # columns of a step that all rows of a tile see
    edge_step: int  # columns of a step at the edge, narrower to visit less in vain
    warps: int
    stages: int  # steps in flight: loads run ahead of the matrix units by one less
    descriptors: bool  # load whole steps by tensor descriptors (the bulk copies of sm_90 and later)
    chunk: int | None = None  # head dimensions of a load for Q K^T and dO V^T; None for tiles that are loaded whole
    halves: bool = False  # forward: P V in two halves of a step, so that one runs during the other's exponentials

    @property
    def value_rows(self) -> int:
        """Rows of V that the forward loads at a time in whole steps."""
        return self.step // 2 if self.halves else self.step


def normalize(architecture: int | str) -> int:
    """90 for 90 and "sm_90". ValueError for one without configurations."""
    name = str(architecture).removeprefix("sm_")
    if name not in map(str, ARCHITECTURES):
        known = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise ValueError(f"architecture must be one of {known}, got {architecture!r}")
    return int(name)


def padded_head_dim(head_dim: int) -> int:
    """Dimensions of a tile in registers, a power of two of at least 32. ValueError for a head dimension without one."""
    if head_dim % 16 or not 16 <= head_dim <= 256:
        rule = 'a multiple of 16 of at most 256 for backend="triton"'
        raise ValueError(f'the head dimension must be {rule}, got {head_dim}; use backend="torch"')
    return max(32, 1 << (head_dim - 1).bit_length())


def config(kernel: str, architecture: int | str, head_dim: int, itemsize: int, height: int) -> Config:
    """The configuration of `kernel` for tiles of `height` (128 or 64) positions of numbers of `itemsize` bytes."""
    architecture = normalize(architecture)
    width = padded_head_dim(head_dim)
    shapes = _SHAPES[architecture, itemsize][kernel][width]
    chunk = 16 if itemsize == 4 and width >= 128 else None
    halves = kernel == "forward" and architecture == 90 and itemsize == 2
    return Config(*shapes[height != 128], descriptors=architecture >= 90, chunk=chunk, halves=halves)


# Shapes (block, step, edge_step, warps, stages) for tiles of 128 and of 64 positions, by kernel and padded head
# dimension. Two blocks of 64 rows share a multiprocessor where one of 128 would not leave room; where the matrix units
# are the fastest, 128 rows load less for each product.
_Shape = tuple[int, int, int, int, int]
_Shapes = dict[str, dict[int, tuple[_Shape, _Shape]]]

_SM_80_16_BIT: _Shapes = {
    "forward": {
        32: ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3)),
        64: ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3)),
        128: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        256: ((64, 16, 16, 4, 2), (64, 16, 16, 4, 2)),
    },
    "backward_dq": {
        32: ((128, 64, 64, 4, 2), (64, 64, 64, 4, 2)),
        64: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        128: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        256: ((64, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    },
    "backward_dkdv": {
        32: ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
        64: ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
        128: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        256: ((32, 32, 32, 8, 2), (32, 32, 32, 8, 2)),
    },
}
_SM_90_16_BIT: _Shapes = {
    "forward": {
        32: ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
        64: ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
        128: ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
        256: ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
    },
    "backward_dq": {
        32: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        64: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        128: ((128, 128, 64, 8, 2), (64, 64, 64, 4, 2)),
        256: ((128, 32, 32, 8, 2), (64, 64, 32, 8, 2)),
    },
    "backward_dkdv": {
        32: ((128, 32, 32, 8, 2), (64, 64, 32, 4, 2)),
        64: ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
        128: ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
        256: ((64, 16, 16, 8, 2), (64, 16, 16, 8, 2)),
    },
}
_SM_100_16_BIT: _Shapes = {
    "forward": {
        32: ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
        64: ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2)),
        128: ((128, 128, 64, 8, 2), (64, 64, 64, 4, 2)),
        256: ((128, 64, 32, 8, 2), (64, 32, 32, 4, 2)),
    },
    "backward_dq": {
        32: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        64: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        128: ((128, 64, 64, 8, 2), (64, 64, 32, 4, 2)),
        256: ((128, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    },
    "backward_dkdv": {
        32: ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
        64: ((128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
        128: ((128, 32, 32, 8, 2), (64, 32, 32, 4, 2)),
        256: ((64, 32, 16, 8, 2), (64, 32, 16, 8, 2)),
    },
}
_SM_120_16_BIT: _Shapes = {
    "forward": {
        32: ((128, 64, 64, 8, 2), (64, 64, 64, 4, 2)),
        64: ((64, 64, 64, 4, 2), (64, 64, 64, 4, 2)),
        128: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        256: ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
    },
    "backward_dq": {
        32: ((64, 64, 64, 4, 2), (64, 64, 64, 4, 2)),
        64: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        128: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        256: ((32, 32, 32, 4, 1), (32, 32, 32, 4, 1)),
    },
    "backward_dkdv": {
        32: ((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
        64: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        128: ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
        256: ((16, 16, 16, 4, 2), (16, 16, 16, 4, 2)),
    },
}
# Operands of fp32 products are in registers with their low parts, so tiles are small. Of a product, each warp takes 16
# rows or 8 columns; where there are fewer, warps repeat each other's work: 4 warps repeat none at 16 rows by 32
# columns.
_FP32: _Shapes = {
    "forward": {
        32: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        64: ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
        128: ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
        256: ((16, 32, 32, 8, 2), (16, 32, 32, 8, 2)),
    },
    "backward_dq": {
        32: ((64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        64: ((32, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
        128: ((32, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
        256: ((16, 32, 32, 8, 2), (16, 32, 32, 8, 2)),
    },
    "backward_dkdv": {
        32: ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
        64: ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
        128: ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
        256: ((16, 32, 32, 8, 2), (16, 32, 32, 8, 2)),
    },
}
_SHAPES = {
    (80, 2): _SM_80_16_BIT,
    (90, 2): _SM_90_16_BIT,
    (100, 2): _SM_100_16_BIT,
    (120, 2): _SM_120_16_BIT,
    **{(architecture, 4): _FP32 for architecture in ARCHITECTURES},
}
