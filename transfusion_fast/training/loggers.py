"""The loggers of a run: its file of rows, the terminal, and TensorBoard and Weights & Biases where settings ask for it.

The last two are conveniences. When one of them fails, it is turned off with a warning, and training goes on.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transfusion_fast.config import Config
from transfusion_fast.errors import optional_module
from transfusion_fast.files import write_atomically
from transfusion_fast.training.metrics import Logger, MetricsLog, Row, ValidationRow
from transfusion_fast.training.terminal import Terminal, say

_PATIENCE = 60  # seconds that Weights & Biases may hold the run at its start, and again at its end


def check_packages(config: Config) -> None:
    """Raise InputError if a logger that settings ask for is not installed."""
    if config.train.tensorboard:
        optional_module("tensorboard", "tensorboard")
    if config.train.wandb is not None:
        optional_module("wandb", "wandb")


def make_loggers(config: Config, folder: Path, first_step: int) -> list[Logger]:
    """Return the loggers of a run that goes on after `first_step`."""
    loggers: list[Logger] = [
        MetricsLog(folder, first_step),
        Terminal(config.train.steps, first_step),
    ]
    if config.train.tensorboard:
        loggers.append(Expendable("train.tensorboard", lambda: TensorBoard(folder / "tensorboard", first_step)))
    if config.train.wandb is not None:
        loggers.append(Expendable("train.wandb", lambda: WeightsAndBiases(config, folder)))
    return loggers


class Expendable(Logger):
    """A logger that an exception turns off, with one line."""

    def __init__(self, setting: str, make: Callable[[], Logger]):
        self.setting, self.logger = setting, Logger()
        made: list[Logger] = []
        self._attempt(lambda: made.append(make()))
        self.logger = made[0] if made else self.logger

    def step(self, step: int) -> None:
        self._attempt(lambda: self.logger.step(step))

    def log(self, row: Row) -> None:
        self._attempt(lambda: self.logger.log(row))

    def validation(self, row: ValidationRow) -> None:
        self._attempt(lambda: self.logger.validation(row))

    def image(self, name: str, path: Path, step: int) -> None:
        self._attempt(lambda: self.logger.image(name, path, step))

    def close(self) -> None:
        self._attempt(lambda: self.logger.close())

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (a network or a full quota must not end a run)
            self.logger = Logger()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"warning: {self.setting} failed ({reason:.200}); it is off until the run is started again")


class TensorBoard(Logger):
    """TensorBoard's event files. Those of a resumed run hide the steps that it repeats."""

    def __init__(self, folder: Path, first_step: int):
        writer = optional_module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.writer = writer(str(folder), purge_step=first_step + 1, flush_secs=30)

    def log(self, row: Row) -> None:
        for name, number in numbers(row).items():
            self.writer.add_scalar(f"train/{name}", number, row.step, row.time)

    def validation(self, row: ValidationRow) -> None:
        for name, number in numbers(row).items():
            self.writer.add_scalar(f"heldout/{name}", number, row.step)

    def image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Logger):
    """A run of Weights & Biases, whose id the run folder keeps. It ignores the steps that a resumed run repeats."""

    def __init__(self, config: Config, folder: Path):
        self.wandb, file = optional_module("wandb", "wandb"), folder / "wandb.id"
        if not file.exists():
            write_atomically(file, uuid.uuid4().hex[:8])
        # A prompt for a login waits for ever by default. It does not obey the settings of a run.
        self.wandb.setup(self.wandb.Settings(login_timeout=_PATIENCE))
        self.run = self.wandb.init(
            project=config.train.wandb,
            id=file.read_text().strip(),
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings={
                "console": "off",  # capturing the output would disturb the live line
                # Without a limit, uploads over a broken connection would hold the end of the run for ever.
                "init_timeout": _PATIENCE,
                "finish_timeout": _PATIENCE,
                "finish_timeout_raises": True,
            },
        )

    def log(self, row: Row) -> None:
        self.run.log({f"train/{name}": number for name, number in numbers(row).items()}, step=row.step)

    def validation(self, row: ValidationRow) -> None:
        self.run.log({f"heldout/{name}": number for name, number in numbers(row).items()}, step=row.step)

    def image(self, name: str, path: Path, step: int) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def numbers(row: Row | ValidationRow) -> dict[str, float]:
    """Return what there is to draw against the step."""
    return {name: x for name, x in asdict(row).items() if x is not None and name not in ("step", "time")}
