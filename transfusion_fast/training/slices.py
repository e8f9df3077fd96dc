"""The state of training, as slices of flattened parameters: what each rank holds, and files that any ranks can read.

ZeRO divides every parameter and its optimizer state among the ranks, in ways that depend on the stage and on the number
of ranks. A file of slices says for each tensor which elements of which parameter it holds, so that the division can be
another one when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What is kept of each parameter, fp32: the weight, and Adam's averages of the gradient and of its square."""


@dataclass(frozen=True, eq=False)
class Slice:
    """This rank's elements [offset, offset + length) of a flattened parameter, in a flat tensor of the optimizer."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    offset: int
    length: int
    partition: Tensor
    """The fp32 weights of several parameters that torch's optimizer takes as one parameter."""
    start: int
    """Index in `partition` of the slice's first element."""

    def view(self, optimizer: torch.optim.Optimizer, kind: str) -> Tensor:
        """Return the memory of one of `KINDS`, fp32 [length]."""
        flat = self.partition if kind == WEIGHT else optimizer.state[self.partition][kind]
        return flat.detach().narrow(0, self.start, self.length)


def local_slices(engine: Any) -> list[Slice]:
    """Return this rank's slices of a DeepSpeed engine at ZeRO stage 1, 2 or 3, in the order of the parameters.

    DeepSpeed's public functions for slices cover stage 3 alone; the attributes that are read here are those behind them.
    """
    zero, found = engine.optimizer, []
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):  # stage 3
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = engine.global_rank * size
            length = min(max(parameter.ds_numel - offset, 0), size)  # the last slice is padded
            shape, partition = tuple(parameter.ds_shape), zero.fp32_partitioned_groups_flat[group]
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            partition = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
            start, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            offset, shape = mapping.lp_fragment_address.start, tuple(parameter.shape)
        else:
            continue
        if length:
            found.append(Slice(name, parameter, shape, offset, length, partition, start))
    return found


def copy_to_host(slices: Iterable[Slice], optimizer: torch.optim.Optimizer, *, pin: bool) -> dict[str, Tensor]:
    """Return copies of all kinds of all slices on the host, by `KIND/NAME`; waits for the device once if `pin`."""
    copies = {}
    for one in slices:
        for kind in KINDS:
            copy = torch.empty(one.length, dtype=torch.float32, pin_memory=pin)
            copies[f"{kind}/{one.name}"] = copy.copy_(one.view(optimizer, kind), non_blocking=pin)
    if pin:
        torch.cuda.synchronize()
    return copies


def write_slices(path: Path, slices: Iterable[Slice], tensors: Mapping[str, Tensor]) -> None:
    """Write what `copy_to_host` returned, with each slice's offset and its parameter's shape in the metadata."""
    places = {one.name: {"offset": one.offset, "length": one.length, "shape": one.shape} for one in slices}
    save_file(dict(tensors), path, {"slices": json.dumps(places)})


class StoredSlices:
    """Files of slices, read by ranges of parameters. Nothing is unpickled, and only what is asked for is read.

    Attributes:
        shapes: the shape of every parameter.

    Raises:
        ValueError: a file is no file of slices, or elements of a parameter are missing.
    """

    def __init__(self, files: Iterable[Path]):
        self._slices: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, place, opened in _read_header(file):
                self._slices.setdefault(name, []).append((place["offset"], place["length"], opened))
                self.shapes[name] = tuple(place["shape"])
        for name, slices in self._slices.items():
            slices.sort(key=lambda one: one[0])
            covered = 0
            for offset, length, _ in slices:
                if offset != covered:
                    break
                covered += length
            if covered != math.prod(self.shapes[name]):
                raise ValueError(f"elements of {name} from {covered} on are in none of the files")

    def read(self, kind: str, name: str, offset: int = 0, length: int | None = None) -> Tensor:
        """Return elements [offset, offset + length) of a flattened parameter, fp32; default: all of them."""
        end = math.prod(self.shapes[name]) if length is None else offset + length
        parts = [
            file.get_slice(f"{kind}/{name}")[max(offset - start, 0) : min(end - start, size)]
            for start, size, file in self._slices[name]
            if start < end and start + size > offset
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read_header(file: Path) -> Iterator[tuple[str, dict[str, Any], Any]]:
    try:
        opened = safe_open(file, framework="pt")
        for name, place in json.loads(opened.metadata()["slices"]).items():
            yield name, place, opened
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} cannot be read as slices ({error})") from error


def restore_slices(engine: Any, stored: StoredSlices, step: int) -> None:
    """Copy stored state into this rank's slices, of any division; `step` is the number of steps that Adam has taken."""
    zero = engine.optimizer
    if hasattr(zero, "checkpoint_event_prologue"):
        zero.checkpoint_event_prologue()  # small parameters that ZeRO-3 holds gathered are divided again
    with torch.no_grad():
        for one in local_slices(engine):
            _fill_state(zero.optimizer.state, one.partition, step)
            for kind in KINDS:
                one.view(zero.optimizer, kind).copy_(stored.read(kind, one.name, one.offset, one.length))
            if hasattr(one.parameter, "ds_tensor"):  # the weights that ZeRO-3 gathers, in half precision or the same
                one.parameter.ds_tensor.data[: one.length].copy_(one.view(zero.optimizer, WEIGHT))
        for name, parameter in engine.module.named_parameters():
            if not hasattr(parameter, "ds_tensor"):
                parameter.data.copy_(stored.read(WEIGHT, name).view(parameter.shape))
    if hasattr(zero, "checkpoint_event_epilogue"):
        zero.checkpoint_event_epilogue()


def _fill_state(state: dict[Tensor, Any], partition: Tensor, step: int) -> None:
    """Give a partition the state that torch's AdamW makes at its first step."""
    if not state.get(partition):
        state[partition] = {"step": torch.tensor(0.0), **{kind: torch.zeros_like(partition) for kind in MOMENTS}}
    state[partition]["step"].fill_(float(step))
