"""The one exception that a user's input raises, and that a command line prints as one line."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class InputError(ValueError):
    """What a user gave cannot be used: the message says what, the value got, the rule, and what to do."""


class Rejected(ValueError):
    """A document that cannot be used. `reason` is one of a few, for counting; the message is for the reader."""

    def __init__(self, reason: str, detail: str) -> None:
        # Names in archives and messages of libraries reach the terminal, and must not forge lines on it.
        self.reason, self.detail = reason, _printable(detail)
        super().__init__(f"{reason}: {self.detail}")

    def at(self, where: str) -> Rejected:
        """The same, and in which document."""
        return Rejected(self.reason, f"{self.detail}, {where}")


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def optional_module(name: str, extra: str) -> Any:
    """Import a module of a package that only an extra of setup.py installs.

    Raises:
        InputError: the package is missing; the message names the extra.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise InputError(f"package {package} must be installed for this, got none; pip install '.[{extra}]'") from error
