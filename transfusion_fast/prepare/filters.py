"""Filters of documents by the fields of their records, the size of their images and the length of their captions.

A condition such as `similarity > 0.3` is parsed and compared, never evaluated as code. A document that a filter leaves
out is Rejected, with the condition in its reason, so that each filter is counted by itself.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from numbers import Real
from typing import Any, Self

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources.base import SourceDocument
from transfusion_fast.prepare.sources.records import lookup

_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_CONDITION = re.compile(
    r"""
    \s* (?P<field> [^\s<>=!"'.]+ (?: \. [^\s<>=!"'.]+ )* )
    \s* (?P<operator> <= | >= | == | != | < | > )
    \s* (?: (?P<number> [+-]? (?: (?P<whole> \d{1,300} ) | (?: \d+\.?\d* | \.\d+ ) (?: [eE][+-]?\d+ )? ) )
           | "(?P<double> [^"]* )" | '(?P<single> [^']* )' )
    \s*""",
    re.VERBOSE,
)
_LENGTHS = re.compile(r"(\d{0,18}):(\d{0,18})", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """A comparison that a field of a document's record must satisfy."""

    field: str
    """Name of the field, with a dot before each name within an object."""
    operator: str
    value: float | str

    def __str__(self) -> str:
        return f"{self.field} {self.operator} {json.dumps(self.value, ensure_ascii=False)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the condition `FIELD OPERATOR VALUE`; raise InputError for anything else."""
        found = _CONDITION.fullmatch(text)
        is_number = found is not None and found["number"] is not None
        if found is None or not (is_number or found["operator"] in ("==", "!=")):
            raise InputError(
                f"condition must be FIELD, an operator of {' '.join(_COMPARED)}, and a number, or a text in quotes "
                f"behind == or !=, got {text!r}; give one such as 'similarity > 0.3' or 'language == \"en\"'"
            )
        value: float | str = found["double"] or found["single"] or ""
        if is_number:  # floats would round large integers
            value = int(found["number"]) if found["whole"] else float(found["number"])
        return cls(found["field"], found["operator"], value)

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raise Rejected if a field is missing, of another type, not a number (NaN) or does not satisfy it."""
        value = lookup(fields, self.field)
        if value is None:
            raise Rejected("field missing", f"{self.field}, for {self}")
        if not isinstance(self.value, str):
            value = self._number(value)
        elif not isinstance(value, str):
            raise Rejected("field is no text", f"{self.field} is {value!r:.60}, for {self}")
        if not _COMPARED[self.operator](value, self.value):
            raise Rejected(f"not {self}", f"it is {value!r:.60}")

    def _number(self, value: Any) -> Any:
        """Return the number that a field holds, also as text: all values of .csv files are texts."""
        found = value
        if isinstance(value, str):
            with suppress(ValueError):
                found = float(value)
        if isinstance(found, bool) or not isinstance(found, Real | Decimal) or found != found:  # NaN
            raise Rejected("field is no number", f"{self.field} is {value!r:.60}, for {self}")
        return found


@dataclass(frozen=True)
class Filters:
    """Rules by which documents are left out; the default ones leave out none."""

    where: tuple[Condition, ...] = ()
    """Conditions that must all hold."""
    min_side: int = 1
    """Pixels that the shorter side of each image file has at least."""
    max_aspect: float = math.inf
    """Ratio of the longer to the shorter side that each image file has at most."""
    caption_length: tuple[int, float] = (0, math.inf)
    """Characters that the texts of a document have together, at least and at most."""

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise InputError(f"smallest side of an image must be 1 or more, got {self.min_side}; give more pixels")
        if not self.max_aspect >= 1:
            raise InputError(f"largest aspect ratio must be 1 or more, got {self.max_aspect}; give a larger number")

    @classmethod
    def parse(
        cls, where: Sequence[str] = (), min_side: int = 1, max_aspect: float = math.inf, caption_length: str = "0:"
    ) -> Self:
        """Return the filters that are written so on a command line; InputError for a malformed one."""
        return cls(tuple(map(Condition.parse, where)), min_side, max_aspect, parse_lengths(caption_length))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of records that the conditions look at, or that hold those."""
        names = ((condition.field, condition.field.partition(".")[0]) for condition in self.where)
        return tuple(dict.fromkeys(chain.from_iterable(names)))

    def describe(self) -> dict[str, Any]:
        """Return the filters that are not the default as JSON; equal filters leave out equal documents."""
        described = {
            "where": list(map(str, self.where)),
            "min_side": self.min_side,
            "max_aspect": self.max_aspect,
            "caption_length": [None if bound == math.inf else bound for bound in self.caption_length],
        }
        return {name: value for name, value in described.items() if getattr(self, name) != getattr(Filters, name)}

    def rejection(self, document: SourceDocument) -> Rejected | None:
        """Return why a document is left out by its record or its texts; None if it is not."""
        try:
            for condition in self.where:
                condition.check(document.fields)
            if self.caption_length != Filters.caption_length:
                self._check_length(sum(len(part) for part in document.parts if isinstance(part, str)))
        except Rejected as rejected:
            return rejected.at(document.where)
        return None

    def check_size(self, width: int, height: int) -> None:
        """Raise Rejected for an image that is left out by its size in pixels."""
        shorter, longer = sorted((width, height))
        if shorter < self.min_side:
            raise Rejected("image too small", f"{width} x {height} pixels have a side below {self.min_side}")
        if longer > self.max_aspect * shorter:
            raise Rejected("aspect ratio too large", f"{width} x {height} pixels are above {self.max_aspect:g} to 1")

    def _check_length(self, length: int) -> None:
        least, most = self.caption_length
        if length < least:
            raise Rejected("caption too short", f"{length} characters are fewer than {least}")
        if length > most:
            raise Rejected("caption too long", f"{length} characters are more than {most}")


def parse_lengths(text: str) -> tuple[int, float]:
    """Return the bounds `MIN:MAX`, of which one may be missing; raise InputError for anything else."""
    found = _LENGTHS.fullmatch(text)
    least, most = (int(found[1] or 0), float(found[2] or "inf")) if found else (1, 0.0)
    if text == ":" or least > most:
        raise InputError(f"caption length must be MIN:MAX characters, got {text!r}; give such as 10:300, 10: or :300")
    return least, most
