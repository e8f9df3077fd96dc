"""The model of an evaluation, which draws and captions images, and the documents that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.data.autoencoder import Autoencoder
from transfusion_fast.data.folder import Folder
from transfusion_fast.data.images import pixels_to_latents, to_grid
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.pictures import Images, images_to_pixels
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

_Item = TypeVar("_Item")
MAX_READ = 4 << 30
"""Bytes of images and texts after which no more documents of a folder are read; packs hold them in random order."""
_POSITIONS = 1 << 16  # of the model at once, which bounds its memory


class Unmeasured(Exception):
    """A figure that cannot be measured; the message is the reason."""


def require(condition: object, reason: str) -> None:
    """Raise Unmeasured unless the condition holds."""
    if not condition:
        raise Unmeasured(reason)


@dataclass(frozen=True)
class Captioned:
    """Images [height, width, channels], uint8 pixels or float16 latents, with as many captions, and other documents."""

    images: Images
    """One array [n, height, width, channels] if all images have one size."""
    captions: tuple[str, ...]
    texts: tuple[str, ...]
    """The documents without an image."""
    modality: int = 0
    """Number of the images' modality."""
    others: int = 0
    """Number of documents that are neither text nor one image of that modality and its caption."""

    def first(self, most: int) -> Captioned:
        """Return the same with the first images alone."""
        return replace(self, images=self.images[:most], captions=self.captions[:most])

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the height and width, in values, of the first image of each caption."""
        found: dict[str, tuple[int, int]] = {}
        for caption, image in zip(self.captions, self.images, strict=True):
            found.setdefault(caption, image.shape[:2])
        return found


def read_captioned(folder: Folder | Path, tokenizer: Tokenizer, numbers: Sequence[int] | None = None) -> Captioned:
    """Read the documents of all packs of a data folder, or of some by number, up to `MAX_READ`."""
    reader, read, others, modality = PackReader(folder), 0, 0, None
    images: list[np.ndarray] = []
    captions: list[str] = []
    texts: list[str] = []
    for number in range(len(reader)) if numbers is None else numbers:
        pack = reader.read(number)
        for document in pack.documents(reader.index.modalities):
            text = "".join(tokenizer.decode(s.ids) for s in document if isinstance(s, TextSegment))
            own = [s for s in document if isinstance(s, ImageSegment)]
            if not own:
                texts.append(text)
            elif len(own) == 1 and len(document) == 2 and modality in (None, own[0].modality):
                modality = own[0].modality
                images.append(own[0].values)
                captions.append(text)
            else:
                others += 1
        read += pack.latents.nbytes + pack.tokens.nbytes
        if read > MAX_READ:
            break
    return Captioned(_stacked(images), tuple(captions), tuple(texts), modality or 0, others)


@dataclass(frozen=True)
class Subject:
    """A model, and what turns its ids into text and its images into pixels."""

    model: Transfusion
    tokenizer: Tokenizer
    modalities: tuple[ModalityInfo, ...]
    autoencoder: Autoencoder | None = None
    """The autoencoder of its latents."""

    def draw(
        self,
        sizes: Sequence[tuple[str, tuple[int, int]]],
        modality: int,
        each: int,
        image: ImageSettings,
        seed: int,
        first: int = 0,
    ) -> list[np.ndarray]:
        """Return `each` images of each (caption, (height, width) in values), uint8 [each, height, width, channels].

        Image k of caption i has the noise of prompt number (first + i) * each + k.
        """
        self.check_pixels(modality)
        drawn: dict[int, np.ndarray] = {}
        patch = self.modalities[modality].patch_size
        for height, width in dict.fromkeys(size for _, size in sizes):
            grid = height // patch, width // patch
            own = [i for i, (_, size) in enumerate(sizes) if size == (height, width)]
            for some in _batches(own, each * grid[0] * grid[1]):
                numbers = [(first + i) * each + k for i in some for k in range(each)]
                prompts = [[self.ids(sizes[i][0])] for i in some for _ in range(each)]
                latents = generate_images(
                    self.model, prompts, grid, modality=modality, image=image, seed=seed, prompt_numbers=numbers
                )
                pixels = images_to_pixels(latents, self.modalities[modality], self.autoencoder)
                drawn |= zip(some, pixels.reshape(len(some), each, *pixels.shape[1:]), strict=True)
        return [drawn[i] for i in range(len(sizes))]

    def caption(self, images: Images, modality: int) -> list[str]:
        """Return greedy captions of images [height, width, channels], pixels or latents."""
        captions: dict[int, str] = {}
        patch = self.modalities[modality].patch_size
        to_latents = pixels_to_latents if self.modalities[modality].encoding == "pixels" else to_grid
        for shape in dict.fromkeys(image.shape for image in images):
            own = [i for i, image in enumerate(images) if image.shape == shape]
            for some in _batches(own, TextSettings().max_tokens + shape[0] * shape[1] // patch**2):
                latents = to_latents(np.stack([images[i] for i in some]), patch)
                produced = sample(self.model, [[(modality, one)] for one in latents], max_images=0)
                captions |= zip(some, map(self._text, produced), strict=True)
        return [captions[i] for i in range(len(images))]

    def pixels(self, images: Images, modality: int) -> Images:
        """Return stored images as pixels, uint8 [height, width, channels] each; latents are decoded."""
        self.check_pixels(modality)
        decoder = self.autoencoder
        return images if decoder is None else _stacked([decoder.decode(image[None])[0] for image in images])

    def check_pixels(self, modality: int) -> None:
        """Raise Unmeasured if the images of a modality cannot be turned into pixels."""
        info = self.modalities[modality]
        require(not info.mean, "nothing here decodes a vision encoder's features")
        require(info.encoding == "pixels" or self.autoencoder, "latents need --vae, the autoencoder of the run's data")

    @torch.no_grad()
    def nats(self, texts: Sequence[str]) -> float:
        """Return the mean cross-entropy over all tokens of texts, <eos> included."""
        ids = [self.ids(text) for text in texts]
        total = 0.0
        for some in _batches(ids, max(map(len, ids)) + 2):
            # Without images, all loss is text loss, a mean over the tokens.
            total += self.model([[one] for one in some]).item() * sum(len(one) + 1 for one in some)
        return total / sum(len(one) + 1 for one in ids)

    def ids(self, text: str) -> Tensor:
        """Return the ids of a text, int64 [n]."""
        return torch.from_numpy(self.tokenizer.encode(text)).long()

    def _text(self, pieces: Sequence[Tensor | tuple[int, Tensor]]) -> str:
        return "".join(self.tokenizer.decode(piece.numpy()) for piece in pieces if isinstance(piece, Tensor))


def _stacked(images: list[np.ndarray]) -> Images:
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def _batches(items: Sequence[_Item], positions: int) -> Iterator[Sequence[_Item]]:
    """Yield the items in batches of at most `_POSITIONS` positions, of which each takes `positions`."""
    size = max(1, _POSITIONS // positions)
    for start in range(0, len(items), size):
        yield items[start : start + size]
