"""The processes of a run: who they are, what they compute on, and how they agree on small numbers."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist

from transfusion_fast.config import TrainConfig
from transfusion_fast.errors import InputError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among all of the run's."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group over host memory: agreeing on counts waits for no GPU."""
    on_node: tuple[int, int] = (0, 1)
    """Which of how many ranks this is on its own node."""
    runner: psutil.Process | None = None
    """The `deepspeed` command that started it all, two processes up."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, fp64."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' items, on every rank, in the order of ranks."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, items, group=self.control)
        return [item for part in gathered for item in part]

    def together(self, action: Callable[[], None]) -> None:
        """Acts on every rank; an InputError or OSError on any is an InputError on all, who would else wait for it."""
        errors = []
        try:
            action()
        except (InputError, OSError) as error:
            errors.append(str(error))
        if errors := self.gather(errors):
            raise InputError(errors[0])

    @property
    def abandoned(self) -> bool:
        """Whether the `deepspeed` command is gone: ended by a signal, it leaves its launcher and the ranks behind."""
        if self.runner is None:
            return False
        try:
            return not self.runner.is_running() or self.runner.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier(group=self.control)


def join_ranks(config: TrainConfig) -> Ranks:
    """Joins the process group of the launcher (deepspeed, torchrun), or a group of one without a launcher."""
    launched = "RANK" in os.environ
    if launched:
        _end_with_parent()
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # The shared-memory all-reduce that DeepSpeed would compile for the CPU needs a C++ compiler and minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(config.cpu_threads or _threads_of_a_rank())
        keep_freed_memory()
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    runner = _deepspeed_command() if launched else None
    control = dist.new_group(backend="gloo")
    on_node = (local_rank % _ranks_of_a_node(), _ranks_of_a_node())
    return Ranks(dist.get_rank(), dist.get_world_size(), device, control, on_node, runner)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively; elsewhere it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _threads_of_a_rank() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // _ranks_of_a_node())


def _ranks_of_a_node() -> int:
    """As deepspeed or torchrun says; 1 under a launcher that does not."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _deepspeed_command() -> psutil.Process | None:
    """The process of `deepspeed` on this node; None under another launcher, or where processes are hidden."""
    try:
        parent = psutil.Process().parent()
        if parent is None or "deepspeed.launcher.launch" not in parent.cmdline():
            return None
        command = parent.parent()
        return command if command is not None and any("deepspeed" in part for part in command.cmdline()) else None
    except psutil.Error:
        return None


def _end_with_parent() -> None:
    """Asks Linux for a SIGTERM when the launcher dies, which would otherwise leave its ranks running for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_NEVER = -1
_LARGEST_THRESHOLD = 32 << 20  # of M_MMAP_THRESHOLD
_LARGEST_HEAP = 32 << 30
_GROWTH = 1 << 30
_PAGE = 2 << 20  # a large one


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed in a heap of half the machine's memory, and Linux to back it with large pages.

    Otherwise memory of some MiB goes back to the system when it is freed, and each of its pages is faulted in anew at
    its next use. Address space alone is taken, memory only as it is used. Elsewhere than on glibc nothing happens, nor
    where address space is limited or accounted for.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt") or _address_space_counts():
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_M_TOP_PAD, _GROWTH)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    # Linux forks no process with a piece of address space larger than its memory.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Pieces below the threshold make the heap itself grow, by as many; advice given now holds for all of it.
    size = _LARGEST_THRESHOLD - _PAGE
    for piece in [libc.malloc(size) for _ in range(min(_LARGEST_HEAP, memory // 2) // size)]:
        libc.free(piece)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
            libc.madvise(start, max(0, end - start), mmap.MADV_HUGEPAGE)


def _address_space_counts() -> bool:
    import resource  # which only Unix has

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False
