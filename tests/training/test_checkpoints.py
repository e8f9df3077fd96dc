"""Checkpoints of one rank with a stand-in for the engine: order of writes, retention, damage, and what must match."""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import OneRank, small_config

from transfusion_fast.config import ModelConfig
from transfusion_fast.config_reading import load_config
from transfusion_fast.data.loader import open_data
from transfusion_fast.errors import InputError
from transfusion_fast.training import slices
from transfusion_fast.training.checkpoint import Checkpoints
from transfusion_fast.training.checkpoint_files import Meta, find_checkpoint, find_damage
from transfusion_fast.training.resume import initial_meta
from transfusion_fast.training.run_folder import load_model
from transfusion_fast.training.slices import averaged_weights, init_state, write_weights_into

META = Meta(
    step=0, packs_consumed=0, skipped_steps=0, quarantined=0, precision="fp32", data="a" * 64, data_path="data",
    shares=("1",), world_size=1, config=load_config(None), versions={},
)  # fmt: skip


class Engine:
    """A model of one matrix and one vector, with the parts of a DeepSpeed engine at stage 1 that checkpoints use."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module, start = torch.nn.Linear(3, 2), 0
        flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self.module.parameters()]))
        for parameter in self.module.parameters():
            place = SimpleNamespace(start=start, numel=parameter.numel())
            whole = SimpleNamespace(start=0)
            parameter._hp_mapping = SimpleNamespace(
                param_group_index=0, hp_fragment_address=place, lp_fragment_address=whole
            )
            start += parameter.numel()
        self.optimizer = SimpleNamespace(
            optimizer=torch.optim.AdamW([flat]),
            update_lp_params=self.update_parameters,
            cpu_offload=False,
            params_in_partition=[],
        )
        init_state(self, ema=True)

    def update_parameters(self) -> None:
        """Copy the optimizer's flat weights to the model."""
        [flat] = self.optimizer.optimizer.param_groups[0]["params"]
        torch.nn.utils.vector_to_parameters(flat.detach(), self.module.parameters())


def save(run: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoints = Checkpoints(run, OneRank(), keep)
        checkpoints.save(Engine(step), replace(META, step=step))
        checkpoints.close()


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


def test_a_save_that_was_cut_off_leaves_latest_alone_and_is_removed_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for leftover in (".step-00000002", ".deleted-step-00000000"):
        (folder / leftover).mkdir()
        (folder / leftover / "rank-00000.safetensors").write_bytes(b"half")
    (folder / ".latest.durable").write_text("step")
    checkpoints = Checkpoints(tmp_path, OneRank(), 9)
    assert checkpoints.newest_intact() == find_checkpoint(tmp_path) == folder / "step-00000001"
    (folder / "latest").unlink()  # as if the process had been killed after the checkpoint got its name
    checkpoints.repair(folder / "step-00000001")
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert find_checkpoint(tmp_path) == folder / "step-00000001"


def test_a_rank_that_cannot_write_ends_the_run_with_its_error_and_publishes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, OneRank(), 9)
    (tmp_path / "checkpoints" / ".step-00000002").write_text("a file where the staging folder should be")
    checkpoints.save(Engine(), replace(META, step=2))
    with pytest.raises(InputError, match="step-00000002"):
        checkpoints.finish()
    assert find_checkpoint(tmp_path).name == "step-00000001" and not checkpoints.in_progress


def test_a_checkpoint_is_published_when_asked_and_before_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, OneRank(), 9)
    checkpoints.save(Engine(), replace(META, step=1))
    assert checkpoints.in_progress
    while not checkpoints.written:
        assert not list((tmp_path / "checkpoints").glob("step-*"))
    checkpoints.save(Engine(), replace(META, step=2))
    assert find_checkpoint(tmp_path).name == "step-00000001"
    checkpoints.finish()
    assert find_checkpoint(tmp_path).name == "step-00000002" and not checkpoints.in_progress


