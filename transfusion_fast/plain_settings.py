"""Stand-ins for what config.py takes from pydantic, so that a model can be built and timed where it is not installed.

Settings then come from Python alone: names and the rules between settings are checked, types and ranges are not, and
importing this module warns of that. config_reading.py refuses to read files, command lines or saved settings without
pydantic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from inspect import get_annotations
from typing import Any

warnings.warn("pydantic is not installed: types and ranges of settings are not checked", stacklevel=2)

ConfigDict = dict
ValidationInfo = Any


def _ignored(*_: Any, **__: Any) -> None:
    """Stand for a constraint or a conversion of a value."""


AfterValidator = BeforeValidator = Discriminator = Field = Tag = _ignored


class _Rule:
    """A method that checks or completes one field, or all of them for the field None."""

    def __init__(self, method: Any, field: str | None, mode: str):
        self.method, self.field, self.mode = method, field, mode


def model_validator(*, mode: str) -> Callable[[Any], Any]:
    return lambda method: _Rule(method, None, mode)


def field_validator(field: str, *, mode: str = "after") -> Callable[[Any], Any]:
    return lambda method: _Rule(method, field, mode)


class BaseModel:
    """Frozen settings with defaults."""

    def __init__(self, **given: Any):
        for rule in self._rules(None, "before"):
            given = rule.method.__func__(type(self), given)
        names = [name for cls in reversed(type(self).__mro__) for name in get_annotations(cls)]
        if unknown := given.keys() - set(names):
            raise ValueError(f"settings must be of {', '.join(names)}, got {min(unknown)!r}; correct it")
        for name in names:
            default = getattr(type(self), name)
            value = given.get(name, default)
            if isinstance(default, BaseModel) and isinstance(value, Mapping):
                value = type(default)(**value)
            if isinstance(default, tuple) and default and isinstance(default[0], BaseModel):
                value = tuple(type(default[0])(**x) if isinstance(x, Mapping) else x for x in value)
            for rule in self._rules(name, "before"):
                value = rule.method.__func__(type(self), value)
            self.__dict__[name] = value
        for rule in self._rules(None, "after"):
            rule.method(self)

    def _rules(self, field: str | None, mode: str) -> Iterator[_Rule]:
        rules = (x for cls in type(self).__mro__ for x in vars(cls).values() if isinstance(x, _Rule))
        return (rule for rule in rules if (rule.field, rule.mode) == (field, mode))

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(f"settings are frozen, got a new {name}; make new settings")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def model_dump(self, mode: str) -> dict[str, Any]:
        return {k: v.model_dump(mode) if isinstance(v, BaseModel) else v for k, v in vars(self).items()}
