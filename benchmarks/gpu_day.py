"""Run everything that is worth running in the first hour on a GPU, in the order of its worth, into one report folder.

    python benchmarks/gpu_day.py --out DIR [--minutes 9.5] [--rehearse]

Each stage has a limit of less than 8 minutes, one that fails does not stop the next, and none starts that might not
end within --minutes. Run the same command again to go on: stages that ended well for the same code are not repeated,
and compiled kernels are kept in DIR/cache. DIR/gpu_day.md says after each stage what ran, what did not, and why. Exit
status 1 while a stage is missing or failed.

--rehearse runs the same stages on a machine without a GPU: kernels in Triton's interpreter and compiled up to their
launch, the tests collected, benchmarks in tiny shapes on the CPU.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.cpus import usable_cpus

ROOT = Path(__file__).resolve().parents[1]
HERE = "benchmarks"
SECONDS_A_COMPILATION = 1.4  # of one core
START = 20  # seconds until torch is imported and the GPU is set up
TESTERS = 16  # test processes at most: their kernels are compiled in parallel
TABLES = ("numpy", "pandas", "matplotlib", "psutil")
TESTS = ("pytest", "hypothesis")
PACKAGES = ("torch", "triton", *TABLES, *TESTS, "networkx", "safetensors", "einops", "yaml", "pydantic")
SANITIZER = "compute-sanitizer"
UNFINISHED = 3  # exit status of a benchmark that goes on where it stopped

Command = list[str]
Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One part of the day. `commands` run one after the other; `{out}` and `{python}` in them are replaced."""

    name: str
    commands: tuple[str, ...]
    rehearsal: tuple[str, ...]
    compilations: int
    """Kernels that are compiled: counted by the rehearsal for "kernels", by hand for the others."""
    timed: float
    """Seconds that it measures or computes for, besides."""
    needs: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    processes: int = 1
    limit: float = 470

    def estimate(self) -> float:
        """Return the seconds that it is expected to take on a GPU."""
        return START + self.compilations * SECONDS_A_COMPILATION / self.processes + self.timed

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        lacking = [name for name in self.needs if not importlib.util.find_spec(name)]
        lacking += [tool for tool in self.tools if not _find_tool(tool)]
        return f"not installed: {', '.join(lacking)}" if lacking else None


