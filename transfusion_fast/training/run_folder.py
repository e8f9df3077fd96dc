"""The files of a run folder, for everything that reads a run. Needs neither ranks nor DeepSpeed.

RUN/config.yaml       the resolved config of the last start
RUN/data.json         how to read and draw the run's data: tokenizer, modalities, image sizes
RUN/metrics.jsonl     a row every `log_every` steps
RUN/validation.jsonl  the loss of held-out packs
RUN/samples/          pictures of what the model draws
RUN/checkpoints/      see checkpoint_files.py
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from transfusion_fast.config import Config, ModelConfig
from transfusion_fast.config_reading import changes, parse
from transfusion_fast.data.folder import FetchError
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.data.pack import KIND_TEXT, ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json, write_atomically
from transfusion_fast.model.transfusion import MODEL_CONFIG, Transfusion
from transfusion_fast.model.weights import load_weights
from transfusion_fast.training.checkpoint_files import CHECKPOINTS, find_checkpoint, open_weights, read_meta

CONFIG = "config.yaml"
DATA = "data.json"
LAYOUT = ("caption_first", "prob_uncond", "noise_cap", "context", "copies")
"""Settings of `DataConfig` that the losses of a model depend on, which exports keep."""
_PACKS = 8


@dataclass(frozen=True)
class DataDescription:
    """The properties of the training data that sampling needs."""

    tokenizer: Tokenizer
    modalities: tuple[ModalityInfo, ...]
    image_sizes: tuple[tuple[int, int], ...]
    """(height, width) in values of the first image of each modality, the default size of drawn images."""
    bounds: tuple[float | None, ...] = ()
    """Largest absolute value of each modality's images: 1 for pixels, that of some packs for latents; None or nothing
    where it is not known."""
    edits: bool = False
    """Whether some packs hold a document that begins with an image, a text and another image, as edits do."""

    def grid(self, modality: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of the default size."""
        height, width = self.image_sizes[modality]
        patch = self.modalities[modality].patch_size
        return height // patch, width // patch

    def completed(self, config: ModelConfig) -> ModelConfig:
        """Return the settings of the model with the shape and the bound of the data's images, where they are None."""
        known = zip(self.modalities, self.bounds or [None] * len(self.modalities), strict=True)
        bounds = [1.0 if info.encoding == "pixels" else bound for info, bound in known]
        modalities = []
        for number, (one, bound) in enumerate(zip(config.modalities, bounds, strict=True)):
            update = {"shape": one.shape or self.grid(number), "bound": one.bound or bound}
            modalities.append(one.model_copy(update=update))
        return config.model_copy(update={"modalities": tuple(modalities)})


def describe_data(data: Mixture, skip_unreadable: bool = False) -> DataDescription:
    """Read `_PACKS` packs of each folder, and more until every modality has shown an image.

    A modality without images gets the size of one patch, and no bound.
    """
    sizes: dict[int, tuple[int, int]] = {}
    bounds: dict[int, float] = {}
    edits = False
    readers = [PackReader(d.folder, d.index) for d in data.datasets if d.index.modalities]
    for reader, number in ((r, n) for r in readers for n in range(len(r))):
        if number >= _PACKS and len(sizes) == len(data.modalities):
            continue
        try:
            pack = reader.read(number)
        except InputError as error:
            if isinstance(error, FetchError) or not skip_unreadable:
                raise
            continue
        edits = edits or _has_edit(pack.segments)
        for _, kind, offset, _, height, width in pack.segments[pack.segments[:, 1] != KIND_TEXT].tolist():
            info = data.modalities[kind - 1]
            sizes.setdefault(kind - 1, (height, width))
            if info.encoding == "latents":
                values = pack.latents[offset : offset + height * width * info.channels]
                bounds[kind - 1] = max(bounds.get(kind - 1, 0.0), float(abs(values).max()))
    first = data.datasets[0]
    return DataDescription(
        tokenizer=load_tokenizer(first.index.tokenizer, first.folder),
        modalities=data.modalities,
        image_sizes=tuple(sizes.get(m, (info.patch_size,) * 2) for m, info in enumerate(data.modalities)),
        bounds=tuple(
            1.0 if info.encoding == "pixels" else bounds.get(m) or None for m, info in enumerate(data.modalities)
        ),
        edits=edits,
    )


def _has_edit(segments: np.ndarray) -> bool:
    document, image = segments[:, 0], segments[:, 1] != KIND_TEXT
    first = np.diff(document, prepend=-1) > 0
    pattern = first[:-2] & image[:-2] & ~image[1:-1] & image[2:]
    return bool((pattern & (document[:-2] == document[2:])).any())


def write_data_description(run: Path, data: DataDescription) -> None:
    """Write data.json, and the tokenizer that it names, to the run folder."""
    data.tokenizer.write(run)
    record = {
        "tokenizer": data.tokenizer.describe(),
        "modalities": [m.describe() for m in data.modalities],
        "image_sizes": data.image_sizes,
        "bounds": data.bounds,
        "edits": data.edits,
    }
    write_atomically(run / DATA, json.dumps(record, indent=1))


def read_data_description(run: Path) -> DataDescription:
    """Read data.json; raise InputError if the folder is not a run, or the file is damaged."""
    try:
        record = json.loads((run / DATA).read_text())
        modalities = tuple(ModalityInfo.of(fields) for fields in record["modalities"])
        sizes = tuple((int(height), int(width)) for height, width in record["image_sizes"])
        bounds = tuple(None if bound is None else float(bound) for bound in record.get("bounds", ()))
        if len(sizes) != len(modalities) or len(bounds) not in (0, len(modalities)):
            raise ValueError(f"{len(sizes)} image_sizes and {len(bounds)} bounds for {len(modalities)} modalities")
        if any(bound is not None and not 0 < bound < math.inf for bound in bounds):
            raise ValueError(f"bounds {bounds} must be above 0 and finite")
        return DataDescription(
            load_tokenizer(record["tokenizer"], run), modalities, sizes, bounds, record.get("edits") is True
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{run}: is not a run folder (no {DATA}); train first: deepspeed train/pretrain.py") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{run / DATA}: cannot be read ({error}); resume training to write it again") from error


def write_config(run: Path, config: Config) -> None:
    """Write config.yaml to the run folder."""
    write_atomically(run / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def read_settings(folder: Path, checkpoint: str | None = None) -> Config | None:
    """Return the settings that a run's checkpoint was trained with; of an export, those of its model and its `LAYOUT`.

    None for an export that an earlier version wrote, without the layout.

    Raises:
        InputError: the folder has no model, or settings of another version.
    """
    if not is_export(folder):
        return read_meta(find_checkpoint(folder, checkpoint)).config
    found = read_json(folder / MODEL_CONFIG)
    if not isinstance(found, dict) or "data" not in found:
        return None
    return parse(Config, {"model": found.get("model"), "data": found["data"]}, str(folder / MODEL_CONFIG))


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
    model = Transfusion.from_pretrained(folder, _device())
    model.config = read_data_description(folder).completed(model.config)
    return model


def is_export(folder: Path) -> bool:
    """Return whether train/export.py wrote a folder."""
    return (folder / MODEL_CONFIG).is_file()


def load_model(checkpoint: Path, *, raw: bool = False) -> Transfusion:
    """Return the model of a checkpoint, as `open_model` does."""
    data = read_data_description(checkpoint.parents[1])
    with torch.device(_device()):
        model = Transfusion(data.completed(read_meta(checkpoint).config.model))
    load_weights(model, open_weights(checkpoint, raw=raw), checkpoint)
    return model.eval()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
