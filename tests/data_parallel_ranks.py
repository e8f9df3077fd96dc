"""Ranks that train the model in the data parallelism of PyTorch, for its tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
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
    "fsdp, separate weights": MixedPrecisionPolicy(),
    "fsdp in bf16": MixedPrecisionPolicy(**BF16, cast_forward_inputs=False),
    "fsdp in bf16 with inputs cast": MixedPrecisionPolicy(**BF16),
}


SEPARATE = {"modality_weights": "separate", "conditioning": "adaln"}


def data_parallel_model(kind: str) -> Transfusion:
    """Return a model of three modalities, of which the batches have one."""
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48, **(SEPARATE if "separate" in kind else {})}
    return small_model(num_text_tokens=16, dim_latent=(4, 6, 3), transformer=transformer)


def batch_of(rank: int, model: Transfusion) -> PackedBatch:
    """Return the batch of a rank: text and an image, or text alone."""
    documents = [[[ids(1, 2), torch.randn(6, 4, generator=seeded()), ids(3)]], [[ids(4, 5, 6, 7)]]]
    return pack_documents(documents[rank], model.config, Randomness(seeded(), prob_uncond=0))


def _gradients(kind: str, rank: int) -> dict[str, torch.Tensor]:
    model = data_parallel_model(kind)
    if kind.startswith("ddp"):
        parallel = DistributedDataParallel(model)  # which must live until backward has ended
        parallel(batch_of(rank, model)).total.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=POLICIES[kind])
    assert isinstance(model, FSDPModule)
    model(batch_of(rank, model)).total.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def write_gradients(rank: int, ranks: int, port: str, out: Path) -> None:
    """Save what `_gradients` returns, or the error that it raises, for each kind."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo")
    results = {}
    for kind in ("ddp", "ddp, separate weights", *POLICIES):
        try:
            results[kind] = _gradients(kind, rank)
        except ValueError as error:
            results[kind] = str(error)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()
