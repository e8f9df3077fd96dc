"""The files of a run folder, for everything that reads a run. Needs neither ranks nor DeepSpeed.

RUN/config.yaml       the resolved config of the last start
RUN/data.json         how to read and draw the run's data: tokenizer, modalities, image sizes
RUN/metrics.jsonl     a row every `log_every` steps
RUN/validation.jsonl  the loss of held-out packs
RUN/samples/          pictures of what the model draws
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from transfusion_fast.config import Config
from transfusion_fast.config_reading import changes, parse
from transfusion_fast.data.folder import FetchError
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.data.pack import KIND_TEXT, ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import write_atomically
from transfusion_fast.model.transfusion import MODEL_CONFIG, Transfusion
from transfusion_fast.model.weights import load_weights
from transfusion_fast.training.stored_slices import EMA, WEIGHT, SliceWeights, StoredSlices

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
META = "meta.json"
DATA = "data.json"
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
            "steps": train.steps if optimizer.schedule == "cosine" else None,
        }


@dataclass(frozen=True)
class DataDescription:
    """The properties of the training data that sampling needs."""

    tokenizer: Tokenizer
    modalities: tuple[ModalityInfo, ...]
    image_sizes: tuple[tuple[int, int], ...]
    """(height, width) in values of the first image of each modality, the default size of drawn images."""

    def grid(self, modality: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of the default size."""
        height, width = self.image_sizes[modality]
        patch = self.modalities[modality].patch_size
        return height // patch, width // patch


def describe_data(data: Mixture, skip_unreadable: bool = False) -> DataDescription:
    """Read packs until every modality has shown an image; a modality without images gets the size of one patch."""
    sizes: dict[int, tuple[int, int]] = {}
    readers = [PackReader(d.folder, d.index) for d in data.datasets if d.index.modalities]
    for reader, number in ((r, n) for r in readers for n in range(len(r))):
        try:
            segments = reader.read(number).segments
        except InputError as error:
            if isinstance(error, FetchError) or not skip_unreadable:
                raise
            continue
        for _, kind, _, _, height, width in segments[segments[:, 1] != KIND_TEXT].tolist():
            sizes.setdefault(kind - 1, (height, width))
        if len(sizes) == len(data.modalities):
            break
    first = data.datasets[0]
    return DataDescription(
        tokenizer=load_tokenizer(first.index.tokenizer, first.folder),
        modalities=data.modalities,
        image_sizes=tuple(sizes.get(m, (info.patch_size,) * 2) for m, info in enumerate(data.modalities)),
    )


def write_data_description(run: Path, data: DataDescription) -> None:
    """Write data.json, and the tokenizer that it names, to the run folder."""
    data.tokenizer.write(run)
    record = {
        "tokenizer": data.tokenizer.describe(),
        "modalities": [asdict(m) for m in data.modalities],
        "image_sizes": data.image_sizes,
    }
    write_atomically(run / DATA, json.dumps(record, indent=1))


def read_data_description(run: Path) -> DataDescription:
    """Read data.json; raise InputError if the folder is not a run, or the file is damaged."""
    try:
        record = json.loads((run / DATA).read_text())
        modalities = tuple(ModalityInfo(**m) for m in record["modalities"])
        sizes = tuple((int(height), int(width)) for height, width in record["image_sizes"])
        return DataDescription(load_tokenizer(record["tokenizer"], run), modalities, sizes)
    except FileNotFoundError as error:
        raise InputError(f"{run}: is not a run folder (no {DATA}); train first: deepspeed train/pretrain.py") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{run / DATA}: cannot be read ({error}); resume training to write it again") from error


def write_config(run: Path, config: Config) -> None:
    """Write config.yaml to the run folder."""
    write_atomically(run / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def changed_settings(run: Path, config: Config) -> list[str]:
    """Return how a config differs from that of the run's last start, each setting as `NAME OLD -> NEW`."""
    path, settings = run / CONFIG, config.model_dump(mode="json")
    try:
        return list(changes(yaml.safe_load(path.read_text()), settings)) if path.exists() else []
    except (OSError, ValueError, yaml.YAMLError) as error:
        return [f"unknown, since the previous config.yaml cannot be read ({' '.join(str(error).split()):.100})"]


def check_output(run: Path) -> None:
    """Raise InputError if training in a folder would overwrite anything but a run."""
    if (run / CHECKPOINTS).is_dir() or not run.exists():
        return
    if (run / DATA).is_file():
        read_data_description(run)  # fails unless a run wrote it
    elif not run.is_dir() or any(run.iterdir()):
        raise InputError(f"train.output must be new, empty or the folder of a run, got {run}; give another")


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


def open_model(folder: Path, checkpoint: str | None = None, *, raw: bool = False) -> Transfusion:
    """Return the model of a run or of an exported folder, fp32, in evaluation mode; on the GPU if there is one.

    Args:
        checkpoint: name of a checkpoint of the run; default: the latest.
        raw: take the weights of the last step, even if the run keeps an average of the weights.

    Raises:
        InputError: the folder has no model, or its files are damaged or do not fit each other.
    """
    if not is_export(folder):
        return load_model(find_checkpoint(folder, checkpoint), raw=raw)
    if checkpoint is not None or raw:
        raise InputError(f"a checkpoint or raw weights must come from a run, got {folder}, an exported folder")
    return Transfusion.from_pretrained(folder, _device())


def is_export(folder: Path) -> bool:
    """Return whether train/export.py wrote a folder."""
    return (folder / MODEL_CONFIG).is_file()


def load_model(checkpoint: Path, *, raw: bool = False) -> Transfusion:
    """Return the model of a checkpoint, as `open_model` does."""
    with torch.device(_device()):
        model = Transfusion(read_meta(checkpoint).config.model)
    load_weights(model, open_weights(checkpoint, raw=raw), checkpoint)
    return model.eval()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
