"""The calls of two earlier systems: sample, sample_many, generate_text_only, generate_modality_only,
force_modality_at_start, fixed_modality_shape, init_modality_noise, modality_default_shape, modality_encoder/decoder,
channel_first_latent, create_ema; and the segment form with its generate."""

import pytest
import torch
import torch.nn.functional as F
from chain_models import BOI, BOS, EOI, EOS, GRIDS, ONE_STEP, chain, make
from small_models import ids, seeded, small_model
from torch import nn

from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.sampling.adapters import SegmentAdapter, TransfusionAdapter
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.engine import Drawing
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

SIZES = {"num_text_tokens": 10, "transformer": {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 48}}
QUICK = {"text_temperature": 0.0, "modality_steps": 1, "cfg_scale": 1.0}
STORY = {BOS: 1, 1: BOI, EOI: 2, 2: 3, 3: EOS}


def adapter(links=STORY):
    return TransfusionAdapter(chain(links))


def described(pieces):
    """Return a document with texts as lists of ids, and images as (modality, shape)."""
    return [(piece[0], tuple(piece[1].shape)) if isinstance(piece, tuple) else piece.tolist() for piece in pieces]


def test_sample_returns_the_prompt_and_its_continuation_with_every_image_under_its_modality():
    model = adapter()
    whole = model.sample(ids(4, 1), fixed_modality_shape=(2, 2), **QUICK)
    assert described(whole) == [[4, 1], (0, (2, 2, 4)), [2, 3]]
    image = model.sample(ids(4, 1), fixed_modality_shape=(2, 2), return_without_prompt=True, seed=5, **QUICK)
    assert described(image) == [(0, (2, 2, 4))]
    settings = ImageSettings(steps=1, guidance=1.0)
    [[drawn, _]] = sample(model.model, [[ids(4, 1)]], grids=[(2, 2), None], image=settings, seed=5)
    assert torch.equal(image[0][1], drawn)


def test_sample_counts_ids_and_patches_up_to_max_length():
    model = adapter({BOS: 1, 1: 2, 2: BOI, EOI: 1})
    lengths = {n: described(model.sample(fixed_modality_shape=(2, 2), max_length=n, **QUICK)) for n in (1, 3, 7, 9)}
    image = (0, (2, 2, 4))
    assert lengths == {1: [[1]], 3: [[1, 2], image], 7: [[1, 2], image, [1]], 9: [[1, 2], image, [1, 2], image]}


def test_sample_draws_its_seed_from_the_generator_of_torch():
    model = TransfusionAdapter(make())
    torch.manual_seed(3)
    first, second = (model.sample(max_length=16, fixed_modality_shape=(1, 2)) for _ in range(2))
    torch.manual_seed(3)
    again = model.sample(max_length=16, fixed_modality_shape=(1, 2))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert str(first) != str(second)


def test_sample_many_continues_prompts_of_every_form_as_one_by_one():
    model, prompts = adapter(), [None, ids(5, 1), (1, torch.ones(1, 3, 6)), [torch.ones(2, 2, 4), ids(3)]]
    settings = QUICK | {"fixed_modality_shape": (2, 2), "seed": 1, "max_length": 9}
    many = model.sample_many(prompts, **settings)
    assert [described(one) for one in many] == [
        [[1], (0, (2, 2, 4)), [2, 3]],
        [[5, 1], (0, (2, 2, 4)), [2, 3]],
        [(1, (1, 3, 6))] + described(model.sample(prompts[2], **settings))[1:],
        [(0, (2, 2, 4)), [3]],
    ]
    torch.testing.assert_close(many[0], model.sample(None, **settings), rtol=0, atol=0)
    assert len(model.sample_many(**settings)) == 1


def test_generate_text_only_fills_rows_with_eos_and_never_begins_an_image():
    model = adapter({1: {BOI: 2, 2: 1}, 2: 3, 3: EOS, 4: {4: 1.0, 5: 0.95}, 5: 5})
    written = model.generate_text_only(torch.tensor([[0, 1], [0, 4]]), seq_len=6, temperature=0.0)
    assert written.tolist() == [[2, 3, EOS, EOS], [4, 4, 4, 4]]


