"""The variables of launchers: every process learns its rank, and processes without an agreed rank are refused."""

import pytest

from transfusion_fast.errors import InputError
from transfusion_fast.training.launch import Launch, read_launch

SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "launch", "address"),
    [
        ({}, Launch(), "127.0.0.1"),
        ({"LOCAL_RANK": "0"}, Launch(), "127.0.0.1"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a"},
         Launch(3, 4, 1, 2), "a"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(1, 2, 1, 2), "127.0.0.1"),
        ({**SRUN, "SLURM_JOB_NODELIST": "gpu[03-05,9],login"}, Launch(5, 8, 1, 4), "gpu03"),
        ({**SRUN, "SLURM_STEP_NODELIST": "a1,a2", "SLURM_JOB_NODELIST": "a[0-9]"}, Launch(5, 8, 1, 4), "a1"),
        (MPIRUN, Launch(1, 2, 1, 2), "127.0.0.1"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(), "127.0.0.1"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, Launch(), "127.0.0.1"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Launch(), "127.0.0.1"),  # a batch script
    ],
)  # fmt: skip
def test_each_launcher_gives_rank_and_address(given: dict[str, str], launch: Launch, address: str) -> None:
    environment = dict(given)
    assert read_launch(environment) == launch
    assert environment["RANK"] == str(launch.rank) and environment["WORLD_SIZE"] == str(launch.world_size)
    assert environment["LOCAL_RANK"] == str(launch.local_rank) and environment["MASTER_ADDR"] == address
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
