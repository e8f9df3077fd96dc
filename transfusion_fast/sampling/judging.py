"""Images drawn for a file of prompts, and judged by a function of the user: the protocol of docs/sampling.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.errors import InputError
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.sampling.subject import Subject

Judge = Callable[[dict[str, Any], np.ndarray], Mapping[str, float]]
"""A function of an entry of the file and its images, uint8 [each, height, width, channels]."""
_TAGS = ("tag", "category")
_PROMPTS = 64  # drawn together


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, each with a text "prompt"; raise InputError naming the line that has none."""
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {path} must be a JSON object, got {error}; correct it") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise InputError(f'line {number} of {path} must be a JSON object with a text "prompt"; correct it')
        if not isinstance(_tag(entry), str | None):
            raise InputError(f"tag or category of line {number} of {path} must be a text, got {_tag(entry)!r:.60}")
        entries.append(entry)
    if not entries:
        raise InputError(f"{path} must have a JSON object in each line, got an empty file; give another")
    return entries


def load_judge(name: str) -> Judge:
    """Import a function by "MODULE:FUNCTION"; raise InputError if there is none."""
    module, _, function = name.partition(":")
    try:
        judge = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--judge must be MODULE:FUNCTION, got {name} ({error}); correct it") from error
    if not callable(judge):
        raise InputError(f"--judge must be a function, got {name}, {type(judge).__name__}; name another")
    return judge


def judge_prompts(
    subject: Subject,
    entries: Sequence[dict[str, Any]],
    judge: Judge,
    size: tuple[int, int],
    *,
    each: int,
    image: ImageSettings,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Draw and judge `each` images of every entry, of a height and width in values.

    Returns:
        (the mean of each number over the entries that have it, overall and by tag; the images of the first prompts).

    Raises:
        InputError: the judge returned anything but a dict of finite numbers.
    """
    results, first = [], {}
    for number, images in enumerate(_draw(subject, entries, size, each, image, seed)):
        entry = entries[number]
        results.append(_checked(judge(dict(entry), images), entry["prompt"]))
        if number < _PROMPTS:
            first[entry["prompt"]] = images
    tags = [_tag(entry) for entry in entries]
    by_tag = {
        tag: _means([r for r, own in zip(results, tags, strict=True) if own == tag])
        for tag in dict.fromkeys(tags)
        if tag is not None
    }
    return {"prompts": len(entries), "each": each, "overall": _means(results), "by_tag": by_tag}, first


def _draw(
    subject: Subject,
    entries: Sequence[dict[str, Any]],
    size: tuple[int, int],
    each: int,
    image: ImageSettings,
    seed: int,
) -> Iterator[np.ndarray]:
    """Yield the images of each entry; those of a few prompts are in memory at once."""
    for start in range(0, len(entries), _PROMPTS):
        sizes = [(entry["prompt"], size) for entry in entries[start : start + _PROMPTS]]
        yield from subject.draw(sizes, 0, each, image, seed, start)


def _checked(result: object, prompt: str) -> dict[str, float]:
    numbers = (int, float, np.integer, np.floating, np.bool_)
    if not isinstance(result, Mapping) or not all(
        isinstance(name, str) and isinstance(value, numbers) and math.isfinite(value) for name, value in result.items()
    ):
        rule = "--judge must return a dict of finite numbers or bools by name"
        raise InputError(f"{rule}, got {result!r:.100} for {prompt!r:.60}; correct the function")
    return {name: float(value) for name, value in result.items()}


def _means(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for result in results for name in result)
    return {name: float(np.mean([result[name] for result in results if name in result])) for name in names}


def _tag(entry: Mapping[str, Any]) -> Any:
    return next((entry[name] for name in _TAGS if name in entry), None)
