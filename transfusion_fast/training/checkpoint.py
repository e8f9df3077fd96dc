"""Checkpoints of a run, each complete or absent; checkpoint_files.py describes their files.

Saving copies this rank's slices to host memory, and a thread writes them to a staging folder while training goes on.
Once all ranks have written, the folder is renamed, and only then named by `latest`. On resume, a checkpoint whose files
do not match its manifest is skipped in favor of the one before it.
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.files import sync, write_durably
from transfusion_fast.training.checkpoint_files import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    META,
    Meta,
    find_damage,
    list_checkpoints,
    measure,
    meta_json,
    open_slices,
    read_meta,
)
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.resume import check_same_run
from transfusion_fast.training.slices import copy_to_host, local_slices, restore_slices
from transfusion_fast.training.stored_slices import SliceSpan, write_slices

_DELETED = ".deleted-"
_LEFTOVERS = (".step-*", f"{_DELETED}*", f".{LATEST}.*", f"..{LATEST}.*")  # of staging, removing and naming


@dataclass(frozen=True)
class _Save:
    """A save in progress; `measured` will hold the size and sha256 of this rank's file."""

    meta: Meta
    staging: Path
    file: str
    measured: Future[tuple[int, str]] = field(default_factory=Future)


class Checkpoints:
    """The checkpoints of one run folder, shared by all ranks."""

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.run, self.folder, self.ranks, self.keep = run, run / CHECKPOINTS, ranks, keep
        self._save: _Save | None = None
        self._removals: list[Thread] = []

    def save(self, engine: Any, meta: Meta) -> None:
        """Begin to write a checkpoint; finish the one before first. Collective."""
        self.finish()
        save = self._save = _Save(meta, self.folder / f".{_name(meta)}", f"rank-{self.ranks.rank:05d}.safetensors")
        with self._keep_error(save):
            slices = [one for one in local_slices(engine) if one.saved]
            tensors = copy_to_host(slices, engine.optimizer.optimizer)
            spans = {one.name: one.span for one in slices}
            Thread(target=self._write, args=(save, spans, tensors)).start()

    def _write(self, save: _Save, spans: dict[str, SliceSpan], tensors: dict[str, Tensor]) -> None:
        with self._keep_error(save):
            save.staging.mkdir(parents=True, exist_ok=True)
            write_slices(save.staging / save.file, spans, tensors)
            sync(save.staging / save.file)
            save.measured.set_result(measure(save.staging / save.file))

    @contextmanager
    def _keep_error(self, save: _Save) -> Iterator[None]:
        """Leave an error to `finish`, which raises it on all ranks; none of them waits for this one in vain."""
        try:
            yield
        except (InputError, OSError) as error:
            save.measured.set_exception(error)
        except Exception:  # noqa: BLE001 (a fault of the program, which its traceback shows)
            where = f"rank {self.ranks.rank} cannot save step {save.meta.step}"
            save.measured.set_exception(InputError(f"{where}\n{traceback.format_exc()}"))

    @property
    def in_progress(self) -> bool:
        """True from `save` to the publication of its checkpoint; the same on all ranks."""
        return self._save is not None

    @property
    def written(self) -> bool:
        """True if this rank has written its part of the save in progress, or failed to."""
        return self._save is not None and self._save.measured.done()

    def finish(self) -> None:
        """Publish the checkpoint in progress, if there is one, as soon as all ranks have written it. Collective.

        Raises:
            InputError: on all ranks, if any rank could not write its part.
        """
        save, self._save = self._save, None
        if save is None:
            return
        files = self.ranks.collect(lambda: (save.file, *save.measured.result()))
        self.ranks.together(lambda: self._publish(save, files))

    def close(self) -> None:
        """Publish the last checkpoint, and wait until the old ones are removed. Collective."""
        self.finish()
        for thread in self._removals:
            thread.join()

    def _publish(self, save: _Save, files: list[tuple[str, int, str]]) -> None:
        if not self.ranks.is_main:
            return
        (save.staging / META).write_text(meta_json(save.meta))
        files = [*files, (META, *measure(save.staging / META))]
        manifest = {file: {"bytes": size, "sha256": digest} for file, size, digest in sorted(files)}
        (save.staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
        sync(save.staging / META, save.staging / MANIFEST, save.staging)
        name = _name(save.meta)
        self._delete(name)  # it exists only if it was damaged and skipped on resume
        os.rename(save.staging, self.folder / name)
        write_durably(self.folder / LATEST, name + "\n")
        names = self._names()
        for other in {*names} - {*[other for other in names if other <= name][-self.keep :]}:
            self._delete(other)  # those of later steps were damaged and skipped on resume

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint whose files match its manifest; None for a run without checkpoints. Collective.

        Raises:
            InputError: all checkpoints are damaged.
        """
        names = self._names()
        for name in reversed(names):
            problems = self.ranks.gather(find_damage(self.folder / name, self.ranks.own))
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
        """Load a checkpoint of any number of ranks and any ZeRO stage into the engine. Collective.

        Args:
            expected: the meta of this run before its first step.

        Returns:
            `expected` with the progress of the checkpoint.

        Raises:
            InputError: the checkpoint has another model, data, batch size or precision.
        """
        meta = read_meta(checkpoint)
        check_same_run(checkpoint, meta, expected)
        restore_slices(engine, open_slices(checkpoint), meta.step - meta.skipped_steps)
        engine.global_steps, engine.skipped_steps = meta.step, meta.skipped_steps
        progress = ("step", "packs_consumed", "skipped_steps", "quarantined")
        return replace(expected, **{name: getattr(meta, name) for name in progress})

    def repair(self, newest: Path | None) -> None:
        """Remove what killed saves left behind, and make `latest` name the newest intact checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in (path for pattern in _LEFTOVERS for path in self.folder.glob(pattern)):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        latest = self.folder / LATEST
        if newest is not None and (not latest.is_file() or latest.read_text().strip() != newest.name):
            write_durably(latest, newest.name + "\n")

    def _names(self) -> list[str]:
        return [path.name for path in list_checkpoints(self.run)]

    def _delete(self, name: str) -> None:
        """Remove a checkpoint in a thread under another name, so that one half removed is not taken for damaged."""
        if (self.folder / name).exists():
            hidden = self.folder / f"{_DELETED}{name}"
            os.rename(self.folder / name, hidden)
            self._removals = [thread for thread in self._removals if thread.is_alive()]
            self._removals.append(Thread(target=shutil.rmtree, args=(hidden, True)))
            self._removals[-1].start()


def _name(meta: Meta) -> str:
    return f"step-{meta.step:08d}"
