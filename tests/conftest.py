"""Shared set-up: one thread, so that sums round alike; the same examples and random numbers in every run; and a way to
run commands."""

import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

# Before torch is imported, and inherited by the ranks that tests start: the number of threads changes the order of
# sums, and with it the sixth digit.
os.environ["OMP_NUM_THREADS"] = "1"
# Before triton is imported: kernels run on CPU tensors. A GPU's kernels are compiled: `make test-gpu` sets it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from fast_interpreter import search_the_language_once
from hypothesis import settings

search_the_language_once()
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def random_numbers():
    """Let tests that give no generator draw the same numbers in every run, whichever tests run before them."""
    torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def command():
    """Return a function that runs train/NAME.py and returns (exit code, standard output, standard error)."""

    def run_command(name: str, *arguments: object) -> tuple[int, str, str]:
        script = str(Path(__file__).resolve().parents[1] / "train" / f"{name}.py")
        out, err = (TextIOWrapper(BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(script, run_name="__main__")
        return int(ended.value.code or 0), *(stream.buffer.getvalue().decode() for stream in (out, err))

    return run_command
