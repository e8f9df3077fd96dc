"""From stored packs to training batches: what is drawn, by what it is keyed, and how it is laid out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from transfusion_fast.config import DataConfig, ModelConfig
from transfusion_fast.data.batch import BatchBuilder, Draws, KeyedPack, draw
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment, make_pack
from transfusion_fast.diffusion_config import DiffusionConfig
from transfusion_fast.model.diffusion import Diffusion
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.model.sequence import Vocabulary

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
COLOUR = ModalityInfo("colour", channels=3, patch_size=1, encoding="pixels")
MODALITIES = (GREY, COLOUR)
VOCABULARY = Vocabulary(num_text_tokens=256, dims=(2, 2))
BOS, EOS, BOI, EOI = VOCABULARY.bos, VOCABULARY.eos, VOCABULARY.boi(0), VOCABULARY.eoi(0)


def text(*ids: int) -> TextSegment:
    return TextSegment(np.array(ids, dtype=np.int32))


def image(seed: int, height: int = 4, width: int = 2, modality: int = 0) -> ImageSegment:
    shape = (height, width, MODALITIES[modality].channels)
    return ImageSegment(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8), modality)


def builder(total_length: int = 64, **settings: float) -> BatchBuilder:
    keep = {"caption_first": 1.0, "prob_uncond": 0.0}
    data = DataConfig(**{**keep, **settings})
    configs = ModelConfig(dim_latent=(4, 4)).modalities
    return BatchBuilder(MODALITIES, VOCABULARY, Diffusion(DiffusionConfig()), data, 0, configs, False, total_length)


def keyed(*documents: tuple, epoch: int = 0, number: int = 0) -> KeyedPack:
    return KeyedPack(make_pack(documents, MODALITIES), epoch, number)


PAIR = (text(5, 6), image(1))


def used(batch: PackedBatch) -> list[int]:
    return batch.tokens[: batch.num_tokens].tolist()


def test_a_pair_is_laid_out_caption_first_image_first_or_apart_in_the_same_length() -> None:
    stored = keyed(PAIR)
    assert used(builder()([stored])) == [BOS, 5, 6, BOI, 0, 0, EOI, EOS]
    assert used(builder(caption_first=0.0)([stored])) == [BOS, BOI, 0, 0, EOI, 5, 6, EOS]
    apart = builder(prob_uncond=1.0)([stored])
    assert used(apart) == [BOS, 5, 6, BOI, 0, 0, EOI, EOS]
    assert apart.layout.document_offsets.tolist() == [0, 3, 8]


def test_size_tokens_lengthen_a_batch_by_whole_steps_and_precede_each_image() -> None:
    sized = replace(builder(8), vocabulary=Vocabulary(num_text_tokens=256, dims=(2, 2), max_size=2))
    batch = sized([keyed(PAIR)])
    two, one = sized.vocabulary.first_size + 1, sized.vocabulary.first_size
    assert used(batch) == [BOS, 5, 6, BOI, two, one, 0, 0, EOI, EOS] and len(batch.tokens) == 16
    apart = replace(sized, settings=DataConfig(caption_first=0.0, prob_uncond=1.0))([keyed(PAIR)])
    assert used(apart) == [BOS, BOI, two, one, 0, 0, EOI, 5, 6, EOS]
    assert apart.layout.document_offsets.tolist() == [0, 1, 10]
    assert apart.labels.tolist()[:10] == [-100, two, one, -100, -100, -100, 5, 6, EOS, -100]


def test_only_pairs_are_rearranged() -> None:
    others = [(text(1),), (image(2),), (text(1), image(2), text(3)), (text(1), text(2)), (image(3), text(4))]
    usual, changed = (builder(**s)([keyed(*others)]) for s in ({}, {"caption_first": 0.0}))
    assert used(usual) == used(changed)
    assert torch.equal(usual.layout.document_offsets, changed.layout.document_offsets)


def test_an_image_of_any_document_is_trained_without_what_precedes_it() -> None:
    batch = builder(prob_uncond=1.0)([keyed((text(1), image(2), text(3), image(4)), (text(5),))])
    assert used(batch) == [BOS, 1, BOI, 0, 0, EOI, 3, BOI, 0, 0, EOI, EOS, BOS, 5, EOS]
    assert batch.layout.document_offsets.tolist() == [0, 2, 7, 12, 15]


def test_the_image_that_text_follows_keeps_under_the_noise_cap_and_no_other() -> None:
    packs = [keyed(PAIR, number=n) for n in range(300)]
    length = 300 * 8
    first, last = (builder(length, caption_first=p)(packs).modalities[0].timesteps for p in (1.0, 0.0))
    assert 900 < first.max() <= 1000
    assert 450 < last.max() <= 500
    assert 0 < first.min() < 30 and 0 < last.min() < 15


def test_the_probabilities_of_order_and_drop_are_those_of_the_settings() -> None:
    packs = [keyed(PAIR, number=n) for n in range(2000)]
    batch = builder(2000 * 8, caption_first=0.8, prob_uncond=0.1)(packs)
    documents = len(batch.layout.document_offsets) - 1
    assert documents - 2000 == pytest.approx(200, abs=45)  # three standard deviations
    followed = sum(a == EOI and b == 5 for a, b in zip(used(batch), used(batch)[1:], strict=False))
    assert followed == pytest.approx(0.2 * 2000, abs=55)


def test_what_is_drawn_is_keyed_by_seed_epoch_pack_and_image_and_by_nothing_else() -> None:
    documents = ((text(1), image(1)), (image(2), image(3, modality=1), text(9)), (text(4), image(5)))
    build = replace(builder(200, caption_first=0.5, prob_uncond=0.3))
    pack, other = keyed(*documents, number=7), keyed(PAIR, number=3)
    alone, after = build([pack]), build([other, pack])
    for modality in range(2):
        one, two = alone.modalities[modality], after.modalities[modality]
        assert torch.equal(one.noise, two.noise[-len(one.noise) :])
        assert torch.equal(one.timesteps, two.timesteps[-len(one.timesteps) :])
        assert torch.equal(one.latents, two.latents[-len(one.latents) :])
    assert used(after)[-len(used(alone)) :] == used(alone)
    for changed in (replace(pack, epoch=1), replace(pack, number=8)):
        assert not torch.equal(build([changed]).modalities[0].noise, alone.modalities[0].noise)
    assert not torch.equal(replace(build, seed=1)([pack]).modalities[0].noise, alone.modalities[0].noise)


def test_all_draws_have_their_distribution_and_are_independent_of_each_other() -> None:
    packs = [keyed(PAIR, (text(8), image(9, 16, 8)), number=n) for n in range(1000)]
    draws = [draw(pack, seed=0) for pack in packs]
    names = ("order", "drop", "timestep")
    uniforms = np.stack([np.concatenate([getattr(d, name).flatten() for d in draws]) for name in names])
    assert uniforms.shape == (3, 2000) and len(np.unique(uniforms)) == 6000
    assert uniforms.mean(axis=1) == pytest.approx(0.5, abs=0.03)
    assert uniforms.var(axis=1) == pytest.approx(1 / 12, abs=0.01)
    between_images = np.corrcoef(np.concatenate([uniforms[:, 0::2], uniforms[:, 1::2]]))
    assert np.abs(between_images - np.eye(6)).max() < 0.12
    noise = np.concatenate([d.noise[0] for d in draws])
    assert len(np.unique(noise)) > 0.999 * len(noise), "every value has noise of its own"
    assert (noise.mean(), noise.var()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.04))
    assert np.mean(noise**4) == pytest.approx(3, abs=0.2)  # the fourth moment of a normal distribution


def test_a_batch_uses_each_draw_for_its_own_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, drop and timestep of one pair come from three numbers, each of which is set here alone."""
    documents: list[int] = []

    def tokens_and_timestep(order: float, drop: float, timestep: float) -> tuple[list[int], float]:
        drawn = Draws(np.array([order]), np.array([drop]), np.array([[timestep]]), np.zeros((1, 8), np.float32))
        monkeypatch.setattr("transfusion_fast.data.batch.draw", lambda pack, seed, copies: drawn)
        batch = builder(caption_first=0.5, prob_uncond=0.5)([keyed(PAIR)])
        documents.append(len(batch.layout.document_offsets) - 1)
        return used(batch), batch.modalities[0].timesteps.item()

    assert tokens_and_timestep(order=0.2, drop=0.9, timestep=0.7) == ([BOS, 5, 6, BOI, 0, 0, EOI, EOS], 701)
    assert tokens_and_timestep(order=0.9, drop=0.9, timestep=0.2) == ([BOS, BOI, 0, 0, EOI, 5, 6, EOS], 101)
    assert tokens_and_timestep(order=0.2, drop=0.2, timestep=0.7) == ([BOS, 5, 6, BOI, 0, 0, EOI, EOS], 701)
    assert documents == [1, 1, 2]


