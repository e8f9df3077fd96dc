"""Weights of losses: means in which a token or an image of weight 2 counts as two, and one of weight 0 not at all."""

import math

import numpy as np
import pytest
import torch
from small_models import ids, seeded, small_model

from transfusion_fast import Weighted
from transfusion_fast.model.inputs import Randomness, pack_documents, pack_rows
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.sequence import Vocabulary

LATENTS = torch.randn(2, 2, 4, generator=seeded())


@pytest.fixture(scope="module")
def model():
    return small_model(num_text_tokens=16, dim_latent=4, transformer={"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48})


def packed(model, *documents):
    return pack_documents(documents, model.config, Randomness(seeded(), prob_uncond=0))


def document(first=1.0, image=1.0, last=1.0, prompt=(1, 2, 3)):
    return [Weighted(ids(*prompt), first), Weighted(LATENTS, image), Weighted(ids(4, 5, 6, 7), last)]


def test_a_token_has_the_weight_of_its_segment_boi_that_of_its_image_and_eos_that_of_the_last_segment(model):
    batch, vocabulary = packed(model, document(2, 3, 5), document(0, 7, 11)), Vocabulary(16, (2,))
    found = [
        (label, weight)
        for label, weight in zip(batch.labels[batch.supervised].tolist(), batch.token_weights.tolist(), strict=True)
    ]
    boi, eos, last = vocabulary.boi(), vocabulary.eos, (4, 5, 6, 7)
    first = [*((n, 2) for n in (1, 2, 3)), (boi, 3), *((n, 5) for n in last), (eos, 5)]
    assert found == [*first, (boi, 7), *((n, 11) for n in last), (eos, 11)]
    assert batch.modalities[0].weights.tolist() == [3, 7]
    assert Counts.of(batch) == (3 * 2 + 3 + 5 * 5 + 7 + 11 * 5, 10)


def losses_of(model, *documents):
    return model(packed(model, *documents))


def test_losses_are_means_in_which_each_segment_counts_by_its_weight(model, tolerance):
    """The document has 3 tokens of its first segment, <boi>, 5 tokens of its last, and one image."""
    sums = [
        losses_of(model, document(*alone)).text * n for alone, n in (((1, 0, 0), 3), ((0, 1, 0), 1), ((0, 0, 1), 5))
    ]
    for weights in ((1, 1, 1), (2, 1, 1), (0, 1, 3), (0.25, 0, 0.5)):
        of_tokens = sum(w * n for w, n in zip(weights, (3, 1, 5), strict=True))
        expected = sum(w * s for w, s in zip(weights, sums, strict=True)) / of_tokens
        torch.testing.assert_close(losses_of(model, document(*weights)).text, expected, **tolerance["fp32"])
    other = [LATENTS + 1, ids(9)]
    one, two = (losses_of(model, document(image=w), Weighted(other, v)).diffusion for w, v in ((1, 0), (0, 1)))
    found = losses_of(model, document(image=3), Weighted(other, 0.5)).diffusion
    torch.testing.assert_close(found, (3 * one + 0.5 * two) / 3.5, **tolerance["fp32"])
    assert one != two


def test_weights_of_a_document_and_of_its_pieces_are_multiplied(model):
    batch = packed(model, Weighted(document(2, 3, 5), 0.5), document())
    assert batch.token_weights.tolist() == [1, 1, 1, 1.5, *[2.5] * 5, *[1] * 9]
    assert batch.modalities[0].weights.tolist() == [1.5, 1]


def test_a_weight_of_1_everywhere_is_none(model):
    plain = packed(model, [ids(1, 2, 3), LATENTS, ids(4, 5, 6, 7)])
    batch = packed(model, Weighted(document(), 1))
    assert batch.token_weights is None and Counts.of(batch) == (9, 1)
    assert torch.equal(batch.labels, plain.labels)
    for got, expected in zip(model(batch), model(plain), strict=True):
        assert got == expected if isinstance(got, Counts) else torch.equal(got, expected)


def test_an_ignored_prompt_has_no_label_and_is_seen(model):
    batch = packed(model, document(first=0))
    assert batch.labels[: batch.supervised[0]].eq(-100).all() and len(batch.supervised) == 6
    other = losses_of(model, document(first=0, prompt=(9, 8, 10)))
    assert not torch.isclose(model(batch).text, other.text, rtol=1e-3)
    nothing = model(packed(model, Weighted(document(), 0)))
    assert nothing.total == 0 and nothing.total.requires_grad


def test_gradients_do_not_depend_on_how_documents_are_cut_into_batches(model, tolerance):
    documents = [
        document(2, 0.5, 0),
        Weighted([ids(1, 2)], 3),
        [ids(5), ids(6)],
        document(image=0),
        Weighted([LATENTS], 0),
    ]
    whole = packed(model, *documents)
    generator, cut = seeded(), []
    for part in (documents[:1], documents[1:3], documents[3:]):  # the second has no image, and other weights than 1
        cut.append(pack_documents(part, model.config, Randomness(generator, prob_uncond=0)))
    for batch, noise in zip(cut, whole.modalities[0].noise.split([4, 0, 8]), strict=True):
        batch.modalities[0].noise.copy_(noise)
    timesteps = whole.modalities[0].timesteps.split([1, 0, 2])
    for batch, own in zip(cut, timesteps, strict=True):
        batch.modalities[0].timesteps.copy_(own)
    counts = Counts(*map(sum, zip(*map(Counts.of, cut), strict=True)))
    assert counts == Counts.of(whole)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(whole).total, parameters)
    parts = [torch.autograd.grad(model(batch, counts=counts).total, parameters) for batch in cut]
    for own, *found in zip(expected, *parts, strict=True):
        torch.testing.assert_close(sum(found), own, **tolerance["fp32"])


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "2", None, True, 1e7, [1.0]])
def test_a_bad_weight_is_named_with_its_document_and_piece(model, weight):
    for documents, where in (
        ([[ids(1)], [ids(1), Weighted(ids(2), weight)]], "document 1, piece 1"),
        ([[ids(1)], Weighted([ids(1)], weight)], "document 1"),
    ):
        with pytest.raises(ValueError, match=rf"^weight of {where} must be a number in 0\.\.1000000, got ") as error:
            model(documents)
        assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_weights(model):
    assert packed(model, [Weighted(ids(1), np.float32(0.5))]).token_weights.tolist() == [0.5, 0.5]


