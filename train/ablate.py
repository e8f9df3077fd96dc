"""Compare settings by short runs, unattended, and tabulate which of the papers' findings they show.

    python train/ablate.py [NAME ...] [--seeds 2] [--hours 5] [--steps 300] [--jobs CORES] [--out runs/ablations]

A run is train/prepare.py, `deepspeed train/pretrain.py` and train/evaluate.py, on one rank and one core. A variant
whose steps take more than 1.1 times the baseline's is run again with fewer steps, which take as long as the
baseline's. The same command resumes after an interruption at any moment: it goes on with the runs in progress, and
repeats none that has finished with the same settings. A run that failed does not stop the others, and is tried again
by the next command. At its end, also when it is cut off, it writes OUT/ablations.md, .csv and .png, of the named
comparisons and the others that have been run; with --hours 0 it does nothing else.

Exit status: 0 if all runs are finished, 1 if one failed, 2 for bad input, 5 if cut off.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO

import psutil

from transfusion_fast.cpus import usable_cpus
from transfusion_fast.errors import EXIT_STOPPED, InputError, optional_module
from transfusion_fast.training.ablation import Comparison, Run, mean_seconds, write_tables

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train" / "configs" / "digits.yaml"
DATA = {
    "digits": ("digits", "--patch-size", "2"),
    "interleaved": ("digits", "--patch-size", "2", "--interleaved"),
    "digits4": ("digits", "--patch-size", "4"),
    "fashion7": ("fashion-mnist", "--patch-size", "7", "--seq-len", "512"),
    "fashion14": ("fashion-mnist", "--patch-size", "14", "--seq-len", "512"),
}
"""Arguments of train/prepare.py, but for the folder."""
EVALUATED_ON = {"interleaved": "digits"}
"""The data of evaluation where it is not that of training: there each image is drawn after its word alone."""
SETTINGS = (
    "train.sample_every=0", "train.checkpoint_every=50", "train.keep_checkpoints=1", "train.precision=fp32",
    "train.cpu_threads=1",
)  # fmt: skip
EVALUATION = ("--each", "20", "--steps", "25", "--eta", "1.5")
SLOWER = 1.1  # times the baseline's seconds per step from which on a variant is run for equal time too
GRACE = 120  # seconds that a command gets to save and stop
ERROR = re.compile(r"(\[rank\d+\]: )?((prepare|pretrain|evaluate): |[\w.]*(Error|Exception)\b)")

TRANSFUSION, JIT = "arXiv 2408.11039", "arXiv 2511.13720"
CLEAN = "arXiv 2505.14683; copies: 2406.11838"
CAPTIONS, FRECHET = "caption_accuracy", "frechet_distance"
CONTEXTS = {
    "clean, 1 copy": ("better", "data.context=clean"),
    "clean, 4 copies": ("better", "data.context=clean data.copies=4"),
}
X0 = "model.diffusion.prediction=x0 model.diffusion.loss=velocity"
CAUSAL = {"causal": ("worse", "model.image_attention=causal")}
NOISE_CAP = {"none": ("worse", "data.noise_cap=1000")}
ADALN = {"adaLN-zero": ("better", "model.transformer.conditioning=adaln")}
SEPARATE = {"separate": ("better", "model.transformer.modality_weights=separate")}
COMPARISONS = (
    Comparison("attention", TRANSFUSION, FRECHET, "bidirectional", CAUSAL),
    Comparison("codec", TRANSFUSION, FRECHET, "linear", {"U-Net": ("better", "model.codec=unet")}),
    Comparison("noise-cap", TRANSFUSION, CAPTIONS, "t = 500", NOISE_CAP),
    Comparison("context", CLEAN, CAPTIONS, "noised", CONTEXTS),
    Comparison("interleaved", CLEAN, FRECHET, "noised", CONTEXTS, "interleaved"),
    Comparison("process", "arXiv 2403.03206", FRECHET, "DDPM", {"flow": ("better", "model.diffusion.process=flow")}),
    Comparison("4-values", JIT, FRECHET, "eps", {"x0": ("equal", X0)}),
    Comparison("16-values", JIT, FRECHET, "eps", {"x0": ("equal", X0)}, "digits4"),
    Comparison("49-values", JIT, FRECHET, "eps", {"x0": ("equal", X0)}, "fashion7"),
    Comparison("196-values", JIT, FRECHET, "eps", {"x0": ("better", X0)}, "fashion14"),
    Comparison("timesteps", "arXiv 2212.09748", FRECHET, "added", ADALN),
    Comparison("weights", "arXiv 2411.04996", "diffusion_loss", "shared", SEPARATE),
    Comparison("optimizer", "arXiv 2502.16982", "text_loss", "AdamW", {"Muon": ("better", "optimizer.name=muon")}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="comparisons to run (default: all of --list)")
    parser.add_argument("--list", action="store_true", help="print the comparisons, their runs and the time left")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=5.0, help="stop after this time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="runs at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        return _ablate(options)
    except (InputError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2


def _ablate(options: argparse.Namespace) -> int:
    known = {comparison.name: comparison for comparison in COMPARISONS}
    if unknown := [name for name in options.names if name not in known]:
        raise InputError(f"NAME must be one of {', '.join(known)}, got {unknown[0]}; correct it")
    if min(options.seeds, options.steps, options.jobs) < 1 or not options.hours >= 0:
        got = f"{options.seeds}, {options.steps}, {options.jobs} and {options.hours}"
        rule = "--seeds, --steps and --jobs must be at least 1 and --hours at least 0"
        raise InputError(f"{rule}, got {got}; correct them")
    harness = Harness(options.out.resolve(), options.steps, options.seeds, options.jobs)
    chosen = [known[name] for name in options.names] or COMPARISONS
    if options.list:
        harness.list(chosen)
        return 0
    if not shutil.which("deepspeed"):
        raise InputError("deepspeed must be on the PATH, got none; activate the environment: . .venv/bin/activate")
    optional_module("matplotlib.figure", "examples")
    return harness.work(chosen, 3600 * options.hours)


class Harness:
    """The runs in a folder, some at a time."""

    def __init__(self, out: Path, steps: int, seeds: int, jobs: int) -> None:
        self.out, self.steps, self.seeds, self.jobs, self.end = out, steps, seeds, jobs, 0.0
        self.preparing = threading.Lock()

    def run(self, data: str, settings: str, seed: int) -> Run:
        """Return a run, whose name has a hash of all that the result depends on but for the code."""
        parts = [CONFIG.read_text(), *DATA[data], *SETTINGS, *EVALUATION, str(self.steps), settings]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:6]
        changed = [setting.rpartition(".")[2] for setting in settings.split()]
        name = "-".join([data, *changed, digest, f"seed{seed}"])
        return Run(self.out / "runs" / name, data, settings, seed)

    def with_equal_time(self, comparison: Comparison) -> Comparison:
        """Return a comparison with a further variant for each slow one: as many steps as take the baseline's time."""

        def seconds(settings: str) -> float | None:
            found = [run.row()["step_seconds"] for run in self._seeds(comparison.data, settings)]
            return None if None in found else min(found)

        variants, baseline = dict(comparison.variants), seconds("")
        for label, (claim, settings) in comparison.variants.items():
            own = seconds(settings)
            if baseline and own and own > SLOWER * baseline:
                steps = round(self.steps * baseline / own)
                variants[f"{label}, {steps} steps"] = (claim, f"{settings} train.steps={steps}")
        return replace(comparison, variants=variants)

    def _begun(self, comparison: Comparison, equal_steps: Comparison) -> Comparison:
        """Leave out the variants of equal time that no run has begun, as its steps may change while others run."""

        def kept(label: str, settings: str) -> bool:
            return label in equal_steps.variants or any(run.state for run in self._seeds(comparison.data, settings))

        variants = {label: variant for label, variant in comparison.variants.items() if kept(label, variant[1])}
        return replace(comparison, variants=variants)

    def _has_variant(self, comparison: Comparison) -> bool:
        """Return whether a run of a variant has begun, so that the comparison is shown though it was not chosen."""
        variants = [settings for _, settings in comparison.variants.values()]
        return any(run.state for settings in variants for run in self._seeds(comparison.data, settings))

    def _seeds(self, data: str, settings: str) -> list[Run]:
        return [self.run(data, settings, seed) for seed in range(self.seeds)]

    def runs(self, comparisons: Sequence[Comparison]) -> list[Run]:
        """Return the runs of all variants, seed after seed; a run that several comparisons share is listed once."""
        variants = [(c.data, settings) for c in comparisons for settings in c.settings.values()]
        return [self.run(*variant, seed) for seed in range(self.seeds) for variant in dict.fromkeys(variants)]

    def list(self, comparisons: Sequence[Comparison]) -> None:
        """Print a line for each comparison, and the time that the runs need."""
        comparisons = [self.with_equal_time(comparison) for comparison in comparisons]
        for comparison in comparisons:
            own = self.runs([comparison])
            done = f"{sum(run.finished for run in own)} of {len(own)} runs finished"
            print(f"{comparison.name:12} {comparison.paper}  {done}: {', '.join(comparison.settings)}")
        runs = self.runs(comparisons)
        left, seconds = sum(not run.finished for run in runs), mean_seconds(runs)
        known = seconds is not None
        hours = f"{left * seconds / self.jobs / 3600:.1f} hours" if known else "unknown, as none is finished"
        print(f"{left} of {len(runs)} runs are left, as comparisons share runs; time: {hours}")

    def work(self, chosen: Sequence[Comparison], seconds: float) -> int:
        """Take each run to its end, until the time is over, and write the tables; return the exit code."""
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # commands inherit the lock, so one whose harness was killed holds it too
                print(f"{self.out}: another process works here; waiting for its end", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.end = time.monotonic() + seconds
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    signal.signal(number, self._stop)
            equal_steps = self.runs(chosen)
            self._finish(equal_steps, lock)
            runs = self.runs([self.with_equal_time(comparison) for comparison in chosen])
            self._finish([run for run in runs if run not in equal_steps], lock)
            shown = [comparison for comparison in COMPARISONS if comparison in chosen or self._has_variant(comparison)]
            compared = [self._begun(self.with_equal_time(comparison), comparison) for comparison in shown]
            variants = [(c, label, settings) for c in compared for label, settings in c.settings.items()]
            rows = {(c.name, label): [run.row() for run in self._seeds(c.data, own)] for c, label, own in variants}
            write_tables(self.out, compared, rows)
        failed, left = (sum(found) for found in zip(*(("error" in r.state, not r.finished) for r in runs), strict=True))
        print(f"{len(runs) - left} of {len(runs)} runs are finished, {failed} failed: {self.out / 'ablations.md'}")
        return 1 if failed else EXIT_STOPPED if left else 0

    def _finish(self, runs: Sequence[Run], lock: IO[str]) -> None:
        """Take those of the runs to their end for which there is time."""

        def finish(number: int, run: Run) -> None:
            left = self.end - time.monotonic()
            if left > (mean_seconds(runs) or 0):
                print(f"run {number} of {len(runs)}, {left / 3600:.1f} hours left: {run.folder.name}", flush=True)
                self.execute(run, lock)

        with ThreadPoolExecutor(self.jobs) as pool:
            unfinished = [(number, run) for number, run in enumerate(runs, 1) if not run.finished]
            for future in [pool.submit(finish, *one) for one in unfinished]:
                future.result()

    def _stop(self, number: int, _: object) -> None:
        """End the time that is left. An exception here could leave a lock of `subprocess` held."""
        self.end = 0.0

    def execute(self, run: Run, lock: IO[str]) -> None:
        """Run the commands of a run, with their output in its log, and record how they ended."""
        with run.attempt(_revision()) as state, run.log.open("a") as log:
            begin = log.tell()
            for words in self.commands(run):
                shared = self.preparing if words[1].endswith("prepare.py") else nullcontext()
                with shared:  # runs have data in common
                    code = self._run(words, log, lock)
                if code:
                    state["error"] = _last_error(run.log, begin) or f"exit status {code}"
                    print(f"failed: {state['error']}", flush=True)
                if code != 0:
                    return
            state["finished"] = True

    def _run(self, words: list[str], log: IO[str], lock: IO[str]) -> int | None:
        """Run a command; return its exit code, or None if the time was over, when it has saved and stopped."""
        inherited = {"pass_fds": [lock.fileno()], "start_new_session": True}
        one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, cwd=ROOT, env=one_core, stdout=log, stderr=subprocess.STDOUT, **inherited)
        while process.poll() is None:
            if time.monotonic() > self.end:  # stop all of its processes; ranks may outlive their launcher
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                os.killpg(process.pid, signal.SIGTERM)
                for one in psutil.wait_procs(family, timeout=GRACE)[1]:
                    one.kill()
                return None
            time.sleep(0.05)
        return process.returncode

    def commands(self, run: Run) -> list[list[str]]:
        """Return the commands of a run; one that has ended does nothing when it is repeated."""
        tested, folder, train = EVALUATED_ON.get(run.data, run.data), self.out / "data", ROOT / "train"
        with socket.socket() as free:  # another job may use the launcher's own port
            free.bind(("127.0.0.1", 0))
            launcher = ["deepspeed", "--num_gpus", "1", "--master_port", str(free.getsockname()[1])]
        data = [f"data.{key}={folder / run.data / split}" for key, split in (("path", "train"), ("heldout", "heldout"))]
        steps = [f"train.{key}={self.steps}" for key in ("steps", "validate_every")]
        own = [*run.settings.split(), f"train.seed={run.seed}", f"train.output={run.folder}"]  # the last value counts
        prepared = [
            [f"{train}/prepare.py", *DATA[kind], f"{folder / kind}"] for kind in dict.fromkeys([run.data, tested])
        ]
        evaluated = [f"{train}/evaluate.py", f"{run.folder}", "--data", f"{folder / tested}", *EVALUATION]
        return [
            *([sys.executable, *words] for words in prepared),
            [*launcher, f"{train}/pretrain.py", str(CONFIG), *SETTINGS, *data, *steps, *own],
            [sys.executable, *evaluated],
        ]


def _last_error(log: Path, begin: int) -> str | None:
    """Return the last line since `begin` that reports an error, else the last line."""
    lines = [line.strip() for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1] if lines else None)


def _revision() -> str:
    """Return the revision of the code, with a + where tracked files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
