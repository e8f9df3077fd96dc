"""The heap for training on a CPU: large, in huge pages, and no obstacle to a fork."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, re
from pathlib import Path
import torch
from transfusion_fast.training.ranks import keep_freed_memory

keep_freed_memory()
held = [torch.empty(4 << 20) for _ in range(100)]  # 1.6 GB, beyond one growth
advised = inside = 0
for block in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
    if "[heap]" in block.splitlines()[0] and " hg" in block:
        start, end = (int(address, 16) for address in block.split()[0].split("-"))
        advised += end - start
        inside += sum(start <= x.data_ptr() < end for x in held)
child = os.fork()
if child == 0:
    os._exit(0)
print(json.dumps([advised, inside, os.waitpid(child, 0)[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's maps")
def test_the_heap_is_half_of_memory_in_huge_pages_and_processes_still_fork() -> None:
    """This holds with glibc where address space is not limited."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    advised, inside, fork = json.loads(done.stdout.splitlines()[-1])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert advised > 0.9 * min(32 << 30, memory // 2)
    assert (inside, fork) == (100, 0)
