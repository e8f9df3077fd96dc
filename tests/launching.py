"""Runs of train/pretrain.py as a user starts them, small enough to take seconds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.config import Config, load_config
from transfusion_fast.data.pack import Document, ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.examples.digits import MODALITY

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "train" / "pretrain.py"
DEFAULT_CONFIG = ROOT / "train" / "configs" / "digits.yaml"
SMALL = (
    "model.transformer={dim: 32, depth: 2, heads: 2, ffn_dim: 64}",
    "optimizer.lr=0.003",
    "optimizer.warmup_steps=2",
    "train.precision=fp32",
    "train.cpu_threads=1",
    "train.steps=6",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=5",
)


def small_config(data: Path | str, *overrides: str) -> Config:
    """The config that the ranks of `start` read."""
    return load_config(DEFAULT_CONFIG, [*SMALL, f"data.path={data}", *overrides])


@dataclass
class Launched:
    """The ranks of one run."""

    processes: list[subprocess.Popen[str]]

    def wait(self) -> tuple[list[int], str]:
        """Exit codes of all ranks, and what they printed."""
        outputs = [process.communicate(timeout=240)[0] for process in self.processes]
        return [process.returncode for process in self.processes], "".join(outputs)

    def signal_when(self, condition: Callable[[], bool], number: int) -> None:
        """Sends a signal to all ranks once the condition holds."""
        await_until(lambda: condition() or any(p.poll() is not None for p in self.processes))
        assert all(p.poll() is None for p in self.processes), "the run ended before that point"
        for process in self.processes:
            process.send_signal(number)


def await_until(condition: Callable[[], bool]) -> None:
    """Waits for a run to come to a point, two minutes at most."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the run never came to that point"
        time.sleep(0.01)


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(ranks: int, data: Path | str, output: Path, *overrides: str) -> Launched:
    """Starts the ranks of a run, as a launcher would, without waiting for them."""
    port = free_port()
    arguments = [*SMALL, f"data.path={data}", f"train.output={output}", *overrides]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return Launched(
        [
            subprocess.Popen(
                [sys.executable, str(PRETRAIN), *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
    )


def train(ranks: int, data: Path | str, output: Path, *overrides: str) -> str:
    """Runs to the end, which must be a good one; returns what was printed."""
    codes, printed = start(ranks, data, output, *overrides).wait()
    assert codes == [0] * ranks, printed
    return printed


def metrics(output: Path) -> list[dict[str, Any]]:
    """The logged rows of a run, without the times, which differ."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def last_step(output: Path) -> int:
    """The last step that a run in progress has logged, 0 before the first."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def write_packs(folder: Path, documents: Sequence[Document], sequence_length: int) -> Path:
    """Prepares documents into a data folder of digit-like images and byte text."""
    prepare(documents, folder, sequence_length=sequence_length, tokenizer=ByteTokenizer(), modalities=(MODALITY,))
    return folder


def text(length: int, seed: int) -> TextSegment:
    return TextSegment(np.random.default_rng(seed).integers(0, 256, length).astype(np.int32))


def picture(seed: int) -> ImageSegment:
    return ImageSegment(np.random.default_rng(seed).integers(0, 256, (8, 8, 1)).astype(np.uint8))
