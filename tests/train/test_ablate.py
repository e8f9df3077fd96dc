"""The harness of comparisons, with commands that write in milliseconds what the real ones write."""

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from transfusion_fast.config_reading import load_config
from transfusion_fast.training.ablation import FIGURES, Run, verdict

ROOT = Path(__file__).resolve().parents[2]
FAKE = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
if name == "deepspeed":
    os.execv(sys.executable, [sys.executable, *arguments[4:]])  # after --num_gpus 1 --master_port PORT
given = dict(word.split("=", 1) for word in arguments if "=" in word)
run = pathlib.Path(given.get("train.output", arguments[0]))
with open({{log!r}}, "a") as calls:
    calls.write(f"{{{{name[:-3]}}}} {{{{run.name}}}}\\n")
if name == "pretrain.py":
    run.mkdir(parents=True, exist_ok=True)
    if "data.noise_cap" in given:
        print("pretrain: no such setting")
        print("[launch] subprocess killed")
        sys.exit(2)
    if given.get("optimizer.name") and not (run / "checkpoint").exists():
        signal.signal(signal.SIGTERM, lambda *_: ((run / "checkpoint").write_text("saved"), sys.exit(5)))
        (run / "begun").touch()
        while not (run / "released").exists():
            time.sleep(0.02)
        (run / "checkpoint").write_text("at the end")
    seed = int(given["train.seed"])
    loss = 2 + seed / 10 - ("optimizer.name" in given)
    steps = int(given["train.steps"])
    each = 4.0 if "adaln" in run.name else 1.0
    times = [0.0, 100.0, *(100 + each * n for n in range(1, 4))]
    rows = [dict(step=10 * n, time=10 * time) for n, time in enumerate(times, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    losses = dict(loss=loss, text_loss=loss, diffusion_loss=loss, diffusion_loss_q1=None)
    first = dict.fromkeys(losses, 99.0)
    (run / "validation.jsonl").write_text("".join(json.dumps(dict(step=steps, **x)) + "\\n" for x in (first, losses)))
if name == "evaluate.py":
    causal = "causal" in run.name
    figures = dict(generated_accuracy=0.5, caption_accuracy=1.0, frechet_distance=1.0 + causal)
    (run / "evaluation.json").write_text(json.dumps(figures))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts train/ablate.py with stand-ins for its commands, which list calls in calls.txt."""
    folder = tmp_path / "train"
    (folder / "configs").mkdir(parents=True)
    for name in ("ablate.py", "configs/digits.yaml"):
        shutil.copy(ROOT / "train" / name, folder / name)
    for name in ("prepare.py", "pretrain.py", "evaluate.py", "deepspeed"):
        (folder / name).write_text(FAKE.format(log=str(tmp_path / "calls.txt")))
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(folder / "ablate.py"), "--out", str(tmp_path / "out"), "--jobs", "1", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed


def pretrained(folder: Path) -> list[str]:
    """Return the runs that were trained, in order, without the hash in their names."""
    calls = (folder / "calls.txt").read_text().splitlines()
    return [re.sub("-[0-9a-f]{6}-", "-", call.split()[1]) for call in calls if call.startswith("pretrain")]


def load() -> ModuleType:
    """Return train/ablate.py as a module."""
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "train" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shared_runs_run_once_seed_by_seed_failures_are_tried_again_and_time_is_kept(
    start, tmp_path: Path, capsys
) -> None:
    chosen, out, ablate = ("noise-cap", "attention", "--seeds", "2"), tmp_path / "out", load()
    assert ablate.main(["--out", str(out), "--list"]) == 0 and "time: unknown" in capsys.readouterr().out
    code, printed = ended(start(*chosen))
    variants = ("digits", "digits-noise_cap=1000", "digits-image_attention=causal")
    assert pretrained(tmp_path) == [f"{variant}-seed{seed}" for seed in (0, 1) for variant in variants]
    assert code == 1 and "4 of 6 runs are finished, 2 failed" in printed
    rows = list(csv.DictReader((out / "ablations.csv").open()))
    assert [row["outcome"] for row in rows] == ["finished"] * 4 + ["pretrain: no such setting"] * 2
    assert (rows[1]["seed"], rows[1]["text_loss"], rows[1]["diffusion_loss_q1"]) == ("1", "2.1", "")
    assert (rows[0]["steps"], rows[0]["step_seconds"]) == ("300", "1.0"), "the shortest time"
    [attention] = [line for line in (out / "ablations.md").read_text().splitlines() if "| causal |" in line]
    assert "| 2 | 2.050 ± 0.050 |" in attention
    assert attention.endswith("| worse (arXiv 2408.11039) | Frechet distance | yes |")
    with Image.open(out / "ablations.png") as picture:
        assert picture.width > 1000
    (tmp_path / "calls.txt").unlink()
    assert ended(start(*chosen))[0] == 1
    assert pretrained(tmp_path) == [f"digits-noise_cap=1000-seed{seed}" for seed in (0, 1)]
    for record in (out / "runs").glob("*.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": 3600}))
    (tmp_path / "calls.txt").unlink()
    assert ended(start("attention", "--seeds", "3", "--hours", "0.9"))[0] == 5
    assert not (tmp_path / "calls.txt").exists(), "a run began that would not have ended in time"
    assert ablate.main(["--out", str(out), "--list", "attention", "--seeds", "3", "--jobs", "1"]) == 0
    assert "2 of 6 runs are left, as comparisons share runs; time: 2.0 hours" in capsys.readouterr().out
    assert ablate.main(["--out", str(out), "--list", "--steps", "9"]) == 0
    assert "0 of 4 runs finished" in capsys.readouterr().out, "runs of other settings are others"
    assert ablate.main(["attentoin"]) == 2 and "NAME must be one of attention, " in capsys.readouterr().err


def test_a_run_that_was_interrupted_saves_and_is_resumed(start, tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", ("optimizer", "--seeds", "2")

    def begun(seed: int) -> Path:
        """Wait for the run with Muon to begin, and return its folder."""
        deadline = time.monotonic() + 60
        while not (found := list((out / "runs").glob(f"*muon*seed{seed}/begun"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found[0].parent

    process = start(*chosen)
    run = begun(0)
    process.send_signal(signal.SIGTERM)
    code, printed = ended(process)
    assert code == 5 and "1 of 4 runs are finished, 0 failed" in printed and (out / "ablations.png").is_file()
    assert (run / "checkpoint").read_text() == "saved"
    process = start(*chosen)
    run = begun(1)
    process.kill()  # which the command of the run survives
    process = start(*chosen)
    assert "another process works here; waiting for its end" in process.stdout.readline()
    (run / "released").touch()
    assert ended(process)[0] == 0 and (run / "checkpoint").read_text() == "at the end"
    assert [name.startswith("digits-name=muon") for name in pretrained(tmp_path)] == [0, 1, 1, 0, 1, 1]
    assert "| better (arXiv 2502.16982) | text loss | yes |" in (out / "ablations.md").read_text()


def test_a_slow_variant_is_run_again_with_the_steps_that_take_the_time_of_its_baseline(start, tmp_path: Path) -> None:
    code, printed = ended(start("timesteps", "--seeds", "2", "--jobs", "2"))
    assert code == 0 and "6 of 6 runs are finished" in printed
    rows = list(csv.DictReader((tmp_path / "out" / "ablations.csv").open()))
    assert [row["steps"] for row in rows] == ["300"] * 4 + ["75"] * 2
    assert rows[-1]["settings"] == "model.transformer.conditioning=adaln train.steps=75"
    assert "| adaLN-zero, 75 steps |" in (tmp_path / "out" / "ablations.md").read_text()
    (tmp_path / "calls.txt").unlink()
    assert ended(start("timesteps", "--seeds", "2"))[0] == 0 and not (tmp_path / "calls.txt").exists()
    for record in (tmp_path / "out" / "runs").glob("*steps=75*.json"):
        record.unlink()
    assert ended(start("timesteps", "--seeds", "2", "--hours", "0"))[0] == 5
    page = (tmp_path / "out" / "ablations.md").read_text()
    assert "| adaLN-zero |" in page and "75 steps" not in page, "runs that have not begun are not in the table"
    assert "| attention |" not in page and "| process |" not in page
    assert ended(start("attention", "--seeds", "2", "--hours", "0"))[0] == 5
    page = (tmp_path / "out" / "ablations.md").read_text()
    assert "| attention | causal |" in page and "| adaLN-zero |" in page and "| process |" not in page


@pytest.mark.parametrize(
    ("claim", "sign", "variant", "told"),
    [
        ("better", -1, [1.0, 1.2], "yes"),
        ("better", 1, [1.0, 1.2], "no"),
        ("worse", 1, [1.0, 1.2], "yes"),
        ("better", -1, [1.8, 2.0], "within the spread"),
        ("better", -1, [1.6, 1.8], "yes"),
        ("better", -1, [1.2, 2.0], "within the spread"),
        ("equal", -1, [1.8, 2.0], "yes"),
        ("equal", -1, [1.0, 1.2], "no"),
    ],
)
def test_a_claim_is_judged_by_differences_beyond_the_spread(claim, sign, variant, told) -> None:
    assert verdict(claim, sign, [1.9, 2.1], variant) == told
    assert verdict(claim, sign, [], []) == "not measured"
    assert verdict("equal", sign, [2.0], [2.0]) == "yes, of one seed"


def test_the_seconds_of_an_attempt_that_was_killed_are_counted_to_its_last_output(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", "digits", "", 0)
    (tmp_path / "a.json").write_text(json.dumps({"seconds": 5, "revisions": ["x"], "started": 1000}))
    run.log.touch()
    os.utime(run.log, (1100, 1100))
    with run.attempt("y"):
        pass
    assert run.state["seconds"] == pytest.approx(105, abs=1) and run.state["revisions"] == ["x", "y"]


def test_all_variants_are_settings_that_exist() -> None:
    ablate = load()
    for comparison in ablate.COMPARISONS:
        assert comparison.data in ablate.DATA and comparison.figure in FIGURES
        for settings in comparison.settings.values():
            load_config(ablate.CONFIG, [*ablate.SETTINGS, *settings.split()])
