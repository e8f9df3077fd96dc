"""Images that are drawn from given noise, from other images, around a kept part, and under two weights of guidance."""

import pytest
import torch
from chain_models import BOI, BOI1, BOS, EOI, chain, make
from small_models import ids, seeded

from transfusion_fast.sampling.decoder import generate_images, generate_text, sample
from transfusion_fast.sampling.drawing import guided
from transfusion_fast.sampling.engine import Context, Drawing, Engine
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

GRID = (2, 2)
SHAPE = (2, 2, 2, 4)
PROMPTS = [[ids(1, 2, 3)], [ids(4)]]  # streams are sorted by length, so the second comes first in the cache


def images(seed=0):
    return torch.randn(SHAPE, generator=seeded(seed))


def settings(**changed):
    return ImageSettings(**{"steps": 4, "guidance": 1.0} | changed)


def test_the_noise_of_the_seed_can_be_given_and_each_prompt_gets_its_own(monkeypatch):
    model, seen, predict = make(), [], Drawing.predict
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: seen.append(x) or predict(self, x, t))
    drawn = generate_images(model, PROMPTS, GRID, image=settings())
    noise = seen[0].flip(0)
    torch.testing.assert_close(generate_images(model, PROMPTS, GRID, image=settings(), noise=noise), drawn)
    other = generate_images(model, PROMPTS, GRID, image=settings(), noise=noise.flip(0))
    assert (other - drawn).flatten(1).abs().max(1).values.min() > 0.01


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_an_image_to_start_from_gets_the_noise_of_its_strength(process, monkeypatch):
    model, calls = make(diffusion={"process": process, "prediction": "v"}), []
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: calls.append((x, t)) or torch.zeros_like(x)[None])
    given = {"start": images(), "noise": images(1)}
    generate_images(model, PROMPTS, GRID, image=settings(steps=3, strength=0.6, sampler="euler"), **given)
    x = calls[0][0]
    expected = model.diffusion.add_noise(given["start"], given["noise"], torch.full((1, 1, 1, 1), 600.0))
    torch.testing.assert_close(x.flip(0), expected)
    assert [round(t) for _, t in calls] == [600, 400, 200]


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "heun", "dpm++"])
@pytest.mark.parametrize("by_value", [False, True])
def test_what_is_kept_stays_and_is_noised_as_an_image_of_its_timestep_on_the_way(sampler, by_value, monkeypatch):
    model, calls, predict = make(), [], Drawing.predict
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: calls.append((x, t)) or predict(self, x, t))
    start, keep = images().clamp(-1, 1), torch.tensor([[[True, False], [False, False]], [[False, False], [True, True]]])
    everywhere = keep.unsqueeze(-1).expand(SHAPE)
    told, given = [], {"start": start, "keep": everywhere if by_value else keep}
    drawn = generate_images(
        model, PROMPTS, GRID, image=settings(sampler=sampler), on_images=lambda *step: told.append(step[2]), **given
    )
    assert torch.equal(drawn[keep], start[keep]) and torch.equal(told[0].flip(0)[keep], start[keep])
    assert (drawn[~keep] - start[~keep]).abs().min(1).values.max() > 0.01, "the rest is drawn"
    for x, t in calls:
        alpha, sigma = model.diffusion.levels(t)
        noise = (x.flip(0) - alpha * start)[keep] / sigma
        assert noise.std() == pytest.approx(1, abs=0.6), "unit noise at every timestep"


def test_images_of_a_prompt_are_those_that_it_would_draw_one_after_another(monkeypatch):
    model, seen, predict = chain({BOS: BOI, EOI: BOI}), [], Drawing.predict
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: seen.append(x) or predict(self, x, t))
    drawn = generate_images(model, [[], [ids(1)]], GRID, images_per_prompt=2, image=settings(), seed=3)
    first = seen[0]
    seen.clear()
    sample(model, [[]], grids=[GRID, (1, 3)], max_images=2, image=settings(), seed=3)
    torch.testing.assert_close(first[:2], torch.cat(seen[::4]), rtol=0, atol=0)
    alone = generate_images(model, [[ids(1)]], GRID, images_per_prompt=2, image=settings(), seed=3, prompt_numbers=[1])
    assert torch.equal(drawn[2:], alone)
    assert len({x.sum().item() for x in drawn}) == 4


def test_images_of_a_prompt_have_contexts_of_their_own_under_two_weights():
    model, prompt = make(), [ids(2), images()[0]]
    given = {"image": settings(guidance=4.0, image_guidance=1.5, eta=0.0), "noise": images(1)}
    drawn = generate_images(model, [prompt], GRID, images_per_prompt=2, **given)
    torch.testing.assert_close(drawn, generate_images(model, [prompt, prompt], GRID, **given))


