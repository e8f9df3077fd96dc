"""The files of a checkpoint, for everything that reads one. Needs neither ranks nor DeepSpeed.

RUN/checkpoints/latest                  the name of the newest checkpoint
RUN/checkpoints/step-00000500/
    meta.json                           step, packs consumed, config, data, versions
    rank-00000.safetensors, ...         each rank's slices of weights and optimizer state, fp32; see stored_slices.py
    manifest.json                       size and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.config import Config
from transfusion_fast.config_reading import parse
from transfusion_fast.errors import InputError
from transfusion_fast.training.stored_slices import EMA, WEIGHT, SliceWeights, StoredSlices

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
META = "meta.json"
CHECKPOINT_NAME = re.compile(r"step-\d{8,}")
Select = Callable[[list[str]], list[str]]
"""A function that picks the files of a checkpoint to check."""
_FREE_TO_CHANGE = {"backend", "activation_checkpointing"}  # model settings that change the computation, not the model


@dataclass(frozen=True)
class Meta:
    """The state of a run at a checkpoint, and what the state depends on."""

    step: int
    packs_consumed: int
    skipped_steps: int
    quarantined: int
    """Unreadable packs left out so far."""
    precision: str
    data: str
    """sha256 of the data folder's index, or of the indexes of all folders."""
    data_path: str
    shares: tuple[str, ...]
    """Fraction of the tokens that each data folder gives."""
    world_size: int
    config: Config
    versions: dict[str, str]
    """Versions of the packages that wrote it."""

    @property
    def dependencies(self) -> dict[str, Any]:
        """Everything that must be the same for the run to continue."""
        train, data, optimizer = self.config.train, self.config.data, self.config.optimizer
        return {
            "model": self.config.model.model_dump(mode="json", exclude=_FREE_TO_CHANGE),
            "data": self.data,
            "shares": self.shares,
            "order": (train.seed, data.shuffle_window, data.heldout if isinstance(data.heldout, float) else None),
            "global_batch": train.global_batch,
            "precision": self.precision,
            "optimizer": optimizer.name,
            "freeze": train.freeze,
            "steps": train.steps if optimizer.schedule == "cosine" else None,
        }


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first; they may be damaged."""
    return sorted(path for path in (run / CHECKPOINTS).glob("*") if CHECKPOINT_NAME.fullmatch(path.name))


def find_checkpoint(run: Path, name: str | None = None) -> Path:
    """Return the checkpoint of a name, by default the one that `latest` names; InputError if it does not exist."""
    if name is None:
        pointer = run / CHECKPOINTS / LATEST
        if not pointer.is_file():
            raise InputError(f"{run}: holds no finished checkpoint; train first: deepspeed train/pretrain.py")
        name = pointer.read_text(errors="replace").strip()
    checkpoint = run / CHECKPOINTS / name
    if not CHECKPOINT_NAME.fullmatch(name) or not checkpoint.is_dir():
        raise InputError(f"{run}: has no checkpoint {name!r}; see {run / CHECKPOINTS}")
    return checkpoint


def open_weights(
    checkpoint: Path, *, raw: bool = False, select: Callable[[list[str]], list[str]] = list
) -> SliceWeights:
    """Return the weights of a checkpoint, to be read in part: their average over steps if there is one and not `raw`.

    Args:
        select: picks the files to check, for ranks that divide them among themselves.

    Raises:
        InputError: a file does not match the manifest.
    """
    for problem in find_damage(checkpoint, select):
        raise InputError(f"{checkpoint}: is damaged ({problem}); name another checkpoint, or resume training")
    stored = open_slices(checkpoint)
    return SliceWeights(stored, EMA if EMA in stored.kinds and not raw else WEIGHT)


def open_slices(checkpoint: Path) -> StoredSlices:
    """Open the slices of all ranks that the manifest lists; InputError if they are not complete."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        return StoredSlices(checkpoint / Path(file).name for file in files if file != META)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint}: {error}; name another checkpoint") from error


def read_meta(checkpoint: Path) -> Meta:
    """Read the meta of a checkpoint; raise InputError if the folder is not a checkpoint of this version."""
    try:
        fields = json.loads((checkpoint / META).read_text())
        config = parse(Config, fields["config"], str(checkpoint / META))
        return Meta(**{**fields, "config": config, "shares": tuple(fields["shares"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{checkpoint}: is not a checkpoint of this version ({error}); give a run folder") from error


def meta_json(meta: Meta) -> str:
    """Return the contents of meta.json."""
    return json.dumps({**vars(meta), "config": meta.config.model_dump(mode="json")}, indent=1)


def find_damage(checkpoint: Path, select: Select = list) -> list[str]:
    """Return the problems of a checkpoint's files against its manifest; `select` picks the files to check."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        expected = {file: (entry["bytes"], entry["sha256"]) for file, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return [f"{MANIFEST}: {type(error).__name__}"]
    if META not in expected or len(expected) < 2:
        return [f"{MANIFEST}: lists no {META}, or no file of a rank"]
    problems = []
    for file in select(sorted(expected)):
        if not (checkpoint / file).is_file():
            problems.append(f"{file}: missing")
        elif _measured(checkpoint / file) != expected.get(file):
            problems.append(f"{file}: not as {MANIFEST} says")
    return problems


def _measured(path: Path) -> tuple[int, str] | None:
    try:
        return measure(path)
    except OSError:  # such as a disk that cannot read it; an exception on one rank would leave the others waiting
        return None


def measure(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
