"""What people hand to the model: the calling forms, how they are packed, and what is refused."""

import pytest
import torch

from transfusion_fast import Losses, ModelConfig, Transfusion
from transfusion_fast.model.inputs import pack_documents, pack_rows

SMALL = {"num_text_tokens": 16, "transformer": {"dim": 32, "depth": 2}}
BOS, EOS, BOI, EOI, BOI1, EOI1 = 16, 17, 18, 19, 20, 21
CONFIG = ModelConfig(**SMALL, dim_latent=(4, 6))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ids(*values):
    return torch.tensor(values)


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def model_of(**settings):
    torch.manual_seed(0)
    return Transfusion(**SMALL | settings)


def packed(*documents, config=CONFIG, seed=0):
    return pack_documents(documents, config, seeded(seed))


def test_rows_with_modality_spans_give_a_loss_and_its_parts():
    model = Transfusion(num_text_tokens=256, dim_latent=192, transformer={"dim": 512, "depth": 8})
    randn = torch.randn
    text_ids = torch.randint(0, 256, (2, 16))
    loss, breakdown = model(
        text_ids,
        modality_tokens=[[randn(6, 192), randn(4, 192)], [randn(7, 192)]],
        modality_positions=[[(2, 6), (10, 4)], [(1, 7)]],
    )
    assert isinstance(breakdown, Losses)
    assert torch.equal(loss, breakdown.total)
    assert loss.item() == pytest.approx((breakdown.text + 5 * breakdown.diffusion).item())
    # Pairs of neighbouring texts: 0-1, 8-9, 14-15 in the first row; 8 to 15 in the second.
    assert (breakdown.counts.tokens, breakdown.counts.images) == (3 + 7, 3)
    loss.backward()


def test_rows_with_types_put_each_tensor_in_its_modality():
    config = ModelConfig(**SMALL, dim_latent=(384, 192))
    wide, narrow = latents(3, 384), latents(2, 192)
    batch = pack_rows(ids(*range(10))[None], [[wide, narrow]], [[(0, 1, 3), (1, 6, 2)]], config, seeded())
    assert torch.equal(batch.modalities[0].latents, wide) and torch.equal(batch.modalities[1].latents, narrow)
    assert batch.modalities[0].sequence_index.tolist() == [1, 2, 3]
    assert batch.modalities[1].sequence_index.tolist() == [6, 7]
    loss, breakdown = model_of(dim_latent=(384, 192))(
        ids(*range(10))[None], [[wide, narrow]], [[(0, 1, 3), (1, 6, 2)]], generator=seeded()
    )
    assert loss.isfinite() and breakdown.counts.images == 2


def test_documents_give_a_loss():
    model = model_of(dim_latent=(4, 6))
    loss = model([[ids(1, 2), latents(5, 4), ids(3), latents(2, 4)], [ids(4), (1, latents(3, 6))]])
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()


ROWS = ids(
    *(BOS, 1, 2, BOI, 0, 0, 0, EOI, 3, BOI1, 0, 0, EOI1, EOS),
    *(BOS, BOI, 0, 0, 0, 0, EOI, 4, 5, BOI1, 0, 0, EOI1, EOS),
).view(2, 14)
A, B, C, D = latents(3, 4, seed=1), latents(2, 6, seed=2), latents(4, 4, seed=3), latents(2, 6, seed=4)
DOCUMENTS = [[ids(1, 2), A, ids(3), (1, B)], [C, ids(4, 5), (1, D)]]
IN_ROWS = ([[A, B], [D, C]], [[(4, 3), (1, 10, 2)], [(1, 10, 2), (0, 2, 4)]])  # spans of a row in any order


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_documents_and_rows_of_one_content_have_one_loss(objective):
    model = model_of(dim_latent=(4, 6), objective=objective)
    from_rows, _ = model(ROWS, *IN_ROWS, generator=seeded())
    assert model(DOCUMENTS, generator=seeded()).item() == from_rows.item()


def test_documents_are_packed_with_their_special_tokens():
    batch = packed(*DOCUMENTS)
    assert batch.tokens.tolist() == ROWS.flatten().tolist()
    assert batch.layout.document_offsets.tolist() == [0, 14, 28]
    assert batch.layout.image_spans.tolist() == [[4, 3], [10, 2], [16, 4], [24, 2]]
    assert torch.equal(batch.modalities[0].latents, torch.cat([A, C]))
    assert torch.equal(batch.modalities[1].latents, torch.cat([B, D]))