def test_text_alone_begins_no_image_and_ends_where_text_ends():
    model = chain({BOS: {BOI: 1.0, 3: 0.9}, 3: {BOI1: 1.0, 4: 0.9}, 4: 5, 5: 11})
    texts = generate_text(model, [[], [ids(4)]], text=TextSettings(max_tokens=9))
    assert [text.tolist() for text in texts] == [[3, 4, 5], [5]]
    [none] = model.generate_text([[ids(5)]])
    assert none.dtype == torch.int64 and none.tolist() == []


def test_predicted_images_are_told_after_each_evaluation_and_the_last_ones_are_drawn():
    told = []
    model = make()
    drawn = generate_images(
        model, PROMPTS, GRID, image=settings(), on_images=lambda *step: told.append(step), modality=0
    )
    assert [(indices, modality) for indices, modality, _ in told] == [([1, 0], 0)] * 4
    torch.testing.assert_close(told[-1][2].flip(0), drawn)
    assert not torch.allclose(told[0][2], told[-1][2])


def test_a_context_is_taken_apart_into_its_text_and_its_images():
    one, two = torch.ones(2, 1, 4), torch.ones(1, 1, 6)
    context = Context([BOS, 1, BOI])
    context.append_image(0, one)
    context.tokens += [EOI, 2, 0, BOI1]
    context.append_image(1, two)
    context.tokens += [15, BOI]
    without = context.without_images([0, 0])
    assert without.tokens == [BOS, 1, 2, 0, BOI] and without.images == []
    images = context.without_text(range(11))
    assert images.tokens == [BOI, 0, 0, EOI, BOI1, 0, 15, BOI]
    assert [(image.offset, image.modality) for image in images.images] == [(1, 0), (5, 1)]


def test_the_weights_of_text_and_images_leave_behind_what_is_without_them(tolerance):
    """Flow in one step: the image is the noise minus the prediction, here from the contexts one by one."""
    model, seen = make(diffusion={"process": "flow"}), torch.randn(2, 2, 4, generator=seeded(1))
    noise = images()[:1]

    def predict(tokens, latents):
        context = Context(tokens)
        for image in latents:
            context.append_image(0, image)
        context.tokens += [EOI, *([1] if BOS in tokens else []), BOI] if latents else []
        cache, _ = Engine(model).prefill([context])
        return Engine(model).start_image([(cache, [0])], 0, GRID).predict(noise, 1000.0)[0]

    whole, without_text, without_images = (
        predict([BOS, 2, BOI], [seen]),
        predict([BOI], [seen]),
        predict([BOS, 2, 1, BOI], []),
    )
    given = settings(steps=1, guidance=4.0, image_guidance=1.5)
    drawn = generate_images(model, [[ids(2), seen, ids(1)]], GRID, image=given, noise=noise)
    text_guided = without_text + 4 * (whole - without_text)
    expected = noise - (without_images + 1.5 * (text_guided - without_images))
    torch.testing.assert_close(drawn, expected, **tolerance["fp32"])
    unguided = guided(torch.stack([whole, without_text, without_images]), settings(image_guidance=1.0))
    torch.testing.assert_close(unguided, whole, **tolerance["fp32"])


BAD = [
    ({"noise": torch.zeros(2, 2, 2, 3)}, r"noise must be .* of shape \(2, 2, 2, 4\), got torch.float32 of shape"),
    ({"noise": torch.zeros(SHAPE, dtype=torch.int64)}, "noise must be .* got torch.int64"),
    ({"start": "zeros"}, "start must be a tensor of floating-point numbers .* got str"),
    ({"start": torch.full(SHAPE, float("nan"))}, "start must be finite, got NaN or infinity"),
    ({"keep": torch.ones(2, 2, 2, dtype=torch.bool)}, "keep must come with the images .* got none; give start"),
    ({"keep": torch.ones(2, 2, 2), "start": torch.zeros(SHAPE)}, "keep must be a bool tensor .* got torch.float32"),
    ({"keep": torch.ones(2, 2, dtype=torch.bool), "start": torch.zeros(SHAPE)}, "keep must be a bool tensor"),
    ({"image": settings(strength=0.5)}, "strength must come with an image to start from, got 0.5; give one"),
    ({"images_per_prompt": 0}, "images_per_prompt must be an integer of at least 1, got 0"),
    ({"image": settings(image_guidance=2.0), "negative": [ids(1)]}, "image_guidance must be None with a negative"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_does_not_fit_the_images_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        generate_images(make(), PROMPTS, GRID, **given)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sampler_that_flow_does_not_have_is_refused(sampler):
    with pytest.raises(ValueError, match=f"of a flow model must be euler, heun or dpm\\+\\+, got {sampler}"):
        generate_images(make(diffusion={"process": "flow"}), PROMPTS, GRID, image=settings(sampler=sampler))