def test_an_ignored_image_has_no_noised_copies_and_is_seen(model, tolerance):
    """The copies of the other images are the same as in a batch where the first image has a tiny weight."""

    def losses(weight, latents=LATENTS):
        documents = [[Weighted(latents, weight), ids(1), LATENTS + 1, ids(2)], [Weighted(LATENTS, weight)]]
        batch = pack_documents(documents, model.config, Randomness(seeded(), prob_uncond=0, noised_copies=2))
        return batch, model(batch)

    (batch, found), (other, expected) = losses(0), losses(1e-7)
    assert (batch.num_images, other.num_images) == (2, 6) and len(other.tokens) - len(batch.tokens) == 4 * 4
    assert batch.modalities[0].weights.tolist() == [1, 1] and len(batch.modalities[0].timesteps) == 2 + 3
    torch.testing.assert_close(found[:3], expected[:3], **tolerance["fp32"])
    assert not torch.isclose(losses(0, LATENTS + 2)[1].diffusion, found.diffusion, rtol=1e-3)


def test_prompts_with_weights_are_refused():
    model = small_model(num_text_tokens=16, dim_latent=4, transformer={"dim": 32, "depth": 1, "heads": 2})
    with pytest.raises(ValueError, match="document 0 must be a list of pieces, got Weighted"):
        model.sample([Weighted([ids(1)], 2.0)])


ROWS = ids(16, 1, 2, 3, 18, 0, 0, 0, 0, 19, 4, 5, 6, 7, 17).view(1, 15)  # the document above, laid out
IMAGE = ([[LATENTS.view(4, 4)]], [[(5, 4)]])


def test_rows_have_a_weight_for_each_token_as_documents_have_for_each_segment(model, tolerance):
    weights = torch.tensor([[9.0, *[2] * 3, 1, *[0] * 4, 1, *[5] * 5]])  # at the image they are ignored
    random = {"prob_uncond": 0, "noise_cap": 1000}
    loss, losses = model(ROWS, *IMAGE, text_weights=weights, generator=seeded(), **random)
    assert loss == model([document(2, 1, 5)], generator=seeded(), **random)
    assert losses.counts == (3 * 2 + 1 + 5 * 5, 1)
    batch = pack_rows(ROWS, *IMAGE, model.config, text_weights=weights > 1)  # a mask of bool
    assert batch.labels[batch.supervised].tolist() == [1, 2, 3, 4, 5, 6, 7, 17] and batch.token_weights is None
    assert batch.modalities[0].weights.tolist() == [1]
    text = ids(1, 2, 3, 4).view(2, 2)
    one = model(text, text_weights=torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    torch.testing.assert_close(one, model(text[:1]), **tolerance["fp32"])  # the first token is not predicted


def test_weights_of_1_in_rows_are_none(model):
    plain, weighted = (pack_rows(ROWS, *IMAGE, model.config, text_weights=w) for w in (None, torch.ones(1, 15)))
    assert weighted.token_weights is None and torch.equal(weighted.labels, plain.labels)
