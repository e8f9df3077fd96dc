"""The check of raw DeepSpeed settings by DeepSpeed's own reader, which alone would ignore some unknown keys in silence.

The reader is given settings that remember which keys it asks for. Sections that are pydantic models refuse unknown keys
themselves; a key of the top level or of another section that nothing asks for has no effect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from transfusion_fast.errors import InputError


class _Watched(dict[str, Any]):
    """Settings that remember, at every level, which keys were asked for."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__({k: _Watched(v) if isinstance(v, Mapping) else v for k, v in settings.items()})
        self.asked: set[str] = set()

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # so that `in settings.keys()` asks too

    def __iter__(self) -> Iterator[str]:
        self.asked.update(super().keys())  # such as `Model(**settings)`, which asks for each
        return super().__iter__()

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()

    def __copy__(self) -> _Watched:
        return self


def check_raw_settings(settings: Mapping[str, Any]) -> None:
    """Raise InputError for the first key that DeepSpeed does not know, or for a value that it refuses."""
    watched = _Watched({**settings, "train_batch_size": None})  # which it would compare with the number of ranks
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        first = error.errors()[0]
        path = _path(watched, first["loc"] or ("",))
        if first["type"] == "extra_forbidden":
            raise _unknown(path, watched) from error
        raise InputError(f"config: {path}: {first['msg']}, got {first['input']!r}") from error
    except (ValueError, TypeError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config: deepspeed must be settings that DeepSpeed accepts, got: {reason}") from error
    for path in _unasked(watched, "deepspeed"):
        raise _unknown(path, watched)


def _unasked(settings: _Watched, name: str) -> Iterator[str]:
    """Yield the full names of the keys that nothing asked for.

    A section of which nothing was asked for was read by pydantic. The `params` of an optimizer are read later.
    """
    for key, value in dict.items(settings):
        if key not in settings.asked:
            yield f"{name}.{key}"
        elif isinstance(value, _Watched) and value.asked and key != "params":
            yield from _unasked(value, f"{name}.{key}")


def _path(settings: _Watched, location: tuple[int | str, ...]) -> str:
    """Return the full name of a key inside of a section, whose name pydantic does not know."""
    inner = ".".join(map(str, location))
    sections = [
        key for key, value in dict.items(settings) if isinstance(value, dict) and location[0] in dict.keys(value)
    ]
    return ".".join(["deepspeed", *sections[:1], inner])


def _unknown(path: str, settings: _Watched) -> InputError:
    fields = [item for model in _models(DeepSpeedConfigModel) for item in model.model_fields.items()]
    known = {field.alias or name for name, field in fields} | _all_asked(settings)
    key = path.rpartition(".")[2]
    near = difflib.get_close_matches(key, known - {key}, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "DeepSpeed does not read it; drop it"
    return InputError(f"config: unknown key {path!r}; {hint}")


def _all_asked(settings: _Watched) -> set[str]:
    inner = [_all_asked(value) for value in dict.values(settings) if isinstance(value, _Watched)]
    return settings.asked.union(*inner)


def _models(model: Any) -> Iterator[Any]:
    for derived in model.__subclasses__():
        yield derived
        yield from _models(derived)
