"""A driver that lets compiled kernels be launched on CPU tensors up to the launch itself, on a machine without a GPU.

Triton compiles and specialises as it does for the GPU, and the launch is counted instead of made: results are what the
memory held before. Import this with TRITON_INTERPRET=0, before anything of the library that imports triton.
"""

import types
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches: Counter[str] = Counter()
"""The launches of each kernel."""


class _Launcher:
    def __init__(self, source: Any, metadata: Any):
        self.name = getattr(getattr(source, "fn", None), "__name__", "?")

    def __call__(self, *arguments: Any) -> None:
        launches[self.name] += 1


class _Driver:
    """The part of Triton's driver that a launch asks for."""

    launcher_cls = _Launcher

    def __init__(self, arch: int):
        self.arch = arch
        self.utils = types.SimpleNamespace(
            # module, function, registers, spills, most threads of a block
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextmanager
def fake_gpu(arch: int = 90):
    """Let backend="triton" take CPU tensors as those of an sm_`arch` GPU."""
    from transfusion_fast.kernels import (
        diffusion_mse,
        hybrid_attention,
        launch,
        rms_norm,
        rope,
        rotary_attention,
        swiglu,
    )

    assert not launch.INTERPRETED, "kernels must be compiled here: set TRITON_INTERPRET=0"
    launch.architecture.cache_clear()
    with ExitStack() as patches:
        patches.enter_context(patch.object(driver, "_active", _Driver(arch)))
        for module in (hybrid_attention, rotary_attention, rms_norm, rope, swiglu, diffusion_mse):
            patches.enter_context(patch.object(module, "check_inputs", lambda *_, **__: None))
        patches.enter_context(patch.object(launch, "INTERPRETED_ARCHITECTURE", arch))
        try:
            yield
        finally:
            launch.architecture.cache_clear()


def compilations(*modules: Any) -> Counter[str]:
    """Return how many variants of each kernel of these modules were compiled in this process."""
    kernels = {name: x for m in modules for name, x in vars(m).items() if isinstance(x, triton.JITFunction)}
    return Counter({name: sum(len(cache[0]) for cache in k.device_caches.values()) for name, k in kernels.items()})
