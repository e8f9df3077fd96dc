"""The model in the data parallelism of PyTorch and DeepSpeed, without the trainer, on two ranks.

One rank has no image, the other images of one modality in three shapes and none of another.
"""

import pytest
import torch
from data_parallel_ranks import batch_of, data_parallel_model, write_gradients
from sequence_ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("ranks") / "results"
    run_ranks(write_gradients, 2, out)
    return torch.load(out)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("ddp", 1e-5),
        ("ddp, separate weights", 1e-5),
        ("fsdp", 1e-5),
        ("fsdp, separate weights", 1e-5),
        ("fsdp in bf16", 0.1),
        ("zero 3", 1e-5),
    ],
)
def test_gradients_are_the_mean_of_the_ranks(results: dict, kind: str, most: float) -> None:
    model = data_parallel_model(kind)
    (sum(model(batch_of(rank, model)).total for rank in range(2)) / 2).backward()
    for name, parameter in model.named_parameters():
        error = (results[kind][name].float() - parameter.grad).norm()
        assert error <= most * parameter.grad.norm() + 1e-7, name


def test_timesteps_in_half_precision_are_refused(results: dict) -> None:
    assert results["fsdp in bf16 with inputs cast"] == (
        "timesteps must be fp32, got torch.bfloat16, which rounds them; keep the batch in fp32, "
        "with FSDP2 by MixedPrecisionPolicy(cast_forward_inputs=False)"
    )
