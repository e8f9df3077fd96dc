"""Compare a run that resumes with its checkpoint: some settings must be equal, other differences are reported."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from transfusion_fast.config import Config
from transfusion_fast.config_reading import changes
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import InputError
from transfusion_fast.training.checkpoint_files import Meta, read_meta
from transfusion_fast.training.run_folder import changed_settings
from transfusion_fast.training.schedule import learning_rate

_HINTS = {
    "model": "give the model settings of the run, or another train.output",
    "data": "give the run's data.path, or another train.output",
    "shares": "give the run's weights in data.path, or another train.output",
    "order": "give the run's train.seed, data.shuffle_window and share of data.heldout, or another train.output",
    "global_batch": "give the run's train.global_batch, or another train.output",
    "precision": "give the run's train.precision, or another train.output",
    "freeze": "give the run's train.freeze, or begin a new run with train.init_from",
    "optimizer": "give the run's optimizer.name, or another train.output",
    "steps": "the cosine schedule depends on train.steps; give the train.steps of the run, begin a new run with "
    "train.init_from, or go on with optimizer.schedule=wsd or constant",
}


def initial_meta(config: Config, data: Mixture, world_size: int, *, bf16: bool) -> Meta:
    """Return the meta of a run before its first step."""
    return Meta(
        step=0,
        packs_consumed=0,
        skipped_steps=0,
        quarantined=0,
        precision="bf16" if bf16 else "fp32",
        data=data.fingerprint,
        data_path=str(data),
        shares=data.shares,
        world_size=world_size,
        config=config,
        versions={name: version(name) for name in ("torch", "deepspeed")},
    )


def check_same_run(checkpoint: Path, saved: Meta, expected: Meta) -> None:
    """Raise InputError if a run with the meta `expected` cannot go on from a checkpoint with the meta `saved`."""
    for name, before in saved.dependencies.items():
        wanted = expected.dependencies[name]
        if wanted == before or (name == "steps" and None in (wanted, before)):
            continue
        difference = ", ".join(changes(before, wanted, name))
        if name == "data":  # paths too long for `changes`, and fingerprints, since the folder may be the same
            difference = " -> ".join(f"{m.data_path} (index {m.data[:12]})" for m in (saved, expected))
        raise InputError(f"{checkpoint}: settings must be those of the run, got {difference}; {_HINTS[name]}")


def resume_notes(run: Path, checkpoint: Path, config: Config) -> list[str]:
    """Return lines about what has changed since the run was last started, and about a jump of the learning rate."""
    notes, saved = [], read_meta(checkpoint)
    if changed := changed_settings(run, config):
        notes.append(f"settings changed since the run was last started: {', '.join(changed)}")
    before, after = (
        learning_rate(saved.step - 1 + i, c.train.steps, c.optimizer) for i, c in enumerate((saved.config, config))
    )
    if after > 1.5 * before and saved.step >= config.optimizer.warmup_steps:
        notes.append(f"warning: the learning rate goes from {before:.2e} to {after:.2e}, and the loss may rise")
    return notes
