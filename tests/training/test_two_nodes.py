"""Two nodes, as two network namespaces of this machine that a veth pair joins, start one run with DeepSpeed."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import PRETRAIN, SMALL, assert_same_course, metrics

CAN_MAKE_NODES = os.geteuid() == 0 and subprocess.run(["which", "ip"], capture_output=True).returncode == 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_MAKE_NODES, reason="needs root and the command ip of iproute2 for network namespaces"),
]


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces with the addresses 10.99.0.1 and 10.99.0.2 on their interfaces veth0."""
    names = [f"node-{name}-{os.getpid()}" for name in "ab"]
    try:
        for node in names:
            ip(f"netns add {node}")
        ip(f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for number, node in enumerate(names, start=1):
            ip(f"-n {node} address add 10.99.0.{number}/24 dev veth0")
            ip(f"-n {node} link set veth0 up")
            ip(f"-n {node} link set lo up")
        yield names
    finally:
        for node in names:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True)


def run_on(nodes: list[str], folder: Path, before: str, *overrides: str) -> tuple[list[int], str]:
    """Run a rank on each node, the second one after a shell command; return the exit codes and what was printed."""
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed")]
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    started = []
    for number, node in enumerate(nodes):
        where = f"--hostfile {folder}/hostfile --no_ssh --node_rank {number} --master_addr 10.99.0.1"
        command = shlex.join([*launcher, *where.split(), "--master_port", "29500", str(PRETRAIN), *SMALL, *overrides])
        prepared = f"{before} && exec {command}" if number else f"exec {command}"
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", node, "sh", "-c", prepared],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "veth0"},
            )
        )  # fmt: skip
    try:
        printed = "".join(process.communicate(timeout=300)[0] for process in started)
        return [process.returncode for process in started], printed
    finally:
        for process in started:
            process.kill()


def test_two_nodes_take_the_steps_of_one_machine(
    nodes: list[str], digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    codes, printed = run_on(nodes, tmp_path, "true", f"data.path={digits}", f"train.output={tmp_path}/run")
    assert codes == [0, 0] and "2 x cpu" in printed, printed
    assert_same_course(metrics(uninterrupted), metrics(tmp_path / "run"))


def test_nodes_that_do_not_share_the_run_folder_are_refused(nodes: list[str], digits: Path, tmp_path: Path) -> None:
    """Each namespace has its own mounts, so that the same path can lead to another disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own_disk = f"mount -t tmpfs none {disk}"
    codes, printed = run_on(nodes, tmp_path, own_disk, f"data.path={digits}", f"train.output={disk}/run")
    lines = [line for line in printed.splitlines() if line.startswith("pretrain: ")]
    assert 0 not in codes and len(lines) == 1 and "Traceback" not in printed, printed
    assert f"train.output must be on storage that all nodes share, got {disk}/run, where rank 1" in lines[0]
