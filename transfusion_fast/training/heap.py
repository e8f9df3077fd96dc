"""The C library's heap, for steps on a CPU: they allocate and free the same gigabytes again and again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_THRESHOLD = 32 << 20  # of M_MMAP_THRESHOLD
_GROWTH = 1 << 30
_PAGE = 2 << 20  # a large one


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed and to grow by a gibibyte at a time, and Linux to back that with large pages.

    Otherwise memory of some MiB goes back to the system when it is freed, and each of its pages is faulted in anew at
    its next use. Address space alone is taken, memory only as it is used. Elsewhere than on glibc nothing happens.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, _GROWTH)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.free(libc.malloc(_LARGEST_THRESHOLD - _PAGE))  # grows the heap, unless that much of it was free
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            start, end = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
            libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            libc.madvise(start, max(0, end - start), mmap.MADV_HUGEPAGE)