def test_settings_of_order_and_drop_do_not_shift_timestep_uniforms_or_noise() -> None:
    stored = keyed(PAIR, (text(8), image(9)), number=5)
    one, two = builder()([stored]), builder(prob_uncond=1.0)([stored])
    assert torch.equal(one.modalities[0].noise, two.modalities[0].noise)
    assert torch.equal(one.modalities[0].timesteps, two.modalities[0].timesteps)


def test_pixels_become_patches_between_minus_one_and_one_in_reading_order() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 17
    batch = builder()([keyed((text(1), ImageSegment(pixels)))])
    patches = (batch.modalities[0].latents + 1) * 127.5 / 17
    expected = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15.0]])
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-4)
    assert batch.tokens[batch.modalities[0].sequence_index].tolist() == [0] * 4


def test_images_of_several_sizes_keep_their_order() -> None:
    images = [image(1, 4, 2), image(2, 2, 2), image(3, 2, 4), image(4, 4, 2)]
    batch = builder()([keyed(tuple(images))])
    assert batch.modalities[0].image_offsets.tolist() == [0, 2, 3, 5, 7]
    assert batch.modalities[0].by_shape.tolist() == [1, 2, 0, 3]
    assert batch.modalities[0].shapes == ((1, 1, 1, 1), (1, 1, 1, 2), (2, 1, 2, 1))  # images, frames, rows, columns
    alone = [builder()([keyed((i,))]).modalities[0].latents for i in images]
    assert torch.equal(batch.modalities[0].latents, torch.cat(alone))