def test_generate_modality_only_draws_a_batch_of_one_modality_without_guidance():
    model = adapter()
    drawn = model.generate_modality_only(3, 1, fixed_modality_shape=(1, 3), modality_steps=2, seed=4)
    assert drawn.shape == (3, 1, 3, 6) and (drawn[0] - drawn[1]).abs().max() > 0.1
    settings = ImageSettings(steps=2, guidance=1.0)
    expected = generate_images(model.model, [()] * 3, (1, 3), modality=1, image=settings, seed=4)
    assert torch.equal(drawn, expected)
    with pytest.raises(InputError, match="modality_type must be in"):
        model.generate_modality_only()


def test_force_modality_at_start_begins_with_an_image_of_that_modality_and_size():
    model = adapter({15: 2, 2: EOS, EOI: EOS})
    forced = model.sample(ids(4), force_modality_at_start=(1, (2, 3)), fixed_modality_shape=(1, 1), **QUICK)
    assert described(forced) == [[4], (1, (2, 3, 6)), [2]]
    forced = model.sample(force_modality_at_start=0, fixed_modality_shape=(1, 2), **QUICK)
    assert described(forced) == [(0, (1, 2, 4))]
    with pytest.raises(InputError, match="size of what is drawn must be given for modality 1"):
        model.sample(force_modality_at_start=1, **QUICK)


def test_a_forced_image_is_the_one_that_the_model_would_have_begun():
    model = chain({BOS: BOI, EOI: 2, 2: EOS})
    begun = sample(model, [()], grids=GRIDS, image=ONE_STEP)
    torch.testing.assert_close(sample(model, [()], grids=GRIDS, image=ONE_STEP, begin=0), begun, rtol=0, atol=0)


def test_fixed_modality_shape_is_the_size_of_every_image_in_place_of_the_default():
    model = TransfusionAdapter.create(**SIZES, dim_latent=4, modality_default_shape=(3, 3))
    for shape in ((2, 3), (6, 2)):
        [image] = model.sample(force_modality_at_start=0, fixed_modality_shape=shape, max_length=1, **QUICK)
        assert image[1].shape == (*shape, 4)
        assert model.generate_modality_only(fixed_modality_shape=shape, modality_steps=1).shape == (1, *shape, 4)
    with pytest.raises(InputError, match=r"must be 2 integers of at least 1 for modality 0, got \(4,\)"):
        model.sample(fixed_modality_shape=(4,))


def test_init_modality_noise_is_what_every_image_begins_with(monkeypatch):
    model, noise, seen, predict = adapter(), torch.randn(8, 9, generator=seeded()), [], Drawing.predict
    monkeypatch.setattr(Drawing, "predict", lambda self, x, t: seen.append(x) or predict(self, x, t))
    settings = QUICK | {"fixed_modality_shape": (2, 3), "init_modality_noise": noise}
    model.sample_many([ids(1), ids(4, 1)], **settings)
    [x] = seen
    assert torch.equal(x, noise[:6, :4].reshape(1, 2, 3, 4).expand(2, -1, -1, -1))
    with pytest.raises(InputError, match=r"init_modality_noise must be at least \[6, 4\].*got \(5, 9\)"):
        model.sample(**settings | {"init_modality_noise": noise[:5]})


def test_modality_default_shape_is_drawn_and_says_how_many_dimensions_there_are():
    two = TransfusionAdapter.create(**SIZES, dim_latent=(4, 6), modality_default_shape=((5,), (2, 2)))
    assert [modality.dims for modality in two.model.config.modalities] == [1, 2]
    assert two.generate_modality_only(2, 0, modality_steps=1).shape == (2, 5, 4)
    assert two.generate_modality_only(2, 1, modality_steps=1).shape == (2, 2, 2, 6)
    same = TransfusionAdapter.create(**SIZES, dim_latent=(4, 6), modality_default_shape=(2, 3))
    assert [modality.shape for modality in same.model.config.modalities] == [(2, 3), (2, 3)]
    assert TransfusionAdapter.create(**SIZES).model.config.dim_latent == (32,)


