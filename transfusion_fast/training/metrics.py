"""The metrics of a run: a row for each logged step, the interface of what logs them, and the file of rows."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.files import write_atomically


@dataclass(frozen=True)
class Row:
    """The metrics of one logged step. Losses and gradient norm are those of the step's global batch.

    Rates, fractions and the losses by quarter cover the steps since the last row; the first row after training started
    or resumed covers those since then. Its rates and fractions leave out a first step that compiles, unless it is the
    only one. None is null in the file.
    """

    step: int
    packs: int
    """Packs consumed since the start of training."""
    time: float
    """Unix time, in seconds."""
    loss: float
    """Weighted sum of the two losses below."""
    text_loss: float
    """Cross-entropy per supervised token, in nats."""
    diffusion_loss: float
    """Squared error per image."""
    diffusion_loss_q1: float | None
    """Mean squared error of all images with timesteps in (0, 250]; None without such images."""
    diffusion_loss_q2: float | None
    """The same for timesteps in (250, 500]."""
    diffusion_loss_q3: float | None
    """The same for timesteps in (500, 750]."""
    diffusion_loss_q4: float | None
    """The same for timesteps in (750, 1000]."""
    lr: float
    grad_norm: float
    """Global norm of the gradient before clipping."""
    tokens_per_second: float
    """Positions of documents (text, special tokens and patches, no padding), over all ranks."""
    tokens_per_second_per_device: float
    """The same, divided by the number of ranks."""
    images_per_second: float
    """Images, over all ranks."""
    mfu: float | None
    """Model FLOPs utilization: the operations that training needs (flops.py) as a fraction of what all devices could
    do at their peak; None for a device of unknown peak. A CPU's peak is its measured rate of matrix products."""
    padding: float
    """Fraction of positions that belong to no document."""
    data_wait: float
    """Fraction of the time that training waited for data, on the rank that waited longest."""
    checkpoint_stall: float
    """Fraction of the time that training waited for checkpoints, on rank 0."""
    peak_memory_gb: float
    """10^9 bytes on the rank that takes most: the peak of what tensors took on a CUDA device, or the present resident
    set of the process on a CPU."""
    skipped_steps: int
    """Steps without a finite gradient since the start of training."""
    quarantined: int
    """Unreadable packs left out since the start of training."""


@dataclass(frozen=True)
class ValidationRow:
    """The losses of the held-out packs after a step, with the average of the weights."""

    step: int
    loss: float
    text_loss: float
    diffusion_loss: float
    diffusion_loss_q1: float | None
    """The diffusion loss by quarter of the timesteps, as in `Row`; files of older runs lack it."""
    diffusion_loss_q2: float | None
    diffusion_loss_q3: float | None
    diffusion_loss_q4: float | None
    seconds: float
    """Duration of the measurement."""


METRICS = "metrics.jsonl"
"""File of a run folder that holds a `Row` in each line."""
VALIDATION = "validation.jsonl"
"""File of a run folder that holds a `ValidationRow` in each line."""


def read_rows(path: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Return the intact rows up to a step; a run that was killed leaves an incomplete one."""
    rows = map(_row, path.read_bytes().splitlines())
    return [row for row in rows if row and row["step"] <= last_step]


class Logger:
    """What shows or keeps the progress of a run, on rank 0. The methods that a logger does not define do nothing."""

    def step(self, step: int) -> None:
        """Note a finished step, logged or not; this must not wait for the device."""

    def log(self, row: Row) -> None:
        """Take the row of a logged step; steps increase."""

    def validation(self, row: ValidationRow) -> None:
        """Take the losses of held-out packs."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Take a picture, a PNG file, of a step."""

    def close(self) -> None:
        """Finish what is begun; called once, when training ends."""


class MetricsLog(Logger):
    """The files of rows of a run folder."""

    def __init__(self, folder: Path, first_step: int):
        self.rows, self.validation_rows = (_RowFile(folder / name, first_step) for name in (METRICS, VALIDATION))

    def log(self, row: Row) -> None:
        self.rows.append(row)

    def validation(self, row: ValidationRow) -> None:
        self.validation_rows.append(row)


class _RowFile:
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

    def append(self, row: Row | ValidationRow) -> None:
        """Append a row; numbers that are not finite become null, since JSON cannot express them."""
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in asdict(row).items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line, None if there is none."""
    try:
        row = json.loads(line, parse_int=lambda digits: int(np.int64(digits)))  # larger ones fit no picture
        return row if isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
