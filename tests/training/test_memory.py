"""Resident memory of saving and exporting a model of the paper's smallest size, whose weights take 0.45 GB."""

import re
from pathlib import Path

import pytest
from launching import train
from resident_memory import report_memory_of_saves, reset_peak_memory, resident_memory

from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.export import export_model

LARGEST_PARAMETER = 4 * 2 * 2048 * 768  # gate_up, fp32
PYTHON = 8 << 20  # objects and buffers of Python and its libraries


@pytest.mark.slow
def test_a_save_takes_the_ranks_own_share_and_an_export_one_parameter(digits: Path, tmp_path: Path) -> None:
    model = "model={preset: 0.16b}"
    steps = ("train.steps=1", "train.global_batch=2", "train.precision=bf16")
    printed = train(2, digits, tmp_path / "run", model, *steps, setup=report_memory_of_saves)
    saves = [(int(grown), int(share)) for grown, share in re.findall(r"memory: (-?\d+) (\d+)", printed)]
    assert len(saves) == 2 and all(share > 800 << 20 for _, share in saves)
    assert all(grown < share + LARGEST_PARAMETER for grown, share in saves), saves

    reset_peak_memory()
    before = resident_memory("VmRSS")
    export_model(tmp_path / "run", find_checkpoint(tmp_path / "run"), tmp_path / "out")
    grown = resident_memory("VmHWM") - before
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 400 << 20
    assert grown < LARGEST_PARAMETER + PYTHON
