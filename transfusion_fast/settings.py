"""The base class of settings and the types of their values, from pydantic or its stand-in."""

from __future__ import annotations

from typing import Annotated, Any

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
    from transfusion_fast.plain_settings import (  # type: ignore[assignment,no-redef]
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

# Those of pydantic that other files take from here.
__all__ = ["AfterValidator", "Discriminator", "Tag", "ValidationInfo", "field_validator", "model_validator"]


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Integer, Field(gt=0)]
Count = Annotated[Integer, Field(ge=0)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Frozen settings; an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
