"""Checks of the arguments of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Document
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.engine import Grid
from transfusion_fast.sampling.settings import is_integer

T = TypeVar("T")


def drawn_size(model: Transfusion, modality: int, grid: Grid | None) -> Grid | None:
    """Return the size in patches that is drawn of a modality, None if none is known; refuse a wrong one."""
    config = model.config.modalities[modality]
    grid = config.shape if grid is None else grid
    if grid is None:
        return () if config.dims == 0 else None
    fits = isinstance(grid, Sequence) and len(grid) == config.dims and all(is_integer(n) and n >= 1 for n in grid)
    if not fits:
        rule = f"the size of what is drawn must be {config.dims} integers of at least 1 for modality {modality}"
        raise InputError(f"{rule}, got {grid}; correct it")
    model.vocabulary.opening(modality, grid)  # refuses what the size tokens cannot say
    return tuple(grid)


def check_modality(model: Transfusion, modality: int) -> None:
    """Raise InputError for a modality that the model does not have."""
    if not is_integer(modality) or not 0 <= modality < len(model.codecs):
        raise InputError(f"the modality must be an integer in [0, {len(model.codecs)}), got {modality}; correct it")


def known_size(model: Transfusion, modality: int, grid: Grid | None) -> Grid:
    """Return the size in patches that is drawn of a modality; refuse an unknown modality or size."""
    check_modality(model, modality)
    size = drawn_size(model, modality, grid)
    if size is None:
        rule = f"the size of what is drawn must be given for modality {modality}, which has no shape"
        raise InputError(f"{rule}, got none; give its grid")
    return size


def drawn_sizes(
    model: Transfusion, grids: Sequence[Grid | None] | None, noise: Sequence[Tensor | None], begin: int | None
) -> list[Grid | None]:
    """Return the size in patches that is drawn of each modality; None where the model chooses it, or none is known.

    The size of what `noise` is given for, and of the first image of a model without size tokens, must be known.
    """
    chooses, sizes = model.vocabulary.max_size > 0, []
    for modality, grid in enumerate(for_each_modality(model, grids, "grids", "a size")):
        chosen = chooses and grid is None and noise[modality] is None and model.config.modalities[modality].dims > 0
        sizes.append(None if chosen else drawn_size(model, modality, grid))
        if noise[modality] is not None:
            known_size(model, modality, grid)
    if begin is not None:
        check_modality(model, begin)
        if not chooses:
            known_size(model, begin, sizes[begin])
    return sizes


def for_each_modality(model: Transfusion, values: Sequence[T | None] | None, name: str, one: str) -> Sequence[T | None]:
    """Return a value for each modality, None by default; refuse another number of values."""
    count = len(model.codecs)
    if values is None:
        return [None] * count
    got = len(values) if isinstance(values, Sequence | Tensor) else type(values).__name__
    if got != count:
        raise InputError(f"{name} must have {one} for each of {count} modalities, got {got}")
    return values


def check_prompts(prompts: Sequence[Document]) -> None:
    """Raise InputError unless there is a list of prompts."""
    if not isinstance(prompts, Sequence) or not prompts:
        got = "none" if isinstance(prompts, Sequence) else type(prompts).__name__
        raise InputError(f"prompts must be a list of one or more documents, got {got}; [] is a document")
