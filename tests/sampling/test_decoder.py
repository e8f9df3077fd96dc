"""Decoding: text, images in its midst, guidance, and where it stops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chain_models import BOI, BOI1, BOS, EOI, EOI1, EOS, GRIDS, ONE_STEP, chain, described, make, produced_by
from small_models import ids, seeded, small_model

from transfusion_fast.model.inputs import Randomness, pack_rows
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.engine import Drawing
from transfusion_fast.sampling.generators import image_generator, text_generator
from transfusion_fast.sampling.samplers import step
from transfusion_fast.sampling.settings import ImageSettings, TextSettings


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
        pytest.param(ENDLESS, [], {"text": TextSettings(max_tokens=5)}, [[1] * 5], id="or at its limit"),
        pytest.param(ENDLESS, [], {"text": TextSettings(max_tokens=0)}, [], id="which may be 0"),
        pytest.param(AFTER_AN_IMAGE, [], {}, [[1], IMAGE, [2, 3, 4, 5, 6]], id="<boi> begins an image, then text"),
        pytest.param(
            AFTER_AN_IMAGE, [], {"text": TextSettings(max_tokens=3)}, [[1], IMAGE, [2, 3]], id="of all text the limit"
        ),
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
    [[first, (_, second)]] = sample(model, [()], **settings)
    modalities = model.config.modalities
    changed = [modalities[0], modalities[1].model_copy(update={"channel_first": True})]
    model.config = model.config.model_copy(update={"modalities": tuple(changed)})
    [[same, (_, moved)]] = sample(model, [()], **settings)
    assert torch.equal(same, first) and torch.equal(moved, second.movedim(-1, 0))


def test_identical_calls_are_identical_and_another_seed_gives_something_else():
    settings = {"grids": GRIDS, "max_images": 2, "image": ImageSettings(steps=2, clip=1.0)}
    text, prompts = TextSettings(max_tokens=8, temperature=1.0), [[ids(1)], []]
    one, two, other = (sample(make(), prompts, text=text, seed=seed, **settings) for seed in (3, 3, 4))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert str(one) != str(other)


def test_each_image_of_a_prompt_begins_from_noise_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: seen.append(x) or x[None])
    sample(chain(ALWAYS_IMAGES), [()], grids=GRIDS, max_images=3, image=ONE_STEP, seed=3, prompt_numbers=[5])
    expected = [torch.randn((1, 2, 2, 4), generator=image_generator(3, 5, image)) for image in range(3)]
    assert torch.equal(torch.stack(seen), torch.stack(expected))
    assert len({x.sum().item() for x in seen}) == 3


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("positions", ["sequential", "axial"])
@pytest.mark.parametrize("negative", [None, [], [ids(5)]])
def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional(guidance, positions, negative, tolerance):
    """Flow matching in one step: the image is the noise minus the prediction. Weights 0 and 1 are one of the two."""
    model = make(diffusion={"process": "flow"}, positions=positions)
    x = torch.randn((2, 2, 4), generator=image_generator(3, 5))
    before = [BOI] if negative is None else [BOS, *([5] if negative else []), BOI]
    conditional, unconditional = predict(model, [BOS, 1, 2, BOI], x, 1000.0), predict(model, before, x, 1000.0)
    settings = ImageSettings(steps=1, guidance=guidance)
    given = {"image": settings, "negative": negative, "seed": 3, "prompt_numbers": [5]}
    [got] = generate_images(model, [[ids(1, 2)]], (2, 2), **given)
    expected = x - (unconditional + guidance * (conditional - unconditional))
    torch.testing.assert_close(got, expected, **tolerance["fp32"])
    assert (conditional - unconditional).abs().max() > 0.1, "the prompt matters"


@pytest.mark.parametrize("modality", [0, 1])
def test_without_guidance_weight_the_negative_document_is_the_prompt(modality):
    model, grid = make(diffusion={"process": "flow"}), GRIDS[modality]
    one, two, other = [ids(1), torch.ones(1, 2, 4)], [ids(1), torch.zeros(1, 2, 4)], [ids(2)]

    def drawn(prompt, guidance, negative):
        settings = ImageSettings(steps=2, guidance=guidance)
        return generate_images(model, [prompt], grid, modality=modality, image=settings, negative=negative)

    torch.testing.assert_close(drawn(other, 0.0, one), drawn(one, 1.0, other), rtol=1e-4, atol=1e-4)
    assert (drawn(other, 0.0, one) - drawn(other, 0.0, two)).abs().max() > 0.01, "its image matters"


def test_there_is_guidance_at_both_ends_of_its_interval():
    settings = ImageSettings(guidance_interval=(300.0, 800.0))
    assert [settings.guided(t) for t in (299.9, 300.0, 800.0, 800.1)] == [False, True, True, False]
    weights = ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0))
    assert [ImageSettings(guidance=w, image_guidance=i).guided(500.0) for w, i in weights] == [False, True, True]


def test_seeds_and_numbers_that_differ_in_their_high_bits_alone_give_other_noise_and_text_has_its_own():
    keys = ((1, 2), (1 + 2**32, 2), (1, 2 + 2**32), (2, 1))
    seeds = {image_generator(*key).initial_seed() for key in keys} | {text_generator(1, 2).initial_seed()}
    assert len(seeds) == 5


def test_a_rescaled_prediction_has_the_deviation_of_the_conditional_one(tolerance):
    model = make(diffusion={"process": "flow"})
    x = torch.randn((2, 2, 4), generator=image_generator(0, 0))
    conditional, unconditional = predict(model, [BOS, 1, BOI], x, 1000.0), predict(model, [BOI], x, 1000.0)
    guided = unconditional + 3 * (conditional - unconditional)
    rescaled = guided * conditional.std() / guided.std()
    settings = ImageSettings(1, 3.0, guidance_rescale=0.75)
    got, _ = generate_images(model, [[ids(1)], [ids(2)]], (2, 2), image=settings)
    torch.testing.assert_close(got, x - (0.25 * guided + 0.75 * rescaled), **tolerance["fp32"])


def test_as_many_steps_make_as_many_evaluations_and_guided_ones_are_one_pass(monkeypatch):
    model, rows, hidden = make(), [], Drawing._run
    monkeypatch.setattr(Drawing, "_run", lambda self, *args: rows.append(len(self.batch.tokens)) or hidden(self, *args))
    generate_images(model, [[ids(1)], []], (2, 2), image=ImageSettings(4, guidance_interval=(300, 800)))
    assert rows == [8, 16, 16, 8], "guided at 747 and 498 of 997, 747, 498, 249"


@pytest.mark.parametrize(("process", "start"), [("ddpm", 997.0), ("flow", 1000.0)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_a_perfect_model_the_image_is_found_in_as_many_steps_as_asked(process, start, eta, monkeypatch):
    model, times = make(diffusion={"process": process}), []
    clean = torch.randn(2, 2, 2, 4)

    def oracle(self, x_t, t):
        times.append(t)
        if process == "flow":
            return ((x_t - clean) / (t / 1000))[None]
        alpha_bar = model.diffusion.alpha_bar(t)
        return ((x_t - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()).float()[None]

    monkeypatch.setattr(Drawing, "predict", oracle)
    settings = ImageSettings(steps=5, guidance=1.0, eta=eta)
    got = generate_images(model, [[ids(1)], [ids(2)]], (2, 2), image=settings)
    torch.testing.assert_close(got, clean, rtol=1e-3, atol=1e-3)
    assert times == pytest.approx([start * k / 5 for k in (5, 4, 3, 2, 1)])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_eta_decides_how_much_noise_is_added_on_the_way(eta, monkeypatch, tolerance):
    model, seen = make(), []
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: seen.append(x) or seen[0][None] / 2)
    generate_images(model, [[]], (2, 2), image=ImageSettings(steps=2, guidance=1.0, eta=eta))
    generator = image_generator(0, 0)
    start, noise = (torch.randn((1, 2, 2, 4), generator=generator) for _ in range(2))
    x_0 = model.diffusion.denoised(start, start / 2, 997.0)
    expected = step(model.diffusion, start, x_0, 997.0, 498.5, eta=eta, noise=noise)
    torch.testing.assert_close(seen[1], expected, **tolerance["fp32"])


def test_an_image_is_drawn_at_timesteps_that_are_shifted_by_its_number_of_patches(monkeypatch):
    model, times = make(diffusion={"prediction": "v", "shift_patches": 1}), []
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: times.append(t) or x[None])
    generate_images(model, [[]], (3, 3), image=ImageSettings(steps=3, guidance=1.0, eta=0.0))
    assert times == pytest.approx(model.diffusion.sampling_timesteps(3, 9)[:-1])
    assert times == pytest.approx([1000.0, 1000 * 6 / 7, 600.0])


@pytest.mark.parametrize(("clip", "bound", "limit"), [("auto", 0.5, 0.5), ("auto", None, None), (0.25, 0.5, 0.25)])
def test_predicted_images_stay_within_the_bound_of_their_modality(clip, bound, limit, monkeypatch):
    modality = {"dims": 2, "dim_latent": 4, "bound": bound}
    model = small_model(num_text_tokens=10, modalities=[modality])
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: 0 * x[None])
    drawn = generate_images(model, [[]], (2, 2), image=ImageSettings(3, 1.0, eta=0.0, clip=clip))
    largest = drawn.abs().max().item()
    assert largest == pytest.approx(limit) if limit else largest > 50


FIRST, SECOND, THIRD = (torch.randn(*shape, generator=seeded(7)) for shape in ((3, 4), (2, 6), (1, 6)))
PROMPTS = [[ids(1, 2, 3)], [], [ids(4), FIRST, (1, SECOND), ids(5)], [(1, THIRD)], *([ids(n)] for n in range(9))]


def rows_agree():
    """Return whether this machine's matrix products of fp32 give a row the same bits in any multiple of 8 rows."""
    x, weights = torch.randn(208, 32), [torch.randn(n, 32) for n in (48, 96)]
    return all(torch.equal(F.linear(x[:n], w), F.linear(x, w)[:n]) for w in weights for n in range(8, 208, 8))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="shared weights"),
        pytest.param({"diffusion": {"process": "flow"}, "positions": "axial"}, id="axial flow"),
        pytest.param({"separate": True}, id="separate weights"),
    ],
)
def test_prompts_of_a_batch_are_decoded_as_they_are_alone(settings):
    settings = dict(settings)
    blocks = {"modality_weights": "separate", "conditioning": "adaln"} if settings.pop("separate", False) else {}
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48, **blocks}
    model = small_model(num_text_tokens=10, dim_latent=(4, 6), transformer=transformer, **settings)
    model.head.weight.data *= 0.02  # then many ids are likely
    given = {"grids": GRIDS, "max_images": 2, "image": ImageSettings(steps=3, clip=1.0)}
    text = TextSettings(max_tokens=6, temperature=1.0)
    together = sample(model, PROMPTS, text=text, **given)
    assert {described(piece)[0] for pieces in together for piece in pieces if is_image(piece)} == {0, 1}
    exact = {"rtol": 0, "atol": 0} if rows_agree() else {"rtol": 1e-4, "atol": 1e-4}
    for number, (prompt, pieces) in enumerate(zip(PROMPTS, together, strict=True)):
        [alone] = sample(model, [prompt], text=text, prompt_numbers=[number], **given)
        torch.testing.assert_close(pieces, alone, **exact)


