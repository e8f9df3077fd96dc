"""Checkpoints of a run, each complete or absent; run_folder.py describes their files.

A checkpoint is written to a staging folder, hashed, synced to disk, renamed, and only then named by `latest`. On
resume, a checkpoint whose files do not match its manifest is skipped in favor of the one before it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from transfusion_fast.config import changes
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
    find_damage,
    measure,
    read_meta,
)

_ENGINE = "engine"
_MUST_MATCH = {
    "model": "give the model settings of the run, or another train.output",
    "data": "give the run's data.path, or another train.output",
    "shares": "give the run's weights in data.path, or another train.output",
    "order": "give the run's train.seed and data.shuffle_window, or another train.output",
    "global_batch": "give the run's train.global_batch, or another train.output",
    "precision": "give the run's train.precision, or another train.output",
    "world_size": "start as many ranks as the run had, or give another train.output",
}


class Checkpoints:
    """The checkpoints of one run folder, shared by all ranks. The public methods are collective."""

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = run / CHECKPOINTS, ranks, keep

    def save(self, engine: Any, meta: Meta) -> None:
        """Write a checkpoint, and delete all but the newest `keep`."""
        name = f"step-{meta.step:08d}"
        staging = self.folder / f".staging-{name}"
        if self.ranks.is_main:
            for incomplete in self.folder.glob(".staging-*"):  # left by a save that was killed
                shutil.rmtree(incomplete)
            staging.mkdir(parents=True)
        self.ranks.barrier()
        engine.save_checkpoint(str(staging), tag=_ENGINE, save_latest=False)
        # Every rank takes part in gathering each full weight, and only the main rank keeps them.
        gathered = ((key, safe_get_full_fp32_param(p)) for key, p in engine.module.named_parameters())
        weights = {key: weight.float().cpu().clone() for key, weight in gathered if self.ranks.is_main}
        if self.ranks.is_main:
            save_file(weights, staging / WEIGHTS)
            (staging / META).write_text(json.dumps(asdict(meta), indent=1))
        self.ranks.barrier()
        files = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
        hashes = self.ranks.gather([(file, *measure(staging / file)) for file in self._own_share(files)])
        if self.ranks.is_main:
            manifest = {file: {"bytes": size, "sha256": digest} for file, size, digest in sorted(hashes)}
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
            sync(*staging.rglob("*"), staging)
            # A checkpoint of this step exists only if it was damaged and skipped on resume.
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.rename(staging, self.folder / name)
            write_durably(self.folder / LATEST, name + "\n")
            self._delete_all_but_newest(name)
        self.ranks.barrier()

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint whose files match its manifest; None for a run without checkpoints.

        Raises:
            InputError: all checkpoints are damaged.
        """
        names = self._names() if self.folder.is_dir() else []
        for name in reversed(names):
            problems = self.ranks.gather(find_damage(self.folder / name, self._own_share))
            if not problems:
                return self.folder / name
            if self.ranks.is_main:
                print(f"checkpoint {name} is damaged ({min(problems)}); trying the one before it", flush=True)
        if names:
            raise InputError(
                f"{self.folder}: all {len(names)} checkpoints are damaged; move the run folder to start over"
            )
        return None

    def restore(self, engine: Any, checkpoint: Path, expected: Meta) -> Meta:
        """Load a checkpoint into the engine, and return its meta; `expected` describes this run at step 0.

        Raises:
            InputError: the checkpoint has another model, data, batch size, precision or number of ranks.
        """
        meta = read_meta(checkpoint)
        for name, hint in _MUST_MATCH.items():
            saved, wanted = getattr(meta, name), getattr(expected, name)
            if saved == wanted:
                continue
            difference = ", ".join(changes(saved, wanted, name))
            if name == "data":  # paths too long for `changes`, and fingerprints, since the folder may be the same
                difference = " -> ".join(f"{m.data_path} (index {m.data[:12]})" for m in (meta, expected))
            raise InputError(f"{checkpoint}: settings must be those of the run, got {difference}; {hint}")
        path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE)
        if path is None:
            raise InputError(f"{checkpoint}: DeepSpeed found no state in it; remove it to use the one before")
        return meta

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if CHECKPOINT_NAME.fullmatch(path.name))

    def _delete_all_but_newest(self, newest: str) -> None:
        """Keep the last checkpoints up to `newest`; those of later steps were damaged and skipped on resume."""
        names = self._names()
        for name in {*names} - {*[name for name in names if name <= newest][-self.keep :]}:
            shutil.rmtree(self.folder / name)

    def _own_share(self, files: list[str]) -> list[str]:
        """Return the files that this rank hashes."""
        return files[self.ranks.rank :: self.ranks.world_size]
