"""A profile of chosen steps: RUN/profile/rank-00000.trace.json for Perfetto or chrome://tracing, and memory on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.terminal import say

_MAX_EVENTS = 1_000_000  # of the memory snapshot: some 100 MB


class StepProfiler:
    """A profiler of a range of steps, first to last, on every rank. Without a range it records nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, ranks: Ranks):
        self.first, self.last = steps or (0, -1)
        self.folder, self.ranks, self.cuda = folder, ranks, ranks.device.type == "cuda"
        self.profile: profile | None = None
        if steps:  # now, since an error at the end would cost the recorded steps
            ranks.together(lambda: folder.mkdir(exist_ok=True))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the step that is taken within, if it is one of the chosen."""
        if not self.first <= number <= self.last:
            yield
            return
        if self.profile is None:
            self._start()
        with record_function(f"step {number}"):
            yield
        if number == self.last:
            self.close()

    def _start(self) -> None:
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.profile = profile(activities=activities)
        self.profile.start()

    def close(self) -> None:
        """Write what was recorded, if anything; a run that stops before the last chosen step calls this."""
        if self.profile is None:
            return
        self.profile.stop()
        name = f"rank-{self.ranks.rank:05d}"
        self.profile.export_chrome_trace(str(self.folder / f"{name}.trace.json"))
        self.profile = None
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.ranks.is_main:
            say(f"profile: {self.folder}")
