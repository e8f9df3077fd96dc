"""The spooled documents of all units that go into a folder, and the remarks on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from transfusion_fast.prepare.selection import Selection
from transfusion_fast.prepare.spool import Counts, Spool

_NUMBER_BITS = 32  # a name is the unit's number, and in the lower bits the document's


@dataclass(frozen=True)
class Chosen:
    """The documents that a selection leaves of these units."""

    selection: Selection
    spool: Callable[[int], Spool]
    counts: Sequence[Counts]
    """Those of each unit."""

    def documents(self, unit: int, side: str) -> np.ndarray:
        """Return the numbers of a unit's documents for one side, int64."""
        if self.selection.takes_all:
            return np.arange(self.counts[unit].documents)
        sources = self.spool(unit).sources
        taken = sources["heldout"] == (side == "heldout")
        return np.flatnonzero(np.repeat(taken, np.diff(sources["end"], prepend=0)))

    def named(self, unit: int, side: str) -> np.ndarray:
        """Return rows (name, length), int64, of a unit's documents for one side."""
        numbers = self.documents(unit, side)
        return np.stack([unit << _NUMBER_BITS | numbers, self.spool(unit).lengths[numbers]], axis=1)

    def totals(self, side: str) -> tuple[int, int]:
        """Return the number of documents for one side, and of the tokens that they take."""
        if self.selection.takes_all:
            return sum(own.documents for own in self.counts), sum(own.tokens for own in self.counts)
        lengths = (self.named(unit, side)[:, 1] for unit in range(len(self.counts)))
        counts = [(own.size, int(own.sum())) for own in lengths]
        return sum(documents for documents, _ in counts), sum(tokens for _, tokens in counts)

    def remarks(self, kind: str) -> Iterator[bytes]:
        """Yield the remarks of one kind on all units, as lines."""
        for unit in range(len(self.counts)):
            with self.spool(unit).path(kind).open("rb") as lines:
                yield from lines


def located(names: np.ndarray) -> np.ndarray:
    """Return int64 [n, 2], the unit and the number of each of these documents."""
    return np.stack([names >> _NUMBER_BITS, names & (1 << _NUMBER_BITS) - 1], axis=1)
