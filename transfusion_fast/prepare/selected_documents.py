"""The spooled documents of all units that go into a folder, and the remarks on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.selection import Selection
from transfusion_fast.prepare.spool import Counts, Spool, remark_line

_NUMBER_BITS = 32  # an id is the unit's number, and in the lower bits the document's


class FinishedUnits:
    """The counts of the units that are finished, from the first one on without a gap, up to the limit."""

    def __init__(self, selection: Selection) -> None:
        self.counts: list[Counts] = []
        self._selection, self._others = selection, dict[int, Counts]()
        self._documents = self._tokens = 0

    def add(self, unit: int, counts: Counts) -> None:
        """Add a unit that is finished."""
        self._others[unit] = counts
        while not self.has_enough and (own := self._others.pop(len(self.counts), None)):
            self.counts.append(own)
            self._documents, self._tokens = self._documents + own.sources, self._tokens + own.tokens

    @property
    def has_enough(self) -> bool:
        """True if no further unit is needed."""
        return self._selection.is_enough(self._documents, self._tokens)


@dataclass(frozen=True)
class SelectedDocuments:
    """The documents that a selection leaves of these units."""

    selection: Selection
    spool: Callable[[int], Spool]
    counts: Sequence[Counts]
    """Those of each unit."""

    @cached_property
    def stopped_at(self) -> int | None:
        """Number of source documents of the last unit up to the limit; None if no limit was reached."""
        selection, last = self.selection, len(self.counts) - 1
        totals = [sum(own.sources for own in self.counts), sum(own.tokens for own in self.counts)]
        if not selection.is_enough(*totals):
            return None
        ends = self.spool(last).sources["end"]
        tokens = np.cumsum(self.spool(last).lengths)[ends - 1] + totals[1] - self.counts[last].tokens
        fitting = ends.size
        if selection.limit is not None:
            fitting = min(fitting, selection.limit - totals[0] + self.counts[last].sources)
        if selection.limit_tokens is not None:
            fitting = min(fitting, int(np.searchsorted(tokens, selection.limit_tokens, "right")))
        return fitting

    def _sources(self, unit: int) -> np.ndarray:
        """Return the rows of a unit's source documents up to the limit; none if they have no marks."""
        return self.spool(unit).sources[: self.stopped_at if unit == len(self.counts) - 1 else None]

    @cached_property
    def _duplicates(self) -> list[np.ndarray]:
        """For each unit, whether a source document equals an earlier one, bool [n].

        All keys are in memory at a time, 16 bytes each; sorting them takes about 20 bytes more per key.
        """
        counts = [len(self._sources(unit)) for unit in range(len(self.counts))]
        ends = np.cumsum(counts)
        if self.selection.dedup is None:
            found = np.zeros(sum(counts), bool)
        else:
            keys, has_key = np.empty((2, sum(counts)), np.uint64), np.empty(sum(counts), bool)
            for unit, (end, count) in enumerate(zip(ends, counts, strict=True)):
                sources = self._sources(unit)
                keys[:, end - count : end], has_key[end - count : end] = sources["key"].T, sources["has_key"]
            found = repeated(keys) & has_key
        return [found[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def documents(self, unit: int, side: str) -> np.ndarray:
        """Return the numbers of a unit's documents for one side, int64."""
        if self.selection.takes_all:
            return np.arange(self.counts[unit].documents)
        sources = self._sources(unit)
        taken = ~self._duplicates[unit] & (sources["heldout"] == (side == "heldout"))
        return np.flatnonzero(np.repeat(taken, np.diff(sources["end"], prepend=0)))

    @property
    def first(self) -> int | None:
        """Number of source documents up to the limit; None if it was not reached."""
        units = range(len(self.counts))
        return None if self.stopped_at is None else sum(len(self._sources(unit)) for unit in units)

    @property
    def cut(self) -> int:
        """Number of source documents that are used and became several."""
        if self.selection.takes_all:
            return sum(own.cut for own in self.counts)
        pieces = (np.diff(self._sources(unit)["end"], prepend=0) for unit in range(len(self.counts)))
        return sum(int((own[~known] > 1).sum()) for own, known in zip(pieces, self._duplicates, strict=True))

    def ids_and_lengths(self, unit: int, side: str) -> np.ndarray:
        """Return rows (id, length), int64, of a unit's documents for one side."""
        numbers = self.documents(unit, side)
        return np.stack([unit << _NUMBER_BITS | numbers, self.spool(unit).lengths[numbers]], axis=1)

    def totals(self, side: str) -> tuple[int, int]:
        """Return the number of documents for one side, and of the tokens that they take."""
        if self.selection.takes_all:
            return sum(own.documents for own in self.counts), sum(own.tokens for own in self.counts)
        lengths = (self.ids_and_lengths(unit, side)[:, 1] for unit in range(len(self.counts)))
        counts = [(own.size, int(own.sum())) for own in lengths]
        return sum(documents for documents, _ in counts), sum(tokens for _, tokens in counts)

    def remarks(self, kind: str) -> Iterator[bytes]:
        """Yield the remarks of one kind on all units, as lines; behind those of a unit, its duplicates."""
        for unit, duplicates in enumerate(self._duplicates):
            most = None
            if unit == len(self.counts) - 1 and (stopped := self.stopped_at) is not None:
                most = int(self._sources(unit)[kind][-1]) if stopped else 0
            with self.spool(unit).path(kind).open("rb") as lines:
                yield from islice(lines, most)
            if kind == "rejected" and duplicates.any():
                for place in self.spool(unit).places(duplicates):
                    yield remark_line(Rejected(f"duplicate {self.selection.dedup}", place))


def repeated(keys: np.ndarray) -> np.ndarray:
    """Return for each key, a column of uint64 [2, n], whether an earlier one is equal, bool [n]."""
    order = np.lexsort(keys)  # stable
    found = np.zeros(keys.shape[1], bool)
    found[order[1:]] = np.logical_and(*(half[order[1:]] == half[order[:-1]] for half in keys))
    return found


def located(ids: np.ndarray) -> np.ndarray:
    """Return int64 [n, 2], the unit and the number of the document of each id."""
    return np.stack([ids >> _NUMBER_BITS, ids & (1 << _NUMBER_BITS) - 1], axis=1)
