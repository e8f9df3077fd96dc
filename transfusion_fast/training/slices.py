"""The state of training in a DeepSpeed engine, as the slices of flattened parameters that each rank holds.

ZeRO divides every parameter and its optimizer state among the ranks, in ways that depend on the stage and on the number
of ranks. stored_slices.py has the files of slices, which can be read with another division.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transfusion_fast.training.stored_slices import EMA, MOMENTUM, WEIGHT, SliceSpan, StoredSlices

_EXCHANGED = 1 << 24  # elements that are copied at a time


@dataclass(frozen=True, eq=False)
class Slice:
    """This rank's elements [offset, offset + length) of a flattened parameter, in a flat tensor of the optimizer."""

    name: str
    parameter: Any
    """The `nn.Parameter`, to which ZeRO adds attributes."""
    shape: tuple[int, ...]
    offset: int
    length: int
    partition: Tensor
    """The fp32 weights of several parameters that torch's optimizer takes as one parameter."""
    start: int
    """Index in `partition` of the slice's first element."""
    matrix_start: int | None = None
    """Index of the parameter's first element in Muon's momentum, where a rank keeps that of whole matrices."""
    frozen: bool = False
    """True if `partition` is the weights alone, in the precision of the run, which the optimizer does not have."""
    saved: bool = True
    """True if this rank saves the parameter. Below stage 3 every rank holds all of a frozen one."""

    @property
    def span(self) -> SliceSpan:
        """The slice's place in its parameter."""
        return SliceSpan(self.offset, self.length, self.shape)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the optimizer's state of the partition, which a frozen one does not have."""
        return {} if self.frozen else optimizer.state[self.partition]

    def views(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the memory of the weights and of the optimizer's state, [length], by kind; fp32 but for momentum."""
        flat = {WEIGHT: self.partition, **{kind: x for kind, x in self.state(optimizer).items() if x.ndim}}
        starts = dict.fromkeys(flat, self.start)
        if self.matrix_start is not None:
            starts[MOMENTUM] = self.matrix_start + self.offset
        return {kind: x.detach().narrow(0, starts[kind], self.length) for kind, x in flat.items()}


def local_slices(engine: Any) -> list[Slice]:
    """Return this rank's slices of a DeepSpeed engine at ZeRO stage 1, 2 or 3, in the order of the parameters.

    DeepSpeed's public functions for slices cover stage 3 alone. This reads the attributes behind them.
    """
    zero, found = engine.optimizer, []
    matrix_starts = {} if getattr(zero, "cpu_offload", True) else _matrix_starts(zero)
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        frozen, saved, start, offset = not parameter.requires_grad, True, 0, 0
        if hasattr(parameter, "ds_tensor"):  # stage 3
            partition, size = parameter.ds_tensor.data, parameter.ds_tensor.numel()
            if not frozen:
                group, start, _ = zero.grad_position[zero.get_param_id(parameter)]
                partition = zero.fp32_partitioned_groups_flat[group]
            offset, shape = engine.global_rank * size, tuple(parameter.ds_shape)
            length = min(max(parameter.ds_numel - offset, 0), size)  # the last slice is padded
        elif frozen:
            partition, length, shape = parameter.data.view(-1), parameter.numel(), tuple(parameter.shape)
            saved = number % engine.world_size == engine.global_rank
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            partition = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
            start, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            offset, shape = mapping.lp_fragment_address.start, tuple(parameter.shape)
        else:
            continue
        if length:
            matrix_start = matrix_starts.get(parameter)
            found.append(Slice(name, parameter, shape, offset, length, partition, start, matrix_start, frozen, saved))
    return found


def _matrix_starts(zero: Any) -> dict[Any, int]:
    """Return the index at which each of Muon's matrices begins in the momentum of its group.

    DeepSpeed's optimizer for ZeRO stages 1 and 2 keeps the momentum of a whole matrix on each rank that holds a part of
    it, unless it is offloaded. The others (at stage 3, and at stage 1 in bf16) divide it like the weights.
    """
    starts: dict[Any, int] = {}
    for group in zero.params_in_partition:
        start = 0
        for matrix in (parameter for parameter in group if hasattr(parameter, "use_muon")):
            starts[matrix] = start
            start += matrix.numel()
    return starts


def init_state(engine: Any, *, ema: bool) -> None:
    """Make the state that AdamW and Muon would make at their first step, and the average of the weights."""
    optimizer = engine.optimizer.optimizer
    for slices in _by_partition(engine):
        first, partition = slices[0], slices[0].partition
        if not hasattr(first.parameter, "use_muon"):
            state = {kind: torch.zeros_like(partition) for kind in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.zeros((), device=partition.device)
        elif first.matrix_start is not None:
            state = {MOMENTUM: partition.new_zeros(sum(one.parameter.numel() for one in slices))}
        else:
            dtype = engine.communication_data_type if hasattr(first.parameter, "ds_tensor") else partition.dtype
            state = {MOMENTUM: torch.zeros_like(partition, dtype=dtype)}
        optimizer.state[partition] = {**state, **({EMA: partition.detach().clone()} if ema else {})}


@torch.no_grad()
def update_ema(engine: Any, decay: float, step: int) -> None:
    """Move the average of the weights towards the weights after a step, counted from 1.

    The decay is at most (1 + step) / (10 + step), so that early weights are soon forgotten.
    """
    partitions = [slices[0].partition for slices in _by_partition(engine)]
    averages = [engine.optimizer.optimizer.state[partition][EMA] for partition in partitions]
    torch._foreach_lerp_(averages, partitions, 1 - min(decay, (1 + step) / (10 + step)))


def _by_partition(engine: Any) -> list[list[Slice]]:
    """Return this rank's slices that are trained, those of one partition together."""
    found: dict[int, list[Slice]] = {}
    for one in local_slices(engine):
        if not one.frozen:
            found.setdefault(id(one.partition), []).append(one)
    return list(found.values())


def copy_to_host(slices: Iterable[Slice], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return host copies of the views of all slices, fp32, by `KIND/NAME`; waits for the device once."""
    copies, pin = {}, torch.cuda.is_available()
    for one in slices:
        for kind, view in one.views(optimizer).items():
            copy = torch.empty(one.length, dtype=torch.float32, pin_memory=pin)
            copies[f"{kind}/{one.name}"] = copy.copy_(view, non_blocking=pin)
    if pin:
        torch.cuda.synchronize()
    return copies


def restore_slices(engine: Any, stored: StoredSlices, step: int) -> None:
    """Copy stored state into the weights and this rank's slices; `step` is the number of steps that were taken."""

    def copy(kind: str, name: str, offset: int, target: Tensor) -> None:
        target.copy_(stored.read(kind, name, offset, len(target)))

    optimizer = engine.optimizer.optimizer
    for one in local_slices(engine):
        state = one.state(optimizer)
        if "step" in state:
            state["step"].fill_(step)
        if one.matrix_start is not None:  # beyond the slice too
            copy(MOMENTUM, one.name, 0, state[MOMENTUM].narrow(0, one.matrix_start, one.parameter.numel()))
        for kind, view in one.views(optimizer).items():
            copy(kind, one.name, one.offset, view)
    _refresh_parameters(engine)


def write_weights_into(engine: Any, copy: Callable[[str, int, Tensor], None]) -> None:
    """Begin a run, and the average of its weights, from other weights. Collective.

    Args:
        copy: a function of a parameter's name, an offset and a flat tensor [n], which it may fill with elements
            [offset, offset + n) of the flattened parameter. What it leaves keeps its initial value.
    """
    optimizer = engine.optimizer.optimizer
    for one in local_slices(engine):
        views = one.views(optimizer)
        for kind in views.keys() & {WEIGHT, EMA}:
            copy(one.name, one.offset, views[kind])
    _refresh_parameters(engine)


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Use the average of the weights in place of the weights, if the run keeps one. Collective."""
    _exchange_weights_and_average(engine)
    try:
        yield
    finally:
        _exchange_weights_and_average(engine)


def _exchange_weights_and_average(engine: Any) -> None:
    state = engine.optimizer.optimizer.state
    every = (slices[0].partition for slices in _by_partition(engine))
    partitions = [partition for partition in every if EMA in state[partition]]
    for partition in partitions:
        both = (x.detach().split(_EXCHANGED) for x in (partition, state[partition][EMA]))
        for weights, average in zip(*both, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
    _refresh_parameters(engine)  # even on a rank that holds no slice, since it is collective


def _refresh_parameters(engine: Any) -> None:
    """Copy the slices to the weights that the forward pass uses, half precision or fp32. Collective."""
    zero = engine.optimizer
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2: all ranks get all weights
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()  # divides the small parameters that stage 3 keeps gathered
    for one in (one for slices in _by_partition(engine) for one in slices):
        one.parameter.ds_tensor.data[: one.length].copy_(one.views(zero.optimizer)[WEIGHT])
    zero.checkpoint_event_epilogue()
