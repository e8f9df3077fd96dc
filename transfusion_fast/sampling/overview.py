"""A picture of a run: its samples at each checkpoint, beside the attention mask of one of its packs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.data.batch import BatchBuilder, KeyedPack
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import optional_module
from transfusion_fast.kernels.layout import AttentionLayout

WIDTH, GRID, CURVE, STRIP, MASK = 9.0, 4.2, 0.85, 1.0, 4.2  # inches; a README shows about 100 pixels of each
WINDOW = 90  # positions of the pack that are drawn large, at least
LINE, TEXT, IMAGE = "#1d2733", "#5b8def", "#e8792b"
COLORS = {
    "text attends to itself and what precedes it": TEXT,
    "an image patch attends to what precedes its image": "#f7c58b",
    "an image patch attends to its whole image": IMAGE,
    "padding attends to nothing": "#d5d5d5",
}


@dataclass(frozen=True)
class Samples:
    """Images drawn from the same prompts and noise at several training steps, and the loss between them.

    Attributes:
        images: uint8 [steps, prompts, height, width, channels]; those of step 0 are the noise.
        losses: (step, total loss) of each logged step, none after the step of the last images.
    """

    prompts: Sequence[str]
    steps: Sequence[int]
    images: np.ndarray
    losses: Sequence[tuple[int, float]]


def draw_overview(path: Path, samples: Samples, keyed: KeyedPack, builder: BatchBuilder, tokenizer: Tokenizer) -> None:
    """Write a PNG of the samples, left, and of a pack's mask with the kernel's query tiles, right.

    Raises:
        InputError: matplotlib is not installed.
    """
    height = GRID + CURVE + 1.0
    figure = optional_module("matplotlib.figure", "examples").Figure(figsize=(WIDTH, height), dpi=200)
    for left, title in ((0.1, "The same noise, drawn during training"), (3.75, "Attention mask of a training pack")):
        figure.text(left / WIDTH, 1 - 0.1 / height, title, va="top", fontsize=11, weight="bold")
    rows, columns = len(samples.prompts), len(samples.steps)
    cell = min(GRID / rows, 3.0 / columns)
    top, wide = 0.5 + GRID, columns * cell
    axes = figure.add_axes((0.62 / WIDTH, (top - rows * cell) / height, wide / WIDTH, rows * cell / height))
    _draw_samples(axes, samples)
    if samples.losses:
        _draw_losses(figure.add_axes((0.62 / WIDTH, (top + 0.12) / height, wide / WIDTH, CURVE / height)), samples)
    box = (3.7 / WIDTH, (top + 0.12 + CURVE - MASK) / height, (STRIP + MASK) / WIDTH, MASK / height)
    _draw_pack(figure.add_axes(box), keyed, builder, tokenizer)
    figure.savefig(path, format="png")


def _draw_samples(axes: Any, samples: Samples) -> None:
    framed = np.pad(samples.images, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    columns, rows, height, width, channels = framed.shape
    mosaic = framed.transpose(1, 2, 0, 3, 4).reshape(rows * height, columns * width, channels)
    _show(axes, mosaic, (0, columns, rows, 0))
    names = [textwrap.fill(textwrap.shorten(prompt, 26, placeholder="…"), 9) for prompt in samples.prompts]
    axes.set_yticks(np.arange(rows) + 0.5, names, fontsize=9, parse_math=False)
    axes.set_xticks(np.arange(columns) + 0.5, [f"{step:,}" if step else "noise" for step in samples.steps], fontsize=8)
    axes.set_xlabel("training step", fontsize=9)
    axes.set_aspect("auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_losses(axes: Any, samples: Samples) -> None:
    """Plot the loss over the columns, with each checkpoint's step at the middle of its column."""
    steps, losses = np.array(samples.losses).T
    axes.plot(np.interp(steps, samples.steps, np.arange(len(samples.steps)) + 0.5), losses, color=LINE, linewidth=1.2)
    axes.set(xlim=(0, len(samples.steps)), yscale="log", xticks=[])
    axes.set_yticks([losses.min(), losses.max()], [f"{losses.min():.2g}", f"{losses.max():.2g}"], fontsize=9)
    axes.minorticks_off()
    axes.set_title("loss", fontsize=9, y=0.6)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_pack(axes: Any, keyed: KeyedPack, builder: BatchBuilder, tokenizer: Tokenizer) -> None:
    """Draw the first documents of a pack and their part of the mask, and the whole mask as an inset."""
    patches = optional_module("matplotlib.patches", "examples")
    batch = builder([keyed])
    layout, total = batch.layout, batch.layout.total_length
    tiles = layout.query_tiles[: int(layout.tile_counts[:2].sum())].numpy()
    first, last = layout.key_start.numpy()[tiles[:, 0]], layout.key_end.numpy()[tiles[:, 1] - 1]
    window = min((end for end in tiles[:, 1].tolist() if end >= WINDOW), default=total)
    inch = window / MASK
    inset = axes.inset_axes((1 - 0.43 * MASK / (STRIP + MASK), 0.55, 0.42 * MASK / (STRIP + MASK), 0.4))
    for target, line, size in ((axes, 1.4, window), (inset, 0.5, total)):
        _show(target, _mask(layout, np.arange(0, size, -(-size // 1024))), (0, size, size, 0))
        for x, end, (y, bottom) in zip(first, last, tiles, strict=True):
            target.add_patch(patches.Rectangle((x, y), end - x, bottom - y, fill=False, edgecolor=LINE, linewidth=line))
    inset.add_patch(patches.Rectangle((0, 0), window, window, fill=False, edgecolor="red"))
    inset.set(xticks=[], yticks=[])
    inset.set_title(f"the whole pack: {total:,} positions", fontsize=8, pad=3)

    spans = [(start, start + length) for start, length in layout.image_spans.tolist()]
    stored = (segment for document in keyed.pack.documents(builder.modalities) for segment in document)
    pixels = dict(zip(spans, (s.values for s in stored if isinstance(s, ImageSegment)), strict=True))
    copies = {(start, start + n): pixels[place, place + n] for start, n, place in layout.noised_copies.tolist()}
    pixels |= copies
    cuts = sorted({*layout.document_offsets.tolist(), *chain(*pixels)})
    for start, end in (pair for pair in pairwise(cuts) if pair[1] <= window):
        ids = batch.tokens[start:end].numpy()
        words = tokenizer.decode(ids[ids < builder.vocabulary.num_text_tokens])
        _draw_segment(axes, start, end, inch, pixels.get((start, end), words))
    axes.set(xlim=(-STRIP * inch, window), ylim=(window, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)

    share = 100 * ((last - first) * (tiles[:, 1] - tiles[:, 0])).sum() / total**2
    note = f"a tile of queries with the keys it visits; all tiles: {share:.2g} % of the square"
    padded = total > int(layout.document_offsets[-1])
    handles = [patches.Patch(color=color, label=label) for label, color in list(COLORS.items())[: 3 + padded]]
    handles += [patches.Patch(fill=False, edgecolor=LINE, linewidth=1.4, label=note)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.1, 0), frameon=False, fontsize=9,
                title="rows are queries, columns are keys", title_fontsize=9, alignment="left")  # fmt: skip


def _draw_segment(axes: Any, start: int, end: int, inch: float, content: str | np.ndarray) -> None:
    """Draw a text or an image to the left of its rows. A text that has no room for its letters is left out."""
    color, middle = TEXT if isinstance(content, str) else IMAGE, (start + end) / 2
    axes.plot([-0.08 * inch] * 2, [start + 0.3, end - 0.3], color=color, linewidth=3, solid_capstyle="butt")
    if not isinstance(content, str):
        side = min(0.9 * (end - start), 0.6 * inch)
        _show(axes, content, (-0.15 * inch - side, -0.15 * inch, middle + side / 2, middle - side / 2))
    elif end - start > 0.14 * inch:
        words = textwrap.fill(textwrap.shorten(content, 48, placeholder="…"), 14)
        axes.text(-0.15 * inch, middle, words, ha="right", va="center", fontsize=9, parse_math=False)


def _mask(layout: AttentionLayout, positions: np.ndarray) -> np.ndarray:
    """Return the mask at these positions, rows being queries, as uint8 [n, n, 3]."""
    start, end, image = (x.numpy()[positions] for x in (layout.key_start, layout.key_end, layout.query_start))
    is_patch = ((image != positions) | (end > positions + 1))[:, None]
    sees = (positions >= start[:, None]) & (positions < end[:, None])
    padding = np.broadcast_to((positions >= int(layout.document_offsets[-1]))[:, None], sees.shape)
    kinds = (sees & ~is_patch, sees & is_patch, sees & is_patch & (positions >= image[:, None]), padding)
    picture = np.full((*sees.shape, 3), 255, np.uint8)
    for kind, color in zip(kinds, COLORS.values(), strict=True):
        picture[kind] = tuple(bytes.fromhex(color[1:]))
    return picture


def _show(axes: Any, image: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255, extent=extent)
