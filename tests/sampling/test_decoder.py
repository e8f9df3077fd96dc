"""Decoding: text, images in its midst, guidance, and where it stops.

Ten text ids, so <bos> is 10, <eos> 11, <boi> and <eoi> 12 and 13 for modality 0, 14 and 15 for modality 1.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_models import ids, seeded, small_model

from transfusion_fast.model.inputs import Randomness, pack_documents, pack_rows
from transfusion_fast.sampling.decoder import ImageSettings, generate_images, sample

BOS, EOS, BOI, EOI, BOI1, EOI1 = 10, 11, 12, 13, 14, 15
GRIDS = [(2, 2), (1, 3)]
ONE_STEP = ImageSettings(steps=1, guidance=1.0, eta=0.0, clip=1.0)


def make(**settings):
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48}
    return small_model(num_text_tokens=10, dim_latent=(4, 6), transformer=transformer, **settings)


def chain(links):
    """Return a model that predicts by the last token alone: links[token] are its likely tokens, and how likely."""
    model = make()
    model.norm.weight.data.fill_(1.0)
    for block in model.blocks:
        block.attention.out.weight.data.zero_()
        block.mlp.down.weight.data.zero_()
    model.embedding.weight.data = torch.eye(16, 32)
    model.head.weight.data.zero_()
    for token, following in links.items():
        for likely, weight in (following if isinstance(following, dict) else {following: 1.0}).items():
            model.head.weight.data[likely, token] = 5 * weight
    return model


def produced_by(model, prompts=((),), **settings):
    """Return what was produced after each prompt, text as lists of ids and images as (modality, shape)."""
    documents = sample(model, prompts, **{"grids": GRIDS, "image": ONE_STEP, "generator": seeded()} | settings)
    return [[described(piece) for piece in document] for document in documents]


def described(piece):
    modality, tensor = piece if isinstance(piece, tuple) else (0, piece)
    return (modality, tuple(tensor.shape)) if tensor.is_floating_point() else tensor.tolist()


def spy_on(model, monkeypatch):
    """Return a list that grows with the (batch, x_t) of every forward pass of the model."""
    calls, hidden = [], model.hidden

    def spy(batch, x_t):
        calls.append((batch, [x.clone() for x in x_t]))
        return hidden(batch, x_t)

    monkeypatch.setattr(model, "hidden", spy)
    return calls


def tokens_of_documents(batch):
    offsets = batch.layout.document_offsets.tolist()
    return [batch.tokens[a:b].tolist() for a, b in pairwise(offsets)]


def predict(model, tokens, x, t):
    """Return the prediction for one image of modality 0 after `tokens`, by the way that training takes."""
    rows, columns, _ = x.shape
    row = ids(*tokens, *[0] * (rows * columns))[None]
    batch = pack_rows(row, [[x]], [[(len(tokens), rows * columns)]], model.config, Randomness(prob_uncond=0))
    images = replace(batch.modalities[0], timesteps=torch.tensor([t]))
    batch = replace(batch, modalities=(images, batch.modalities[1]))
    hidden, encoded = model.hidden(batch, [x.flatten(0, 1), torch.zeros(0, 6)])
    return model.prediction(hidden, batch, 0, encoded[0]).view(x.shape)


IMAGE, IMAGE1 = (0, (2, 2, 4)), (1, (1, 3, 6))
ENDLESS, ALWAYS_IMAGES = {BOS: 1, 1: 1}, {BOS: BOI, EOI: BOI}
AFTER_AN_IMAGE = {BOS: 1, 1: BOI, EOI: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: EOS}


@pytest.mark.parametrize(
    ("links", "prompt", "settings", "expected"),
    [
        pytest.param({BOS: 1, 1: 2, 2: 3, 3: EOS}, [], {}, [[1, 2, 3]], id="text ends at <eos>"),
        pytest.param({BOS: EOS}, [], {}, [], id="at once"),
        pytest.param(ENDLESS, [], {"max_text_tokens": 5}, [[1] * 5], id="or at its limit"),
        pytest.param(ENDLESS, [], {"max_text_tokens": 0}, [], id="which may be 0"),
        pytest.param(AFTER_AN_IMAGE, [], {}, [[1], IMAGE, [2, 3, 4, 5, 6]], id="<boi> begins an image, then text"),
        pytest.param(AFTER_AN_IMAGE, [], {"max_text_tokens": 3}, [[1], IMAGE, [2, 3]], id="of all text the limit"),
        pytest.param({BOS: BOI1, EOI1: BOI, EOI: EOS}, [], {"max_images": 2}, [IMAGE1, IMAGE], id="each its grid"),
        pytest.param(ALWAYS_IMAGES, [], {"max_images": 0}, [], id="no image"),
        pytest.param(ALWAYS_IMAGES, [], {"max_images": 3}, [IMAGE] * 3, id="three images"),
        pytest.param(ALWAYS_IMAGES, [torch.zeros(2, 4)], {}, [IMAGE], id="images of the prompt do not count"),
        pytest.param({BOS: {BOS: 4, EOI: 3, EOI1: 2, 7: 1}, 7: EOS}, [], {}, [[7]], id="never <bos> or <eoi>"),
    ],
)
def test_what_follows_a_prompt(links, prompt, settings, expected):
    assert produced_by(chain(links), [prompt], **settings) == [expected]


def test_prompts_that_begin_images_of_different_modalities_at_once_each_get_theirs():
    model = chain({1: BOI, 2: BOI1, EOI: 3, EOI1: 4, 3: EOS, 4: EOS})
    assert produced_by(model, [[ids(2)], [ids(1)], [ids(2)]]) == [[IMAGE1, [4]], [IMAGE, [3]], [IMAGE1, [4]]]


def test_images_are_returned_in_the_order_of_axes_of_their_own_modality():
    model = chain({BOS: BOI, EOI: BOI1, EOI1: EOS})
    settings = {"grids": [(2, 3), (2, 3)], "image": ONE_STEP, "max_images": 2}
    [[first, (_, second)]] = sample(model, [()], generator=seeded(), **settings)
    modalities = model.config.modalities
    changed = [modalities[0], modalities[1].model_copy(update={"channel_first": True})]
    model.config = model.config.model_copy(update={"modalities": tuple(changed)})
    [[same, (_, moved)]] = sample(model, [()], generator=seeded(), **settings)
    assert torch.equal(same, first) and torch.equal(moved, second.movedim(-1, 0))


def test_decoding_is_repeatable():
    model = make()
    settings = {"max_text_tokens": 8, "max_images": 2, "temperature": 1.0, "image": ImageSettings(steps=2)}
    one, two = (sample(model, [[ids(1)], []], grids=GRIDS, **settings, generator=seeded(3)) for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_temperature_draws_in_proportion_and_zero_takes_the_likeliest():
    """Two likely tokens a factor of e^2 apart at temperature 1, of e at temperature 2; 32^0.5 undoes the norm."""
    model = chain({BOS: {1: 5.0, 2: 5.0 - 0.4 / 32**0.5}, 1: {EOS: 5.0}, 2: {EOS: 5.0}})
    for temperature, share in ((1.0, 1 / (1 + np.exp(-2))), (2.0, 1 / (1 + np.exp(-1)))):
        produced = produced_by(model, [()] * 1000, temperature=temperature)
        assert np.mean([document == [[1]] for document in produced]) == pytest.approx(share, abs=0.04)
    assert produced_by(model, [()] * 3, temperature=0.0) == [[[1]]] * 3


def test_the_prompt_is_laid_out_as_in_training(monkeypatch):
    model = chain({4: EOS})
    calls = spy_on(model, monkeypatch)
    first, second = torch.randn(2, 4), torch.randn(1, 3, 6)
    produced_by(model, [[ids(1), first, (1, second), ids(4)], [ids(4)]])
    [(batch, x_t)] = calls
    expected = [[BOS, 1, BOI, 0, 0, EOI, BOI1, 0, 0, 0, EOI1, 4], [BOS, 4]]
    assert tokens_of_documents(batch) == expected
    assert batch.layout.image_spans.tolist() == [[3, 2], [7, 3]]
    assert torch.equal(x_t[0], first) and torch.equal(x_t[1], second[0])
    assert [m.timesteps.tolist() for m in batch.modalities] == [[1.0], [1.0]], "images of a prompt are clean"


def test_images_see_each_other_in_sampling_as_the_model_was_trained(monkeypatch):
    for attention, spans in (("bidirectional", [[2, 2]]), ("causal", [])):
        model = make(image_attention=attention)
        calls = spy_on(model, monkeypatch)
        generate_images(model, [[]], (1, 2), image=ImageSettings(steps=1, guidance=1.0), generator=seeded())
        [(batch, _)] = calls
        assert batch.layout.image_spans.tolist() == spans
        assert packed_spans(model) == [[start + 1, length] for start, length in spans]


def packed_spans(model):
    documents = [[ids(1), torch.zeros(1, 2, 4)]]
    return pack_documents(documents, model.config, Randomness(prob_uncond=0)).layout.image_spans.tolist()


def test_a_finished_image_is_seen_clean_between_its_tokens(monkeypatch):
    model = chain({BOS: BOI, EOI: 2, 2: EOS})
    calls = spy_on(model, monkeypatch)
    [[image, _]] = sample(model, [()], grids=GRIDS, image=ONE_STEP, generator=seeded())
    batch, x_t = calls[-1]
    assert tokens_of_documents(batch) == [[BOS, BOI, 0, 0, 0, 0, EOI, 2]]
    assert torch.equal(x_t[0], image.flatten(0, 1))
    assert batch.modalities[0].timesteps.tolist() == [1.0]


def test_the_unconditional_branch_is_boi_alone(monkeypatch):
    model = make()
    calls = spy_on(model, monkeypatch)
    prompts = [[ids(1, 2)], [torch.randn(2, 4)]]
    generate_images(model, prompts, (1, 2), image=ImageSettings(steps=1, guidance=2.0), generator=seeded())
    [(batch, x_t)] = calls
    conditional = [[BOS, 1, 2, BOI, 0, 0], [BOS, BOI, 0, 0, EOI, BOI, 0, 0]]
    assert tokens_of_documents(batch) == [*conditional, [BOI, 0, 0], [BOI, 0, 0]]
    assert batch.positions[-3:].tolist() == [0, 1, 2]
    first, _, second, *unconditional = x_t[0].split(2)
    assert torch.equal(torch.cat([first, second]), torch.cat(unconditional)), "both branches see one x_t"


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("positions", ["sequential", "axial"])
def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional(guidance, positions, tolerance):
    """Flow matching in one step: the image is the noise minus the prediction."""
    model = make(diffusion={"process": "flow"}, positions=positions)
    x = torch.randn((1, 2, 2, 4), generator=seeded())[0]
    conditional, unconditional = predict(model, [BOS, 1, 2, BOI], x, 1000.0), predict(model, [BOI], x, 1000.0)
    settings = ImageSettings(steps=1, guidance=guidance)
    [got] = generate_images(model, [[ids(1, 2)]], (2, 2), image=settings, generator=seeded())
    expected = x - (unconditional + guidance * (conditional - unconditional))
    torch.testing.assert_close(got, expected, **tolerance["fp32"])
    assert (conditional - unconditional).abs().max() > 0.1, "the prompt matters"


@pytest.mark.parametrize(("process", "start"), [("ddpm", 999.0), ("flow", 1000.0)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_a_perfect_model_the_image_is_found_in_as_many_steps_as_asked(process, start, eta, monkeypatch):
    model = make(diffusion={"process": process})
    calls = spy_on(model, monkeypatch)
    clean = torch.randn(2, 2, 2, 4)

    def oracle(hidden, batch, modality, encoded):
        x_t, t = calls[-1][1][0].view(clean.shape), float(batch.modalities[0].timesteps[-1])
        if process == "flow":
            return ((x_t - clean) / (t / 1000)).view(8, 4)
        alpha_bar = model.diffusion.alpha_bar(t)
        return ((x_t - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()).float().view(8, 4)

    monkeypatch.setattr(model, "prediction", oracle)
    settings = ImageSettings(steps=5, guidance=1.0, eta=eta)
    got = generate_images(model, [[ids(1)], []], (2, 2), image=settings, generator=seeded())
    torch.testing.assert_close(got, clean, rtol=1e-3, atol=1e-3)
    times = [batch.modalities[0].timesteps.tolist() for batch, _ in calls]
    assert [t for t, _ in times] == pytest.approx([start * k / 5 for k in (5, 4, 3, 2, 1)])
    assert all(a == b for a, b in times)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_eta_decides_how_much_noise_is_added_on_the_way(eta, monkeypatch, tolerance):
    model = make()
    calls = spy_on(model, monkeypatch)
    monkeypatch.setattr(model, "prediction", lambda hidden, batch, modality, encoded: calls[0][1][0] / 2)
    settings = ImageSettings(steps=2, guidance=1.0, eta=eta)
    generate_images(model, [[]], (2, 2), image=settings, generator=seeded())
    generator = seeded()
    start, noise = (torch.randn((1, 2, 2, 4), generator=generator).view(4, 4) for _ in range(2))
    expected = model.diffusion.step(start, start / 2, 999.0, 499.5, eta=eta, noise=noise)
    torch.testing.assert_close(calls[1][1][0], expected, **tolerance["fp32"])


def test_an_image_is_drawn_at_timesteps_that_are_shifted_by_its_number_of_patches(monkeypatch):
    model = make(diffusion={"prediction": "v", "shift_patches": 1})
    calls = spy_on(model, monkeypatch)
    settings = ImageSettings(steps=3, guidance=1.0, eta=0.0)
    generate_images(model, [[]], (3, 3), image=settings, generator=seeded())
    times = [batch.modalities[0].timesteps.item() for batch, _ in calls]
    assert times == pytest.approx(model.diffusion.sampling_timesteps(3, 9)[:-1])
    assert times == pytest.approx([1000.0, 1000 * 6 / 7, 600.0])


FIRST, SECOND, THIRD = (torch.randn(*shape, generator=seeded(7)) for shape in ((3, 4), (2, 6), (1, 6)))
PROMPTS = [[ids(1, 2, 3)], [], [ids(4), FIRST, (1, SECOND), ids(5)], [(1, THIRD)]]


@pytest.mark.parametrize(("process", "modality"), [("ddpm", 0), ("flow", 0), ("flow", 1)])
def test_images_after_unequal_prompts_are_those_drawn_one_by_one(process, modality, tolerance):
    """An image has 16 or 48 values, so that torch draws the same normals for all at once and for one after another."""
    model, grid = make(diffusion={"process": process}), [(2, 2), (2, 4)][modality]
    settings = ImageSettings(steps=3, guidance=2.0, eta=0.0, clip=1.0)
    at_once = generate_images(model, PROMPTS, grid, modality=modality, image=settings, generator=seeded())
    generator = seeded()
    for prompt, image in zip(PROMPTS, at_once, strict=True):
        [alone] = generate_images(model, [prompt], grid, modality=modality, image=settings, generator=generator)
        torch.testing.assert_close(image, alone, **tolerance["fp32"])


def test_a_generator_for_each_prompt_gives_the_image_that_it_gives_alone():
    model, settings = make(), ImageSettings(steps=3, guidance=2.0, clip=1.0)
    drawn = generate_images(model, PROMPTS, (2, 2), image=settings, generator=[seeded(i) for i in range(len(PROMPTS))])
    for number, prompt in enumerate(PROMPTS):
        [alone] = generate_images(model, [prompt], (2, 2), image=settings, generator=[seeded(number)])
        torch.testing.assert_close(drawn[number], alone, rtol=1e-3, atol=1e-3)


def test_what_was_sampled_can_be_a_prompt_and_a_training_document():
    model = chain({1: 2, 2: BOI1, EOI1: 3, 3: EOS})
    [document] = model.sample([[ids(1)]], grids=GRIDS, image=ONE_STEP, generator=seeded())
    assert [described(piece) for piece in document] == [[2], IMAGE1, [3]]
    assert len(model.sample([document], grids=GRIDS)) == 1
    assert model([document], generator=seeded()).isfinite()


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"piece 0: text ids must lie in \[0, 10\), got 10 to 10"):
        sample(make(), [[ids(10)]], grids=GRIDS)
    with pytest.raises(ValueError, match="grids must have a size for modality 1, which the model begins, got 1 sizes"):
        sample(chain({2: BOI1}), [[ids(2)]], grids=GRIDS[:1])
    for prompts, modality in (([], 0), ([[]], 2)):
        with pytest.raises(ValueError, match=f"the modality below 2, got {len(prompts)} and"):
            generate_images(make(), prompts, (1, 2), modality=modality)
