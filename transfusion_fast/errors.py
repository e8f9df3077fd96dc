"""Exceptions that report a user's mistakes; a command line prints them as one line."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Self

EXIT_STOPPED = 5
"""Exit code of a training run that was asked to stop before its end, and can be resumed."""
EXIT_LOST_RANK = 6
"""Exit code of a training run of which one rank no longer answers."""


class InputError(ValueError):
    """Unusable input. The message names the thing, its rule, the value found, and a remedy."""

    exit_code = 2


class DataError(InputError):
    """Data that cannot be read while training."""

    exit_code = 3


class DivergedError(InputError):
    """Training whose gradients are not finite."""

    exit_code = 4


class NodeError(InputError):
    """A node that is not set up for the run; the others may be."""


class Remark(ValueError):
    """A remark on a part of a source. Reports count remarks by their `reason`; the message is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        # File names in archives and messages of libraries reach the terminal, and must not forge lines there.
        self.reason, self.detail = reason, _escape(detail)
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.reason, self.detail)

    def at(self, where: str) -> Self:
        """Return the same remark with the document's location added."""
        return type(self)(self.reason, f"{self.detail}, {where}" if self.detail else where)


class Rejected(Remark):
    """A document or a file that cannot be used."""


class Repaired(Remark):
    """A fault in a document that is used all the same. It is passed on and never raised."""


def _escape(text: str) -> str:
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
