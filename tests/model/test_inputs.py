"""What people hand to the model: the calling forms, how they are packed, and what is refused."""

import pytest
import torch
from small_models import ids, seeded

from transfusion_fast import Losses, ModelConfig, Transfusion
from transfusion_fast.model.inputs import Randomness, pack_documents, pack_rows

SMALL = {"num_text_tokens": 16, "transformer": {"dim": 32, "depth": 2}}
BOS, EOS, BOI, EOI, BOI1, EOI1 = 16, 17, 18, 19, 20, 21
CONFIG = ModelConfig(**SMALL, dim_latent=(4, 6))


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def random(seed=0, **settings):
    return Randomness(seeded(seed), **{"prob_uncond": 0.0} | settings)


def packed(*documents, config=CONFIG, **settings):
    return pack_documents(documents, config, random(**settings))


ROWS = ids(
    *(BOS, 1, 2, BOI, 0, 0, 0, EOI, 3, BOI1, 0, 0, EOI1, EOS),
    *(BOS, BOI, 0, 0, 0, 0, EOI, 4, 5, BOI1, 0, 0, EOI1, EOS),
).view(2, 14)
A, B, C, D = latents(3, 4, seed=1), latents(2, 6, seed=2), latents(4, 4, seed=3), latents(2, 6, seed=4)
DOCUMENTS = [[ids(1, 2), A, ids(3), (1, B)], [C, ids(4, 5), (1, D)]]
IN_ROWS = ([[A, B], [D, C]], [[(4, 3), (1, 10, 2)], [(1, 10, 2), (0, 2, 4)]])  # spans of a row in any order


