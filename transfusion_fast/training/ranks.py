"""The processes of a run: their ranks and devices, the small numbers that they agree on, and their memory on a CPU."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import psutil
import torch
import torch.distributed as dist

from transfusion_fast.config import TrainConfig
from transfusion_fast.cpus import usable_cpus
from transfusion_fast.errors import InputError
from transfusion_fast.training.launch import check_network, read_launch

_T = TypeVar("_T")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most that glibc accepts
_LARGEST_HEAP = 32 << 30
_HEAP_GROWTH = 1 << 30
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process, and its means to communicate with the other processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group over host memory, so that agreeing on counts waits for no GPU."""
    on_node: tuple[int, int] = (0, 1)
    """Rank on this node, and number of ranks on this node."""
    command: psutil.Process | None = None
    """The `deepspeed` command that started the run, the parent of this process's parent."""
    sequence_group: str = ""
    """Name of the process group of the ranks that share packs with this one; empty if none does."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the elementwise sums over all ranks, computed in fp64."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, numbers: Sequence[float]) -> list[float]:
        """Return the elementwise maxima over all ranks."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def _reduce(self, numbers: Sequence[float], op: Any) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.control)
        return tensor.tolist()

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of all ranks, in the order of ranks, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, items, group=self.control)
        return [item for part in gathered for item in part]

    def collect(self, action: Callable[[], _T], error: type[InputError] = InputError) -> list[_T]:
        """Run an action on every rank, and return what it returned on each, in the order of ranks, on every rank.

        Raises:
            error: on all ranks, if the action raised an InputError or OSError on any; it has that message.
        """
        try:
            own: tuple[_T | None, str] = action(), ""
        except (InputError, OSError) as failed:
            own = None, str(failed) or type(failed).__name__
        gathered = self.gather([own])
        for _, message in gathered:
            if message:
                raise error(message)
        return [result for result, _ in gathered]

    def together(self, action: Callable[[], _T], error: type[InputError] = InputError) -> _T:
        """Run an action on every rank, and return what it returned on this one; raise as `collect` does."""
        results: list[_T] = []
        self.collect(lambda: results.append(action()), error)
        return results[0]

    def own(self, items: list[_T]) -> list[_T]:
        """Return the items that this rank takes of those that all ranks divide among themselves."""
        return items[self.rank :: self.world_size]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    @property
    def abandoned(self) -> bool:
        """True if the `deepspeed` command has ended: when a signal ends it, its launcher and the ranks remain."""
        command = self.command
        try:
            return command is not None and (not command.is_running() or command.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


def join_ranks(config: TrainConfig) -> Ranks:
    """Join the process group of the launcher; without a launcher, a group of one process.

    Raises:
        InputError: several processes were started without an agreed rank, or in a number that cannot share packs.
    """
    launched, launch = "RANK" in os.environ, read_launch(os.environ)
    launched = launched or launch.world_size > 1
    if launch.world_size % config.sequence_parallel:
        raise InputError(
            f"train.sequence_parallel must divide the number of ranks, {launch.world_size}, "
            f"got {config.sequence_parallel}; give a divisor, or start more ranks"
        )
    check_network(launch, os.environ)
    if launched and sys.platform == "linux":  # without this, ranks outlive a launcher that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The shared-memory all-reduce that DeepSpeed would compile for the CPU needs a C++ compiler and minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if cuda:
        # A launcher may show each process the one GPU that it is to use.
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(config.cpu_threads or max(1, usable_cpus() // launch.local_size))
        keep_freed_memory()
    _init_process_group("nccl" if cuda else "gloo")
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        control=dist.new_group(backend="gloo"),
        on_node=(launch.local_rank % launch.local_size, launch.local_size),
        command=_deepspeed_command() if launched else None,
        sequence_group=_sequence_group(config.sequence_parallel),
    )


def _init_process_group(backend: str) -> None:
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(
            f"launch: port {os.environ['MASTER_PORT']} must be free on the host of rank 0, got one that another "
            "process uses; set MASTER_PORT to another (deepspeed and torchrun: --master_port)"
        ) from error


def _sequence_group(size: int) -> str:
    """Return the name of this rank's group of `size` consecutive ranks, or nothing for a size of 1. Collective."""
    return dist.new_subgroups(size)[0].group_name if size > 1 else ""


def _deepspeed_command() -> psutil.Process | None:
    """Return the process of `deepspeed` on this node; None under another launcher, or where processes are hidden."""
    try:
        parent = psutil.Process().parent()
        if parent is None or "deepspeed.launcher.launch" not in parent.cmdline():
            return None
        command = parent.parent()
        return command if command is not None and any("deepspeed" in part for part in command.cmdline()) else None
    except psutil.Error:
        return None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in a heap of half the machine's memory that is backed by huge pages.

    By default, glibc returns freed blocks of some MiB to the system, and each page costs a fault at its next use. The
    heap reserves address space only; memory is taken as it is used. Does nothing without glibc, or where address space
    is limited or accounted for.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt") or _address_space_is_limited():
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_M_TOP_PAD, _HEAP_GROWTH)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    # Half of memory at most: Linux refuses to fork a process with a mapping larger than the machine's memory.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Blocks below the threshold extend the heap itself, so madvise below covers all of it.
    size = _LARGEST_MMAP_THRESHOLD - _HUGE_PAGE
    for block in [libc.malloc(size) for _ in range(min(_LARGEST_HEAP, memory // 2) // size)]:
        libc.free(block)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            start, end = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
            libc.madvise(start, max(0, end - start), mmap.MADV_HUGEPAGE)


def _address_space_is_limited() -> bool:
    import resource  # exists on Unix only

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False
