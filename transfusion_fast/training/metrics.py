"""The metrics of a run: each row becomes a line for people and a JSON line for programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.files import write_atomically


@dataclass(frozen=True)
class Row:
    """The metrics of one logged step. Losses are those of the step's global batch; rates are since the last row."""

    step: int
    packs: int
    """Packs consumed since the start of training."""
    loss: float
    """Weighted sum of the two losses below."""
    text_loss: float
    """Cross-entropy per supervised token, in nats."""
    diffusion_loss: float
    """Squared error per image."""
    lr: float
    grad_norm: float
    """Global norm of the gradient before clipping."""
    tokens_per_second: float
    """Tokens without padding, over all ranks."""
    checkpoint_stall: float
    """Fraction of the time since the last row that training waited for checkpoints."""
    skipped_steps: int
    """Steps without a finite gradient since the start of training."""
    quarantined: int
    """Unreadable packs left out since the start of training."""


METRICS = "metrics.jsonl"
"""File of a run folder that holds a row in each line."""


def read_rows(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Return the intact rows up to a step; a run that was killed leaves an incomplete one."""
    rows = map(_row, path.read_bytes().splitlines())
    return [row for row in rows if row and row["step"] <= last_step]


class MetricsLog:
    """A JSONL file of rows. Rows after the step that a run resumes from are dropped, since the run repeats them.

    A file with anything else than rows, but for an incomplete last one, is kept under another name.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        if not path.exists():
            return
        rows = read_rows(path, first_step)
        if None in map(_row, path.read_bytes().splitlines()[:-1]):
            damaged = path.with_suffix(f".damaged-{time.time_ns()}.jsonl")
            path.rename(damaged)
            print(f"{path}: is damaged; it is now {damaged.name}, and its intact rows are kept", flush=True)
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows))

    def write(self, row: Any) -> None:
        """Append a row, a dataclass; numbers that are not finite become null, since JSON cannot express them."""
        finite = {k: v if math.isfinite(v) else None for k, v in asdict(row).items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line, None if there is none."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


class Clock:
    """A counter of tokens, steps and seconds between logged rows."""

    def __init__(self) -> None:
        self.tokens, self.steps, self.stalled, self.start = 0, 0, 0.0, time.perf_counter()

    def add(self, tokens: float) -> None:
        """Count a finished step."""
        self.tokens += int(tokens)
        self.steps += 1

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out the seconds within, which are not those of training."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Count the seconds within as time that training waited."""
        start = time.perf_counter()
        yield
        self.stalled += time.perf_counter() - start

    def lap(self) -> tuple[float, float, float]:
        """Return tokens per second, seconds per step and the fraction stalled since the last lap; start a new one."""
        elapsed = time.perf_counter() - self.start
        rates = self.tokens / elapsed, elapsed / max(1, self.steps), self.stalled / elapsed
        self.tokens, self.steps, self.stalled, self.start = 0, 0, 0.0, self.start + elapsed
        return rates


def progress_line(row: Row, steps: int, seconds_per_step: float) -> str:
    """Return a row as a line for people, with the time left of a run of `steps` steps."""
    left = int(seconds_per_step * (steps - row.step))
    skipped = f"  skipped {row.skipped_steps}" if row.skipped_steps else ""
    quarantined = f"  quarantined {row.quarantined}" if row.quarantined else ""
    return (
        f"step {row.step:>{len(str(steps))}}/{steps}  loss {row.loss:.4f}  text {row.text_loss:.4f}  "
        f"diffusion {row.diffusion_loss:.4f}  {row.tokens_per_second:,.0f} tokens/s  lr {row.lr:.2e}  "
        f"norm {row.grad_norm:.2f}{skipped}{quarantined}  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )
