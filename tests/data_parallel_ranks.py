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
from transfusion_fast.model.packed_batch import PackedBatch

BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
POLICIES = {
    "fsdp": MixedPrecisionPolicy(),
    "fsdp, separate weights": MixedPrecisionPolicy(),
    "fsdp in bf16": MixedPrecisionPolicy(**BF16, cast_forward_inputs=False),
    "fsdp in bf16 with inputs cast": MixedPrecisionPolicy(**BF16),
}


SEPARATE = {"modality_weights": "separate", "conditioning": "adaln"}


def data_parallel_model(kind: str) -> Transfusion:
    """Return a model of three modalities, of which one batch has one."""
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48, **(SEPARATE if "separate" in kind else {})}
    unet = {"dim_latent": 12, "codec": "unet", "patch_size": 2}
    modalities = [{"dim_latent": 4}, {"dim_latent": 6}, unet]
    return small_model(num_text_tokens=16, modalities=modalities, transformer=transformer)


def batch_of(rank: int, model: Transfusion) -> PackedBatch:
    """Return the batch of a rank: text and images of two modalities, one of them in three shapes; or text alone."""
    images = [(2, torch.randn(*shape, 12, generator=seeded())) for shape in ((1, 2), (2, 1), (1, 2), (2, 2))]
    documents = [[[ids(1, 2), torch.randn(6, 4, generator=seeded()), ids(3), *images]], [[ids(4, 5, 6, 7)]]]
    return pack_documents(documents[rank], model.config, Randomness(seeded(), prob_uncond=0))


def _gradients(kind: str, rank: int) -> dict[str, torch.Tensor]:
    model = data_parallel_model(kind)
    if kind.startswith("ddp"):
        parallel = DistributedDataParallel(model)  # which must live until backward has ended
        parallel(batch_of(rank, model)).total.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    if kind == "zero 3":
        return _zero_gradients(model, rank)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=POLICIES[kind])
    assert isinstance(model, FSDPModule)
    model(batch_of(rank, model)).total.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def _zero_gradients(model: Transfusion, rank: int) -> dict[str, torch.Tensor]:
    """Take both batches on each rank in turn: DeepSpeed gathers ahead by what it saw in the first pass."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
    }
    # As in training: the shared-memory all-reduce that DeepSpeed would compile for the CPU takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    batches = [batch_of(number, model) for number in (rank, 1 - rank)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for batch in batches:
        engine.backward(engine(batch).total)
        if batch is batches[0]:
            engine.step()
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in model.named_parameters()}


def write_gradients(rank: int, ranks: int, port: str, out: Path) -> None:
    """Save what `_gradients` returns, or the error that it raises, for each kind."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks), **own)
    dist.init_process_group("gloo")
    results = {}
    for kind in ("ddp", "ddp, separate weights", *POLICIES, "zero 3"):
        try:
            results[kind] = _gradients(kind, rank)
        except ValueError as error:
            results[kind] = str(error)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()
