"""Types of settings, which check their values; pydantic's, or without it those of plain_settings.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

try:
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        ValidationInfo,
        field_validator,
        model_validator,
    )
except ModuleNotFoundError as error:
    if error.name != "pydantic":  # a broken installation
        raise
    from transfusion_fast.plain_settings import (  # type: ignore[assignment,no-redef]  # noqa: F401
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        ValidationInfo,
        field_validator,
        model_validator,
    )


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def no_false(value: Any) -> Any:
    """Return the name off for false."""
    return "off" if value is False else value  # YAML reads off as false


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Integer, Field(gt=0)]
Count = Annotated[Integer, Field(ge=0)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Timestep = Annotated[Number, Field(ge=1, le=1000)]
Backend = Literal["auto", "torch", "triton", "reference"]
Op = Literal["hybrid_attention", "rope", "rms_norm", "swiglu", "diffusion_mse"]
Context = Literal["noised", "clean"]
FolderPath = Annotated[str, AfterValidator(os.path.expanduser)]
_Weights = Annotated[dict[FolderPath, PositiveFloat], Field(min_length=1)]
Folders = Annotated[
    Annotated[FolderPath, Tag("folder")] | Annotated[_Weights, Tag("weight")],
    Discriminator(lambda value: "weight" if isinstance(value, Mapping) else "folder"),
]
_Share = Annotated[Number, Field(gt=0, le=0.5)]
HeldOut = Annotated[
    Annotated[FolderPath, Tag("folder")] | Annotated[_Share, Tag("share")],
    Discriminator(lambda value: "folder" if isinstance(value, str) else "share"),
]

MAX_SEED = 2**63 - 1
"""Largest seed that torch takes."""
Seed = Annotated[Integer, Field(ge=0, le=MAX_SEED)]


class Settings(BaseModel):
    """A section of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
