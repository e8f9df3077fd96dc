"""The C library's heap, for steps on a CPU: they allocate and free the same gigabytes again and again."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

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
