"""Settings read from a YAML file and `a.b=value` overrides, the origin of each, and the differences of two configs.

An unknown key or a value out of its range is an InputError of one line, which names the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml

from transfusion_fast.config import FROM_DATA, Config, ModelConfig
from transfusion_fast.errors import InputError
from transfusion_fast.modalities import SHORTHANDS
from transfusion_fast.settings import BaseModel

if TYPE_CHECKING:
    from pydantic import ValidationError

Settings = TypeVar("Settings", bound=BaseModel)
MOVED = {"model.objective": "model.diffusion.process"}
"""New names of settings that runs and exports of earlier versions have."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults, and apply `section.key=value` overrides with values in YAML.

    Raises:
        InputError: a file that does not exist or is not YAML, an unknown key, or a value out of its range.
    """
    values = _read(path)
    for override in overrides:
        _apply(values, override)
    return parse(Config, values, str(path or "defaults"))


def sources(config: Config, path: str | Path | None, overrides: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and source of each setting of a config that was loaded from these and completed from the data.

    The source is default, preset, file, override or data.
    """
    given = _labelled(_read(path), "file")
    for override in overrides:
        _apply(given, override, "override")
    yield from _sources(config, given, "")


def _sources(settings: BaseModel, given: Any, prefix: str, preset: frozenset[str] = frozenset()) -> Iterator[Any]:
    for name in type(settings).model_fields:
        value, source = getattr(settings, name), given.get(name) if isinstance(given, Mapping) else given
        if isinstance(value, BaseModel):
            expanded = value.model_fields_set if getattr(settings, "preset", None) else ()
            yield from _sources(value, source or {}, f"{prefix}{name}.", frozenset(expanded))
            continue
        if name == "modalities" and source is None and isinstance(given, Mapping):
            source = next((given[shorthand] for shorthand in SHORTHANDS if shorthand in given), None)
        if isinstance(source, Mapping):  # a setting that is a mapping itself
            source = "override" if "override" in source.values() else "file"
        fallback = "preset" if name in preset else "data" if name in FROM_DATA else "default"
        yield f"{prefix}{name}", value, source or fallback


def _labelled(value: Any, label: str) -> Any:
    """Return a nested mapping with `label` in place of every value."""
    return {key: _labelled(x, label) for key, x in value.items()} if isinstance(value, Mapping) else label


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot be read ({error}); give an existing YAML file") from error
    except yaml.YAMLError as error:
        raise InputError(f"config {path}: must be YAML, but {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise InputError(f"config {path}: must be a mapping of sections, got {type(values).__name__}")
    return values or {}


def parse(settings: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """Validate `values` as `settings`; InputError of one line naming `source` and the key."""
    try:
        from pydantic import ValidationError
    except ModuleNotFoundError as error:
        remedy = "install it, or build the settings in Python"
        raise InputError(f"package pydantic must be there to read {source}, got none; {remedy}") from error
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"config {source}: {_explain(settings, error)}") from error


def _apply(values: dict[str, Any], override: str, label: str | None = None) -> None:
    """Put an override into nested values, or a label in its place."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise InputError(f"override must be section.key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value must be YAML; quote it") from error
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"override {override!r}: {section} is a value, not a section")
    values[key] = value if label is None else _labelled(value, label)


def _explain(settings: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        message = f"{path}: {first['msg']}" if path else first["msg"]
        got = (
            "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
        )  # a whole section says too much
        return message.replace("Value error, ", "", 1) + got
    section: Any = settings
    for part in first["loc"][:-1]:
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    names = [*section.model_fields, *(SHORTHANDS if section is ModelConfig else ())]
    near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    full = f"model.{path}" if settings is ModelConfig else path
    hint = f"it is {MOVED[full]!r} now, with the same values; rename it" if full in MOVED else hint
    return f"unknown key {path!r}; {hint}"


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield `NAME OLD -> NEW` for each setting that differs between two nested settings; long values are shortened."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, pair in enumerate(zip(before, now, strict=True)):
            yield from changes(*pair, f"{name}.{place}")
    elif before != now:
        yield f"{name or 'everything'} {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