@torch.no_grad()
def test_what_could_change_a_prompts_continuation_does_not():
    """A number above 2^32, dropout in training mode, and the numpy integers of other code."""
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48, "dropout": 0.5}
    model = small_model(num_text_tokens=10, dim_latent=(4, 6), transformer=transformer)
    text = TextSettings(max_tokens=np.int64(4), temperature=1.0)
    given = {"grids": GRIDS, "image": ImageSettings(steps=np.int64(2), clip=np.float32(1)), "text": text}
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    one, two = (sample(model, [[ids(1)]], **given) for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    large = [
        generate_images(model, [[]], (2, 2), seed=seed, prompt_numbers=[n]) for seed, n in ((5 + 2**32, 7), (5, 1))
    ]
    assert not torch.equal(*large)


def test_a_modality_without_a_size_is_not_begun_but_ends_a_caption():
    model = small_model(
        num_text_tokens=10, dim_latent=4, transformer={"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 48}
    )
    model.head.weight.data.zero_()
    model.head.weight.data[BOI] = model.norm.weight.data
    for prompt in ([], [ids(1)]):
        [pieces] = sample(model, [prompt], text=TextSettings(max_tokens=3))
        assert not any(piece.is_floating_point() for piece in pieces)


def is_image(piece):
    return isinstance(piece, tuple) or piece.is_floating_point()


def test_what_was_sampled_can_be_a_prompt_and_a_training_document():
    model = chain({1: 2, 2: BOI1, EOI1: 3, 3: EOS})
    [document] = model.sample([[ids(1)]], grids=GRIDS, image=ONE_STEP)
    assert [described(piece) for piece in document] == [[2], IMAGE1, [3]]
    assert len(model.sample([document], grids=GRIDS)) == 1
    assert model([document], generator=seeded()).isfinite()