def test_modality_encoder_and_decoder_map_raw_tensors_to_latents_and_back():
    encoder, decoder = nn.Conv2d(3, 4, 2, stride=2), nn.ConvTranspose2d(4, 3, 2, stride=2)
    model = TransfusionAdapter.create(
        **SIZES,
        dim_latent=(4, 6),
        channel_first_latent=True,
        modality_default_shape=(2, 3),
        modality_encoder=(encoder, None),
        modality_decoder=(decoder, None),
    )
    model([[ids(1), torch.randn(3, 4, 6)]]).backward()
    assert encoder.weight.grad.abs().max() > 0
    latents = model.generate_modality_only(2, 0, modality_steps=1, return_unprocessed_modalities=True, seed=1)
    drawn = model.generate_modality_only(2, 0, modality_steps=1, seed=1)
    torch.testing.assert_close(drawn, decoder(latents).detach())
    assert model.generate_modality_only(1, 1, modality_steps=1).shape == (1, 6, 2, 3)
    with pytest.raises(InputError, match="use generate_modality_only"):
        model.sample(return_unprocessed_modalities=True)


def test_channel_first_latent_is_the_order_of_axes_in_training_and_in_results():
    torch.manual_seed(0)
    first = TransfusionAdapter.create(**SIZES, dim_latent=4, channel_first_latent=True)
    last = TransfusionAdapter.create(**SIZES, dim_latent=4)
    last.load_state_dict(first.state_dict())
    image = torch.randn(4, 4, 3, generator=seeded())
    losses = [
        model([[x, ids(1)]], generator=seeded(), prob_uncond=0)
        for model, x in ((first, image), (last, image.movedim(0, -1)))
    ]
    assert losses[0] == losses[1]
    drawn = [model.generate_modality_only(1, 0, (2, 3), 1, seed=1) for model in (first, last)]
    assert torch.equal(drawn[0], drawn[1].movedim(-1, 1)) and drawn[0].shape == (1, 4, 2, 3)


def test_create_ema_averages_the_weights_and_samples_from_the_average():
    model = adapter({BOS: 1, 1: EOS})
    before, averaged = model.model.head.weight.detach().clone(), model.create_ema(beta=0.75)
    model.model.head.weight.data = chain({BOS: 2, 2: EOS}).head.weight.data.clone()
    averaged.update()
    torch.testing.assert_close(averaged.model.head.weight.data, 0.75 * before + 0.25 * model.model.head.weight.data)
    assert averaged.sample(**QUICK)[0].tolist() == [1] and model.sample(**QUICK)[0].tolist() == [2]
    assert not any(p.requires_grad for p in averaged.parameters())
    assert averaged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("modality", "weights"),
    [({}, "shared"), ({"shape": (2, 3), "positions": "axial"}, "shared"), ({}, "separate")],
)
def test_segments_have_the_losses_and_gradients_of_our_own_forward(modality, weights):
    transformer = SIZES["transformer"] | {"modality_weights": weights}
    model = small_model(num_text_tokens=10, transformer=transformer, modalities=[{"dim_latent": 4, **modality}])
    image = torch.randn(*modality.get("shape", (1, 6)), 4, generator=seeded())
    batch = pack_documents([[ids(1, 2), image, ids(3)]], model.config, Randomness(seeded(1), prob_uncond=0))
    losses, [images] = model(batch), batch.modalities
    losses.total.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before, after, strings = ids(BOS, 1, 2, BOI), ids(EOI, 3, EOS), ["text", "image", "text"]
    segments = [before, (model.noisy(images), images.timesteps), after]
    [outputs, [other]], returned = SegmentAdapter(model)([segments, [ids(BOS, 4)]], [strings, ["text"]])
    assert returned == [strings, ["text"]] and other.shape == (1, 2, 14)
    assert [tuple(x.shape) for x in outputs] == [(1, 4, 14), (1, 6, 4), (1, 3, 14)]
    logits = torch.cat([outputs[0][0, :-1], outputs[2][0, :-1]])
    cross_entropy = F.cross_entropy(logits, torch.cat([before[1:], after[1:]]))
    error = F.mse_loss(outputs[1][0], images.noise)
    torch.testing.assert_close(cross_entropy, losses.text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error, losses.diffusion, rtol=1e-5, atol=1e-5)
    (cross_entropy + model.config.diffusion_weight * error).backward()
    for p, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


def test_samples_of_segments_do_not_see_each_other():
    model = SegmentAdapter(small_model(**SIZES, dim_latent=4))
    samples = [[ids(BOS, 1, BOI), (torch.randn(n, 4), torch.tensor([t])), ids(EOI, EOS)] for n, t in ((3, 700), (2, 0))]
    strings = [["text", "image", "text"]] * 2
    together, _ = model(samples, strings)
    for one, expected in zip(samples, together, strict=True):
        [alone], _ = model([one], strings[:1])
        torch.testing.assert_close(alone, expected)


