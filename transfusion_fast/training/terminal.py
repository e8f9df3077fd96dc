"""The progress of a run for people: a live line on a terminal, a line for each row elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from transfusion_fast.training.metrics import Logger, Row, ValidationRow


def say(text: str) -> None:
    """Print a line, above the live line if there is one."""
    with tqdm.external_write_mode(sys.stdout):
        print(text, flush=True)


class Terminal(Logger):
    """One line that is rewritten in place on a terminal, and a new line for each row otherwise."""

    def __init__(self, steps: int, first_step: int):
        self.steps, self.last, self.seconds_per_step = steps, (first_step, time.time()), 0.0
        self.row: Row | None = None
        # disable=None: off where the output is not a terminal.
        self.bar = tqdm(total=steps, initial=first_step, bar_format="{desc}", file=sys.stdout, disable=None)

    def step(self, step: int) -> None:
        """Show the step and the time left beside the numbers of the last row, a few times a second at most."""
        if not self.bar.disable:
            self.bar.set_description_str(self._line(step), refresh=False)
            self.bar.update()

    def log(self, row: Row) -> None:
        step, then = self.last
        self.seconds_per_step = (row.time - then) / max(1, row.step - step)
        self.row, self.last = row, (row.step, row.time)
        if self.bar.disable:
            print(self._line(row.step), flush=True)
        else:
            self.bar.set_description_str(self._line(row.step))

    def validation(self, row: ValidationRow) -> None:
        losses = f"text {row.text_loss:.4f}  diffusion {row.diffusion_loss:.4f}"
        say(f"step {row.step}, held-out packs: {losses}  ({row.seconds:.1f} s)")

    def image(self, name: str, path: Path, step: int) -> None:
        say(f"step {step}, {name}: {path}")

    def close(self) -> None:
        self.bar.close()

    def _line(self, step: int) -> str:
        """Return as much of the line as fits on a terminal, all of it elsewhere."""
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        if self.row is not None:
            parts += [f"left {tqdm.format_interval(self.seconds_per_step * (self.steps - step))}", *describe(self.row)]
        while not self.bar.disable and len("  ".join(parts)) >= shutil.get_terminal_size().columns and len(parts) > 1:
            parts.pop()
        return "  ".join(parts)


def describe(row: Row) -> list[str]:
    """Return the numbers of a row for people, the most important ones first."""
    size, several = tqdm.format_sizeof, row.tokens_per_second_per_device < row.tokens_per_second
    each = f" ({size(row.tokens_per_second_per_device)} each)" if several else ""
    parts = [
        f"text {row.text_loss:.4f}",
        f"diffusion {row.diffusion_loss:.4f}",
        f"skipped {row.skipped_steps}" if row.skipped_steps else "",
        f"quarantined {row.quarantined}" if row.quarantined else "",
        f"norm {row.grad_norm:.2f}",
        f"lr {row.lr:.2e}",
        f"{size(row.tokens_per_second)} tokens/s{each}",
        f"{size(row.images_per_second)} images/s",
        f"MFU {row.mfu:.1%}" if row.mfu is not None else "",
        f"data wait {row.data_wait:.1%}",
        f"{row.peak_memory_gb:.1f} GB",
    ]
    return [part for part in parts if part]
