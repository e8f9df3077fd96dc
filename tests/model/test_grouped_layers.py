"""Separate weights for modalities, adaLN-zero, dropout: what each setting changes, and that it changes nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import ids, seeded, small_model
from torch import Tensor

from transfusion_fast import Transfusion
from transfusion_fast.model import ops
from transfusion_fast.model.grouped_layers import GroupedBlock, group_positions, merge, name_in_text, of_text, split
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.model.layers import Block, RMSNorm
from transfusion_fast.model.packed_batch import PackedBatch

SMALL = {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "qk_norm": True}
LATENTS = (4, 6, 3)  # the last modality is absent from the documents


def make(backend: str = "torch", checkpointing: str = "none", **blocks: Any) -> Transfusion:
    settings = {"backend": backend, "activation_checkpointing": checkpointing}
    return small_model(num_text_tokens=16, dim_latent=LATENTS, transformer=SMALL | blocks, **settings)


def documents() -> PackedBatch:
    generator = seeded()
    image, sound = torch.randn(2, 3, 4, generator=generator), torch.randn(5, 6, generator=generator)
    pieces = [[ids(1, 2, 3), image, ids(4)], [(1, sound), ids(5, 6), image], [ids(7, 8)]]
    return pack_documents(pieces, make().config, Randomness(seeded(), prob_uncond=0))


def noisy(model: Transfusion, batch: PackedBatch) -> list[Tensor]:
    return [m.latents + m.noise for m in batch.modalities]


@pytest.mark.parametrize(
    ("backend", "blocks"),
    [
        ("torch", {"qk_norm": False}),
        ("torch", {}),
        ("triton", {"heads": 2, "kv_heads": 1}),
        ("triton", {"heads": 2, "kv_heads": 1, "qk_norm": False}),
    ],
)
def test_separate_weights_that_are_copies_compute_the_shared_model_and_divide_its_gradients(
    backend: str, blocks: dict[str, Any], tolerance: dict[str, dict[str, float]]
) -> None:
    shared, separate = make(backend, **blocks), make(backend, "selective", modality_weights="separate", **blocks)
    weights, batch = dict(shared.named_parameters()), documents()
    with torch.no_grad():
        for name, parameter in separate.named_parameters():
            parameter.copy_(weights[name_in_text(name)])
    sums: dict[str, Any] = dict.fromkeys(weights, 0)
    losses, expected = separate(batch), shared(batch)
    for loss in (losses.total, expected.total):
        loss.backward()
    for name, parameter in separate.named_parameters():
        sums[name_in_text(name)] += parameter.grad
        if "modalities.2." in name:  # which has no patches
            assert torch.count_nonzero(parameter.grad) == 0
    torch.testing.assert_close(losses[:3], expected[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, {name: x.grad for name, x in weights.items()}, **tolerance["fp32"])


def test_only_the_norm_before_tied_logits_begins_below_one() -> None:
    settings = {"num_text_tokens": 16, "dim_latent": LATENTS, "tie_embeddings": True}
    norm = Transfusion(transformer=SMALL | {"dim": 256, "modality_weights": "separate"}, **settings).norm
    assert norm.weight.unique().item() == pytest.approx(1 / (256 * 0.02))
    assert all(torch.equal(own.weight, torch.ones(256)) for own in norm.modalities)


def test_weights_of_a_modality_change_its_patches_and_what_sees_them() -> None:
    model, batch = make(modality_weights="separate"), documents()
    before = model.hidden(batch, noisy(model, batch))[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and not of_text(name) and "modalities.1." in name:
                parameter.mul_(1.1)
    changed = (model.hidden(batch, noisy(model, batch))[0] != before).any(dim=1)
    first, second, last = batch.layout.document_offsets[1:].tolist()
    assert not changed[:first].any() and changed[first + 2 : second].all() and not changed[second:last].any()


def test_groups_are_read_and_written_without_loss_and_so_are_their_gradients() -> None:
    batch = documents()
    positions = group_positions(batch)
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(len(batch.tokens)))
    x = torch.randn(len(batch.tokens), 5, 2, dtype=torch.float64, requires_grad=True)
    groups = split(x, positions)
    for index, group in zip(positions, groups, strict=True):
        assert torch.equal(group, x[index])
    assert torch.equal(merge([(group[:, :2], group[:, 2:]) for group in groups], positions), x)
    assert torch.autograd.gradcheck(lambda x: merge([(g[:, 3:], g[:, :3]) for g in split(x, positions)], positions), x)


@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_patches_pass_new_adaln_blocks_unchanged_and_their_timestep_reaches_them_there_alone(weights: str) -> None:
    torch.manual_seed(0)
    settings = {"num_text_tokens": 16, "dim_latent": LATENTS}
    model = Transfusion(transformer=SMALL | {"conditioning": "adaln", "modality_weights": weights}, **settings)
    batch, inputs = documents(), []
    images = batch.modalities[0]
    model.blocks[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))

    def hidden() -> Tensor:
        return model.hidden(batch, noisy(model, batch))[0]

    before = hidden()
    norms = [model.norm, *model.norm.modalities] if weights == "separate" else [model.norm] * 4
    for norm, patches, index in zip(norms[1:], inputs[0][1:], group_positions(batch)[1:], strict=True):
        assert torch.equal(before[index], RMSNorm.forward(norm, patches)[0])
    images.timesteps.add_(100)
    assert torch.equal(hidden(), before)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.data.normal_(std=0.1, generator=seeded())
    changed, first = hidden(), images.sequence_index[0]
    assert torch.equal(changed[:first], before[:first])  # text before the first image
    assert (changed[images.sequence_index] != before[images.sequence_index]).any(dim=1).all()
    images.timesteps.sub_(50)
    assert (hidden()[images.sequence_index] != changed[images.sequence_index]).any(dim=1).all()


def test_an_adaln_block_computes_the_published_equations() -> None:
    """For one image alone, with the layers of a plain block, as attention then sees it alone."""
    config = make(conditioning="adaln").config.transformer
    torch.manual_seed(1)
    grouped, plain = GroupedBlock(config, "reference", 1).double(), Block(config, "reference").double()
    torch.nn.init.normal_(grouped.modulation.linear.weight, std=0.1)
    plain.load_state_dict({k: v for k, v in grouped.state_dict().items() if "modulation" not in k})
    batch = pack_documents([[torch.zeros(6, 4)]], make().config, Randomness(seeded()))
    index, rotary = batch.modalities[0].sequence_index, ops.rotary(batch.positions, config.head_dim)
    x, embedded = torch.randn(len(batch.tokens), 32).double(), torch.randn(1, 256).double()
    positions = group_positions(batch)[:2]
    conditions = ((embedded, torch.zeros(len(index), dtype=torch.long)),)
    out = grouped(split(x, positions), rotary, batch.layout, positions, conditions)
    vectors = torch.zeros(6, *x.shape, dtype=torch.float64)
    vectors[:, index] = (grouped.modulation.linear(embedded)[0].view(6, 1, 32)).expand(-1, len(index), -1)
    vectors[[2, 5]] += (~torch.isin(torch.arange(len(x)), index))[:, None]  # text has a gate of one
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
    zero, norm = torch.zeros_like(x), {"q_weight": plain.attention.q_norm, "k_weight": plain.attention.k_norm}
    heads = plain.attention.project(plain.attention_norm(x)[0] * (1 + scale) + shift)
    attended = plain.attention.attend(heads, rotary, batch.layout, **norm).flatten(1)
    x = x + gate * plain.attention.out(attended, zero)
    x = x + mlp_gate * plain.mlp(plain.mlp_norm(x)[0] * (1 + mlp_scale) + mlp_shift, zero)
    torch.testing.assert_close(merge([[group] for group in out], positions), x)


def gradients(model: Transfusion, batch: PackedBatch) -> Iterator[Tensor]:
    torch.manual_seed(5)
    loss = model(batch).total
    yield from (loss, *torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("blocks", [{}, {"modality_weights": "separate", "conditioning": "adaln"}])
def test_dropout_acts_in_training_alone_and_is_repeated_where_activations_are_recomputed(blocks: dict) -> None:
    batch = documents()
    plain, *dropping = (
        make(checkpointing=setting, dropout=p, **blocks)
        for setting, p in (("none", 0.0), ("none", 0.5), ("selective", 0.5), ("full", 0.5))
    )
    without = list(gradients(plain, batch))
    expected = list(gradients(dropping[0], batch))
    assert abs(expected[0] - without[0]) > 1e-3
    for model in dropping:
        assert all(map(torch.equal, gradients(model, batch), expected))
        assert all(map(torch.equal, gradients(model.eval(), batch), without))


def test_dropout_keeps_the_mean_of_what_attention_and_feed_forward_add() -> None:
    config = make(dropout=0.25).config.transformer
    layer = Block(config, "torch").mlp.down
    torch.nn.init.ones_(layer.weight)
    x, residual = torch.ones(4000, config.hidden_dim), torch.full((4000, 32), 2.0)
    added = layer(x, residual) - residual
    assert set(added.unique().tolist()) == {0.0, config.hidden_dim / 0.75}
    assert added.mean().item() == pytest.approx(config.hidden_dim, rel=0.02)
    gated = layer(x, residual, torch.full_like(residual, 3.0)) - residual
    assert set(gated.unique().tolist()) == {0.0, 3 * config.hidden_dim / 0.75}
    assert gated.mean().item() == pytest.approx(3 * config.hidden_dim, rel=0.02)


def test_capped_logits_are_those_of_sampling_too() -> None:
    plain, capped = (make().head, Transfusion(num_text_tokens=16, logit_cap=2.0, transformer=SMALL).head)
    capped.weight = plain.weight
    hidden = torch.randn(3, 32, generator=seeded())
    torch.testing.assert_close(capped(hidden), 2 * (plain(hidden) / 2).tanh())