def test_segments_are_continued_as_documents_and_can_be_continued_again():
    model = small_model(**SIZES, modalities=[{"dim_latent": 4, "shape": (2, 3)}])
    segments = SegmentAdapter(model)
    given = [ids(BOS, 1, BOI), (torch.randn(6, 4), torch.zeros(1)), ids(EOI, 2, BOI)]
    strings = ["text", "image", "text"]
    limits = {"image": ONE_STEP, "text": TextSettings(max_tokens=3), "max_images": 2}
    tokens, names = segments.generate(given, strings, **limits)
    prompt = [ids(1), given[1][0].reshape(2, 3, 4), ids(2)]
    [expected] = sample(model, [prompt], begin=0, **limits)
    assert names[:5] == ["text", "image", "text", "image", "text"] and tokens[2].tolist() == [EOI, 2, BOI]
    patches, timestep = tokens[3]
    assert torch.equal(patches, expected[0].reshape(6, 4)) and timestep.tolist() == [0]
    written = [token for x in tokens[4::2] for token in x.tolist() if token < 10]
    assert written == [token for x in expected if not x.is_floating_point() for token in x.tolist()] and written
    assert tokens[4][0] == EOI
    again, more = segments.generate(tokens, names, **limits)
    assert again[:2] == tokens[:2] and len(again) == len(more) >= len(tokens)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("model_output_clean", "'prediction': 'x0'"),
        ("modality_num_dim", "modality_default_shape"),
        ("flow_loss_weight", "diffusion_weight"),
        ("odeint_kwargs", "ImageSettings"),
        ("add_pos_emb", "positions='axial'"),
    ],
)
def test_settings_that_are_not_supported_name_the_ones_that_replace_them(name, replacement):
    with pytest.raises(InputError, match=f"{name} must be left out, got 1; use .*{replacement}"):
        TransfusionAdapter.create(**SIZES, **{name: 1})


IMAGE = (torch.zeros(2, 4), torch.zeros(1))


@pytest.mark.parametrize(
    ("segments", "strings", "message"),
    [
        ([ids(1)], ["text", "text"], "as many strings as segments, and at least one, got 1 and 2"),
        ([], [], "at least one, got 0 and 0"),
        ([ids(1), IMAGE[0]], ["text", "image"], r"segment 1 must be .*, got 'image' of Tensor \(2, 4\)"),
        ([(torch.zeros(2, 3), 0)], ["image"], r"\(patches \[N, 4\], timestep\), got 'image' of tuple \(2, 3\)"),
        ([ids(14)], ["text"], r"ids int64 \[T\] in 0..13"),
        ([ids(1)], ["audio"], "got 'audio' of Tensor"),
    ],
)
def test_segments_that_do_not_fit_their_strings_are_refused(segments, strings, message):
    with pytest.raises(InputError, match=message):
        SegmentAdapter(small_model(**SIZES, dim_latent=4))([segments], [strings])


@pytest.mark.parametrize(
    ("segments", "settings", "message"),
    [
        ([ids(BOS)], {"diff_utils": object()}, "diff_utils must be left out, got object; use image=ImageSettings"),
        ([ids(BOS), IMAGE], {}, "must begin and end with text"),
        ([ids(BOS), (IMAGE[0], torch.tensor([500])), ids(EOI)], {}, "clean, at timestep 0, got 500"),
    ],
)
def test_samples_that_cannot_be_continued_are_refused(segments, settings, message):
    strings = ["image" if isinstance(segment, tuple) else "text" for segment in segments]
    with pytest.raises(InputError, match=message):
        SegmentAdapter(small_model(**SIZES, dim_latent=4)).generate(segments, strings, **settings)


def test_models_and_arguments_that_the_adapters_do_not_serve_are_refused():
    with pytest.raises(InputError, match="the model must have one modality"):
        SegmentAdapter(make())
    with pytest.raises(InputError, match="no encoder, decoder or size tokens"):
        SegmentAdapter(small_model(**SIZES, dim_latent=4, size_tokens=2))
    with pytest.raises(InputError, match="cache_kv must be left out, got False; use the cache"):
        adapter().sample(cache_kv=False)
