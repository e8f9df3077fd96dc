"""The model in the data parallelism of PyTorch, without the trainer: two ranks, of which one has no image."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sequence_ranks import run_ranks
from small_models import ids, seeded, small_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from transfusion_fast import Transfusion
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.model.sequence import PackedBatch

BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
POLICIES = {
    "fsdp": MixedPrecisionPolicy(),
    "fsdp in bf16": MixedPrecisionPolicy(**BF16, cast_forward_inputs=False),
    "fsdp in bf16 with inputs cast": MixedPrecisionPolicy(**BF16),
}


def make() -> Transfusion:
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48}
    return small_model(num_text_tokens=16, dim_latent=(4, 6), transformer=transformer)


def batch_of(rank: int, model: Transfusion) -> PackedBatch:
    documents = [[[ids(1, 2), torch.randn(6, 4, generator=seeded()), ids(3)]], [[ids(4, 5, 6, 7)]]]
    return pack_documents(documents[rank], model.config, Randomness(seeded(), prob_uncond=0))


def _gradients(kind: str, rank: int) -> dict[str, torch.Tensor]:
    model = make()
    if kind == "ddp":
        parallel = DistributedDataParallel(model)  # which must live until backward has ended
        parallel(batch_of(rank, model)).total.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=POLICIES[kind])
    assert isinstance(model, FSDPModule)
    model(batch_of(rank, model)).total.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def _rank(rank: int, ranks: int, port: str, out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo")
    results = {}
    for kind in ("ddp", *POLICIES):
        try:
            results[kind] = _gradients(kind, rank)
        except ValueError as error:
            results[kind] = str(error)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("ranks") / "results"
    run_ranks(_rank, 2, out)
    return torch.load(out)


@pytest.mark.parametrize(("kind", "most"), [("ddp", 1e-5), ("fsdp", 1e-5), ("fsdp in bf16", 0.05)])
def test_gradients_are_the_mean_of_the_ranks(results: dict, kind: str, most: float) -> None:
    model = make()
    (sum(model(batch_of(rank, model)).total for rank in range(2)) / 2).backward()
    for name, parameter in model.named_parameters():
        error = (results[kind][name].float() - parameter.grad).norm()
        assert error <= most * parameter.grad.norm() + 1e-7, name


def test_timesteps_in_half_precision_are_refused(results: dict) -> None:
    assert results["fsdp in bf16 with inputs cast"] == (
        "timesteps must be fp32, got torch.bfloat16, which cannot hold them; do not convert the batch, "
        "which FSDP2 does without MixedPrecisionPolicy(cast_forward_inputs=False)"
    )
