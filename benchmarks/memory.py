"""Memory of a step: what forward keeps for backward, and the most that is allocated at any time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from measure import Step
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start and end of its own


class _Made(TorchDispatchMode):
    """Keeps track of all memory that operations make, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.given: set[StorageWeakRef] = set()  # what operations read that none of them made: weights and the batch

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.given |= {storage for storage, _ in _storages((args, kwargs)) if storage not in self.made}
        out = function(*args, **(kwargs or {}))
        self.made |= {storage: size for storage, size in _storages(out) if storage not in self.given}
        return out


def _storages(tree: Any) -> list[tuple[StorageWeakRef, int]]:
    storages = [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes made in `forward` that are alive behind it while its result is: what backward needs, and the result.

    Whole storages, whichever part of them is needed, and whoever holds them: autograd, or selective checkpointing,
    which saved-tensor hooks do not see. Operations of compiled code are not seen.
    """
    with _Made() as made:
        result = forward()
    gc.collect()  # what is alive in cycles alone
    alive = sum(size for storage, size in made.made.items() if not storage.expired())
    del result
    return alive


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that tensors on the device take at any time of a forward and backward beyond those before it."""
    if device.type != "cuda":
        return _peak_cpu_bytes(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu_bytes(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()()
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak
