"""A process counts the CPUs that it may use, and not those of the machine."""

import os

import pytest

from transfusion_fast.cpus import usable_cpus


@pytest.fixture(autouse=True)
def affinity(monkeypatch):
    """Eight CPUs of a machine of 128, whatever this machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),  # as a container sees its own group
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2),
        ("0::/elsewhere\n", {"cpu.max": "400000 100000\n"}, 4),  # a name outside of the container
        ("4:cpu,cpuacct:/job\n1:name=systemd:/x\n", {"cpu/job/cpu.cfs_quota_us": "50000\n"}, 8),
        (
            "5:cpuset:/\n4:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("", {"cpu.max": "100000 100000\n"}, 8),
    ],
)
def test_the_limit_of_control_groups_counts(tmp_path, own, files, expected):
    for name, content in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_cpus(tmp_path) == expected


def test_without_control_groups_the_affinity_counts_and_python_s_own_count_where_there_is_one(tmp_path, affinity):
    assert usable_cpus(tmp_path) == 8
    affinity.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert usable_cpus(tmp_path) == 5
    affinity.delattr(os, "process_cpu_count")
    affinity.delattr(os, "sched_getaffinity")
    assert usable_cpus(tmp_path) == 128