def test_a_restored_engine_has_every_number_of_the_saved_one(tmp_path: Path) -> None:
    saved, restored = Engine(1), Engine(2)
    state = saved.optimizer.optimizer.state
    for tensors in state.values():
        tensors.update({kind: torch.randn(8) for kind in ("exp_avg", "exp_avg_sq", "ema")})
    checkpoints = Checkpoints(tmp_path, OneRank(), 9)
    checkpoints.save(saved, replace(META, step=7, skipped_steps=2, packs_consumed=28, quarantined=1))
    checkpoints.finish()
    meta = checkpoints.restore(restored, find_checkpoint(tmp_path), replace(META, world_size=2))
    assert meta == replace(META, step=7, skipped_steps=2, packs_consumed=28, quarantined=1, world_size=2)
    assert (restored.global_steps, restored.skipped_steps) == (7, 2)
    [(flat, tensors)], [(other, others)] = state.items(), restored.optimizer.optimizer.state.items()
    assert torch.equal(flat, other) and others["step"] == 5
    assert all(torch.equal(tensors[kind], others[kind]) for kind in ("exp_avg", "exp_avg_sq", "ema"))
    for one, two in zip(saved.module.parameters(), restored.module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_average_takes_the_place_of_the_weights_in_parts_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_EXCHANGED", 3)  # of 8 elements
    engine, average = Engine(), torch.arange(8.0)
    [(flat, state)] = engine.optimizer.optimizer.state.items()
    weights = flat.detach().clone()
    state["ema"] = average.clone()
    with averaged_weights(engine):
        assert torch.equal(flat, average) and torch.equal(state["ema"], weights)
        assert torch.equal(torch.nn.utils.parameters_to_vector(engine.module.parameters()), average)
    assert torch.equal(flat, weights) and torch.equal(state["ema"], average)
    assert torch.equal(torch.nn.utils.parameters_to_vector(engine.module.parameters()), weights)


def test_a_new_run_and_one_from_other_weights_begin_their_average_with_their_weights() -> None:
    engine, given = Engine(), {"weight": torch.arange(6.0), "bias": torch.tensor([6.0, 7.0])}
    [(flat, state)] = engine.optimizer.optimizer.state.items()
    assert torch.equal(state["ema"], flat)
    write_weights_into(engine, lambda name, offset, target: target.copy_(given[name][offset:][: len(target)]))
    assert torch.equal(flat, torch.arange(8.0)) and torch.equal(state["ema"], flat)


def test_a_run_that_was_saved_without_an_average_begins_it_with_its_weights(tmp_path: Path) -> None:
    saved, restored = Engine(1), Engine(2)
    [(flat, state)] = saved.optimizer.optimizer.state.items()
    del state["ema"]
    checkpoints = Checkpoints(tmp_path, OneRank(), 9)
    checkpoints.save(saved, replace(META, step=7))
    checkpoints.close()
    checkpoints.restore(restored, find_checkpoint(tmp_path), META)
    [others] = restored.optimizer.optimizer.state.values()
    assert torch.equal(others["ema"], flat)


def test_a_rank_that_holds_no_slice_takes_part_when_weights_and_average_are_exchanged() -> None:
    engine, calls = Engine(), []
    for parameter in engine.module.parameters():
        parameter._hp_mapping = None
    engine.optimizer.update_lp_params = lambda: calls.append("collective")
    with averaged_weights(engine):
        assert calls == ["collective"]
    assert calls == ["collective"] * 2


@pytest.mark.parametrize("file", ["meta.json", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated", "flipped"])
def test_damage_to_any_file_is_found_before_use_and_the_checkpoint_before_it_is_taken(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture, file: str, damage: str
) -> None:
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    path = find_checkpoint(run) / file
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"removed": b"", "emptied": b"", "truncated": content[:middle], "flipped": flipped}[damage])
    if damage == "removed":
        path.unlink()
    assert Checkpoints(run, OneRank(), 9).newest_intact() == run / "checkpoints" / "step-00000004"
    assert "checkpoint step-00000006 is damaged" in capsys.readouterr().out
    with pytest.raises(InputError, match="step-00000006"):
        load_model(find_checkpoint(run))


def test_a_planted_pickle_does_not_run_whatever_the_manifest_says(uninterrupted: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    run = shutil.copytree(uninterrupted, tmp_path / "run")
    checkpoint = find_checkpoint(run)
    content, file = pickle.dumps(Planted()), "rank-00000.safetensors"
    (checkpoint / file).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"rank-00000\.safetensors cannot be read as slices"):
        load_model(checkpoint)
    assert not (tmp_path / "ran").exists()


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
    ("other", "told"),
    [
        ({"precision": "bf16"}, "precision fp32 -> bf16; give the run's train.precision"),
        ({"data": "b" * 64}, "data (index aaaaaaaaaaaa) -> data (index bbbbbbbbbbbb); give the run's data.path"),
        ({"shares": ("1/4", "3/4")}, "shares ('1',) -> ('1/4', '3/4'); give the run's weights in data.path"),
        ("train.global_batch=8", "global_batch 1024 -> 8; give the run's train.global_batch"),
        ("train.seed=5", "order (0, 16, None) -> (5, 16, None); give the run's train.seed, data.shuffle_window"),
        ("data.shuffle_window=5", "order (0, 16, None) -> (0, 5, None)"),
        ("data.heldout=0.25", "order (0, 16, None) -> (0, 16, 0.25)"),
        ("model.transformer.dim=64", "model.transformer.dim 512 -> 64; give the model settings"),
        ("optimizer.name=muon", "optimizer adamw -> muon; give the run's optimizer.name"),
        ("train.steps=300000", "steps 250000 -> 300000; the cosine schedule depends on train.steps"),
    ],
)
def test_a_resume_compares_everything_that_the_state_depends_on(
    tmp_path: Path, other: dict[str, Any] | str, told: str
) -> None:
    save(tmp_path, 1)
    saved, changed = find_checkpoint(tmp_path), other
    if isinstance(other, str):
        changed = {"config": load_config(None, [other])}
    with pytest.raises(InputError) as refused:
        Checkpoints(tmp_path, OneRank(), keep=1).restore(Engine(), saved, replace(META, **changed))
    assert str(refused.value).startswith(f"{saved}: settings must be those of the run, got ")
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "other",
    [
        ["optimizer.schedule=wsd", "train.steps=300000"],
        ["train.zero_stage=1", "train.micro_batch=4", "optimizer.lr=1", "model.backend=torch"],
        ["model.activation_checkpointing=full", "train.ema_decay=0", "train.output=elsewhere"],
    ],
)
def test_a_resume_takes_other_settings_that_the_state_does_not_depend_on(tmp_path: Path, other: list[str]) -> None:
    save(tmp_path, 1)
    expected = replace(META, config=load_config(None, other), data_path="elsewhere", world_size=3)
    checkpoints = Checkpoints(tmp_path, OneRank(), keep=1)
    assert checkpoints.restore(Engine(), find_checkpoint(tmp_path), expected) == replace(expected, step=1)


def test_a_run_is_described_by_its_data_and_all_settings_of_its_model(digits: Path) -> None:
    config = small_config(digits)
    described = initial_meta(config, open_data(config), 2, bf16=True)
    sha256 = hashlib.sha256((digits / "index.json").read_bytes()).hexdigest()
    known = {"world_size": 2, "precision": "bf16", "data": sha256, "data_path": str(digits), "config": config}
    assert described == replace(META, **known, versions=described.versions)
    assert described.versions["torch"] == torch.__version__
    model = described.dependencies["model"]
    assert model.keys() == ModelConfig.model_fields.keys() - {"backend", "activation_checkpointing"}
    mixed = small_config(f"{{{digits}: 1, {digits.parent / 'heldout'}: 3}}")
    other = initial_meta(mixed, open_data(mixed), 2, bf16=True)
    assert other.shares == ("1/4", "3/4") and other.data != described.data
