"""The place of this process in a run, from the variables that its launcher sets.

deepspeed and torchrun set the variables that torch.distributed reads. srun and MPI launchers set their own, which are
translated. Processes that a launcher started together without a rank would each train alone, so they are refused.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address

from transfusion_fast.errors import InputError, NodeError

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Variables of rank, number of ranks, rank on the node, number of ranks on the node. srun sets those of its step;
# a batch script without srun has SLURM_PROCID and SLURM_NTASKS too, but is one process.
_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "an MPI launcher": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_UNKNOWN_RANKS = ("MV2_COMM_WORLD_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK", "PMIX_RANK")
_ADVICE = "start with deepspeed or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Launch:
    """Rank and number of ranks, in the run and on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch(environment: MutableMapping[str, str]) -> Launch:
    """Return this process's place, and complete the variables that torch.distributed reads.

    Raises:
        InputError: several processes were started without an agreed rank or address.
    """
    given = [name for name in _TORCH if name in environment]
    if given and len(given) < len(_TORCH) and given != ["LOCAL_RANK"]:
        missing = ", ".join(name for name in _TORCH if name not in environment)
        raise InputError(f"launch: RANK, WORLD_SIZE and LOCAL_RANK must be set together, got no {missing}; {_ADVICE}")
    if "RANK" in environment:
        # deepspeed sets LOCAL_SIZE, and torchrun LOCAL_WORLD_SIZE. Without them, this address means a single node.
        unknown = environment["WORLD_SIZE"] if _is_loopback(environment.get("MASTER_ADDR", "")) else "1"
        local_size = environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", unknown))
        values = [environment[name] for name in _TORCH] + [local_size]
        launch = _parse("RANK, WORLD_SIZE, LOCAL_RANK", values)
    else:
        launch = _translate(environment)
    environment.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    if "MASTER_ADDR" not in environment:
        one_node = launch.local_size == launch.world_size
        environment["MASTER_ADDR"] = "127.0.0.1" if one_node else _first_host(environment)
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = _port(environment, launch)
    return launch


def check_network(launch: Launch, environment: Mapping[str, str]) -> None:
    """Raise NodeError if this node would offer the others, or look for rank 0 at, an address that leads to itself."""
    if launch.local_size == launch.world_size:
        return
    main = environment["MASTER_ADDR"]
    on_first_node = launch.rank < launch.local_size
    if _is_loopback(main) or (not on_first_node and set(map(_is_loopback, _addresses(main))) == {True}):
        raise NodeError(
            f"launch: MASTER_ADDR must be an address at which all nodes reach the host of rank 0, got {main}, which is "
            f"{socket.gethostname()} itself here; set it (deepspeed: --master_addr)"
        )
    name = socket.gethostname()
    address = next(filter(_can_listen, _addresses(name)), "")  # as gloo chooses it
    if "GLOO_SOCKET_IFNAME" not in environment and (not address or _is_loopback(address)):
        found = address or "no address of this host"
        raise NodeError(
            f"launch: the host name must resolve to an address that other nodes reach, got {found} for {name}; set "
            "GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME on GPUs, to the network interface, such as eth0"
        )


def _addresses(host: str) -> list[str]:
    """Return the addresses of a host, in the order in which they are tried; none if the host is unknown."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None)))
    except OSError:
        return []


def _can_listen(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.bind((address, 0))
        return True
    except OSError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _translate(environment: Mapping[str, str]) -> Launch:
    """Read the variables of a launcher that does not set torch's; without one, this process is alone."""
    for launcher, names in _LAUNCHERS.items():
        rank, size, local_rank, local_size = (environment.get(name) for name in names)
        if rank is None or size is None:
            continue
        if size == "1":
            return Launch()
        if local_rank is None or local_size is None:
            missing = " and ".join(name for name in names[2:] if name not in environment)
            raise InputError(f"launch: {launcher} must set {missing} for its {size} processes, got none; {_ADVICE}")
        return _parse(f"the variables of {launcher}", [rank, str(size), local_rank, local_size])
    for name in _UNKNOWN_RANKS:
        if name in environment:
            got = f"{name}={environment[name]}"
            raise InputError(f"launch: processes started together must be given RANK, got {got} alone; {_ADVICE}")
    return Launch()


def _parse(what: str, values: list[str]) -> Launch:
    try:
        # SLURM counts the tasks of each node, such as 4(x2),3.
        rank, world_size, local_rank, local_size = (int(re.split(r"[(,]", value)[0]) for value in values)
    except ValueError:
        raise InputError(f"launch: {what} must be numbers, got {', '.join(values)}; {_ADVICE}") from None
    if not 0 <= rank < world_size or local_rank < 0:
        raise InputError(f"launch: the rank must be below the number of ranks, got {rank} of {world_size}; {_ADVICE}")
    return Launch(rank, world_size, local_rank, local_size)


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the first host of a SLURM list, such as gpu[03-05,9],login."""
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", listed)
    if found is None:
        raise InputError(f"launch: MASTER_ADDR must be the host of rank 0 on several nodes, got none; {_ADVICE}")
    return "".join(part or "" for part in found.groups())


def _port(environment: Mapping[str, str], launch: Launch) -> str:
    """Return a free port for a process that is alone, and one that all ranks agree on for several."""
    if launch.world_size == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1])
    job = environment.get("SLURM_JOB_ID", "0")
    return str(29500 + int(job) % 10000 if job.isdigit() else 29500)
