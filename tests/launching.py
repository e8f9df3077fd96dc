"""Runs of train/pretrain.py in processes of their own, small enough to take seconds."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfusion_fast.config import Config
from transfusion_fast.config_reading import load_config
from transfusion_fast.data.pack import Document, ImageSegment, TextSegment
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.examples.digits import MODALITY
from transfusion_fast.training.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "train" / "pretrain.py"
DEFAULT_CONFIG = ROOT / "train" / "configs" / "digits.yaml"
SMALL = (
    "model.transformer={dim: 32, depth: 2, heads: 2, ffn_dim: 64}",
    "optimizer={lr: 0.003, warmup_steps: 2}",
    "train={seed: 3, precision: fp32, cpu_threads: 1, steps: 6, global_batch: 4, micro_batch: 1, log_every: 1, "
    "checkpoint_every: 2, keep_checkpoints: 5, heartbeat: 30}",
)

Setup = Callable[[], None] | None  # a function of this file, since ranks cannot import those of the tests

# Ranks are forked from a process that has made their imports, which take longer than most of these runs. DeepSpeed
# imports its Muon optimizer, and with it torch.compile, whenever it starts.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["transfusion_fast.training.trainer", "deepspeed.runtime.zero.muon.muon_optimizer"])


def small_config(data: Path | str, *overrides: str) -> Config:
    """Return the config that the ranks of `start` read."""
    return load_config(DEFAULT_CONFIG, [*SMALL, f"data.path={data}", *overrides])


def _become(arguments: Sequence[str], environment: dict[str, str], output: str, setup: Setup) -> None:
    """Run train/pretrain.py in this process, printing to a file."""
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.argv = [str(PRETRAIN), *arguments]
    if setup is not None:
        setup()
    runpy.run_path(str(PRETRAIN), run_name="__main__")


@dataclass
class Launched:
    """The processes of one command, and the file that they print to."""

    processes: list[BaseProcess]
    output: Path

    def wait(self) -> tuple[list[int | None], str]:
        """Return the exit codes, and what was printed."""
        deadline = time.monotonic() + 240
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes, self.output.read_text()

    def wait_for_launcher(self, rank: int) -> int | None:
        """Wait for a rank to end, end the others as DeepSpeed's launcher does, and return its exit code."""
        self.processes[rank].join(240)
        for process in self.processes:
            process.join(2)
            process.kill()
            process.join()
        return self.processes[rank].exitcode

    def signal_when(self, condition: Callable[[], bool], number: int) -> None:
        """Send a signal to all ranks once the condition holds."""
        await_until(lambda: condition() or not all(p.is_alive() for p in self.processes))
        assert all(p.is_alive() for p in self.processes), "the run ended before that point"
        for process in self.processes:
            os.kill(process.pid, number)


def await_until(condition: Callable[[], bool]) -> None:
    """Wait for a run to come to a point, two minutes at most."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the run never came to that point"
        time.sleep(0.01)


def free_port() -> str:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def deepspeed_command(data: Path, output: Path, *overrides: str) -> list[str]:
    """Return `deepspeed --num_gpus 2 train/pretrain.py ...` with the small settings."""
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
    arguments = [*SMALL, f"data.path={data}", f"train.output={output}", *overrides]
    return [*launcher, "--master_port", free_port(), str(PRETRAIN), *arguments]


def start(ranks: int, data: Path | str, output: Path, *overrides: str, setup: Setup = None) -> Launched:
    """Start the ranks of a run, as a launcher would, without waiting for them; `setup` runs in each rank first."""
    descriptor, printed = tempfile.mkstemp(suffix=".printed")
    os.close(descriptor)
    arguments = [*SMALL, f"data.path={data}", f"train.output={output}", *overrides]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
    }
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_FORKSERVER.Process(target=_become, args=(arguments, environment, printed, setup)))
        processes[-1].start()
    return Launched(processes, Path(printed))


def train(ranks: int, data: Path | str, output: Path, *overrides: str, setup: Setup = None) -> str:
    """Run to the end, which must succeed, and return what was printed."""
    codes, printed = start(ranks, data, output, *overrides, setup=setup).wait()
    assert codes == [0] * ranks, printed
    return printed


def refusal(launched: Launched, code: int = 2) -> str:
    """Return the one line that all ranks together print when they end with this exit code."""
    codes, printed = launched.wait()
    lines = [line for line in printed.splitlines() if line.startswith("pretrain: ")]
    assert codes == [code] * len(codes) and len(lines) == 1 and "Traceback" not in printed, printed
    return lines[0]


class OneRank(Ranks):
    """The ranks of a run of one process, without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"), control=None)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [float(number) for number in numbers]

    def max(self, numbers: Sequence[float]) -> list[float]:
        return [float(number) for number in numbers]

    def gather(self, items: list[Any]) -> list[Any]:
        return items

    def barrier(self) -> None:
        pass