def test_a_batch_with_copies_is_padded_to_a_multiple_and_its_first_copies_have_the_usual_noise() -> None:
    """Each copy has a timestep and noise of its own, without the cap."""
    packs = [keyed((image(1), text(4)), PAIR, number=n) for n in range(40)]
    usual = builder(40 * 16, noise_cap=1000.0)([*packs]).modalities[0]
    batch = builder(50, context="clean", copies=2)([*packs])
    assert (batch.num_tokens, len(batch.tokens)) == (40 * (2 * 8 + 2 * 4) - 40, 950)
    images = batch.modalities[0]
    assert torch.equal(images.timesteps[:160:2], usual.timesteps)
    assert torch.equal(images.noise.unflatten(0, (80, 2, 2))[:, 0].flatten(0, 1), usual.noise)
    assert len(images.timesteps[:160].unique()) > 140 and len(images.noise.unique()) == images.noise.numel()
    ignored = builder(1, context="clean", copies=2)([keyed((replace(image(1), weight=0.0), text(4)))])
    assert len(ignored.tokens) == ignored.num_tokens == 7, "nothing is kept free for copies that are not made"


def test_each_segment_keeps_its_weight_in_a_pair_that_is_turned_around_and_beside_other_packs() -> None:
    weighted = keyed((replace(text(5), weight=2.0), replace(image(1), weight=3.0)), number=1)
    plain = keyed((text(7),))
    for packs, before, after in (([plain, weighted], [1, 1], []), ([weighted, plain], [], [1, 1])):
        for caption_first, expected in ((1.0, [2, 3, 3]), (0.0, [3, 2, 2])):
            batch = builder(caption_first=caption_first)(packs)
            assert batch.token_weights.tolist() == [*before, *expected, *after]
            assert batch.modalities[0].weights.tolist() == [3]


def test_all_padding_stands_at_the_end_and_the_length_is_constant() -> None:
    batch = builder(40)([keyed(PAIR), keyed((text(3),), number=1)])
    assert len(batch.tokens) == len(batch.labels) == batch.layout.total_length == 40
    assert batch.num_tokens == 8 + 3
    assert (batch.labels[11:] == -100).all() and (batch.positions[11:] == 0).all()
