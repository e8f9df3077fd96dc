"""A run that was stopped, killed or damaged continues as if nothing had happened."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import (
    DEFAULT_CONFIG,
    SMALL,
    assert_same_course,
    fail_to_save_on_rank_1,
    kill_at_event,
    last_step,
    metrics,
    refusal,
    spoil_second_backward,
    start,
    state_of,
    stop_at_the_engine,
    train,
)

from transfusion_fast.errors import EXIT_STOPPED
from transfusion_fast.training.checkpoint_files import find_checkpoint, read_meta
from transfusion_fast.training.run_folder import load_model


def test_a_run_that_was_stopped_and_then_killed_gives_the_same_losses_and_weights_bit_for_bit(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped = start(2, digits, run, "train.checkpoint_every=100")
    stopped.signal_when(lambda: last_step(run) >= 1, signal.SIGTERM)
    codes, printed = stopped.wait()
    assert codes == [EXIT_STOPPED] * 2 and "stopped at step" in printed
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
    assert state_of(run, 6) == state_of(uninterrupted, 6)


def test_damaged_checkpoints_are_skipped_and_training_arrives_at_the_same_bits(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    checkpoints = run / "checkpoints"
    flipped = checkpoints / "step-00000006" / "rank-00001.safetensors"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 0xFF
    flipped.write_bytes(data)
    (checkpoints / "step-00000004" / "rank-00000.safetensors").unlink()

    printed = train(2, digits, run)
    assert "step-00000006 is damaged (rank-00001.safetensors: not as" in printed
    assert "step-00000004 is damaged (rank-00000.safetensors: missing" in printed
    assert "resuming at step 2" in printed
    assert metrics(run) == metrics(uninterrupted)
    assert state_of(run, 6) == state_of(uninterrupted, 6)


def test_a_checkpoint_of_another_run_is_refused_in_one_line_and_left_alone(digits: Path, uninterrupted: Path) -> None:
    """test_checkpoints.py lists all the settings that are compared."""
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert "got order (3, 16, None) -> (4, 16, None); give the run's train.seed" in refusal(
        start(1, digits, uninterrupted, "train.seed=4")
    )
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_a_run_goes_on_at_other_numbers_of_ranks_and_stages(digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    changes = (
        (2, 1, "train.zero_stage=3", "train.micro_batch=4"),
        (3, 4, "train.zero_stage=1"),
        (4, 2, "train.zero_stage=2", "train.offload_optimizer=true"),
        (5, 2, "train.zero_stage=3"),
    )
    for step, ranks, *settings in changes:
        for later in range(step + 1, 7):
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
        printed = train(ranks, digits, run, "train.checkpoint_every=1", *settings)
        assert f"resuming at step {step}," in printed
    assert_same_course(metrics(run), metrics(uninterrupted), relative=1e-5)
    for raw in (True, False):  # the average of the weights as well
        ours, theirs = (load_model(find_checkpoint(folder), raw=raw).state_dict() for folder in (run, uninterrupted))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


POINTS = [(0, number) for number in range(1, 33)] + [(1, number) for number in range(1, 7)]
QUICK = {(0, 9), (0, 16), (1, 3)}


@pytest.mark.parametrize(
    ("rank", "number"), [pytest.param(*p, marks=[] if p in QUICK else pytest.mark.slow) for p in POINTS]
)
def test_a_run_killed_at_any_change_of_its_files_ends_with_the_same_bits(
    digits: Path, uninterrupted: Path, tmp_path: Path, rank: int, number: int
) -> None:
    run, settings = tmp_path / "run", ("train.checkpoint_every=1", "train.keep_checkpoints=2")
    killed = start(2, digits, run, *settings, setup=partial(kill_at_event, rank, number))
    assert killed.wait_for_launcher(rank) == -signal.SIGKILL
    train(2, digits, run, *settings)
    assert metrics(run) == metrics(uninterrupted)
    assert state_of(run, 6) == state_of(uninterrupted, 6)
    assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step-00000005", "step-00000006"]
    assert sorted(os.listdir(run)) == ["checkpoints", "config.yaml", "data.json", "metrics.jsonl"]


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_remembered_by_a_resume(
    digits: Path, tmp_path: Path
) -> None:
    settings = ("train.micro_batch=4", "train.checkpoint_every=1", "optimizer.schedule=constant")
    printed = train(1, digits, tmp_path, *settings, "train.steps=3", setup=spoil_second_backward)
    assert "step 2 is skipped: NaN or infinity in the gradient alone, of finite losses on all ranks" in printed
    checkpoints = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [read_meta(checkpoint).skipped_steps for checkpoint in checkpoints] == [0, 1, 1]
    states = [state_of(tmp_path, step) for step in (1, 2, 3)]
    assert states[0] == states[1] != states[2]  # a due checkpoint holds the weights as they are
    assert "skipped 1" in train(1, digits, tmp_path, *settings, "train.steps=4")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["packs"] for row in rows] == [4, 8, 12, 16]
    metas = [read_meta(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (3, 4)]
    assert [(meta.skipped_steps, meta.packs_consumed) for meta in metas] == [(1, 12), (1, 16)]


def test_a_run_that_is_asked_to_stop_before_its_first_step_saves_and_resumes(digits: Path, tmp_path: Path) -> None:
    stopped = start(1, digits, tmp_path / "run", "train.profile=[1, 5]", setup=stop_at_the_engine)
    codes, printed = stopped.wait()
    assert codes == [EXIT_STOPPED] and "stopped at step 1" in printed
    assert "step 1" in (tmp_path / "run" / "profile" / "rank-00000.trace.json").read_text()


def test_a_fault_in_a_rank_s_save_ends_all_ranks_at_once_with_its_traceback(digits: Path, tmp_path: Path) -> None:
    settings = ("train.heartbeat=900", "train.steps=100000")  # the heartbeat would not end it in time
    codes, printed = start(2, digits, tmp_path / "run", *settings, setup=fail_to_save_on_rank_1).wait()
    assert codes == [2, 2] and printed.count("pretrain: rank 1 cannot save step 2\nTraceback ") == 1
    assert "in _write\n" in printed and printed.count("RuntimeError: a fault of a library") == 1


def test_a_resumed_run_whose_learning_rate_would_jump_is_warned(digits: Path, tmp_path: Path) -> None:
    train(1, digits, tmp_path, "train.steps=5")
    printed = train(1, digits, tmp_path, "train.steps=6", "optimizer.schedule=constant")
    assert "warning: the learning rate goes from 1.50e-05 to 3.00e-03, and the loss may rise" in printed


def test_a_finished_run_keeps_its_config(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "warning: optimizer.warmup_steps=2 covers all 2 steps" in train(1, digits, run, "train.steps=2")
    before = (run / "config.yaml").read_bytes()
    assert "trained to step 2 already" in train(1, digits, run, "train.steps=2", "optimizer.lr=0.5")
    assert (run / "config.yaml").read_bytes() == before


def test_a_dry_run_says_of_an_existing_run_what_a_start_would_say(digits: Path, uninterrupted: Path, command) -> None:
    settings = (*SMALL, f"data.path={digits}", "data.heldout=null", f"train.output={uninterrupted}")
    words = (DEFAULT_CONFIG, "--dry-run", *settings)
    assert "a finished run" in command("pretrain", *words)[1]
    code, _, err = command("pretrain", *words, "train.seed=4")
    told = "settings must be those of the run, got order (3, 16, None) -> (4, 16, None); give the run's train.seed"
    assert code == 2 and err.startswith(f"pretrain: {find_checkpoint(uninterrupted)}: {told}") and err.count("\n") == 1
    code, out, _ = command("pretrain", *words, "optimizer.schedule=constant", "train.steps=9", "train.init_from=gone")
    assert code == 0 and "training would resume from step-00000006" in out
    [changed] = [line for line in out.splitlines() if "settings changed since the run was last started: " in line]
    assert "optimizer.schedule cosine -> constant" in changed and "train.steps 6 -> 9" in changed
    assert "warning: the learning rate goes from 1.50e-05 to 3.00e-03, and the loss may rise" in out
