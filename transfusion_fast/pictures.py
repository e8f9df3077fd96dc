"""Pictures of images and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw_grid(rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path, title: str = "") -> None:
    """Writes a PNG of labelled rows of images, uint8 [height, width, 1 or 3]; rows may differ in length."""
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(1.2 + 0.75 * columns, 0.3 + 0.75 * len(rows)), dpi=120)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (caption, images) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        row[0].text(-0.15, 0.5, caption, transform=row[0].transAxes, ha="right", va="center", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout(pad=0.4, h_pad=0.15, w_pad=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
