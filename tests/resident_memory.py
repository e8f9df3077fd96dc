"""The resident memory of a process, and of the saves of a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def resident_memory(field: str) -> int:
    """Return VmRSS, the resident memory of this process, or VmHWM, its peak since it was reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def report_memory_of_saves() -> None:
    """Print by how much the resident memory grew in each save, and the bytes of what this rank saved."""
    from transfusion_fast.training import ranks
    from transfusion_fast.training.checkpoint import Checkpoints

    ranks.keep_freed_memory = lambda: None  # which would hide what a save takes
    save, finish = Checkpoints.save, Checkpoints.finish

    def measured_save(self: Checkpoints, *arguments: Any) -> None:
        finish(self)
        reset_peak_memory()
        self.before = resident_memory("VmRSS")
        save(self, *arguments)

    def measured_finish(self: Checkpoints) -> None:
        saved = self._save
        finish(self)
        if saved is not None:
            share = saved.measured.result()[0]
            print(f"memory: {resident_memory('VmHWM') - self.before} {share}", flush=True)

    Checkpoints.save, Checkpoints.finish = measured_save, measured_finish