def test_rows_are_packed_as_they_are():
    batch, given = pack_rows(ROWS, *IN_ROWS, CONFIG, seeded()), packed(*DOCUMENTS)
    for name in ("tokens", "labels", "positions", "supervised"):
        assert torch.equal(getattr(batch, name), getattr(given, name))
    for of_rows, of_documents in zip(batch.modalities, given.modalities, strict=True):
        for name in vars(of_documents):
            assert torch.equal(getattr(of_rows, name), getattr(of_documents, name))


def test_ids_at_the_places_of_images_are_ignored_and_the_caller_keeps_its_tensor():
    text_ids = ROWS.clone()
    text_ids[:, 4:6] = -1
    kept = text_ids.clone()
    batch = pack_rows(text_ids, *IN_ROWS, CONFIG, seeded())
    assert torch.equal(text_ids, kept)
    assert torch.equal(batch.tokens, pack_rows(ROWS, *IN_ROWS, CONFIG, seeded()).tokens)


def test_rows_without_images_are_text():
    model = model_of(dim_latent=4)
    loss, breakdown = model(ids(1, 2, 3, 4, 5, 6).view(2, 3))
    assert (breakdown.counts.tokens, breakdown.counts.images) == (4, 0)
    assert loss.item() == breakdown.text.item()