@pytest.mark.parametrize("ids_in_images", [0, -1])
def test_documents_and_rows_of_one_content_are_one_batch_and_ids_in_images_are_ignored(ids_in_images):
    rows = ROWS.clone()
    rows[0, 4:7] = ids_in_images
    given = rows.clone()
    batch, expected = pack_rows(rows, *IN_ROWS, CONFIG, random()), packed(*DOCUMENTS)
    assert torch.equal(rows, given), "the caller keeps its tensor"
    assert batch.tokens.tolist() == ROWS.flatten().tolist()
    assert batch.layout.document_offsets.tolist() == [0, 14, 28]
    assert batch.layout.image_spans.tolist() == [[4, 3], [10, 2], [16, 4], [24, 2]]
    assert torch.equal(batch.modalities[0].latents, torch.cat([A, C]))
    for name in ("tokens", "labels", "positions", "supervised"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    for one, other in zip(batch.modalities, expected.modalities, strict=True):
        torch.testing.assert_close(vars(one), vars(other), rtol=0, atol=0)


def test_each_form_of_a_batch_gives_its_losses():
    torch.manual_seed(0)
    model = Transfusion(CONFIG)
    loss, breakdown = model(ROWS, *IN_ROWS, generator=seeded(), prob_uncond=0)
    assert isinstance(breakdown, Losses)
    assert torch.equal(loss, breakdown.total)
    assert loss.item() == pytest.approx((breakdown.text + 5 * breakdown.diffusion).item())
    assert (breakdown.counts.tokens, breakdown.counts.images) == (6 + 5, 4)
    of_documents = model(DOCUMENTS, generator=seeded(), prob_uncond=0)
    assert of_documents.item() == loss.item() == model(packed(*DOCUMENTS)).total.item()
    dropped = model(DOCUMENTS, generator=seeded(), prob_uncond=1, noise_cap=1)
    assert dropped.item() == model(packed(*DOCUMENTS, prob_uncond=1.0, noise_cap=1.0)).total.item() != loss.item()
    text = ids(1, 2, 3, 4, 5, 6).view(2, 3)
    assert model(text).item() == model(pack_rows(text, None, None, CONFIG)).text.item()
    loss, breakdown = model(text, [[], []], [[], []])
    assert (breakdown.counts.tokens, breakdown.counts.images) == (4, 0)


def test_noise_and_timesteps_come_from_the_generator():
    one, same, other = (packed(*DOCUMENTS, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(one.modalities, same.modalities, other.modalities, strict=True):
        assert torch.equal(a.noise, b.noise) and torch.equal(a.timesteps, b.timesteps)
        assert not torch.equal(a.noise, c.noise) and not torch.equal(a.timesteps, c.timesteps)
        assert len(a.noise.unique()) == a.noise.numel(), "every value has noise of its own"


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_an_image_before_its_caption_has_at_most_the_noise_of_the_cap(process):
    config = ModelConfig(**SMALL, dim_latent=(4, 6), diffusion={"process": process})

    def timesteps(document, **settings):
        return packed(*[document] * 300, config=config, **settings).modalities[1].timesteps

    image = (1, latents(1, 6))
    assert 350 < timesteps([image, ids(1)]).max() <= 500
    assert timesteps([image, ids(1)], prob_uncond=1.0).max() <= 500
    assert 200 < timesteps([image, ids(1)], noise_cap=300).max() <= 300
    for free in ([ids(1), image], [ids(1), image, ids(2)], [image, ids(1), latents(1, 4)]):
        assert 600 < timesteps(free).max() <= 1000
        assert 600 < timesteps(free, prob_uncond=1.0).max() <= 1000


def test_the_timesteps_of_an_image_are_shifted_by_its_number_of_patches(tolerance):
    document = [ids(1), latents(2, 2, 4), (1, latents(9, 6)), latents(1, 4)]
    diffusion = {"process": "flow", "shift_patches": 4}
    plain, shifted = (
        packed(document, config=ModelConfig(**SMALL, dim_latent=(4, 6), diffusion=settings)).modalities
        for settings in ({"process": "flow"}, diffusion)
    )
    for one, other, shifts in zip(plain, shifted, (torch.tensor([1.0, 0.5]), torch.tensor([1.5])), strict=True):
        odds, shifted_odds = (t / (1000 - t) for t in (one.timesteps, other.timesteps))
        torch.testing.assert_close(shifted_odds, shifts * odds, rtol=1e-4, atol=0)


def test_an_image_at_the_very_start_of_a_row_is_before_its_caption_too():
    rows = ids(0, 1).expand(300, 2), [[latents(1, 4)]] * 300, [[(0, 1)]] * 300
    assert 350 < pack_rows(*rows, CONFIG, random()).modalities[0].timesteps.max() <= 500


def test_the_share_of_images_without_context_is_that_of_the_setting():
    batch = packed(*[[ids(1), latents(1, 4), ids(2), latents(2, 4)]] * 500, prob_uncond=0.3)
    assert len(batch.layout.document_offsets) - 501 == pytest.approx(300, abs=45)  # three standard deviations


def test_conditions_are_dropped_at_any_timestep():
    documents = [[ids(1), latents(1, 4)]] * 400
    kept, dropped = (packed(*documents, prob_uncond=p) for p in (0.0, 0.3))
    assert torch.equal(kept.modalities[0].timesteps, dropped.modalities[0].timesteps)
    alone = torch.isin(dropped.modalities[0].sequence_index - 1, dropped.layout.document_offsets)  # <boi> begins one
    times = dropped.modalities[0].timesteps[alone]
    assert 80 < len(times) < 160 and times.mean().item() == pytest.approx(500, abs=90)  # three standard deviations


@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("diffusion", [{}, {"process": "flow"}, {"prediction": "v"}], ids=str)
def test_gradients_reach_the_encoder_of_latents(diffusion, copies):
    """Through the noisy input or the clean one beside copies, and through a target that holds the latents."""
    torch.manual_seed(0)
    model = Transfusion(**SMALL, dim_latent=4, diffusion=diffusion)
    given = A.double().requires_grad_()

    def loss(latents):
        return model([[ids(1), latents, ids(2)]], generator=seeded(), prob_uncond=0, noised_copies=copies)

    [gradient] = torch.autograd.grad(loss(given), given)
    step = 1e-2 * gradient / gradient.norm()
    up, down = (loss(given + sign * step) for sign in (1, -1))
    assert ((up - down) / 2e-2).item() == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_channels_first_are_channels_last_by_setting():
    grid = latents(2, 3, 4)
    first = ModelConfig(**SMALL, dim_latent=(4, 6), channel_first=True)
    given, expected = packed([grid.movedim(-1, 0)], config=first), packed([grid])
    assert torch.equal(given.modalities[0].latents, expected.modalities[0].latents)
    last = ModelConfig(**SMALL, dim_latent=(4, 6), channel_first=False)
    assert packed([latents(4, 3, 4)], config=last).modalities[0].latents.shape == (12, 4)


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 2, 4), [[0, 0], [0, 1], [1, 0], [1, 1]]), ((2, 4), [[0, 0], [0, 1]])]
)
def test_a_grid_of_patches_has_its_positions_and_no_grid_is_one_row(shape, expected):
    batch = packed([latents(*shape)], config=ModelConfig(**SMALL, dim_latent=4, positions="axial"))
    [images] = batch.modalities
    assert (batch.positions[images.sequence_index] - 2).tolist() == expected  # <bos> <boi>


def test_latents_and_ids_of_any_precision_are_taken_and_text_may_be_empty():
    batch = packed([ids(1, 2).to(torch.uint8), A.bfloat16(), ids(3).int()])
    assert batch.tokens.tolist() == [BOS, 1, 2, BOI, 0, 0, 0, EOI, 3, EOS]
    assert torch.equal(batch.modalities[0].latents, A.bfloat16().float())
    assert packed([ids()]).tokens.tolist() == [BOS, EOS]
