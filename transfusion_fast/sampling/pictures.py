"""Pictures: grids of images with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from transfusion_fast.data.autoencoder import Autoencoder, read_autoencoder
from transfusion_fast.data.images import from_grid, latents_to_pixels
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.errors import InputError, optional_module

CELL, GAP, LEFT, TOP = 0.72, 0.3, 0.95, 0.32  # inches for an image and its margin, between groups, captions, headings


def check_picture(path: Path) -> None:
    """Raise InputError if no PNG can be drawn and written to a path, before hours of drawing; make its folder."""
    optional_module("matplotlib", "examples")
    check_writable(path, ".png", "")


def check_writable(path: Path, *suffixes: str) -> None:
    """Raise InputError if no file with one of the suffixes can be written to a path; make its folder."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"output must be a file NAME{suffixes[0]}, got {path}; change the name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {path}: its folder cannot be made ({error}); give another path") from error
    if path.is_dir():
        raise InputError(f"output must be a file, got the folder {path}; give the path of a file")


def images_to_pixels(latents: Tensor, modality: ModalityInfo, autoencoder: Autoencoder | None) -> np.ndarray:
    """Convert a model's images [N, rows, columns, C] to pixels, uint8 [N, height, width, channels]."""
    if autoencoder is None:
        return latents_to_pixels(latents.numpy(), modality.patch_size)
    return autoencoder.decode(from_grid(latents.numpy(), modality.patch_size))


def open_autoencoder(
    folder: Path | None, modalities: Sequence[ModalityInfo], setting: str, what: str
) -> Autoencoder | None:
    """Return the autoencoder that made the latents of `what`; None for images that are pixels.

    Raises:
        InputError: the folder is missing or holds another autoencoder, or there are no latents, or they are features;
            names `setting`.
    """
    latents = [modality for modality in modalities if modality.encoding == "latents"]
    if not latents and folder is None:
        return None
    if not latents:
        raise InputError(f"{setting} needs a run on latents, got {what} on pixels or text; leave it out")
    if any(modality.mean for modality in latents):
        raise InputError(
            f"pictures must be drawn of pixels or an autoencoder's latents, got {what} on a vision encoder's features, "
            "which nothing here decodes; take the latents that model.sample returns in Python"
        )
    if folder is None:
        raise InputError(f"{setting} must be given for {what}, a run on latents; give the autoencoder of its data")
    autoencoder = read_autoencoder(folder)
    for modality in latents:
        autoencoder.check_made(modality.autoencoder, modality.channels, what)
    return autoencoder


Images = Sequence[np.ndarray] | np.ndarray


def draw_grid(
    rows: Sequence[tuple[str, Sequence[Images]]], file: Path | BinaryIO, headings: Sequence[str] = ()
) -> None:
    """Write a PNG with a row for each caption, and groups of images side by side.

    Args:
        rows: (caption, groups of images uint8 [height, width, 1 or 3]); every row has the same number of groups.
        file: the file to write.
        headings: a heading for each group, or none.
    """
    widths = [max(len(groups[g]) for _, groups in rows) for g in range(len(rows[0][1]))]
    starts = [LEFT + sum(widths[:g]) * CELL + g * GAP for g in range(len(widths))]
    top = TOP if headings else 0.05
    width, height = starts[-1] + widths[-1] * CELL + 0.05, top + len(rows) * CELL + 0.05
    figure = optional_module("matplotlib.figure", "examples").Figure(figsize=(width, height), dpi=110)
    for start, heading in zip(starts, headings, strict=False):
        figure.text(
            start / width, 1 - 0.8 * TOP / height, heading, ha="left", va="bottom", fontsize=10, parse_math=False
        )
    for number, (caption, groups) in enumerate(rows):
        bottom = height - top - (number + 1) * CELL
        middle = (bottom + CELL / 2) / height
        figure.text((LEFT - 0.1) / width, middle, caption, ha="right", va="center", fontsize=11, parse_math=False)
        for start, images in zip(starts, groups, strict=True):
            for column, image in enumerate(images):
                box = ((start + column * CELL) / width, bottom / height, 0.94 * CELL / width, 0.94 * CELL / height)
                axes = figure.add_axes(box)
                axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
                axes.set_axis_off()
    figure.savefig(file, format="png")
