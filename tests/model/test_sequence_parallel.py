"""Sequence parallelism: ranks that share a batch compute its losses and gradients."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sequence_ranks import cut_batch, loss_and_gradients, on_ranks
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import ModalityBatch
from transfusion_fast.model.sequence_parallel import split_batch
from transfusion_fast.training.ranks import _sequence_group

GROUPED = {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "qk_norm": True}
CASES: list[dict[str, Any]] = [
    {"transformer": GROUPED, "activation_checkpointing": "selective"},
    {"transformer": GROUPED | {"modality_weights": "separate", "conditioning": "adaln"}, "z_loss": 0.01},
    {
        "transformer": GROUPED,
        "diffusion": {"process": "flow", "prediction": "v", "loss": "x0"},
        "backend": "reference",
        "tie_embeddings": True,
        "noised_copies": 2,
    },
]


def test_two_ranks_that_share_a_batch_give_the_losses_and_gradients_of_one(
    tmp_path: Path, tolerance: dict[str, dict[str, float]]
) -> None:
    for settings, got in zip(CASES, on_ranks(2, CASES, tmp_path), strict=True):
        expected = loss_and_gradients(settings, 0, 1, "")
        assert all(value.abs().max() > 1e-3 for value in expected.values())
        torch.testing.assert_close(got, expected, **tolerance["fp32"])


@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_parts_of_a_batch_hold_each_position_and_patch_once(parts: int, copies: int) -> None:
    batch = cut_batch(copies)
    split = [split_batch(batch, part, parts) for part in range(parts)]
    length = len(batch.tokens) // parts
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(batch, name))
    supervised = torch.cat([part.supervised + number * length for number, part in enumerate(split)])
    assert torch.equal(supervised, batch.supervised)
    assert torch.equal(torch.cat([part.token_weights for part in split]), batch.token_weights)
    for weighted in (True, False):  # without weights, one of the ranks counts the images
        of_parts = [part if weighted else replace(part, token_weights=None) for part in split]
        counts = [Counts.of(part, common=number == 0) for number, part in enumerate(of_parts)]
        whole_counts = Counts.of(batch if weighted else replace(batch, token_weights=None))
        assert tuple(map(sum, zip(*counts, strict=True))) == pytest.approx(whole_counts)
    for number, whole in enumerate(batch.modalities):
        pieces = [part.modalities[number] for part in split]
        assert torch.equal(
            joined([p.sequence_index + at * length for at, p in enumerate(pieces)], pieces), whole.sequence_index
        )
        assert torch.equal(joined([p.latents for p in pieces], pieces), whole.latents)
        assert torch.equal(torch.cat([p.noise for p in pieces]), whole.noise)
        of_patches = [p.timesteps.repeat_interleave(p.image_offsets.diff()) for p in pieces]
        assert torch.equal(joined(of_patches, pieces), whole.timesteps.repeat_interleave(whole.image_offsets.diff()))
        assert sum(float(p.weights.sum()) for p in pieces) == pytest.approx(float(whole.weights.sum()))


def joined(values: Sequence[torch.Tensor], pieces: Sequence[ModalityBatch]) -> torch.Tensor:
    """Join values of patches: those of trained images first, then those of clean ones."""
    trained = [x[: p.trained_patches] for x, p in zip(values, pieces, strict=True)]
    return torch.cat([*trained, *(x[p.trained_patches :] for x, p in zip(values, pieces, strict=True))])


def test_consecutive_ranks_share_packs() -> None:
    for rank, members in ((1, [0, 1]), (2, [2, 3])):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            group = _resolve_process_group(_sequence_group(2))
            assert dist.get_process_group_ranks(group) == members
        finally:
            dist.destroy_process_group()
