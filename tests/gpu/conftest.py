"""Fixtures of the tests that need a GPU."""

import pytest


@pytest.fixture(scope="session")
def compiled_kernels():
    """Check that kernels are compiled and not interpreted."""
    from transfusion_fast.kernels import launch

    assert not launch.INTERPRETED, "kernels must be compiled here: set TRITON_INTERPRET=0"


@pytest.fixture
def compilations():
    """Return a function that counts the compiled variants of kernels."""
    return lambda kernels: sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