def run_in_child() -> None:
    """Leave a rank to a child of this process, which stands for its launcher."""
    if os.fork():
        signal.pause()


def kill_at_event(rank: int, number: int) -> None:
    """Make a rank kill itself just before the given one of the operations that change files of the run."""
    from transfusion_fast.training import stored_slices

    if os.environ["RANK"] != str(rank):
        return
    count = itertools.count(1)

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if torch.distributed.is_initialized() and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, watched)

    for owner, names in ((os, ("mkdir", "fsync", "rename", "replace")), (Path, ("write_text", "write_bytes"))):
        for name in names:
            watch(owner, name)
    watch(shutil, "rmtree")
    watch(stored_slices, "save_file")


def fail_to_save_on_rank_1() -> None:
    """Make the thread that writes the checkpoints of rank 1 fail as no disk would."""
    from transfusion_fast.training import checkpoint

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of a library")

    if os.environ["RANK"] == "1":
        checkpoint.write_slices = fail


def become_the_second_node() -> None:
    """Set what the first rank of a second node is given, with an address that leads to itself."""
    os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="localhost")


def use_port(port: str) -> None:
    """Let the ranks meet at a port."""
    os.environ["MASTER_PORT"] = port


def without_compiling() -> None:
    """Run what DeepSpeed compiles as it is, since its compilation would take most of a minute."""
    torch.compiler.set_stance("force_eager")


def muon_in_single_precision() -> None:
    """Let Muon orthogonalise in fp32 also where the CPU has half precision, where no bound holds; compile nothing."""
    from deepspeed.runtime.zero.muon import original_muon

    without_compiling()
    original_muon.ns_compute_dtype = lambda method="gram": torch.float32


def take_long_in_the_first_step() -> None:
    """Let the first micro-batch take five seconds more, as its compilation would; compile nothing."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    without_compiling()
    forward, calls = DeepSpeedEngine.forward, itertools.count()

    def slow(self: DeepSpeedEngine, *inputs: Any, **options: Any) -> Any:
        time.sleep(0 if next(calls) else 5)
        return forward(self, *inputs, **options)

    DeepSpeedEngine.forward = slow


def stop_at_the_engine() -> None:
    """Send SIGTERM to this process when its engine is made."""
    from transfusion_fast.training import trainer

    make = trainer.make_engine

    def stopping(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*arguments)

    trainer.make_engine = stopping


def spoil_second_backward() -> None:
    """Make the gradient of the second micro-batch NaN."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward, calls = DeepSpeedEngine.backward, itertools.count(1)

    def spoiled(self: DeepSpeedEngine, loss: Any, **options: Any) -> Any:
        return backward(self, loss * (math.nan if next(calls) == 2 else 1), **options)

    DeepSpeedEngine.backward = spoiled


