"""The one exception that a user's input raises, and that a command line prints as one line."""

from __future__ import annotations


class InputError(ValueError):
    """What a user gave cannot be used: the message says what, the value got, the rule, and what to do."""


class Rejected(ValueError):
    """A document that cannot be used. `reason` is one of a few, for counting; the message is for the reader."""

    def __init__(self, reason: str, detail: str) -> None:
        # Names in archives and messages of libraries reach the terminal, and must not forge lines on it.
        self.reason, self.detail = reason, _printable(detail)
        super().__init__(f"{reason}: {self.detail}")

    def at(self, where: str) -> Rejected:
        """Return this rejection with the place of the document."""
        return Rejected(self.reason, f"{self.detail}, {where}" if self.detail else where)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
