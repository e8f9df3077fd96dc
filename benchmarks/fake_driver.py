"""A driver for Triton that compiles for a GPU and records launches in place of making them: no GPU needed.

It runs the whole path from a PyTorch op to a launch on CPU tensors, so that its cost and its compilations can be
counted. Import this before the kernels, in a process of its own, where they are compiled and not interpreted.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHITECTURE = 90
launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
"""Name, grid and arguments of each launch."""


class _Utils:
    """What Triton asks about a device and its binaries, as an H100 would answer."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return (1, 2, 100, 0, 1024)  # module, function, registers, spills, most threads

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    """Records the launches of one binary."""

    def __init__(self, source: Any, _metadata: Any):
        self.name = source.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        grid, values = arguments[:3], arguments[9:]  # between them stream, function, metadata and hooks
        launches.append((self.name, grid, values))


class FakeDriver:
    """The part of a Triton driver that compiling and launching use."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def install() -> None:
    """Make Triton use this driver, and the kernels accept CPU tensors."""
    from transfusion_fast.kernels import hybrid_attention, launch, rms_norm, rope, rotary_attention, swiglu

    assert not launch.INTERPRETED
    driver.set_active(FakeDriver())
    for module in (hybrid_attention, rms_norm, rope, rotary_attention, swiglu):
        module.check_inputs = lambda *_, **__: None


def compilations(kernels: list[triton.JITFunction]) -> int:
    """Return how many binaries the kernels have on the device."""
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
