"""Fixtures of the training tests: a small data folder, and one run that nothing disturbed."""

import subprocess
from pathlib import Path

import pytest
from launching import deepspeed_command

from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.digits import Digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in short packs."""
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_splits(Digits(), out, sequence_length=128, packs_per_shard=16)
    return out / "train"


@pytest.fixture(scope="session")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks through DeepSpeed's launcher, as the README says, with checkpoints at 2, 4 and 6."""
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    ended = subprocess.run(deepspeed_command(digits, output), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 x cpu" in ended.stdout
    return output
