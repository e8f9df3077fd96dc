"""A run that was stopped, killed or damaged goes on as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from launching import last_step, metrics, start, train


def weights_of(run: Path, step: int) -> str:
    file = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_run_asked_to_stop_and_then_killed_gives_the_same_losses_and_weights_bit_for_bit(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped = start(2, digits, run, "train.checkpoint_every=100")
    stopped.signal_when(lambda: last_step(run) >= 1, signal.SIGTERM)
    codes, printed = stopped.wait()
    assert codes == [0, 0] and "stopped at step" in printed
    at = last_step(run)
    assert 1 <= at < 6

    killed = start(2, digits, run, "train.checkpoint_every=1")
    killed.signal_when(lambda: last_step(run) > at, signal.SIGKILL)
    codes, printed = killed.wait()
    assert codes == [-signal.SIGKILL] * 2 and f"resuming at step {at}" in printed

    printed = train(2, digits, run, "train.checkpoint_every=100")
    assert "resuming at step" in printed
    assert "settings changed since the run was last started: train.checkpoint_every 1 -> 100\n" in printed
    assert metrics(run) == metrics(uninterrupted)
    assert weights_of(run, 6) == weights_of(uninterrupted, 6)


def test_damaged_checkpoints_are_passed_over_and_training_arrives_at_the_same_bits(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    checkpoints = run / "checkpoints"
    flip_a_byte(next((checkpoints / "step-00000006" / "engine").glob("*optim_states.pt")))
    next((checkpoints / "step-00000004" / "engine").glob("*model_states.pt")).unlink()
    (checkpoints / ".staging-step-00000005").mkdir()  # what a kill during saving leaves behind

    printed = train(2, digits, run)
    assert "step-00000006 is damaged (engine/" in printed
    assert "step-00000004 is damaged (engine/" in printed
    assert "resuming at step 2" in printed
    assert metrics(run) == metrics(uninterrupted)
    assert weights_of(run, 6) == weights_of(uninterrupted, 6)
    assert not list(checkpoints.glob(".staging*"))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    codes, printed = start(1, digits, run).wait()
    assert codes == [2], printed
    assert "all 3 checkpoints are damaged; move the run folder to start anew" in printed.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("ranks", "override", "complaint"),
    [
        (2, "model.transformer={dim: 64, depth: 2, heads: 2, ffn_dim: 64}", "model is {'transformer': {'dim': 32}}"),
        (2, "train.seed=5", "order is (0, 16), but this run has (5, 16)"),
        (1, "train.steps=8", "world_size is 2, but this run has 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line_and_left_alone(
    digits: Path, uninterrupted: Path, ranks: int, override: str, complaint: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    codes, printed = start(ranks, digits, uninterrupted, override).wait()
    assert codes == [2] * ranks
    lines = [line for line in printed.splitlines() if line.startswith("pretrain: ")]
    assert len(lines) == 1 and complaint in lines[0] and "Traceback" not in printed
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_other_data_under_the_same_path_is_refused_by_its_index(digits: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits, data)
    train(1, data, run, "train.steps=1")
    index = json.loads((data / "index.json").read_text())
    index["shards"].reverse()
    (data / "index.json").write_text(json.dumps(index))
    codes, printed = start(1, data, run, "train.steps=2").wait()
    assert codes == [2]
    assert printed.count(f"{data} (index ") == 2 and "Traceback" not in printed


def test_a_finished_run_keeps_its_config(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "warning: optimizer.warmup_steps=2 is the whole of the 2 steps" in train(1, digits, run, "train.steps=2")
    before = (run / "config.yaml").read_bytes()
    assert "trained to step 2 already" in train(1, digits, run, "train.steps=2", "optimizer.lr=0.5")
    assert (run / "config.yaml").read_bytes() == before


def test_only_the_newest_checkpoints_are_kept_and_latest_names_the_newest(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(1, digits, run, "train.keep_checkpoints=2", "train.checkpoint_every=1", "train.steps=4")
    assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step-00000003", "step-00000004"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000004"
