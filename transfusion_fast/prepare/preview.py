"""Documents as a self-contained page of HTML: text, special tokens, and images in their order."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from transfusion_fast.config import Config
from transfusion_fast.config_reading import parse
from transfusion_fast.data.batch import BatchBuilder, KeyedPack
from transfusion_fast.data.images import unpatchify, unscale_pixels
from transfusion_fast.data.loader import batch_builder
from transfusion_fast.data.pack import KIND_TEXT
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.model.packed_batch import PackedBatch

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
    """Images uint8 [height, width, 1 or 3] side by side over a caption."""

    images: tuple[np.ndarray, ...]
    caption: str


Shown = str | Special | Picture
Decoder = Callable[[np.ndarray], np.ndarray]
"""A function from latents [n, h, w, channels] to pixels, uint8 [n, height, width, 3]."""


def page(title: str, documents: Sequence[Sequence[Shown]]) -> str:
    """Return the HTML page of some documents. Markup in them is shown as text."""
    sections = "\n".join(f"<section>{fragment(pieces)}</section>" for pieces in documents)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"</head><body>\n<h1>{name}</h1>\n{sections}\n</body></html>\n"
    )


def fragment(pieces: Iterable[Shown]) -> str:
    """Return the HTML of a document's pieces. Markup in them is shown as text."""
    return "".join(map(_html, pieces))


def _html(piece: Shown) -> str:
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
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def preview(reader: PackReader, number: int, epoch: int, seed: int, decode: Decoder | None = None) -> list[list[Shown]]:
    """Return the documents of a pack as a run with the default settings sees them; InputError for a wrong number."""
    index = reader.index
    if not 0 <= number < len(reader):
        raise InputError(f"--pack must be in 0..{len(reader) - 1}, got {number}; give another")
    for name, value in (("epoch", epoch), ("seed", seed)):
        if value < 0:
            raise InputError(f"--{name} must be 0 or more, got {value}; give another")
    widths = [info.channels * info.patch_size**2 for info in index.modalities]
    model = {"num_text_tokens": index.num_text_tokens, "dim_latent": widths}
    config = parse(Config, {"model": model, "train": {"seed": seed}}, str(reader.folder))
    tokenizer = load_tokenizer(index.tokenizer, reader.folder)
    keyed = KeyedPack(reader.read(number), epoch, number)
    return shown_documents(keyed, batch_builder(config, index, packs=1), tokenizer, decode)


def shown_documents(
    keyed: KeyedPack, builder: BatchBuilder, tokenizer: Tokenizer, decode: Decoder | None = None
) -> list[list[Shown]]:
    """Return a pack's documents as a run that draws with `builder` sees them: order, dropped captions and noise.

    Each image is shown clean and with its noise. Latents are decoded, or without `decode` their first channels shown,
    scaled to fit.
    """
    batch, vocabulary = builder([keyed]), builder.vocabulary
    names = {vocabulary.bos: "bos", vocabulary.eos: "eos"}
    for modality in range(vocabulary.num_modalities):
        names |= {vocabulary.boi(modality): f"boi {modality}", vocabulary.eoi(modality): f"eoi {modality}"}
    names |= {vocabulary.first_size + n: f"size {n + 1}" for n in range(vocabulary.max_size)}
    tokens, pictures = batch.tokens.tolist(), _pictures(keyed, builder, batch, decode)
    weights = np.zeros(len(tokens))  # of each token as a label
    weights[batch.supervised.numpy() + 1] = 1 if batch.token_weights is None else batch.token_weights.numpy()

    def kind(i: int) -> tuple[bool, float]:
        is_text = i not in pictures and tokens[i] not in names
        return is_text, float(weights[i]) if is_text else 0.0

    def pieces(positions: range) -> Iterator[Shown]:
        for (is_text, weight), run in itertools.groupby(positions, kind):
            if is_text:
                if weight != 1:
                    yield Special(f"weight {weight:g}")
                yield tokenizer.decode([tokens[i] for i in run])
                continue
            for i in run:
                if piece := pictures[i] if i in pictures else Special(names[tokens[i]]):
                    yield piece

    return [list(pieces(range(*span))) for span in itertools.pairwise(batch.layout.document_offsets.tolist())]


def _pictures(
    keyed: KeyedPack, builder: BatchBuilder, batch: PackedBatch, decode: Decoder | None
) -> dict[int, Picture | None]:
    """Return the picture at the first position of each image, and None at its other positions."""
    rows = keyed.pack.segments[keyed.pack.segments[:, 1] != KIND_TEXT]  # a batch has the images in this order
    found: dict[int, Picture | None] = {}
    for modality, (info, own) in enumerate(zip(builder.modalities, batch.modalities, strict=True)):
        show = unscale_pixels if info.encoding == "pixels" else decode or _false_colours
        sizes = rows[rows[:, 1] == 1 + modality][:, 4:6].tolist()
        spans = itertools.pairwise(own.image_offsets.tolist())
        for (height, width), span, t, weight in zip(sizes, spans, own.timesteps, own.weights, strict=True):
            patches = slice(*span)
            x_0 = own.latents[patches]
            x_t = builder.diffusion.add_noise(x_0, own.noise[patches], t)
            images = [show(unpatchify(x.numpy(), height, width, info.patch_size))[0] for x in (x_0, x_t)]
            first, *others = own.sequence_index[patches].tolist()
            found |= dict.fromkeys(others)
            weighed = "" if weight == 1 else f", weight {weight:g}"
            found[first] = Picture(tuple(images), f"{info.name}, {width} x {height}, t = {t:.0f}{weighed}")
    return found


def _false_colours(values: np.ndarray) -> np.ndarray:
    shown = values[..., : 3 if values.shape[-1] >= 3 else 1]
    low, high = shown.min(), shown.max()
    return np.rint((shown - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
