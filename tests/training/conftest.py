"""Fixtures of the training tests: a small data folder, and one run that nothing disturbed."""

from pathlib import Path

import pytest
from launching import train

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
    """Six steps on two ranks, with checkpoints at 2, 4 and 6."""
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert "2 x cpu" in train(2, digits, output)
    return output
