"""Files of slices of flattened parameters, written by any number of ranks and read by any other.

Each file says which elements of which parameter its tensors hold, so that the ranks that read it may divide the
parameters in another way. Nothing is unpickled, and only the elements that are asked for are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHT = "weight"
"""The kind of a tensor of fp32 weights. The other kinds are the names of optimizer state, such as exp_avg and ema."""
EMA = "ema"
"""The kind of the average of the weights over steps, which is kept as one more state of the optimizer."""
MOMENTUM = "momentum_buffer"
"""The kind of Muon's average of gradients, which its matrices have in place of Adam's moments."""


@dataclass(frozen=True)
class SliceSpan:
    """Elements [offset, offset + length) of a flattened parameter of this shape."""

    offset: int
    length: int
    shape: tuple[int, ...]


def write_slices(path: Path, spans: Mapping[str, SliceSpan], tensors: Mapping[str, Tensor]) -> None:
    """Write fp32 tensors by `KIND/NAME`, with the span of each parameter's name in the metadata."""
    described = json.dumps({name: asdict(span) for name, span in spans.items()})
    try:
        save_file(dict(tensors), path, {"slices": described})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets its owner alone read a file
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error


class StoredSlices:
    """Files of slices, read by ranges of parameters.

    Attributes:
        shapes: the shape of every parameter.
        kinds: the kinds of tensors that are stored.

    Raises:
        ValueError: a file is no file of slices, or elements or kinds of tensors of a parameter are missing.
    """

    def __init__(self, files: Iterable[Path]):
        self._slices: dict[str, list[_StoredSlice]] = {}
        for one in (one for file in files for one in _read_header(file)):
            self._slices.setdefault(one.name, []).append(one)
        self.shapes = {name: slices[0].span.shape for name, slices in self._slices.items()}
        self.kinds = {kind for slices in self._slices.values() for kind in slices[0].starts}
        for slices in self._slices.values():
            slices.sort(key=lambda one: one.span.offset)
            _check_complete(slices)

    def read(self, kind: str, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Return elements [offset, offset + length) of a flattened parameter, fp32; default: all from `offset` on.

        A parameter that was frozen, or saved by a run without averages, is its own average.
        """
        if kind == EMA and EMA not in self._slices[name][0].starts:
            kind = WEIGHT
        end = math.prod(self.shapes[name]) if length is None else offset + length
        found = torch.empty(end - offset)
        for one in self._slices[name]:
            first, last = max(one.span.offset, offset), min(one.span.offset + one.span.length, end)
            if first < last:
                one.read(kind, first - one.span.offset, found[first - offset : last - offset])
        return found


@dataclass(frozen=True, eq=False)
class SliceWeights:
    """One kind of the tensors in files of slices, as `model.weights.Weights`."""

    stored: StoredSlices
    kind: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return self.stored.shapes

    @property
    def averaged(self) -> bool:
        """True for the exponential moving average of the weights, False for those of the last step."""
        return self.kind == EMA

    def read(self, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Return elements [offset, offset + length) of a flattened parameter, fp32; default: all from `offset` on."""
        return self.stored.read(self.kind, name, offset, length)


@dataclass(frozen=True)
class _StoredSlice:
    """The tensors of one parameter in a file; `starts` has the byte at which that of each kind begins."""

    file: Path
    name: str
    span: SliceSpan
    starts: Mapping[str, int]

    def read(self, kind: str, offset: int, target: Tensor) -> None:
        """Fill a flat tensor from an element of the slice on, in place: a mapped file's pages would take memory too."""
        with self.file.open("rb") as opened:
            opened.seek(self.starts[kind] + offset * target.itemsize)
            if opened.readinto(target.numpy().data) != target.nbytes:
                raise OSError(f"{self.file}: has become shorter than it was when it was opened")


def _read_header(file: Path) -> list[_StoredSlice]:
    """Return the slices in a file."""
    try:
        with safe_open(file, framework="pt") as opened:  # checks that tensors lie within the file
            spans = {
                name: SliceSpan(span["offset"], span["length"], tuple(span["shape"]))
                for name, span in json.loads(opened.metadata()["slices"]).items()
            }
        with file.open("rb") as plain:
            size = int.from_bytes(plain.read(8), "little")
            header = json.loads(plain.read(size))
        starts: dict[str, dict[str, int]] = {}
        for key, tensor in header.items():
            if key == "__metadata__":
                continue
            kind, _, name = key.partition("/")
            if (found := (tensor["dtype"], tensor["shape"])) != ("F32", [spans[name].length]):
                raise ValueError(f"{key} is of {found}, its span of the length {spans[name].length}, F32")
            starts.setdefault(name, {})[kind] = 8 + size + tensor["data_offsets"][0]
        return [_StoredSlice(file, name, span, starts[name]) for name, span in spans.items()]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} cannot be read as slices ({error})") from error


def _check_complete(slices: list[_StoredSlice]) -> None:
    """Raise ValueError if the slices of a parameter, in the order of offsets, leave elements or kinds out."""
    first, covered = slices[0], 0
    for one in slices:
        if one.starts.keys() != first.starts.keys():
            raise ValueError(
                f"{one.file.name} holds {one.name} as tensors of the kinds {', '.join(sorted(one.starts))}, and other "
                "files differ"
            )
        if one.span.offset != covered:
            break
        covered += one.span.length
    if covered != math.prod(first.span.shape):
        raise ValueError(f"elements of {first.name} from {covered} on are in none of the files")
