"""Calls that the tests of transfusion-pytorch 0.20 make in training, by what they check.

    test_transfusion, test_auto_equivalence_all_profiles    documents of several modalities, vectors among them
    test_auto_modality_transform, test_modality_only        channels first or last; images without text
    test_text, test_auto_text_only_training                 rows of text alone
    test_text_image_end_to_end, test_auto_end_to_end_training
                                                            an encoder and a decoder of the model (test_modalities.py)
    test_axial_pos_emb                                      axial positions with as many axes as dimensions

Its functions that draw timesteps by the lengths of images have the settings `model.diffusion.shift_patches` in their
place (test_diffusion.py). Velocity consistency, a loss against an averaged model, is not offered.
"""

from typing import Any

import pytest
import torch
from small_models import ids, seeded
from torch import Tensor

from transfusion_fast import Transfusion

SMALL = {"num_text_tokens": 8, "transformer": {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 48}}


def make(**settings: Any) -> Transfusion:
    torch.manual_seed(0)
    return Transfusion(**SMALL, **settings)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(sum(shape)))


def losses_of_steps(model: Transfusion, batch: Any, steps: int = 12) -> list[float]:
    """Return the loss of each step on one batch, always with the same noise; every weight must get a gradient."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = model(batch, generator=seeded())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


BATCHES = {
    "two modalities": (
        {"modalities": [{"dim_latent": 6}, {"dim_latent": 3, "dims": 1}]},
        [
            [ids(1, 2), (0, drawn(2, 2, 6)), ids(3), (1, drawn(6, 3))],
            [drawn(1, 3, 6), ids(5), (1, drawn(2, 3)), ids(1)],
        ],
    ),
    "vectors": ({"modalities": [{"dim_latent": 6, "dims": 0}]}, [[ids(1, 2), drawn(6), ids(3), drawn(6)], [drawn(6)]]),
    "axial positions": (
        {"modalities": [{"dim_latent": 6, "positions": "axial"}, {"dim_latent": 3, "dims": 1, "positions": "axial"}]},
        [[ids(1), (0, drawn(2, 3, 6)), (1, drawn(4, 3))], [drawn(1, 4, 6), ids(5)]],
    ),
    "channels first": ({"dim_latent": 6, "channel_first": True}, [[ids(1), drawn(6, 2, 2), ids(2), drawn(6, 3, 1)]]),
    "images alone": ({"dim_latent": (5, 6)}, [[(1, drawn(4, 4, 6))], [(1, drawn(2, 3, 6))]]),
    "rows of text": ({"dim_latent": 6}, torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])),
}


@pytest.mark.parametrize(("settings", "batch"), BATCHES.values(), ids=BATCHES)
def test_a_batch_is_learned_and_every_weight_takes_part(settings, batch):
    losses = losses_of_steps(make(**settings), batch)
    assert losses[-1] < 0.8 * losses[0]
