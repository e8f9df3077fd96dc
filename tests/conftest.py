"""What every test shares: one thread, so that sums round alike, and the same examples in every run."""

import os

# Before torch is imported, and inherited by the ranks that tests start: the number of threads changes the order of
# sums, and with it the sixth digit.
os.environ["OMP_NUM_THREADS"] = "1"
# Before triton is imported: kernels run on CPU tensors. A GPU's kernels are compiled: `make test-gpu` sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tolerance():
    """What `torch.testing.assert_close` allows between two ways to compute one thing, for each precision."""
    return {
        "fp64": {"rtol": 1e-10, "atol": 1e-10},
        "fp32": {"rtol": 1e-5, "atol": 1e-5},
        "bf16": {"rtol": 2e-2, "atol": 2e-2},
    }


@pytest.fixture
def on_the_cpu(monkeypatch):
    """As on a machine without a GPU, whose bits differ."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
