"""A run that was stopped, killed or damaged continues as if nothing had happened."""

import json
import shutil
import signal
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from launching import last_step, metrics, refusal, spoil_second_backward, start, train, weights_of

from transfusion_fast.training.run_folder import load_model, read_meta


def test_a_run_that_was_stopped_and_then_killed_gives_the_same_losses_and_weights_bit_for_bit(
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


def test_damaged_checkpoints_are_skipped_and_training_arrives_at_the_same_bits(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    checkpoints = run / "checkpoints"
    flipped = next((checkpoints / "step-00000006" / "engine").glob("*optim_states.pt"))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 0xFF
    flipped.write_bytes(data)
    next((checkpoints / "step-00000004" / "engine").glob("*model_states.pt")).unlink()

    printed = train(2, digits, run)
    assert "step-00000006 is damaged (engine/" in printed
    assert "step-00000004 is damaged (engine/" in printed
    assert "resuming at step 2" in printed
    assert metrics(run) == metrics(uninterrupted)
    assert weights_of(run, 6) == weights_of(uninterrupted, 6)


def test_a_checkpoint_of_another_run_is_refused_in_one_line_and_left_alone(digits: Path, uninterrupted: Path) -> None:
    """test_checkpoints.py lists all the settings that are compared."""
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert "got world_size 2 -> 1; start as many" in refusal(start(1, digits, uninterrupted, "train.steps=8"))
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_saved_weights_are_the_fp32_weights_of_the_engine_bit_for_bit(uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / "step-00000006"
    ours = load_model(checkpoint).cpu().state_dict()
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="engine")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, theirs[name]), name


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_remembered_by_a_resume(
    digits: Path, tmp_path: Path
) -> None:
    settings = ("train.micro_batch=4", "train.checkpoint_every=1")
    train(1, digits, tmp_path, *settings, "train.steps=3", setup=spoil_second_backward)
    checkpoints = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [read_meta(checkpoint).step for checkpoint in checkpoints] == [1, 3]  # none of a step that was skipped
    assert "skipped 1" in train(1, digits, tmp_path, *settings, "train.steps=4")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["packs"] for row in rows] == [4, 8, 12, 16]
    metas = [read_meta(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (3, 4)]
    assert [(meta.skipped_steps, meta.packs_consumed) for meta in metas] == [(1, 12), (1, 16)]


def test_a_finished_run_keeps_its_config(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "warning: optimizer.warmup_steps=2 covers all 2 steps" in train(1, digits, run, "train.steps=2")
    before = (run / "config.yaml").read_bytes()
    assert "trained to step 2 already" in train(1, digits, run, "train.steps=2", "optimizer.lr=0.5")
    assert (run / "config.yaml").read_bytes() == before
