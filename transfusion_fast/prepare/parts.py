"""One data folder that several machines prepare in parts: each encodes some units, and the last one writes the shards.

All of them share the lock of the staging folder while they encode. A process that finds all units encoded releases it
and waits for the exclusive lock: the first to get it writes the shards, and the others then find the folder finished.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json
from transfusion_fast.prepare import staging
from transfusion_fast.prepare.build import Built, Work, build, finished, one_line_if_full, staged_recipe
from transfusion_fast.prepare.pool import worker_pool
from transfusion_fast.prepare.progress import progress
from transfusion_fast.prepare.recipe import Recipe
from transfusion_fast.prepare.staging import RECIPE, output_and_staging


@dataclass(frozen=True)
class Share:
    """Every `of`-th unit, beginning with unit `number` - 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the share that `I/N` names; InputError if it names none."""
        numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        share = cls(*map(int, numbers.groups())) if numbers else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise InputError(f"--part must be I/N with I in 1..N, got {text!r:.40}; give such as 1/4")
        return share


def build_part(recipe: Recipe, folder: Path, share: Share, processes: int = 1) -> Built | list[int]:
    """Encode a share of the units, and make the data folder if all shares are encoded.

    Returns:
        The data folder, or the numbers of the shares that are missing.

    Raises:
        InputError: as for `build`; or another process runs this share, or the recipe has a limit.
    """
    if recipe.selection.has_limit:
        raise InputError("--limit and --limit-tokens must be given without --part, got both; leave one out")
    folder, partial = output_and_staging(folder)
    with one_line_if_full(partial):
        missing = _encode_share(recipe, folder, partial, share, processes)
    return missing or build(recipe, folder, processes, share.of)


def _encode_share(recipe: Recipe, folder: Path, partial: Path, share: Share, processes: int) -> list[int]:
    """Encode a share; return the numbers of the shares that are still missing.

    The list is also empty if another process finished the folder meanwhile.
    """
    staged = staged_recipe(recipe, share.of)
    while finished(folder, recipe) is None:
        if staging.has_units(partial):
            staging.check_begun(partial, staged)  # before others are waited for
        with suppress(staging.InUseError), staging.locked(partial):  # if others share it, the work has begun
            if finished(folder, recipe) is None:  # another may have finished before the lock was free
                staging.begin_or_resume(partial, staged, recipe.encoder.tokenizer)
        with staging.locked(partial, shared=True, wait=True):
            if finished(folder, recipe) is None and read_json(partial / RECIPE) is not None:
                staging.check_begun(partial, staged)
                return _encode_units(Work(recipe, partial), share, processes)
    return []


def _encode_units(work: Work, share: Share, processes: int) -> list[int]:
    """Encode the units of a share; return the numbers of the shares that are missing."""
    units = list(enumerate(work.recipe.source.units()))
    own = units[share.number - 1 :: share.of]
    with staging.part_locked(work.partial, share.number), worker_pool(work, processes) as each:
        for _ in progress(each(Work.encode, own), "reading", "unit", len(own)):
            pass
    return sorted({number % share.of + 1 for number, _ in units if not work.spool(number).path("json").exists()})
