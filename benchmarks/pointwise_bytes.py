"""Bytes of global memory that the memory-bound kernels touch, counted from shapes and grids; no times.

Of each tensor three integers:

    least   once in or once out, if it is an input or output of the pass; 0 for what the pass makes for itself, and
            where another kernel of the pass counts it
    once    its bytes that the kernel touches at all: what device memory moves if the L2 cache keeps all that is read
            again
    moved   the bytes that each program touches, added over programs: what device memory moves if the L2 cache keeps
            nothing. What one program reads twice, as a table for each of its heads, counts once

A pass is what autograd runs as one step forward or backward: one kernel, or two, or a kernel and a sum by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transfusion_fast.kernels import diffusion_mse, rope


@dataclass(frozen=True)
class Tensor:
    """`name` is the kernel's argument; PYTORCH is what PyTorch touches after the kernel."""

    name: str
    least: int
    once: int
    moved: int


PYTORCH = "by PyTorch"


def _plain(itemsize: int, sizes: dict[str, int]) -> list[Tensor]:
    """Inputs and outputs that no two programs share."""
    return [Tensor(name, *[size * itemsize] * 3) for name, size in sizes.items()]


def swiglu_forward(values: int, itemsize: int) -> list[Tensor]:
    """Of `values` numbers of the output."""
    return _plain(itemsize, {"gate_ptr": values, "up_ptr": values, "y_ptr": values})


def swiglu_backward(values: int, itemsize: int) -> list[Tensor]:
    names = ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
    return _plain(itemsize, dict.fromkeys(names, values))


def rope_forward(T: int, H: int, G: int, D: int, itemsize: int, norm: bool) -> list[Tensor]:
    """Also of the way back without a norm, which turns by the opposite angle."""
    sizes, _ = rope.constants("forward", H, G, D)
    heads = {"q_ptr": T * H * D, "k_ptr": T * G * D, "q_out_ptr": T * H * D, "k_out_ptr": T * G * D}
    steps = -(-T // sizes["BLOCK_T"])
    return _plain(itemsize, heads) + _shared(steps, T, H, G, D, itemsize, sizes["BLOCK_HEADS"], norm)


def rope_backward(T: int, H: int, G: int, D: int, itemsize: int) -> list[Tensor]:
    """Through the norm. PyTorch adds the sums of the programs up to the weights' gradients."""
    sizes, _ = rope.constants("backward", H, G, D)
    queries = dict.fromkeys(("dq_out_ptr", "q_ptr", "dq_ptr"), T * H * D)
    keys = dict.fromkeys(("dk_out_ptr", "k_ptr", "dk_ptr"), T * G * D)
    steps = -(-T // (sizes["BLOCK_T"] * sizes["TILES"]))
    sums = 4 * D * steps * sum(_chunks(H, G, sizes["BLOCK_HEADS"]))
    gradients = 2 * D * itemsize
    return [
        *_plain(itemsize, queries | keys),
        *_shared(steps, T, H, G, D, itemsize, sizes["BLOCK_HEADS"], True),
        Tensor("sums_ptr", 0, sums, sums),
        Tensor(PYTORCH, gradients, sums + gradients, sums + gradients),
    ]


def _shared(steps: int, T: int, H: int, G: int, D: int, itemsize: int, block: int, norm: bool) -> list[Tensor]:
    """What several programs read: cos and sin every chunk of heads, the norm's weights every program of their heads."""
    q_chunks, k_chunks = _chunks(H, G, block)
    table, weight = T * D // 2 * 4, D * itemsize
    tables = [Tensor(name, table, table, table * (q_chunks + k_chunks)) for name in ("cos_ptr", "sin_ptr")]
    if not norm:
        return tables
    chunks = {"q_weight_ptr": q_chunks, "k_weight_ptr": k_chunks}
    return tables + [Tensor(name, weight, weight, weight * steps * count) for name, count in chunks.items()]


def _chunks(H: int, G: int, block: int) -> tuple[int, int]:
    return -(-H // block), -(-G // block)


def mse_forward(offsets: Sequence[int], C: int, itemsize: int, targets: dict[str, int]) -> list[Tensor]:
    """`targets`: the tensors that the target is made of, and the bytes of their numbers."""
    live, bounds = _programs(offsets, C)
    return [*_patches(offsets, C, itemsize, targets, ()), bounds, Tensor("sums_ptr", 0, 4 * live, 4 * live)]


def mse_mean(offsets: Sequence[int], C: int) -> list[Tensor]:
    """A program an image; forward counts the least of the offsets."""
    images, (live, _) = len(offsets) - 1, _programs(offsets, C)
    return [
        Tensor("sums_ptr", 0, 4 * live, 4 * live),
        Tensor("offsets_ptr", 0, 4 * (images + 1) if images else 0, 8 * images),
        Tensor("loss_ptr", 4 * images, 4 * images, 4 * images),
    ]


def mse_backward(offsets: Sequence[int], C: int, itemsize: int, targets: dict[str, int]) -> list[Tensor]:
    live, bounds = _programs(offsets, C)
    images = len(offsets) - 1
    dloss = Tensor("dloss_ptr", 4 * images, 4 * sum(b > a for a, b in pairwise(offsets)), 4 * live)
    return [*_patches(offsets, C, itemsize, targets, ("dprediction_ptr",)), bounds, dloss]


def _patches(
    offsets: Sequence[int], C: int, itemsize: int, targets: dict[str, int], more: Sequence[str]
) -> list[Tensor]:
    itemsizes = dict.fromkeys(("prediction_ptr", *more), itemsize) | targets
    return [Tensor(name, *[offsets[-1] * C * size] * 3) for name, size in itemsizes.items()]


def _programs(offsets: Sequence[int], C: int) -> tuple[int, Tensor]:
    """(programs that find patches, what all programs read of the offsets while they look for their image)."""
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
    return live, Tensor("offsets_ptr", 4 * len(offsets), 4 * len(ever), 4 * read)