def test_noise_and_timesteps_come_from_the_generator():
    one, same, other = (packed(*DOCUMENTS, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(one.modalities, same.modalities, other.modalities, strict=True):
        assert torch.equal(a.noise, b.noise) and torch.equal(a.timesteps, b.timesteps)
        assert not torch.equal(a.noise, c.noise) and not torch.equal(a.timesteps, c.timesteps)
        assert len(a.noise.unique()) == a.noise.numel(), "every value has noise of its own"


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_an_image_that_text_follows_has_at_most_half_the_noise(objective):
    config = ModelConfig(**SMALL, dim_latent=4, objective=objective)
    image = latents(1, 4)
    before = packed(*[[image, ids(1)]] * 300, config=config).modalities[0].timesteps
    after = packed(*[[ids(1), image]] * 300, config=config).modalities[0].timesteps
    assert before.min() > 0 and 350 < before.max() <= 500
    assert 600 < after.max() <= 1000


def test_timesteps_go_to_the_images_that_they_were_drawn_for():
    """Text follows the images of modality 1 and not those of modality 0, in turn."""
    batch = packed(*[[(1, latents(1, 6)), ids(1), latents(1, 4)]] * 300)
    assert batch.modalities[1].timesteps.max() <= 500 < 600 < batch.modalities[0].timesteps.max()


def test_a_grid_of_patches_has_its_positions_and_no_grid_is_one_row():
    config = ModelConfig(**SMALL, dim_latent=4, positions="axial")
    grid = packed([latents(2, 2, 4)], config=config)
    row = packed([latents(4, 4)], config=config)
    patches = grid.modalities[0].sequence_index
    assert (grid.positions[patches] - grid.positions[patches[0]]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    patches = row.modalities[0].sequence_index
    assert (row.positions[patches] - row.positions[patches[0]]).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_latents_and_ids_of_any_precision_are_taken():
    batch = packed([ids(1, 2).to(torch.uint8), A.bfloat16(), ids(3).int()])
    assert batch.tokens.tolist() == [BOS, 1, 2, BOI, 0, 0, 0, EOI, 3, EOS]
    assert torch.equal(batch.modalities[0].latents, A.bfloat16().float())


def test_text_of_a_document_may_be_empty():
    assert packed([ids()[:0].long()]).tokens.tolist() == [BOS, EOS]
    assert packed([ids()[:0].long(), A]).tokens.tolist() == [BOS, BOI, 0, 0, 0, EOI, EOS]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ([1, 2], r"piece 1 must be a tensor or \(modality, tensor\), got list"),
        ((0, [1.0]), r"piece 1 must be a tensor or \(modality, tensor\), got \(int, list\)"),
        (ids(1)[None], r"piece 1: text ids must be \[n\], got \(1, 1\)"),
        (ids(3, 16), r"piece 1: text ids must lie in \[0, 16\), got 3 to 16"),
        (ids(-1, 3), r"piece 1: text ids must lie in \[0, 16\), got -1 to 3"),
        ((0, ids(1)), "piece 1: a modality tensor must be floating point, got torch.int64"),
        ((2, latents(3, 4)), r"piece 1: modality must be in \[0, 2\), got 2"),
        ((-1, latents(3, 4)), r"piece 1: modality must be in \[0, 2\), got -1"),
        (latents(3, 6), r"piece 1: latents of modality 0 must be \[patches, 4\].*got \(3, 6\)"),
        ((1, latents(3, 4)), r"piece 1: latents of modality 1 must be \[patches, 6\].*got \(3, 4\)"),
        (latents(4), r"piece 1: latents of modality 0 must be .* got \(4,\)"),
        (latents(1, 1, 1, 4), r"piece 1: latents of modality 0 must be .* got \(1, 1, 1, 4\)"),
        (latents(0, 4), r"piece 1: latents of modality 0 must be .* not empty, got \(0, 4\)"),
        ((0, 1, latents(3, 4)), "piece 1"),
        (("depth", latents(3, 4)), "piece 1: modality must be .*depth"),
    ],
)
def test_a_piece_that_does_not_fit_is_named_with_rule_and_value(piece, message):
    with pytest.raises(ValueError, match=message):
        packed([ids(1), piece])


ROW = torch.zeros(2, 8, dtype=torch.long)
X = latents(2, 4)


@pytest.mark.parametrize(
    ("text_ids", "tensors", "places", "message"),
    [
        (ROW[0], [[]], [[]], r"text_ids must be integers \[B, T\], got torch.int64 \(8,\)"),
        (ROW.float(), [[], []], [[], []], r"text_ids must be integers \[B, T\], got torch.float32 \(2, 8\)"),
        (ROW + 22, [[], []], [[], []], r"text_ids must lie in \[0, 22\), got 22 to 22"),
        (ROW - 1, [[], []], [[], []], r"text_ids must lie in \[0, 22\), got -1 to -1"),
        (ROW, [[X]], [[(2, 2)]], "an entry for each of the 2 rows, got 1 and 1"),
        (ROW, [[X], []], [[(2, 2)]], "an entry for each of the 2 rows, got 2 and 1"),
        (ROW, [[], [X]], [[], []], "row 1 has 1 modality tensors but 0 positions"),
        (ROW, [[], [X]], [[], [(2, 3)]], r"row 1, span \(2, 3\): length must be the number of patches.*got \(2, 4\)"),
        (ROW, [[], [X]], [[], [(7, 2)]], r"row 1, span \(7, 2\): must lie inside the row of 8"),
        (ROW, [[], [X]], [[], [(-1, 2)]], r"row 1, span \(-1, 2\): must lie inside the row of 8"),
        (ROW, [[], [X]], [[], [(2, 2, 2)]], r"row 1, span \(2, 2, 2\): modality must be in \[0, 2\), got 2"),
        (ROW, [[], [X]], [[], [(1, 2, 2)]], r"row 1, span \(1, 2, 2\): latents of modality 1 must be .*got \(2, 4\)"),
        (ROW, [[X, X], []], [[(2, 2), (3, 2)], []], r"span \(start=3, length=2\) overlaps"),
        (ROW, [[], [X]], [[], [(2,)]], "row 1"),
        (ROW, [[], [X]], [[], [(0, 0, 2, 2)]], "row 1"),
        (ROW, [[], [X.long()]], [[], [(2, 2)]], "row 1.* floating point"),
        (ROW, [[], [X.tolist()]], [[], [(2, 2)]], "row 1.*tensor"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_rule_and_value(text_ids, tensors, places, message):
    with pytest.raises(ValueError, match=message):
        pack_rows(text_ids, tensors, places, CONFIG)


@pytest.mark.parametrize(("documents", "number"), [([[], [ids(1)]], 0), ([[ids(1)], []], 1), ([[]], 0)])
def test_an_empty_document_is_refused_wherever_it_stands(documents, number):
    with pytest.raises(ValueError, match=f"document {number} must hold at least one piece, got none"):
        packed(*documents)
