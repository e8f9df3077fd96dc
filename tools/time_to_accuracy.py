"""Measure the time that the demo trains until it draws digits well, at several revisions, on one machine in one run.

    python tools/time_to_accuracy.py REVISION[,section.key=value...] ... [--out runs/time-to-accuracy]

Each revision runs in a working tree of its own, with the installed packages and its own demo: it prepares the digits
and trains with `deepspeed --num_gpus 2` and its own config, changed only by the given settings and in that it saves and
keeps a checkpoint every 30 steps. Its own sampler then draws 8 images of every digit with every checkpoint, in 25
steps and with the --eta of its demo. One classifier of the present revision, fitted to the training images, says which
of them are what the prompt asked for.

The output of training gets a time stamp for each line. Training time is from the line before the first step to that of
the checkpoint's step; start-up is from the start of the command to the first of these. All that a revision does in
between counts: saving checkpoints, validation, samples, compiling C++ kernels. The compiler's cache is empty at first,
which shows in the time of the first 10 steps.

A revision that is finished is not repeated. OUT/time_to_accuracy.json and .md hold all that were asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from transfusion_fast.cpus import usable_cpus
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.files import write_atomically
from transfusion_fast.prepare.examples.digits import DIGIT_WORDS
from transfusion_fast.sampling.frechet import flat_pixels
from transfusion_fast.sampling.subject import Captioned, read_captioned

ROOT = Path(__file__).resolve().parents[1]
DRAW = ROOT / "tools" / "draw_digits.py"
BOUND = 0.95
SETTINGS = ("train.checkpoint_every=30", "train.keep_checkpoints=1000")
RUN = Path("runs", "digits")  # of all demos, below the working tree


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the revisions that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="+", metavar="REVISION[,section.key=value...]")
    parser.add_argument("--out", type=Path, default=Path("runs/time-to-accuracy"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _run(ROOT, out / "prepare.log", [sys.executable, "train/prepare.py", "digits", str(out / "digits")])
        real = read_captioned(out / "digits" / "train", ByteTokenizer())
        results = [_measure(out, revision, real) for revision in options.revisions]
    except (InputError, OSError) as error:
        print(f"time_to_accuracy: {error}", file=sys.stderr)
        return 2
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {"cpu": cpu[1] if cpu else platform.machine(), "cores": usable_cpus()}
    machine |= {package: version(package) for package in ("torch", "deepspeed")}
    record = {"machine": machine, "bound": BOUND, "results": results}
    write_atomically(out / "time_to_accuracy.json", json.dumps(record, indent=1) + "\n")
    write_atomically(out / "time_to_accuracy.md", to_markdown(results))
    print(to_markdown(results), end="")
    return 0


def first_above(accuracy: Mapping[str, float], bound: float = BOUND) -> str | None:
    """Return the first step whose accuracy reaches the bound, or None. Steps are strings, as JSON has them."""
    return min((step for step, value in accuracy.items() if value >= bound), key=int, default=None)


def read_times(lines: Sequence[tuple[float, str]]) -> tuple[float, dict[str, float]]:
    """Return the time of the line before the first step, and the seconds from there to each step that has a line.

    Raises:
        InputError: no line says that training starts.
    """
    starts = [stamp for stamp, line in lines if re.match(r"training, \d+ steps", line)]
    if not starts:
        raise InputError('the output of training must have a line "training, N steps", got none; see its log')
    steps = ((stamp, re.match(r"step +(\d+)/\d+ ", line)) for stamp, line in lines)
    return starts[0], {match[1]: stamp - starts[0] for stamp, match in steps if match}


def to_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the results."""
    head = ("revision", f"steps until {BOUND}", "seconds of training", "with start-up", "first 10 steps, seconds")
    head += ("accuracy at the end", "tokens/s (median)")
    rows = []
    for result in results:
        last, step = max(result["accuracy"], key=int), first_above(result["accuracy"])
        reached = ("not reached", "", "")
        if step is not None:
            seconds = result["seconds"][step]
            reached = (step, f"{seconds:.0f}", f"{result['start_up'] + seconds:.0f}")
        name = " ".join([result["revision"], f"({result['date']})", *result["settings"]])
        end = f"{result['accuracy'][last]:.3f} after {last} steps, {result['seconds'][last]:.0f} s"
        rows.append((name, *reached, f"{result['seconds']['10']:.0f}", end, f"{result['tokens_per_second']:,.0f}"))
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def classify(real: Captioned, drawn: Path) -> dict[str, float]:
    """Return the fraction of each checkpoint's drawings that a classifier, fitted to real images, finds as prompted."""
    classifier = optional_module("sklearn.svm", "examples").SVC(gamma="scale")
    classifier.fit(flat_pixels(real.images), real.captions)
    accuracy = {}
    for path in sorted(drawn.glob("*.npy"), key=lambda path: int(path.stem)):
        images = np.load(path)
        found = classifier.predict(flat_pixels(images.reshape(-1, *images.shape[2:])))
        accuracy[path.stem] = float(np.mean(found == np.repeat(DIGIT_WORDS, images.shape[1])))
    return accuracy


