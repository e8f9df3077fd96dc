"""Checkpoints of one rank with a stand-in for the engine: order of writes, retention, and what a resume compares."""

import hashlib
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import OneRank, small_config

from transfusion_fast.config import ModelConfig
from transfusion_fast.data.loader import open_data
from transfusion_fast.errors import InputError
from transfusion_fast.training.checkpoint import Checkpoints
from transfusion_fast.training.run_folder import Meta, find_checkpoint, find_damage
from transfusion_fast.training.trainer import initial_meta

META = Meta(
    step=0, packs_consumed=0, skipped_steps=0, world_size=1, precision="fp32", global_batch=4, data="a" * 64,
    data_path="data", order=(3, 16), model={"transformer": {"dim": 32}, "objective": "ddpm"},
)  # fmt: skip


class Engine:
    """The parts of a DeepSpeed engine that checkpoints use."""

    module = torch.nn.Module()

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "state.pt").write_bytes(b"state")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        return folder, {}


def save(run: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        Checkpoints(run, OneRank(), keep).save(Engine(), replace(META, step=step))


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_latest_names_a_checkpoint_that_is_complete_on_disk_at_every_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder looks before and after each flush, rename and removal."""
    folder, flushed, seen = tmp_path / "checkpoints", {}, []

    def contents(path: Path) -> Any:
        return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()

    def check() -> None:
        named = [*folder.glob("latest")]
        seen.extend(find_checkpoint(tmp_path).name for _ in named)
        for checkpoint in folder.glob("step-*"):
            assert find_damage(checkpoint) == []
            named += [checkpoint, *checkpoint.rglob("*")]
        for path in named:
            assert flushed.get(path.stat().st_ino) == contents(path), f"{path} is not on disk"

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> None:
            check()
            original(*arguments, **options)
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                flushed[path.stat().st_ino] = contents(path)
            check()

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        watch(owner, name)
    save(tmp_path, 1, 2, 3, keep=1)
    assert sorted(set(seen)) == ["step-00000001", "step-00000002", "step-00000003"] == list(dict.fromkeys(seen))
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_a_save_that_was_cut_off_leaves_latest_alone_and_is_removed_by_the_next(tmp_path: Path) -> None:
    class CutOff(Engine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
            super().save_checkpoint(folder, tag, save_latest)
            raise KeyboardInterrupt

    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path, OneRank(), 9).save(CutOff(), replace(META, step=2))
    assert len(names(tmp_path)) == 3 and find_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


def test_only_the_newest_checkpoints_are_kept_and_one_of_a_later_step_is_removed_as_damaged(tmp_path: Path) -> None:
    save(tmp_path, 3, 4, 7)
    (tmp_path / "checkpoints" / "step-00000007" / "meta.json").write_text("{")
    checkpoints = Checkpoints(tmp_path, OneRank(), keep=2)
    assert checkpoints.newest_intact() == tmp_path / "checkpoints" / "step-00000004"
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000005"]
    assert find_checkpoint(tmp_path).name == "step-00000005"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, OneRank(), keep=2)
    assert checkpoints.newest_intact() is None
    save(tmp_path, 1, 2)
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(InputError, match="all 2 checkpoints are damaged; move the run folder to start over"):
        checkpoints.newest_intact()


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("world_size", 2, "world_size 1 -> 2; start as many ranks as the run had"),
        ("precision", "bf16", "precision fp32 -> bf16; give the run's train.precision"),
        ("global_batch", 8, "global_batch 4 -> 8; give the run's train.global_batch"),
        ("data", "b" * 64, "data (index aaaaaaaaaaaa) -> data (index bbbbbbbbbbbb); give the run's data.path"),
        ("order", (5, 16), "order (3, 16) -> (5, 16); give the run's train.seed and data.shuffle_window"),
        (
            "model",
            {**META.model, "transformer": {"dim": 64}},
            "model.transformer.dim 32 -> 64; give the model settings",
        ),
        ("model", {**META.model, "extra": None}, "; give the model settings"),
        ("shares", ("1/4", "3/4"), "shares ('1',) -> ('1/4', '3/4'); give the run's weights in data.path"),
    ],
)
def test_a_resume_compares_everything_that_the_state_depends_on(
    tmp_path: Path, name: str, other: Any, told: str
) -> None:
    save(tmp_path, 1)
    saved = find_checkpoint(tmp_path)
    with pytest.raises(InputError) as refused:
        Checkpoints(tmp_path, OneRank(), keep=1).restore(Engine(), saved, replace(META, **{name: other}))
    assert str(refused.value).startswith(f"{saved}: settings must be those of the run, got ")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_resume_compares_neither_counters_nor_the_path_of_the_data(tmp_path: Path) -> None:
    save(tmp_path, 1)
    expected = replace(META, data_path="elsewhere", packs_consumed=1, skipped_steps=1, quarantined=1)
    checkpoints = Checkpoints(tmp_path, OneRank(), keep=1)
    assert checkpoints.restore(Engine(), find_checkpoint(tmp_path), expected) == replace(META, step=1)


def test_a_run_is_described_by_all_settings_but_those_that_are_free_to_change(digits: Path) -> None:
    config = small_config(digits)
    data = open_data(config)
    described = initial_meta(config, data, 2, bf16=True)
    sha256 = hashlib.sha256((digits / "index.json").read_bytes()).hexdigest()
    known = {"world_size": 2, "precision": "bf16", "global_batch": 4, "data": sha256, "data_path": str(digits)}
    assert {**asdict(described), "model": None} == {**asdict(META), **known, "model": None}
    assert described.model.keys() == ModelConfig.model_fields.keys() - {"backend", "activation_checkpointing"}
    assert described.model["transformer"]["dim"] == 32
    mixed = small_config(f"{{{digits}: 1, {digits.parent / 'heldout'}: 3}}")
    other = initial_meta(mixed, open_data(mixed), 2, bf16=True)
    assert other.shares == ("1/4", "3/4") and other.data != described.data
