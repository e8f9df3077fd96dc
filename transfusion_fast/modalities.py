"""The modalities of a model, and the shorthands of `ModelConfig` that set something for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transfusion_fast.settings import NonNegativeFloat, Positive, PositiveFloat, Settings, model_validator

PositionScheme = Literal["sequential", "shared", "axial"]
SHORTHANDS = ("dim_latent", "codec", "positions", "channel_first")
"""Settings of `ModalityConfig` that may be given as settings of the model; `dim_latent` then has one or more widths."""


class ModalityConfig(Settings):
    """A kind of content besides text, such as images: its latents, and how they enter and leave the transformer."""

    dim_latent: Positive = 4
    """Values C of a patch. Training reads it from the data if it is not given."""
    dims: Literal[0, 1, 2, 3] = 2
    """Dimensions of the grid of patches, each a vector of C values: 0 for a single vector [C], 1 for audio [length, C],
    2 for images [rows, columns, C], 3 for video [frames, rows, columns, C]. Data folders hold images."""
    codec: Literal["linear", "unet"] = "linear"
    """Layers between patches and the transformer: one linear layer in each direction, or the paper's U-Net, which takes
    images."""
    patch_size: Literal[1, 2, 4, 8, 16] | None = None
    """Height and width of a patch in values, for unet alone: C is patch_size^2 times the channels, rows first and
    channels last. The U-Net halves an image log2(patch_size) times. Training reads it from the data if it is not
    given."""
    positions: PositionScheme = "sequential"
    """Positions of patches: an index for each (the paper), one index for all, or axial: a row and a column for images,
    also a frame for video, and an index for each patch with fewer dimensions. Text and other modalities then have the
    same index on every axis."""
    shape: tuple[Positive, ...] | None = None
    """Size of the grid in patches that sampling draws if it is given none, one number for each dimension."""
    bound: PositiveFloat | None = None
    """Largest absolute value of latents, to which sampling clips the clean latents that it predicts; default: none.
    The models of runs and exports have that of their data, if it is not given."""
    loss_weight: NonNegativeFloat = 1.0
    """Factor of the modality's diffusion loss."""
    channel_first: bool | None = None
    """Order of the axes of latents given to the model from Python: true is [C, rows, columns], false is
    [rows, columns, C]. If it is not given, the order is [rows, columns, C], and training refuses latents whose shape
    fits both. Data folders do not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> ModalityConfig:
        if self.shape is not None and len(self.shape) != self.dims:
            raise ValueError(f"shape must have dims={self.dims} numbers, got {self.shape}; correct one of them")
        if self.codec == "linear" and self.patch_size is not None:
            raise ValueError(f"patch_size must come with codec=unet, got {self.patch_size} with linear; leave it out")
        if self.codec == "unet" and self.dims != 2:
            raise ValueError(f"dims must be 2 for codec=unet, got {self.dims}; use codec=linear")
        return self

    @property
    def axes(self) -> int:
        """Number of coordinates that positions of this modality need."""
        return max(1, self.dims) if self.positions == "axial" else 1


def fold_shorthands(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a model with its shorthands moved into `modalities`.

    Raises:
        ValueError: a shorthand contradicts an entry of `modalities`.
    """
    given = {name: values[name] for name in SHORTHANDS if name in values}
    others = {name: value for name, value in values.items() if name not in given}
    if not given:
        return values
    widths = given.pop("dim_latent", None)
    widths = widths if isinstance(widths, list | tuple | None) else [widths]
    entries = others.get("modalities", [{}] * (1 if widths is None else len(widths)))
    if not isinstance(entries, list | tuple) or not all(isinstance(x, Mapping | ModalityConfig) for x in entries):
        return others  # an error that is found where the entries are read
    if widths is not None and len(widths) != len(entries):
        raise ValueError(f"dim_latent must have a width for each of {len(entries)} modalities, got {widths}; drop it")
    folded = []
    for number, entry in enumerate(entries):
        own = dict(entry) if isinstance(entry, Mapping) else _given(entry)
        wanted = given if widths is None else {"dim_latent": widths[number], **given}
        for name, value in wanted.items():
            if own.setdefault(name, value) != value:
                rule = f"{name} must be {own[name]!r} like modalities.{number}.{name}"
                raise ValueError(f"{rule}, got {value!r}; drop one of them")
        folded.append(own)
    return {**others, "modalities": folded}


def _given(modality: ModalityConfig) -> dict[str, Any]:
    return {name: getattr(modality, name) for name in getattr(modality, "model_fields_set", vars(modality))}
