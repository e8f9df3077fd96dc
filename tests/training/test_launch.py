"""The variables of launchers: every process learns its rank, and processes without an agreed rank are refused."""

import socket
from functools import partial
from pathlib import Path

import pytest
from launching import become_the_second_node, refusal, start, use_port

from transfusion_fast.errors import InputError, NodeError
from transfusion_fast.training import launch
from transfusion_fast.training.launch import Launch, check_network, read_launch

SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected", "address"),
    [
        ({}, Launch(), "127.0.0.1"),
        ({"LOCAL_RANK": "0"}, Launch(), "127.0.0.1"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a"},
         Launch(3, 4, 1, 2), "a"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(1, 2, 1, 2), "127.0.0.1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}, Launch(1, 2, 1, 2),
         "127.0.0.1"),
        ({**SRUN, "SLURM_JOB_NODELIST": "gpu[03-05,9],login"}, Launch(5, 8, 1, 4), "gpu03"),
        ({**SRUN, "SLURM_STEP_NODELIST": "a1,a2", "SLURM_JOB_NODELIST": "a[0-9]"}, Launch(5, 8, 1, 4), "a1"),
        (MPIRUN, Launch(1, 2, 1, 2), "127.0.0.1"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(), "127.0.0.1"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, Launch(), "127.0.0.1"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Launch(), "127.0.0.1"),  # a batch script
    ],
)  # fmt: skip
def test_each_launcher_gives_rank_and_address(given: dict[str, str], expected: Launch, address: str) -> None:
    environment = dict(given)
    assert read_launch(environment) == expected
    assert environment["RANK"] == str(expected.rank) and environment["WORLD_SIZE"] == str(expected.world_size)
    assert environment["LOCAL_RANK"] == str(expected.local_rank) and environment["MASTER_ADDR"] == address
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


def test_the_ranks_of_a_job_agree_on_a_port_and_single_processes_do_not() -> None:
    def ports(environment: dict[str, str]) -> set[str]:
        copies = [dict(environment) for _ in range(3)]
        for copy in copies:
            read_launch(copy)
        return {copy["MASTER_PORT"] for copy in copies}

    assert len(ports({**SRUN, "SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "123456"})) == 1
    assert len(ports({})) > 1


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"RANK": "1"}, "RANK, WORLD_SIZE and LOCAL_RANK must be set together, got no WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be set together, got no RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "below the number of ranks, got 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be numbers, got one, 2, 0, 1"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "must set MPI_LOCALRANKID and MPI_LOCALNRANKS for its 2 processes"),
        ({"MV2_COMM_WORLD_RANK": "0"}, "must be given RANK, got MV2_COMM_WORLD_RANK=0 alone"),
        (SRUN, "MASTER_ADDR must be the host of rank 0 on several nodes"),
    ],
)
def test_processes_without_an_agreed_rank_are_refused(environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_launch(dict(environment))


def resolve(monkeypatch: pytest.MonkeyPatch, **hosts: list[str]) -> None:
    """Make host names resolve to these addresses; this machine is called `here`, and 10.9.9.9 is not its address."""

    def getaddrinfo(host: str, _: None) -> list[tuple]:
        if host not in hosts:
            raise socket.gaierror(host)
        return [(2, 1, 6, "", (address, 0)) for address in hosts[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(launch, "_can_listen", lambda address: address != "10.9.9.9")


@pytest.mark.parametrize(
    ("rank", "main", "here", "complaint"),
    [
        (Launch(1, 2, 0, 1), "10.0.0.1", ["127.0.1.1", "10.0.0.2"], "got 127.0.1.1 for here; set GLOO_SOCKET_IFNAME"),
        (Launch(1, 2, 0, 1), "10.0.0.1", ["10.9.9.9", "::1"], "got ::1 for here"),
        (Launch(0, 2, 0, 1), "10.0.0.1", ["10.9.9.9"], "got no address of this host for here"),
        (Launch(0, 2, 0, 1), "10.0.0.1", [], "got no address of this host for here; set .* and NCCL_SOCKET_IFNAME"),
        (Launch(0, 2, 0, 1), "localhost", ["10.0.0.1"], "MASTER_ADDR must be .*, got localhost, which is here itself"),
        (Launch(2, 4, 0, 2), "first", ["10.0.0.2"], "MASTER_ADDR must be .*, got first, which is here itself here"),
    ],
)
def test_a_node_whose_addresses_lead_to_itself_is_refused_with_the_variable_to_set(
    rank: Launch, main: str, here: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, here=here, first=["127.0.1.1"])
    with pytest.raises(NodeError, match=complaint):
        check_network(rank, {"MASTER_ADDR": main})


@pytest.mark.parametrize(
    ("rank", "variables", "here"),
    [
        (Launch(1, 2, 1, 2), {"MASTER_ADDR": "127.0.0.1"}, ["127.0.0.1"]),  # one node
        (Launch(1, 2, 0, 1), {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "eth0"}, ["127.0.0.1"]),
        (Launch(1, 4, 1, 2), {"MASTER_ADDR": "here"}, ["10.0.0.1", "127.0.0.1"]),  # the host of rank 0 itself
        (Launch(1, 4, 1, 2), {"MASTER_ADDR": "first"}, ["10.0.0.1"]),  # as Debian's /etc/hosts has its own name
        (Launch(2, 4, 0, 2), {"MASTER_ADDR": "elsewhere"}, ["10.0.0.2"]),
    ],
)
def test_a_node_that_others_can_reach_is_not_refused(
    rank: Launch, variables: dict[str, str], here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, here=here, elsewhere=["10.0.0.1"], first=["127.0.1.1"])
    check_network(rank, variables)


def test_a_node_that_is_refused_says_so_itself(tmp_path: Path, digits: Path) -> None:
    line = refusal(start(1, digits, tmp_path / "run", setup=become_the_second_node))
    assert "MASTER_ADDR must be an address at which all nodes reach the host of rank 0, got localhost" in line


def test_a_port_that_is_taken_is_named_in_one_line(tmp_path: Path, digits: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refusal(start(1, digits, tmp_path / "run", setup=partial(use_port, port)))
    assert f"port {port} must be free on the host of rank 0" in line and "set MASTER_PORT" in line
