"""Sequence parallelism: ranks that share a batch compute its losses and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sequence_ranks import cut_batch, loss_and_gradients, on_ranks
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from transfusion_fast.model.sequence_parallel import split_batch
from transfusion_fast.training.ranks import _sequence_group

GROUPED = {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "qk_norm": True}
CASES: list[dict[str, Any]] = [
    {"transformer": GROUPED, "activation_checkpointing": "selective"},
    {"transformer": GROUPED, "objective": "flow", "backend": "reference", "tie_embeddings": True},
]


def test_two_ranks_that_share_a_batch_give_the_losses_and_gradients_of_one(
    tmp_path: Path, tolerance: dict[str, dict[str, float]]
) -> None:
    for settings, got in zip(CASES, on_ranks(2, CASES, tmp_path), strict=True):
        expected = loss_and_gradients(settings, 0, 1, "")
        assert all(value.abs().max() > 1e-3 for value in expected.values())
        torch.testing.assert_close(got, expected, **tolerance["fp32"])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_parts_of_a_batch_hold_each_position_and_patch_once(parts: int) -> None:
    batch = cut_batch()
    split = [split_batch(batch, part, parts) for part in range(parts)]
    length = len(batch.tokens) // parts
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(batch, name))
    supervised = torch.cat([part.supervised + number * length for number, part in enumerate(split)])
    assert torch.equal(supervised, batch.supervised)
    assert torch.equal(torch.cat([part.token_weights for part in split]), batch.token_weights)
    for number, whole in enumerate(batch.modalities):
        pieces = [part.modalities[number] for part in split]
        index = torch.cat([piece.sequence_index + at * length for at, piece in enumerate(pieces)])
        assert torch.equal(index, whole.sequence_index)
        assert torch.equal(torch.cat([piece.latents for piece in pieces]), whole.latents)
        assert torch.equal(torch.cat([piece.noise for piece in pieces]), whole.noise)
        of_patches = torch.cat([piece.timesteps.repeat_interleave(piece.image_offsets.diff()) for piece in pieces])
        assert torch.equal(of_patches, whole.timesteps.repeat_interleave(whole.image_offsets.diff()))
        weights = sum(float(piece.weights.sum()) for piece in pieces)
        assert weights == pytest.approx(float(whole.weights.sum()))


def test_consecutive_ranks_share_packs() -> None:
    for rank, members in ((1, [0, 1]), (2, [2, 3])):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            group = _resolve_process_group(_sequence_group(2))
            assert dist.get_process_group_ranks(group) == members
        finally:
            dist.destroy_process_group()
