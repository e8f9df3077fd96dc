"""Prompts and settings that do not fit are refused in one line."""

import pytest
import torch
from chain_models import BOI1, GRIDS, chain, make
from small_models import ids

from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.settings import ImageSettings, TextSettings


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[ids(10)]], {}, r"piece 0: text ids must lie in \[0, 10\), got 10; special tokens are added"),
        (
            [[ids(2)]],
            {"grids": GRIDS[:1]},
            "grids must have a size for each of 2 modalities, got 1",
        ),
        ([[ids(2)]], {"grids": [(2, 2), (3,)]}, r"must be 2 integers of at least 1 for modality 1, got \(3,\)"),
        ([[ids(2)]], {"grids": [(2, 2), (1.5, 2)]}, r"must be 2 integers of at least 1 for modality 1, got \(1.5, 2\)"),
        ([[ids(2)]], {"grids": [(2, 2), 2]}, "must be 2 integers of at least 1 for modality 1, got 2"),
        ([[]], {"grids": 5}, "grids must have a size for each of 2 modalities, got int"),
        ([[]], {"negative": ids(1, 2)}, "negative must be a list of pieces, got Tensor; give a list"),
        ([[]], {"prompt_numbers": 5}, "with a number for each of 1 prompts, got 0 and 5"),
        ([[]], {"begin": 2}, r"modality must be an integer in \[0, 2\), got 2"),
        ([[]], {"begin": 0, "grids": None}, "size of what is drawn must be given for modality 0, which has no shape"),
        ([[]], {"noise": [None]}, "noise must have a tensor or None for each of 2 modalities, got 1"),
        ([[]], {"noise": [None, torch.zeros(3, 6)]}, r"noise must be .* of shape \(1, 3, 6\), got .* \(3, 6\)"),
        ([], {}, "prompts must be a list of one or more documents, got none"),
        (ids(1, 2), {}, "prompts must be a list of one or more documents, got Tensor"),
        ([ids(1, 2)], {}, "document 0 must be a list of pieces, got Tensor; give a list"),
        (["red"], {}, "document 0 must be a list of pieces, got str"),
        ([None], {}, "document 0 must be a list of pieces, got NoneType"),
        ([[]], {"max_images": -1}, "max_images must be an integer from 0 on, got -1; 0 draws none"),
        ([[]], {"max_images": 0, "begin": 0}, "max_images must be at least 1 for .* begin with an image"),
        ([[]], {"seed": -1}, "integers in 0.*with a number for each of 1 prompts, got -1"),
        ([[]], {"seed": 1.5}, "seed and prompt_numbers must be integers in 0.*got 1.5"),
        ([[]], {"prompt_numbers": [1, 2]}, r"a number for each of 1 prompts, got 0 and \[1, 2\]"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(chain({2: BOI1}), prompts, **{"grids": GRIDS} | settings)


def test_a_modality_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match=r"modality must be an integer in \[0, 2\), got 2"):
        generate_images(make(), [[]], (1, 2), modality=2)


def test_weights_that_are_not_numbers_are_reported_rather_than_decoded():
    model = make()
    model.head.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="logits must be numbers, got NaN; check the model's weights"):
        sample(model, [[]], grids=GRIDS)
    model.codecs[0].decoder.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="a drawn image must be finite, got NaN or infinity"):
        generate_images(model, [[]], (2, 2), image=ImageSettings(steps=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: TextSettings(temperature=-1), "temperature must be in 0..inf, got -1; 0 is greedy"),
        (lambda: TextSettings(temperature=float("nan")), "temperature must be in 0..inf, got nan"),
        (lambda: TextSettings(temperature="hot"), "temperature must be in 0..inf, got hot"),
        (lambda: TextSettings(stop="end"), "stop must be a function of the ids of a text, got 'end'"),
        (lambda: TextSettings(max_tokens=-1), "max_tokens must be an integer from 0 on, got -1"),
        (lambda: TextSettings(top_k=1.5), "top_k must be an integer from 0 on, got 1.5"),
        (lambda: TextSettings(top_p=0), r"top_p must be in \(0, 1\], got 0"),
        (lambda: TextSettings(min_p=2), r"min_p must be in \[0, 1\], got 2"),
        (lambda: TextSettings(repetition_penalty=0), "repetition_penalty must be above 0 and finite, got 0"),
        (lambda: TextSettings(temperature=None), "temperature must be in 0..inf, got None"),
        (lambda: ImageSettings(steps=True), "diffusion steps must be an integer in 1..1000, got True"),
        (lambda: ImageSettings(guidance_interval=None), "guidance_interval must be two timesteps .* got None"),
        (lambda: ImageSettings(steps=0), "diffusion steps must be an integer in 1..1000, got 0"),
        (lambda: ImageSettings(eta=-1), "eta must be at least 0 and finite, got -1"),
        (lambda: ImageSettings(sampler="heun", eta=1.5), "eta must come with the sampler ddpm, got 1.5 with heun"),
        (lambda: ImageSettings(clip=-1), "clip must be above 0 and finite, got -1"),
        (lambda: ImageSettings(guidance=float("nan")), "guidance must be finite, got nan"),
        (lambda: ImageSettings(guidance_interval=(5, 1)), r"guidance_interval must be two timesteps .* got \(5, 1\)"),
        (lambda: ImageSettings(guidance_interval=(5,)), r"guidance_interval must be two timesteps .* got \(5,\)"),
        (lambda: ImageSettings(guidance=None), "guidance must be finite, got None"),
        (lambda: ImageSettings(guidance_rescale=2), "guidance_rescale must be in 0..1, got 2"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings()
