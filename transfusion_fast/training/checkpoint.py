"""Checkpoints that are whole or not there; run.py says what is in one.

A checkpoint is written under a staging name, hashed, renamed, and only then named by `latest`. One whose files do not
match its manifest is passed over for the one before it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from transfusion_fast.errors import InputError
from transfusion_fast.files import sync, write_durably
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    META,
    WEIGHTS,
    Meta,
    damage,
    measure,
    read_manifest,
    read_meta,
)

ENGINE = "engine"


class Checkpoints:
    """The checkpoints of one run folder, which all ranks share. Every method is collective."""

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = run / CHECKPOINTS, ranks, keep

    def save(self, engine: Any, meta: Meta) -> None:
        """Writes a checkpoint and drops all but the newest `keep`."""
        name = f"step-{meta.step:08d}"
        staging = self.folder / f".staging-{name}"
        if self.ranks.is_main:
            for unfinished in self.folder.glob(".staging-*"):  # of a save that was killed
                shutil.rmtree(unfinished)
            staging.mkdir(parents=True)
        self.ranks.barrier()
        engine.save_checkpoint(str(staging), tag=ENGINE, save_latest=False)
        weights = _gather_weights(engine.module, keep=self.ranks.is_main)
        if self.ranks.is_main:
            save_file(weights, staging / WEIGHTS)
            (staging / META).write_text(json.dumps(asdict(meta), indent=1))
        self.ranks.barrier()
        own = [(str(p.relative_to(staging)), *measure(p)) for p in self._own_share(_files(staging))]
        hashes = self.ranks.gather(own)
        if self.ranks.is_main:
            manifest = {file: {"bytes": size, "sha256": digest} for file, size, digest in sorted(hashes)}
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
            sync(*staging.rglob("*"), staging)
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a damaged one of this step, passed over on resume
            os.rename(staging, self.folder / name)
            self._point_latest(name)
            self._prune(name)
        self.ranks.barrier()

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; None for a run that has none yet.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        if not self.folder.is_dir() or not (names := sorted(self._names(), reverse=True)):
            return None
        for name in names:
            problems = self.ranks.gather(self._damage(self.folder / name))
            if not problems:
                return self.folder / name
            if self.ranks.is_main:
                print(f"checkpoint {name} is damaged ({min(problems)}); trying the one before it", flush=True)
        raise InputError(f"{self.folder}: all {len(names)} checkpoints are damaged; move the run folder to start anew")

    def restore(self, engine: Any, checkpoint: Path, expected: Meta) -> Meta:
        """Loads a checkpoint into the engine; `expected` describes this run, its counters aside.

        Raises:
            InputError: a checkpoint of another model, data, batch size, precision or number of ranks.
        """
        meta = read_meta(checkpoint)
        for name, hint in _MUST_MATCH.items():
            got, want = getattr(meta, name), getattr(expected, name)
            if got != want:
                got, want = map(_data, (meta, expected)) if name == "data" else _difference(got, want)
                raise InputError(f"{checkpoint}: {name} is {got}, but this run has {want}; {hint}")
        path, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE)
        if path is None:
            raise InputError(f"{checkpoint}: DeepSpeed found no state in it; remove it to use the one before")
        engine.skipped_steps = meta.skipped_steps
        return meta

    def _names(self) -> list[str]:
        return [p.name for p in self.folder.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)]

    def _prune(self, newest: str) -> None:
        """Keeps the newest ones up to this; any of a later step was passed over as damaged and has been overtaken."""
        names = sorted(self._names())
        good = [name for name in names if name <= newest][-self.keep :]
        for name in names:
            if name not in good:
                shutil.rmtree(self.folder / name)

    def _point_latest(self, name: str) -> None:
        write_durably(self.folder / LATEST, name + "\n")

    def _own_share(self, files: list[Path]) -> list[Path]:
        return files[self.ranks.rank :: self.ranks.world_size]

    def _damage(self, checkpoint: Path) -> list[str]:
        """What is wrong with this rank's share of the files."""
        try:
            files = [Path(file) for file in sorted(read_manifest(checkpoint))]
        except (OSError, ValueError) as error:
            return [f"{MANIFEST}: {type(error).__name__}"]
        return list(damage(checkpoint, self._own_share(files)))


_MUST_MATCH = {
    "model": "give the model settings of the run, or another train.output",
    "data": "give the run's data.path, or another train.output",
    "shares": "give the run's weights in data.path, or another train.output",
    "order": "give the run's train.seed and data.shuffle_window, or another train.output",
    "global_batch": "give the run's train.global_batch, or another train.output",
    "precision": "give the run's train.precision, or another train.output",
    "world_size": "start as many ranks as the run had, or give another train.output",
}


def _gather_weights(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The fp32 weights by name, gathered one after another; an empty dict on ranks that do not keep them."""
    weights = {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if keep:
            weights[name] = full.float().cpu().clone()
    return weights


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _difference(got: Any, want: Any) -> tuple[Any, Any]:
    """The parts of two settings that differ, for the message."""
    if not isinstance(got, dict) or not isinstance(want, dict):
        return got, want
    keys = [k for k in sorted({*got, *want}) if got.get(k) != want.get(k)]
    return tuple({k: _difference(got.get(k), want.get(k))[i] for k in keys} for i in (0, 1))  # type: ignore[return-value]


def _data(meta: Meta) -> str:
    """The fingerprint too: the folder may be the same, and what is in it another."""
    return f"{meta.data_path} (index {meta.data[:12]})"
