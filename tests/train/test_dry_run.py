"""train/pretrain.py --dry-run: it prints an estimate, writes nothing, and refuses what training would refuse."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import PRETRAIN, picture, text, write_packs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the config of a large run on it."""
    folder = tmp_path_factory.mktemp("dry-run")
    write_packs(folder / "data", [(text(20, n), picture(n)) for n in range(30)], 256)
    (folder / "big.yaml").write_text("{model: {preset: 7b}, data: {path: data}, train: {output: run}}")
    return folder


def test_the_7b_preset_on_64_gpus_takes_seconds_and_writes_nothing(folder: Path) -> None:
    before, start = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}, time.monotonic()
    words = ["big.yaml", "--dry-run", "--gpus", "64", "train.global_batch=128"]
    ran = subprocess.run([sys.executable, str(PRETRAIN), *words], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == ""
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4e6  # kB; the largest child so far
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    lines = [" ".join(line.split()) for line in ran.stdout.splitlines()]
    for expected in (
        "model.transformer.dim 4096 preset",
        "model.num_text_tokens 256 data",
        "train.global_batch 128 override",
        "train.output run file",
        "train.seed 0 default",
        "blocks 6,476,267,520",
    ):
        assert expected in lines
    assert lines[0].startswith("An estimate on paper")
    assert "MEMORY of a GPU (H100 with 80.0 GB), ZeRO stage 3 on 64 GPUs, bf16" in lines


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--dry-run --gpus 3", "train.global_batch must be a multiple of ranks x train.micro_batch = 3 x 1, got 1024"),
        ("--dry-run --gpus 12", "--gpus must be a multiple of --gpus-per-node=8, got 12"),
        ("--dry-run --gpu RTX", "--gpu must be one of GB200, B200,"),
        ("--dry-run --mfu 40", "--mfu must be above 0 and at most 1, got 40.0"),
        ("--dry-run --packs 0", "--packs must be at least 1, got 0"),
        ("--dry-run train.sequence_parallel=2", "train.sequence_parallel must divide the number of ranks, 1, got 2"),
        ("--dry-run deepspeed.zero_optimisation={}", "config: unknown key 'deepspeed.zero_optimisation'; did you mean"),
        ("--dry-run train.output=data", "train.output must be new, empty or the folder of a run, got data"),
        ("--gpus 64", "--gpus must come with --dry-run, got 64 without"),
    ],
)
def test_bad_input_gets_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command, words: str, complaint: str
) -> None:
    monkeypatch.chdir(folder)
    code, out, err = command("pretrain", "big.yaml", *words.split())
    assert (code, out) == (2, "") and err.startswith(f"pretrain: {complaint}") and err.count("\n") == 1
