"""What the tiles of each kernel visit on the six mixes, counted from the tables that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mixes

from transfusion_fast.kernels.layout import AttentionLayout

DIRECTIONS = ("forward", "backward_dq", "backward_dkdv", "backward")
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Row:
    """Pairs of one head. FlexAttention visits the 128 x 128 blocks of a grid that hold a visible pair."""

    mix: str
    T: int
    arch: int
    head_dim: int
    direction: str
    visible: int
    flex_visited: int
    visited: int
    visited_by_visible: float
    visited_by_flex: float


def rows(architectures: Sequence[int]) -> list[Row]:
    """Every mix, architecture, head dimension and direction, in bf16."""
    found = []
    for mix in mixes.NAMES:
        layout: AttentionLayout = mixes.sample(mix, mixes.FIXED_LENGTH)
        flex = mixes.flex_visited_area(layout)
        for arch in architectures:
            for head_dim in HEAD_DIMS:
                for direction in DIRECTIONS:
                    visited = layout.visited_area(direction, head_dim=head_dim, arch=arch)
                    found.append(
                        Row(
                            mix=mix,
                            T=layout.total_length,
                            arch=arch,
                            head_dim=head_dim,
                            direction=direction,
                            visible=layout.area,
                            flex_visited=flex,
                            visited=visited,
                            visited_by_visible=round(visited / layout.area, 3),
                            visited_by_flex=round(visited / flex, 3),
                        )
                    )
    return found
