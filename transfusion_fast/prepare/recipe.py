"""The recipe of a data folder, and what is measured on its source before the work begins."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.shards import MAX_PACKS, PACKS_PER_SHARD
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.files import read_json
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.filters import Filters
from transfusion_fast.prepare.packing import BUFFER
from transfusion_fast.prepare.selection import ALL, Selection
from transfusion_fast.prepare.sources.base import Part, Source, SourceDocument, TextRange
from transfusion_fast.prepare.staging import RECIPE, output_and_staging

if TYPE_CHECKING:
    from transfusion_fast.data.vision_encoder import VisionEncoder

_VERSION = 6
"""Version of spooled units and of the packing: work begun by another version is refused."""
MEASURED = 256
"""Images by which a vision encoder's features are normalised."""
_NO_FILTERS = Filters()
UNIT_STREAM = (0, 0)  # `pack_stream` draws from streams of one number


@dataclass(frozen=True)
class Recipe:
    """Everything that a data folder depends on."""

    source: Source
    encoder: Encoder
    packs_per_shard: int = PACKS_PER_SHARD
    seed: int = 0
    buffer: int = BUFFER
    """Documents that are packed together."""
    train_bpe: int | None = None
    """Size of the vocabulary, if the tokenizer was trained on the source itself."""
    selection: Selection = ALL

    def __post_init__(self) -> None:
        if not 1 <= self.packs_per_shard <= MAX_PACKS:
            raise InputError(
                f"packs_per_shard must be in 1..{MAX_PACKS}, got {self.packs_per_shard}; give another number"
            )

    def describe(self) -> dict[str, Any]:
        """Return the recipe as JSON, with the sizes and times by which changed source files are recognized."""
        described = {
            **_describe(self.source, self.selection, self.train_bpe),
            "encoder": self.encoder.describe(),
            "packing": {"packs_per_shard": self.packs_per_shard, "seed": self.seed, "buffer": self.buffer},
        }
        return json.loads(json.dumps(described))


def _describe(source: Source, selection: Selection, train_bpe: int | None) -> dict[str, Any]:
    states = source.states()
    return {
        "version": _VERSION,
        "source": source.describe(),
        "files": states,
        "order": hashlib.sha256(os.fsencode("\n".join(states))).hexdigest(),
        "selection": selection.describe(),
        "train_bpe": train_bpe,
    }


def train_tokenizer(
    source: Source, vocabulary: int, folder: Path, selection: Selection = ALL, filters: Filters = _NO_FILTERS
) -> Tokenizer:
    """Train a BPE tokenizer on the texts of a source, but for those that are held out or that filters leave out.

    If `folder` was made or begun with one, that one is returned.
    """
    wanted = json.loads(json.dumps(filters.describe()))
    for path, begun in _begun(source, selection, vocabulary, folder):
        match begun:
            case {"tokenizer": dict(described), **settings} if settings.get("filters", {}) == wanted:
                with suppress(InputError):
                    return load_tokenizer(described, path)
    read = (found for unit in source.units() for found in source.documents(unit))
    kept = (found for found in read if not (isinstance(found, SourceDocument) and filters.rejection(found)))
    documents = selection.trained_on(kept)
    return train_bpe((text for found in documents for part in found.parts for text in _texts(part)), vocabulary)


def _texts(part: Part) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, TextRange):
        with suppress(Rejected):  # which is counted when the text is encoded
            yield from part.pieces()


def measure_features(
    encoder: Encoder, source: Source, train_bpe: int | None, folder: Path, selection: Selection = ALL
) -> VisionEncoder:
    """Return the vision encoder of `encoder`, normalised by images from all of a source that are not held out.

    If `folder` was made or begun with a normalisation, it is that one. InputError if none of the images that are looked
    at can be used.
    """
    from transfusion_fast.data.vision_encoder import VisionEncoder

    assert encoder.latents is not None and isinstance(encoder.latents.encoder, VisionEncoder)
    vision, latents = encoder.latents.encoder, encoder.latents
    for _, begun in _begun(source, selection, train_bpe, folder):
        match begun:
            case {"modalities": [{"autoencoder": vision.fingerprint, "mean": list(mean), "std": list(std)}]}:
                return replace(vision, mean=tuple(mean), std=tuple(std))
    units = source.units()
    if selection.has_limit:  # no unit behind it is read
        pixels = encoder.pixels(selection.trained_on(found for unit in units for found in source.documents(unit)))
    else:
        each = -(-MEASURED // max(len(units), 1))
        chosen = (units[number] for number in keyed_permutation(len(units), 0, *UNIT_STREAM).tolist())
        documents = (selection.trained_on(source.documents(unit)) for unit in chosen)
        pixels = (image for found in documents for image in islice(encoder.pixels(found), each))
    found = latents(list(islice(pixels, MEASURED)))
    features = [values for values in found if not isinstance(values, Rejected)]
    if not features:
        raise InputError("source must hold images whose features can be measured, got none; look at its files")
    return vision.normalised_by(features)


def _begun(
    source: Source, selection: Selection, train_bpe: int | None, folder: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield `folder` and its staging folder with the settings of their encoders, if they were made of this source."""
    now = json.loads(json.dumps(_describe(source, selection, train_bpe)))
    folder, partial = output_and_staging(folder)
    for path in (folder, folder / selection.sides[0], partial):
        match read_json(path / RECIPE):
            case {"encoder": dict(settings), **rest} if now.items() <= rest.items():
                yield path, settings
