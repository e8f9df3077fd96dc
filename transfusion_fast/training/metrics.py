"""What a run says of itself: a line for people, a JSON line for programs, both from one row."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One logged step. Losses are those of that step's global batch; rates are since the row before."""

    step: int
    packs: int
    """Consumed since the beginning of training."""
    loss: float
    text_loss: float
    """Cross-entropy per supervised token, in nats."""
    diffusion_loss: float
    """Squared error per image."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_second: float
    """Without padding, over all ranks."""
    skipped_steps: int
    """Since the beginning of training: steps whose gradient was not finite."""
    quarantined: int
    """Since the beginning of training: packs left out because they could not be read."""


class MetricsLog:
    """Appends rows to a JSONL file; rows after the step that a run resumes from are dropped, as it makes them anew."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
            staged = path.with_suffix(".tmp")
            staged.write_text("".join(f"{line}\n" for line in lines))
            os.replace(staged, path)

    def write(self, row: Row) -> None:
        """Adds one row; what is not finite is null, as JSON has no word for it."""
        finite = {k: v if math.isfinite(v) else None for k, v in asdict(row).items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a row torn by a kill


class Clock:
    """Seconds and tokens between logged rows, and the time left."""

    def __init__(self, steps: int):
        self.steps = steps
        self.tokens = 0
        self.since = time.perf_counter()
        self.steps_since = 0

    def add(self, tokens: float) -> None:
        """Counts a finished step."""
        self.tokens += int(tokens)
        self.steps_since += 1

    def lap(self) -> tuple[float, float]:
        """(tokens/s, seconds/step) since the last lap."""
        now = time.perf_counter()
        elapsed, steps, tokens = now - self.since, max(1, self.steps_since), self.tokens
        self.since, self.steps_since, self.tokens = now, 0, 0
        return tokens / elapsed, elapsed / steps


def progress_line(row: Row, steps: int, seconds_per_step: float) -> str:
    """The row for people."""
    left = int(seconds_per_step * (steps - row.step))
    skipped = f"  skipped {row.skipped_steps}" if row.skipped_steps else ""
    skipped += f"  quarantined {row.quarantined}" if row.quarantined else ""
    return (
        f"step {row.step:>{len(str(steps))}}/{steps}  loss {row.loss:.4f}  text {row.text_loss:.4f}  "
        f"diffusion {row.diffusion_loss:.4f}  {row.tokens_per_second:,.0f} tokens/s  lr {row.lr:.2e}  "
        f"norm {row.grad_norm:.2f}{skipped}  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )
