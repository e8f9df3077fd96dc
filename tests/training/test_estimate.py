"""The estimate of a run against what the model keeps, what training reads, and numbers by hand."""

from __future__ import annotations

import gc
import itertools
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import picture, small_config, text, write_packs

from transfusion_fast import Transfusion
from transfusion_fast.config import Config, ModelConfig
from transfusion_fast.data.loader import BatchSplit, complete_config, open_data, training_batches
from transfusion_fast.errors import DataError
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.training.estimate import (
    Cluster,
    Estimate,
    Traffic,
    activation_memory,
    count_parameters,
    estimate,
    kept_activations,
    optimizer_values,
    read_packs,
    state_memory,
    traffic,
)


def has_memory(x: torch.Tensor) -> bool:
    """Return whether a tensor has a storage in memory; one that PyTorch's tracers left behind has none."""
    try:
        x.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def kept_bytes(model: Transfusion, batch: PackedBatch) -> int:
    """Count the memory that the forward pass leaves allocated: what autograd saved, and what Python objects hold."""
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def allocated() -> list[torch.Tensor]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return [x for x in tensors if has_memory(x)]

    before = {x.untyped_storage().data_ptr() for x in allocated()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = model(batch)
    for x in allocated():
        keep(x)
    assert losses.total.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in before)


@pytest.mark.filterwarnings("ignore")  # looking at every object wakes some that warn
@pytest.mark.parametrize(
    ("setting", "dtype", "blocks"),
    [
        ("none", torch.float32, {}),
        ("none", torch.bfloat16, {}),
        (
            "none",
            torch.bfloat16,
            {"modality_weights": "separate", "conditioning": "adaln", "qk_norm": True, "dropout": 0.1},
        ),
        ("selective", torch.bfloat16, {}),
        ("full", torch.bfloat16, {}),
    ],
)
@pytest.mark.parametrize("patches", [16, 256])
def test_activations_are_those_that_the_forward_pass_keeps(
    setting: str, dtype: torch.dtype, blocks: dict[str, Any], patches: int
) -> None:
    transformer = {"dim": 96, "depth": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 160, **blocks}
    config = ModelConfig(backend="triton", activation_checkpointing=setting, transformer=transformer)
    model, ids = Transfusion(config).to(dtype), torch.zeros(50, dtype=torch.long)
    batch = pack_documents([[ids, torch.zeros(patches, 4), ids]], config, Randomness(prob_uncond=0))
    counts = len(batch.tokens), len(batch.supervised), (patches,), (patches,)
    expected = kept_activations(config, setting, *counts, dtype.itemsize)
    weight = 4 * model.head.weight.numel() * (dtype != torch.float32)  # the head's copy, as the vocabulary is small
    if blocks.get("dropout"):  # on a CPU a value is kept by a number of its type, on a GPU by a byte
        weight += len(batch.tokens) * 2 * 2 * 96 * (dtype.itemsize - 1)
    # The rest is the timestep MLP, and the indices of patches and supervised positions.
    assert kept_bytes(model, batch) == pytest.approx(expected + weight, rel=0.02, abs=12_000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("patch_size", "dtype", "copies", "grids", "blocks"),
    [
        (4, torch.float32, 0, [(6, 8)], {}),
        (4, torch.bfloat16, 0, [(6, 8)], {}),
        (4, torch.float32, 2, [(6, 8), (4, 4), (6, 8)], {}),
        (2, torch.float32, 0, [(6, 8), (4, 4)], {"modality_weights": "separate"}),
        (1, torch.float32, 0, [(12, 12)], {}),
    ],
)
def test_the_u_net_keeps_what_the_estimate_says(
    patch_size: int, dtype: torch.dtype, copies: int, grids: list[tuple[int, int]], blocks: dict[str, Any]
) -> None:
    """It is what the model with a U-Net keeps beyond the same model with a linear codec."""
    width, ids, measured, expected = 3 * patch_size**2, torch.zeros(50, dtype=torch.long), [], []
    for codec in ({"codec": "unet", "patch_size": patch_size}, {}):
        transformer = {"dim": 96, "depth": 1, "heads": 2, "ffn_dim": 160, **blocks}
        modality = {"dim_latent": width, **codec}
        config = ModelConfig(backend="triton", modalities=[modality], transformer=transformer)
        model = Transfusion(config).to(dtype)
        document = [ids, *(torch.zeros(*grid, width) for grid in grids)]
        batch = pack_documents([document], config, Randomness(prob_uncond=0, noised_copies=copies))
        [images] = batch.modalities
        counts = len(batch.tokens), len(batch.supervised), (len(images.latents),), (images.trained_patches,)
        expected.append(kept_activations(config, "none", *counts, dtype.itemsize))
        measured.append(kept_bytes(model, batch))
    levels = [4.0**n for n in range(patch_size.bit_length())]
    # On a CPU a norm keeps its mean and deviation as numbers of its type, on a GPU in fp32.
    norms = len(images.latents) * 2 * (4 - dtype.itemsize) * (4 * sum(levels) + 1 + levels[-1])
    assert measured[0] - measured[1] == pytest.approx(expected[0] - expected[1] - norms, rel=0.02)


def test_parameters_are_counted_by_part_and_not_allocated() -> None:
    counts = count_parameters(ModelConfig(preset="7b", num_text_tokens=32000, dim_latent=256))
    assert 6.6e9 < sum(counts.values()) < 7e9  # Llama's 7B has 6.74e9
    tied = ModelConfig(tie_embeddings=True)
    assert sum(count_parameters(tied).values()) == sum(p.numel() for p in Transfusion(tied).parameters())


def test_ranks_divide_what_their_zero_stage_says() -> None:
    def bytes_of_a_parameter(gpus: int, **train: Any) -> tuple[float, ...]:
        memory, host = state_memory(10**9, Config(train=train), gpus, 2)
        return *(round(gpus * memory[use] / 1e9) for use in ("weights", "gradients", "optimizer", "ema")), host * gpus

    assert bytes_of_a_parameter(64) == (2, 4, 12, 4, 0)  # ZeRO's 16 with gradients in bf16, and the average
    assert bytes_of_a_parameter(64, zero_stage=2) == (128, 4, 12, 4, 0)
    assert bytes_of_a_parameter(64, zero_stage=1, ema_decay=0) == (128, 384, 12, 0, 0)
    assert bytes_of_a_parameter(64, offload_optimizer=True) == (2, 0, 0, 0, 24e9)


def test_buffers_hold_the_gathered_weights_and_what_is_reduced() -> None:
    def buffers(parameters: int, stage: int) -> float:
        return state_memory(parameters, Config(train={"zero_stage": stage}), 64, 2)[0]["buffers"]

    assert [buffers(n, 3) for n in (10**8, 10**9, 4 * 10**9)] == [2 * 6e8, 2 * 15e8, 2 * 15e8]
    assert [buffers(n, 2) for n in (10**8, 10**9)] == [2 * 2 * 1e8, 2 * 2 * 5e8]


def test_muon_keeps_one_value_less_for_each_element_of_the_blocks_matrices() -> None:
    model = Transfusion(preset="0.16b")
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    configs = {name: Config(model={"preset": "0.16b"}, optimizer={"name": name}) for name in ("adamw", "muon")}
    assert optimizer_values(10**9, configs["adamw"]) == 3 * 10**9
    assert optimizer_values(10**9, configs["muon"]) == 3 * 10**9 - matrices


def test_traffic_counts_the_collectives_of_a_step() -> None:
    share = 1000 * 2 * 3 / 4  # of 1,000 parameters in bf16 on 4 GPUs
    assert traffic(1000, 1, 5, 4, 2) == Traffic(gathered=share, reduced=2 * share)
    assert traffic(1000, 2, 5, 4, 2) == Traffic(gathered=share, reduced=10 * share)
    assert traffic(1000, 3, 5, 4, 2) == Traffic(gathered=5 * share, reduced=5 * share)
    large = traffic(4 * 10**9, 3, 5, 4, 2)  # a billion parameters stay gathered from forward to backward
    assert large.gathered == 1.75 * large.reduced == 1.75 * 5 * 6e9
    assert traffic(1000, 3, 5, 1, 2) == Traffic(0, 0)


def test_the_slower_of_nvlink_and_a_nodes_network_limits_communication() -> None:
    def bandwidth(gpus: int, network: float) -> float:
        return Cluster("H100", gpus, 8, mfu=0.4, network=network, storage=1).ring_bandwidth

    assert [bandwidth(8, 50e9), bandwidth(16, 50e9), bandwidth(16, 100e9)] == [450e9, 400e9, 450e9]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("estimate")
    documents = [(text(10 + n, n), picture(n)) for n in range(24)] + [(text(50, 99),)]
    config = small_config(write_packs(folder / "data", documents, 128), f"train.output={folder / 'run'}")
    return complete_config(config, open_data(config))


def test_the_means_are_those_of_the_packs_that_training_takes_first(config: Config) -> None:
    data = open_data(config)
    means = read_packs(config, data, 3)
    stream = training_batches(config, data, BatchSplit(0, 1, 1, 4), 0)
    batches = [loaded.batch for loaded in itertools.islice(stream, 3)]
    assert means.packs == 3 and means.seconds > 0
    assert means.tokens == sum(b.num_tokens for b in batches) / 3
    assert means.supervised == sum(len(b.supervised) for b in batches) / 3
    assert means.images == sum(b.num_images for b in batches) / 3
    assert means.patches == (sum(len(b.modalities[0].latents) for b in batches) / 3,)
    assert means.area == sum(int(b.layout.dense_mask().sum()) for b in batches) / 3


