"""Weights in safetensors files, in the layout of Hugging Face: written tensor by tensor, and read by ranges.

FOLDER/model.safetensors                                 all tensors, fp32
FOLDER/model-00001-of-00003.safetensors, ...             instead, if they are larger than a file should be
FOLDER/model.safetensors.index.json                      then, the file of each tensor
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from transfusion_fast.config_reading import changes
from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9

Shape = tuple[int, ...]


class Weights(Protocol):
    """Stored tensors that can be read in part."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every tensor."""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Return elements [offset, offset + length) of a flattened tensor, fp32; default: all from `offset` on."""


class WeightFiles:
    """The weights in a folder, such as one that train/export.py or Hugging Face's `save_pretrained` wrote.

    Raises:
        InputError: the folder has no weights, or a file is damaged.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, Shape] = {}
        self._files: dict[str, Path] = {}
        for path in (folder / name for name in self._names(folder)):
            try:
                with safe_open(path, framework="pt") as file:
                    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} must be a safetensors file ({error}); give another") from error
            self.shapes |= shapes
            self._files |= dict.fromkeys(shapes, path)

    @staticmethod
    def _names(folder: Path) -> list[str]:
        if not (folder / INDEX).exists():
            return [WEIGHTS]
        try:
            names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        except (TypeError, KeyError, AttributeError):
            raise InputError(f"{folder / INDEX} must map tensors to files, got no such map; write it again") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            got = ", ".join(map(str, names))
            raise InputError(f"{folder / INDEX} must name files of its own folder, got {got:.200}; correct it")
        return names

    def read(self, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Return elements [offset, offset + length) of a flattened tensor, fp32; default: all from `offset` on."""
        shape = self.shapes[name]
        row = math.prod(shape[1:])
        end = math.prod(shape) if length is None else offset + length
        first = offset // row
        with safe_open(self._files[name], framework="pt") as file:  # an open file's pages would stay in memory
            rows = file.get_slice(name)[first : -(-end // row)].flatten()
        return rows[offset - first * row : end - first * row].to(torch.float32, copy=True)


def load_weights(model: nn.Module, weights: Weights, where: Path) -> None:
    """Copy weights into a model, one parameter at a time.

    Raises:
        InputError: a parameter is missing, left over, or of another shape; the message names it and `where`.
    """
    parameters = dict(model.named_parameters())
    for difference in changes(weights.shapes, {name: tuple(x.shape) for name, x in parameters.items()}):
        raise InputError(f"{where}: weights must have the shapes of the model, got {difference}; give another folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights.read(name).view(parameter.shape))


def write_weights(folder: Path, weights: Weights, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write weights as fp32 to a folder, one tensor at a time, in files of at most `max_file_bytes` if possible."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in weights.shapes.items():
        tensor_bytes = 4 * math.prod(shape)
        if groups[-1] and size + tensor_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor_bytes
    files = {WEIGHTS: groups[0]}
    if len(groups) > 1:
        files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}
        total = sum(4 * math.prod(shape) for shape in weights.shapes.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, group in files.items() for name in group},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    for file, group in files.items():
        _write_file(folder / file, {name: weights.shapes[name] for name in group}, weights.read)


def _write_file(path: Path, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file: the length of its header, the header in JSON, and the tensors' bytes one by one.

    The library's own writer needs all tensors of a file in memory at once.
    """
    ends = list(accumulate(4 * math.prod(shape) for shape in shapes.values()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends, strict=False):
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors are aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            read(name).numpy().tofile(file)
