"""Counts of the work that the attention kernels do, from the layout alone: no GPU is needed and nothing is estimated.

A program visits the columns of its rows in full blocks, whose pairs are all visible, and then in partial blocks, whose
pairs are compared with the mask. `AttentionLayout.visited_area` is the sum of both over all programs.
"""

from __future__ import annotations

from typing import NamedTuple

from transfusion_fast.kernels.attention_configs import Config, config
from transfusion_fast.kernels.layout import TILE_HEIGHTS, AttentionLayout


class TileWork(NamedTuple):
    """The work of one head over the tiles of one height. Columns are summed over the programs."""

    config: Config
    programs: int
    full: int
    """Columns visited in full blocks."""
    partial: int
    """Columns visited in partial blocks."""


def tile_work(
    layout: AttentionLayout, kernel: str, *, head_dim: int, arch: int | str, itemsize: int = 2
) -> list[TileWork]:
    """Count the work of one head, over the tall tiles and over the short tiles.

    Args:
        kernel: "forward", "backward_dq" or "backward_dkdv", whose columns are queries.
        head_dim: D. arch: 80, 90, 100 or 120, as in sm_80. itemsize: Bytes of a number.

    Raises:
        ValueError: An unknown kernel, or a head dimension or architecture without a configuration.
    """
    work = []
    for height in TILE_HEIGHTS:
        c = config(kernel, arch, head_dim, itemsize, height)
        full, partial = c.visited_columns(*layout.columns_seen(kernel, height, c.block))
        work.append(TileWork(c, len(full), int(full.sum()), int(partial.sum())))
    return work