def stages(jobs: int) -> list[Stage]:
    """Return the stages in the order of their worth."""
    bench = "{python} " + HERE
    tests = f"{bench}/gpu_day.py --out {{out}} --test"
    quick = "--out {out} --device cpu --quick"
    collect = "{python} -m pytest -q --collect-only -m gpu tests/gpu"
    check, memory = f"{bench}/kernel_check.py", "env PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    interpreted = f"env TRITON_INTERPRET=1 {check} --dims 64"
    small, compiled = f"{check} --dims 64 --dtypes bf16", f"{check} --fake-gpu"
    libraries = "triton sdpa_documents flex flex_flash flash_varlen_causal flashmask flex_flash_attention"
    attention = f"{bench}/attn_bench.py --out {{out}} --head-dim 128 --minutes 6 --backends {libraries}"
    means = " ".join(f"mean{2**power}" for power in range(5, 13))
    step = f"{bench}/step_bench.py --out {{out}}"
    return [
        Stage("kernels", (check,), (compiled, interpreted), 106, 10),
        Stage("attention tests", (f"{tests} attention",), (f"{collect} -k attention_gpu",), 270, 60, TESTS, (), jobs),
        Stage("attention", (f"{attention} --mixes pairs text mixed interleaved tiny long --lengths 16384",),
              (f"{bench}/attn_bench.py {quick}",), 12, 300, TABLES),
        Stage("pointwise tests", (f"{tests} pointwise", f"{tests} model"), (f"{collect} -k not(attention_gpu)",),
              600, 90, TESTS, (), jobs),
        Stage("pointwise", (f"{bench}/pointwise_bench.py --out {{out}} --seconds 0.3",),
              (f"{bench}/pointwise_bench.py {quick} --seconds 0.05",), 90, 120, TABLES),
        Stage("step", (f"{step} --dtypes bf16 --seconds 3",),
              (f"{step} --device cpu --preset mini --dtypes fp32 --seconds 0.1",), 40, 240, TABLES),
        Stage("short documents", (f"{attention} --mixes {means} --lengths 16384 65536",),
              (f"{bench}/attn_bench.py {quick} --mixes mean32 --lengths 512",), 8, 330, TABLES),
        Stage("sanitizer", (f"{memory} {SANITIZER} --error-exitcode 9 {small}",
                            f"{SANITIZER} --tool racecheck --error-exitcode 9 {small}"), (small + " --fake-gpu",),
              30, 240, (), (SANITIZER,)),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end within this time, then run again")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--jobs", type=int, help=f"test processes at once (default: one a core, at most {TESTERS})")
    parser.add_argument("--rehearse", action="store_true", help="on a machine without a GPU")
    parser.add_argument("--test", metavar="WHAT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    jobs = options.jobs or (TESTERS if options.rehearse else min(TESTERS, usable_cpus()))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.test:
        return run_tests(f"tests/gpu/test_{options.test}_gpu.py", jobs)
    chosen = [stage for stage in stages(jobs) if not options.stages or stage.name in options.stages]
    end, day = time.monotonic() + 60 * options.minutes, Day(out, options.rehearse)
    for stage in chosen:
        day.run(stage, end - time.monotonic())
        day.write(chosen)
    print(day.page(chosen))
    return 0 if all(day.records.get(stage.name, {}).get("outcome") == "ok" for stage in chosen) else 1


class Day:
    """The records of the stages, kept in DIR/gpu_day.json."""

    def __init__(self, out: Path, rehearse: bool):
        self.out, self.rehearse, self.path = out, rehearse, out / "gpu_day.json"
        self.records: dict[str, Record] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, stage: Stage, left: float) -> None:
        """Run a stage, unless it ended well for this code, cannot run here, or might not end in time."""
        commands, code = stage.rehearsal if self.rehearse else stage.commands, hash_of_code()
        record = self.records.get(stage.name, {})
        if record.get("outcome") == "ok" and (record["code"], record["rehearsal"]) == (code, self.rehearse):
            return
        record = {"code": code, "rehearsal": self.rehearse, "seconds": 0.0}
        reason = None if self.rehearse and stage.tools else stage.missing()
        if reason:
            outcome = f"did not run: {reason}"
        elif left < min(stage.limit, 1.5 * stage.estimate()):
            outcome = f"did not start: {left / 60:.1f} minutes were left; run the same command again"
        else:
            start = time.monotonic()
            outcome = self._execute(stage, commands, min(stage.limit, left))
            record["seconds"] = time.monotonic() - start
        self.records[stage.name] = record | {"outcome": outcome}

    def _execute(self, stage: Stage, commands: Sequence[str], limit: float) -> str:
        """Run the commands with their output in a log; return "ok", or what went wrong."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
            "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(self.out / "cache"), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        end = time.monotonic() + limit
        with self.log(stage).open("w") as log:
            for command in commands:
                print(f"{stage.name}: {command} (about {stage.estimate() / 60:.1f} minutes on a GPU)", flush=True)
                words = [w.format(python=sys.executable, out=self.out) for w in command.split()]
                words[0] = _find_tool(words[0]) or words[0]
                code = run_command(words, end - time.monotonic(), environment, log)
                if code is None:
                    return f"stopped after its limit of {limit:.0f} s"
                if code == UNFINISHED:
                    return "ran out of time; run the same command again to go on"
                if code:
                    return f"failed with exit status {code}"
        return "ok"

    def log(self, stage: Stage) -> Path:
        return self.out / f"{stage.name.replace(' ', '_')}.log"

    def write(self, chosen: Sequence[Stage]) -> None:
        """Write the records and the page."""
        self.path.write_text(json.dumps(self.records, indent=1))
        (self.out / "gpu_day.md").write_text(self.page(chosen), encoding="utf-8")

    def page(self, chosen: Sequence[Stage]) -> str:
        """Return the page: the machine, a line for each stage, the end of each failed log, and the plots."""
        rows = ["| stage | outcome | seconds here | seconds on a GPU, an estimate |", "| --- | --- | --- | --- |"]
        parts: list[str] = []
        for stage in chosen:
            record = self.records.get(stage.name, {"outcome": "did not run yet", "seconds": 0.0})
            rows.append(f"| {stage.name} | {record['outcome']} | {record['seconds']:.0f} | {stage.estimate():.0f} |")
            if record["seconds"]:
                lines = self.log(stage).read_text(errors="replace").splitlines()
                shown = lines[-25:] if stage.name == "kernels" or record["outcome"] != "ok" else lines[-1:]
                parts += [f"## {stage.name}", "\n".join(["```", *shown, "```"])]
        title = "# Rehearsal of a day on a GPU" if self.rehearse else "# A day on a GPU"
        plots = [f"![{path.stem}]({path.name})" for path in sorted(self.out.glob("*.png"))]
        total = sum(stage.estimate() for stage in chosen)
        note = f"The estimates, for {TESTERS} cores, add up to {total / 60:.0f} minutes. Tables: the other .md files."
        return "\n\n".join([title, describe_environment(), "\n".join(rows), note, *plots, *parts]) + "\n"


def run_tests(path: str, jobs: int) -> int:
    """Run a file of tests in several processes, to compile their kernels in parallel; return the exit code."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    listed = subprocess.run([*pytest, "--collect-only", path], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        print(listed.stdout + listed.stderr)
        return 1
    shares = [names[start::jobs] for start in range(min(jobs, len(names)))]
    running = [subprocess.Popen([*pytest, *share], cwd=ROOT) for share in shares]
    codes = [process.wait() for process in running]
    print(f"{len(names)} tests in {len(running)} processes, of which {sum(map(bool, codes))} failed")
    return int(any(codes))  # a process that a signal ended has a negative code


def run_command(words: Command, limit: float, environment: Mapping[str, str], log: Any) -> int | None:
    """Run a command and end all of its processes after `limit` seconds; return the exit code, or None at the limit."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=max(limit, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def hash_of_code() -> str:
    """Return a hash of the code: a machine without git knows no revision, and changed files have none."""
    folders = (ROOT / name for name in ("kernels", "transfusion_fast", HERE, "tests"))
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def revision() -> str:
    """Return the revision of the code, with a + where tracked files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_environment() -> str:
    """Return the machine, the versions of packages, and what is missing."""
    smi = "/usr/bin/nvidia-smi" if Path("/usr/bin/nvidia-smi").exists() else shutil.which("nvidia-smi")
    gpu = "no NVIDIA GPU"
    if smi:
        query = [smi, "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() or gpu
    return f"{gpu}; {usable_cpus()} cores; Python {platform.python_version()}; {', '.join(_versions())}; {revision()}"


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        if not importlib.util.find_spec(name):
            yield f"no {name}"
        else:
            yield f"{name} {importlib.metadata.version({'yaml': 'PyYAML'}.get(name, name))}"


def _find_tool(name: str) -> str | None:
    cuda = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(cuda) if cuda.exists() else None)


if __name__ == "__main__":
    sys.exit(main())