def spoil_part_of_second_step() -> None:
    """Make the gradients of what lies below the last of two blocks NaN in the second step of four micro-batches."""
    from transfusion_fast.model.layers import Block

    without_compiling()
    calls = itertools.count(1)

    def spoil(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Block) and next(calls) == 4 * 2 + 2:
            inputs[0].register_hook(lambda gradient: gradient * math.nan)

    torch.nn.modules.module.register_module_forward_pre_hook(spoil)


def spoil_losses(losses: dict[tuple[int, int], str]) -> None:
    """Make losses NaN, but not their gradients: those of these ranks and micro-batches, counted from 1."""
    from transfusion_fast.model import transfusion

    combine, calls, rank = transfusion.combine, itertools.count(1), int(os.environ["RANK"])

    def spoiled(*arguments: Any, **others: Any) -> Any:
        result = combine(*arguments, **others)
        name = losses.get((rank, next(calls)))
        parts = result._replace(**{name: getattr(result, name) + math.nan}) if name else result
        return parts._replace(total=parts.text + parts.diffusion)

    transfusion.combine = spoiled


def report_averages(losses: dict[tuple[int, int], str]) -> None:
    """Make these losses NaN, and print the number of steps that each average of the weights is told."""
    from transfusion_fast.training import trainer

    spoil_losses(losses)
    update = trainer.update_ema

    def reported(engine: Any, decay: float, step: int) -> None:
        print(f"average of {step} steps", flush=True)
        update(engine, decay, step)

    trainer.update_ema = reported


def fix_what_is_measured() -> None:
    """Make a row cover 2 s, in which rank r waits (1 + r) / 4 s for the data of each step and takes 3 + r GB."""
    from transfusion_fast.training import trainer

    rank, starts = int(os.environ["RANK"]), itertools.count(0, 2)

    class Interval(trainer.Interval):
        def __init__(self) -> None:
            super().__init__(start=next(starts))

        @contextmanager
        def waiting(self) -> Iterator[None]:
            yield
            self.waited += (1 + rank) / 4

    trainer.Interval = Interval
    trainer.peak_memory = lambda device: (3 + rank) * 1e9
    trainer.peak_flops = lambda device, dtype: 1e9


def hide_wandb_from_rank_0() -> None:
    """Make importing wandb fail on rank 0 alone."""
    if os.environ["RANK"] == "0":
        sys.modules["wandb"] = None


MEASURED = (
    "time",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "images_per_second",
    "mfu",
    "data_wait",
    "checkpoint_stall",
    "peak_memory_gb",
)


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the logged rows of a run, without the measured times, which differ."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def state_of(output: Path, step: int) -> dict[str, bytes]:
    """Return the weights and the optimizer's state at a step, as the files of all ranks."""
    files = (output / "checkpoints" / f"step-{step:08d}").glob("rank-*.safetensors")
    return {file.name: file.read_bytes() for file in files}


def assert_same_course(one: list[dict], other: list[dict], relative: float = 1e-5) -> None:
    """Compare the rows of two runs; pytest.approx takes no None."""
    one, other = ([{k: -1.0 if v is None else v for k, v in row.items()} for row in rows] for rows in (one, other))
    assert one and one == [pytest.approx(row, rel=relative) for row in other]


def last_step(output: Path) -> int:
    """Return the last step that a run in progress has logged, 0 before the first."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def write_packs(folder: Path, documents: Sequence[Document], sequence_length: int) -> Path:
    """Prepare documents into a data folder of digit-like images and byte text."""
    prepare(documents, folder, sequence_length=sequence_length, tokenizer=ByteTokenizer(), modalities=(MODALITY,))
    return folder


def text(length: int, seed: int) -> TextSegment:
    return TextSegment(np.random.default_rng(seed).integers(0, 256, length).astype(np.int32))


def picture(seed: int) -> ImageSegment:
    return ImageSegment(np.random.default_rng(seed).integers(0, 256, (8, 8, 1)).astype(np.uint8))