def test_noised_copies_count_as_positions_and_the_images_that_they_copy_are_not_decoded(config: Config) -> None:
    changed = config.data.model_copy(update={"context": "clean"})
    config = config.model_copy(update={"data": changed})
    means, packs_of_gpu = read_packs(config, open_data(config), 3), config.train.micro_batch
    assert means.patches == (2 * means.trained_patches[0],) and means.trained_patches[0] > 0
    assert means.positions >= means.tokens > 128, "packs of 128 positions, with copies behind them"
    run = estimate(config, open_data(config), Cluster("H100", 1, 1, mfu=0.4, network=1e9, storage=1e9), means)
    assert run.padding == pytest.approx(1 - means.tokens / means.positions)
    counts = (packs_of_gpu * x for x in (means.positions, means.supervised, means.patches[0], means.trained_patches[0]))
    positions, supervised, *patches = counts
    expected = activation_memory(config.model, "none", positions, supervised, *([n] for n in patches), run.itemsize)
    assert run.activations["none"] == expected


def test_frozen_text_is_held_without_gradients_and_state(config: Config) -> None:
    blocks = config.model.transformer.model_copy(update={"modality_weights": "separate"})
    model, packs = config.model.model_copy(update={"transformer": blocks}), read_packs(config, open_data(config), 2)

    def run(freeze: str) -> Estimate:
        train = config.train.model_copy(update={"freeze": freeze, "zero_stage": 2})
        changed = config.model_copy(update={"model": model, "train": train})
        return estimate(changed, open_data(config), Cluster("H100", 4, 4, mfu=0.4, network=1e9, storage=1e9), packs)

    names = {name: p.numel() for name, p in Transfusion(model).named_parameters()}
    trained = sum(size for name, size in names.items() if name.startswith("codecs") or "modalities" in name)
    share, (all_of_it, text_frozen) = trained / sum(names.values()), map(run, ("none", "text"))
    assert text_frozen.checkpoint_bytes == 4 * (sum(names.values()) + 3 * trained)  # moments and average
    for use in ("gradients", "optimizer", "ema", "buffers"):
        assert text_frozen.memory[use] == pytest.approx(share * all_of_it.memory[use]), use
    assert text_frozen.memory["weights"] == all_of_it.memory["weights"]
    for bytes_of in (attrgetter("traffic.gathered"), attrgetter("traffic.reduced")):
        assert bytes_of(text_frozen) == pytest.approx(share * bytes_of(all_of_it))
    assert text_frozen.flops_per_token < all_of_it.flops_per_token
    muon = {"model": model, "train": {"freeze": "text"}, "optimizer": {"name": "muon"}}
    own = [p for name, p in Transfusion(model).named_parameters() if name.startswith("blocks") and "modalities" in name]
    matrices = sum(p.numel() for p in own if p.ndim == 2)
    assert optimizer_values(sum(names.values()), Config.model_validate(muon)) == 3 * trained - matrices


def test_a_faster_gpu_leaves_another_part_to_limit_the_step(config: Config) -> None:
    data = open_data(config)
    packs = read_packs(config, data, 2)

    def limit(**settings: Any) -> str:
        machine = {"gpu_name": "H100", "gpus": 4, "gpus_per_node": 2, "mfu": 1e-12, "network": 1e12, "storage": 1e12}
        return estimate(config, data, Cluster(**{**machine, **settings}), packs).limit

    assert limit() == "compute"
    assert limit(mfu=1.0) == "loader"
    assert limit(mfu=1.0, network=1.0) == "communication"
    assert limit(mfu=1.0, storage=1.0) == "checkpoints"


def test_gpus_that_share_packs_hold_a_part_of_the_activations_and_checkpoints_are_in_fp32(config: Config) -> None:
    data = open_data(config)
    packs = read_packs(config, data, 2)

    def run(gpus: int) -> Estimate:
        changed = config.train.model_copy(update={"sequence_parallel": gpus, "precision": "bf16"})
        cluster = Cluster("H100", gpus, 8, mfu=0.4, network=1e9, storage=1e9)
        return estimate(config.model_copy(update={"train": changed}), data, cluster, packs)

    one, two = run(1), run(2)
    assert one.accumulation_steps == two.accumulation_steps
    assert two.activations == pytest.approx({setting: size / 2 for setting, size in one.activations.items()})
    assert one.checkpoint_bytes == two.checkpoint_bytes == 4 * 4 * one.num_parameters


def test_a_missing_shard_is_an_error_of_the_data(config: Config) -> None:
    shard = Path(config.data.path) / "shard-000000.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="must exist"):
        read_packs(config, open_data(config), 2)
    shard.write_bytes(content)