def _measure(out: Path, argument: str, real: Captioned) -> dict[str, Any]:
    """Return the result of a revision, from its folder if it is finished."""
    revision, *settings = argument.split(",")
    revision, date = _git("log", "-1", "--date=short", "--format=%h %ad", revision, "--").split()
    folder = out / re.sub(r"[^\w.=-]", "_", "-".join([revision, *settings]))
    finished, trained = folder / "result.json", folder / "trained.json"
    if finished.exists():
        return json.loads(finished.read_text())
    tree = folder / "tree"
    if not trained.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")
        folder.mkdir(parents=True)
        _git("worktree", "add", "--detach", str(tree), revision)
        write_atomically(trained, json.dumps(_train(tree, settings)))
    eta = re.search(r"evaluate\.py .*--eta ([\d.]+)", (tree / "Makefile").read_text())
    draw = [sys.executable, str(DRAW), str(RUN), str(folder / "drawn"), "--eta", eta[1] if eta else "1"]
    _run(tree, folder / "draw.log", draw)
    about = {"revision": revision, "date": date, "settings": settings}
    result = {**about, **json.loads(trained.read_text()), "accuracy": classify(real, folder / "drawn")}
    write_atomically(finished, json.dumps(result, indent=1) + "\n")
    _git("worktree", "remove", "--force", str(tree))
    return result


def _train(tree: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run a revision's demo up to the end of training, and return its times and its rate."""
    _run(tree, tree.parent / "prepare.log", [sys.executable, "train/prepare.py", "digits", "data/digits"])
    with socket.socket() as free:  # another job may use the launcher's own port
        free.bind(("127.0.0.1", 0))
        launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free.getsockname()[1])]
    command = [*launcher, "train/pretrain.py", "train/configs/digits.yaml", *SETTINGS, *settings]
    lines = _run(tree, tree.parent / "train.log", command)
    start_up, seconds = read_times(lines)
    rows = [json.loads(line) for line in (tree / RUN / "metrics.jsonl").read_text().splitlines()]
    rate = median(row["tokens_per_second"] for row in rows)
    return {"start_up": start_up, "seconds": seconds, "tokens_per_second": rate}


def _run(tree: Path, log: Path, command: Sequence[str]) -> list[tuple[float, str]]:
    """Run a command in a working tree; return its lines with the seconds since its start, which the log gets too.

    Raises:
        InputError: it failed.
    """
    print(f"writing {log}", flush=True)
    paths = {"PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": str(tree / "compiled")}
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # deepspeed starts `python`
    begin, lines = time.monotonic(), []
    with (
        log.open("w", buffering=1) as file,
        subprocess.Popen(
            command, cwd=tree, env={**os.environ, **paths, "PATH": search},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process,
    ):  # fmt: skip
        for line in process.stdout or ():
            lines.append((time.monotonic() - begin, line.rstrip("\n")))
            file.write(f"{lines[-1][0]:8.2f} {line}")
    if process.returncode:
        raise InputError(f"the command of {log} must succeed, got exit status {process.returncode}; see its last lines")
    return lines


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"git {' '.join(arguments)} must succeed, got: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
