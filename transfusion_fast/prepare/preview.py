"""Documents as a page of HTML that needs nothing beside itself: text, special tokens, and images where they stand."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from transfusion_fast.data.batch import BatchBuilder, KeyedPack
from transfusion_fast.data.images import unpatchify, unscale_pixels
from transfusion_fast.data.pack import KIND_TEXT, ModalityInfo
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.model.sequence import ModalityBatch, PackedBatch, Vocabulary

_STYLE = """
body { font: 15px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-left: 3px solid #ccc; margin: 1rem 0; padding: .2rem 1rem }
section > .text { white-space: pre-wrap }
.special { font: 11px monospace; color: #777; background: #eee; border-radius: 3px; padding: 1px 4px; margin: 0 2px }
figure { display: inline-block; margin: .3rem; text-align: center; vertical-align: middle }
figure img { image-rendering: pixelated; margin: 0 1px; min-width: 84px; max-width: 256px }
figcaption { font-size: 11px; color: #777; line-height: 1.2 }
h1 { font-size: 1.1rem }
"""


@dataclass(frozen=True, eq=False)
class Special:
    """A special token, by name."""

    name: str


@dataclass(frozen=True, eq=False)
class Picture:
    """Images uint8 [height, width, 1 or 3] side by side, and what they are."""

    images: tuple[np.ndarray, ...]
    caption: str


Piece = str | Special | Picture
Decoder = Callable[[np.ndarray], np.ndarray]
"""Latents [n, h, w, channels] to pixels, uint8 [n, height, width, 3]."""


def page(title: str, documents: Sequence[Sequence[Piece]]) -> str:
    """The HTML page of some documents. What they hold is shown, never run."""
    sections = "\n".join(f"<section>{''.join(map(_piece, pieces))}</section>" for pieces in documents)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"</head><body>\n<h1>{name}</h1>\n{sections}\n</body></html>\n"
    )


def pack_documents(
    keyed: KeyedPack, builder: BatchBuilder, tokenizer: Tokenizer, decode: Decoder | None = None
) -> list[list[Piece]]:
    """A pack's documents as a run that draws with `builder` sees them: order, dropped captions, timesteps and noise.

    Each image is shown clean and with its noise. Latents are decoded, or without `decode` their first channels shown,
    scaled to fit.
    """
    batch = builder([keyed])
    pictures = _pictures(keyed, builder, batch, decode)
    ends = batch.layout.document_offsets.tolist()
    tokens = batch.tokens.tolist()
    walk = _Walk(tokens, pictures, builder.vocabulary, tokenizer)
    return [list(walk(start, end)) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class _Walk:
    tokens: list[int]
    pictures: dict[int, tuple[int, Picture]]
    """By first position: how many positions it takes, and the picture."""
    vocabulary: Vocabulary
    tokenizer: Tokenizer

    def __call__(self, at: int, end: int) -> Iterator[Piece]:
        names = _special_names(self.vocabulary)
        while at < end:
            if at in self.pictures:
                length, picture = self.pictures[at]
                yield picture
                at += length
            elif self.tokens[at] in names:
                yield Special(names[self.tokens[at]])
                at += 1
            else:
                stop = at
                while stop < end and stop not in self.pictures and self.tokens[stop] not in names:
                    stop += 1
                yield self.tokenizer.decode(self.tokens[at:stop])
                at = stop


def _special_names(vocabulary: Vocabulary) -> dict[int, str]:
    names = {vocabulary.bos: "bos", vocabulary.eos: "eos"}
    for modality in range(vocabulary.num_modalities):
        names |= {vocabulary.boi(modality): f"boi {modality}", vocabulary.eoi(modality): f"eoi {modality}"}
    return names


def _pictures(
    keyed: KeyedPack, builder: BatchBuilder, batch: PackedBatch, decode: Decoder | None
) -> dict[int, tuple[int, Picture]]:
    rows = keyed.pack.segments[keyed.pack.segments[:, 1] != KIND_TEXT]  # a batch has the images in this order
    found: dict[int, tuple[int, Picture]] = {}
    for modality, (info, own) in enumerate(zip(builder.modalities, batch.modalities, strict=True)):
        sizes = rows[rows[:, 1] == 1 + modality][:, 4:6].tolist()
        latents = _false_colours if decode is None else decode
        show = unscale_pixels if info.encoding == "pixels" else latents
        found |= _of_modality(own, info, sizes, builder.objective.add_noise, show)
    return found


def _of_modality(
    own: ModalityBatch, info: ModalityInfo, sizes: Sequence[tuple[int, int]], add_noise: Callable, show: Decoder
) -> dict[int, tuple[int, Picture]]:
    offsets = own.image_offsets.tolist()
    found: dict[int, tuple[int, Picture]] = {}
    for number, (height, width) in enumerate(sizes):
        patches = slice(offsets[number], offsets[number + 1])
        x_0, t = own.latents[patches], own.timesteps[number]
        both = (x_0, add_noise(x_0, own.noise[patches], t))
        images = [show(unpatchify(x.numpy(), height, width, info.patch_size))[0] for x in both]
        caption = f"{info.name}, {width} x {height}, t = {t:.0f}"
        found[int(own.sequence_index[patches.start])] = (patches.stop - patches.start, Picture(tuple(images), caption))
    return found


def _false_colours(values: np.ndarray) -> np.ndarray:
    shown = values[..., : 3 if values.shape[-1] >= 3 else 1]
    low, high = shown.min(), shown.max()
    return np.rint((shown - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)


def _piece(piece: Piece) -> str:
    match piece:
        case str(text):
            return f'<span class="text">{html.escape(text)}</span>'
        case Special(name):
            return f'<span class="special">{html.escape(name)}</span>'
        case Picture(images, caption):
            shown = "".join(f'<img alt="" src="data:image/png;base64,{_png(image)}">' for image in images)
            return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    grey_or_rgb = image if image.shape[-1] == 3 else image[..., :1].squeeze(-1)
    Image.fromarray(grey_or_rgb).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
