"""A run folder, as everything after training reads it; needs neither ranks nor DeepSpeed.

RUN/config.yaml       the resolved config of its last start
RUN/data.json         how to read and draw the run's data: tokenizer, modalities, image size
RUN/metrics.jsonl     a row every `log_every` steps
RUN/checkpoints/latest                  the name of the newest checkpoint
RUN/checkpoints/step-00000500/
    meta.json                           step, packs consumed, model, data, world size
    model.safetensors                   the weights, fp32, one whole tensor each
    engine/                             DeepSpeed's sharded state, which training resumes from
    manifest.json                       size and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from transfusion_fast.config import Config, ModelConfig, changes, parse
from transfusion_fast.data.folder import FetchError
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.data.pack import KIND_TEXT, ModalityInfo, Pack
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import write_atomically
from transfusion_fast.model.transfusion import Transfusion

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
META = "meta.json"
WEIGHTS = "model.safetensors"
DATA = "data.json"
CHECKPOINT_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is of."""

    step: int
    packs_consumed: int
    skipped_steps: int
    world_size: int
    precision: str
    global_batch: int
    data: str
    """sha256 of the data folder's index, or of those of all folders."""
    data_path: str
    order: tuple[int, int]
    """Seed and shuffle window: what the order of the packs depends on."""
    model: dict[str, Any]
    quarantined: int = 0
    """Packs left out because they could not be read."""
    shares: tuple[str, ...] = ("1",)
    """The part of the tokens that each data folder gives."""


@dataclass(frozen=True)
class DataDescription:
    """What sampling must know of the training data."""

    tokenizer: Tokenizer
    modalities: tuple[ModalityInfo, ...]
    image_sizes: tuple[tuple[int, int], ...]
    """(height, width) in values of the first image of each modality: what is drawn unless asked otherwise."""

    def grid(self, modality: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of the usual size."""
        height, width = self.image_sizes[modality]
        patch = self.modalities[modality].patch_size
        return height // patch, width // patch


def describe_data(data: Mixture, pass_over_unreadable: bool = False) -> DataDescription:
    """Reads packs until every modality has shown an image; a modality that never does gets one patch."""
    first = data.datasets[0]
    sizes = _image_sizes(data, pass_over_unreadable)
    return DataDescription(load_tokenizer(first.index.tokenizer, first.folder), data.modalities, sizes)


def _image_sizes(data: Mixture, pass_over_unreadable: bool) -> tuple[tuple[int, int], ...]:
    found: dict[int, tuple[int, int]] = {}
    for pack in _packs_with_images(data, pass_over_unreadable):
        for _, kind, _, _, height, width in pack.segments[pack.segments[:, 1] != KIND_TEXT].tolist():
            found.setdefault(kind - 1, (height, width))
        if len(found) == len(data.modalities):
            break
    return tuple(found.get(m, (info.patch_size, info.patch_size)) for m, info in enumerate(data.modalities))


def _packs_with_images(data: Mixture, pass_over_unreadable: bool) -> Iterator[Pack]:
    """The packs of every dataset that has modalities."""
    for reader in (PackReader(d.folder, d.index) for d in data.datasets if d.index.modalities):
        for position in range(len(reader)):
            try:
                pack = reader.read(position)
            except FetchError:
                raise
            except InputError:
                if pass_over_unreadable:
                    continue
                raise
            yield pack


def write_data_description(run: Path, data: DataDescription) -> None:
    """Puts data.json, and the tokenizer that it names, into the run folder."""
    data.tokenizer.write(run)
    record = {
        "tokenizer": data.tokenizer.describe(),
        "modalities": [asdict(m) for m in data.modalities],
        "image_sizes": data.image_sizes,
    }
    write_atomically(run / DATA, json.dumps(record, indent=1))


def read_data_description(run: Path) -> DataDescription:
    """Reads data.json; InputError where the folder is no run."""
    try:
        record = json.loads((run / DATA).read_text())
        modalities = tuple(ModalityInfo(**m) for m in record["modalities"])
        sizes = tuple((int(height), int(width)) for height, width in record["image_sizes"])
        return DataDescription(load_tokenizer(record["tokenizer"], run), modalities, sizes)
    except FileNotFoundError as error:
        raise InputError(f"{run}: is not a run folder (no {DATA}); train first: deepspeed train/pretrain.py") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run / DATA}: cannot be read ({error}); resume training to write it anew") from error


def write_config(run: Path, config: Config) -> list[str]:
    """Puts config.yaml into the run folder; returns what differs from the one there, `NAME OLD -> NEW` each."""
    path, now = run / CONFIG, config.model_dump(mode="json")
    try:
        before = yaml.safe_load(path.read_text()) if path.exists() else now
        changed = list(changes(before, now))
    except (OSError, ValueError, yaml.YAMLError) as error:
        changed = [f"not known, as the {CONFIG} of before cannot be read ({' '.join(str(error).split()):.100})"]
    write_atomically(path, yaml.safe_dump(now, sort_keys=False))
    return changed


def check_output(run: Path) -> None:
    """Raises InputError where training in that folder would write over what is not a run's."""
    ours = (run / CHECKPOINTS).is_dir()
    if not ours and (run / DATA).is_file():
        read_data_description(run)
        ours = True
    if run.exists() and not ours and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"train.output must be new, empty or the folder of a run, got {run}; give another")


