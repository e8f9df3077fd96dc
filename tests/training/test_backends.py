"""Training with each backend of the fused ops."""

from pathlib import Path

import pytest
from launching import metrics, train

STEPS = ("model.transformer={dim: 192, depth: 2, heads: 4, ffn_dim: 512}", "train.steps=2", "train.global_batch=1")


@pytest.mark.slow
def test_the_digits_demo_takes_the_same_steps_with_the_triton_kernels(digits: Path, tmp_path: Path) -> None:
    """This uses the demo's model at half its depth, in fp32, one pack a step; conftest.py sets TRITON_INTERPRET."""
    for backend in ("torch", "triton"):
        printed = train(1, digits, tmp_path / backend, *STEPS, f"model.backend={backend}")
        assert f"all ops on {backend}" in printed
    expected = metrics(tmp_path / "torch")
    assert len(expected) == 2 and metrics(tmp_path / "triton") == [pytest.approx(row, rel=1e-5) for row in expected]