def find_checkpoint(run: Path, name: str | None = None) -> Path:
    """The checkpoint of that name, or the one that `latest` names; InputError where it is not there."""
    if name is None:
        pointer = run / CHECKPOINTS / LATEST
        if not pointer.is_file():
            raise InputError(f"{run}: holds no finished checkpoint; train first: deepspeed train/pretrain.py")
        name = pointer.read_text().strip()
    checkpoint = run / CHECKPOINTS / name
    if not CHECKPOINT_NAME.fullmatch(name) or not checkpoint.is_dir():
        raise InputError(f"{run}: has no checkpoint {name!r}; see {run / CHECKPOINTS}")
    return checkpoint


def load_model(checkpoint: Path) -> Transfusion:
    """The model of a checkpoint, fp32, ready to sample from; on the GPU where there is one.

    Raises:
        InputError: a damaged checkpoint, or weights that are not the model's.
    """
    meta = read_meta(checkpoint)
    for problem in damage(checkpoint, [Path(WEIGHTS), Path(META)]):
        raise InputError(f"{checkpoint}: is damaged ({problem}); name another checkpoint, or resume training")
    model = Transfusion(parse(ModelConfig, meta.model, str(checkpoint / META)))
    weights = load_file(checkpoint / WEIGHTS)
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        names = sorted(weights.keys() ^ parameters.keys())
        raise InputError(
            f"{checkpoint / WEIGHTS}: does not hold the model's weights (differing: {', '.join(names[:3])})"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
                raise InputError(f"{checkpoint / WEIGHTS}: {name} is {shapes}; the checkpoint is of another model")
            parameter.copy_(weights[name])
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_meta(checkpoint: Path) -> Meta:
    """The description of a checkpoint; InputError where it is not one."""
    try:
        fields = json.loads((checkpoint / META).read_text())
        tuples = {name: tuple(value) for name, value in fields.items() if name in ("order", "shares")}
        return Meta(**{**fields, **tuples})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{checkpoint}: is not a checkpoint of this version ({error}); give a run folder") from error


def read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """(bytes, sha256) of each file; ValueError or OSError where it cannot be read."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    try:
        return {file: (entry["bytes"], entry["sha256"]) for file, entry in manifest.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a manifest: {error}") from error


def damage(checkpoint: Path, files: Iterable[Path]) -> Iterator[str]:
    """What is wrong with those files of a checkpoint, against its manifest."""
    try:
        expected = read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        yield f"{MANIFEST}: {type(error).__name__}"
        return
    for file in files:
        path = checkpoint / file
        if not path.is_file():
            yield f"{file}: missing"
        elif measure(path) != expected.get(str(file)):
            yield f"{file}: not as {MANIFEST} says"


def measure(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
