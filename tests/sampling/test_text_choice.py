"""How the next id of text is chosen, and where a text stops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chain_models import BOI, BOS, EOI, EOS, chain, produced_by
from small_models import ids

from transfusion_fast.sampling.settings import TextSettings
from transfusion_fast.sampling.text import choose


def test_temperature_draws_in_proportion_and_zero_takes_the_likeliest():
    """Two likely tokens a factor of e^2 apart at temperature 1, of e at temperature 2; 32^0.5 undoes the norm."""
    model = chain({BOS: {1: 5.0, 2: 5.0 - 0.4 / 32**0.5}, 1: {EOS: 5.0}, 2: {EOS: 5.0}})
    for temperature, share in ((1.0, 1 / (1 + np.exp(-2))), (2.0, 1 / (1 + np.exp(-1)))):
        produced = produced_by(model, [()] * 1000, text=TextSettings(temperature=temperature))
        assert np.mean([document == [[1]] for document in produced]) == pytest.approx(share, abs=0.04)
    assert produced_by(model, [()] * 3) == [[[1]]] * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {2}),
        ({"top_p": 0.75}, {0, 2}),
        ({"min_p": 0.3}, {0, 2}),
        ({"min_p": 0.1, "top_k": 3}, {0, 2, 3}),
        ({"top_k": 2, "top_p": 0.7}, {2}),  # of the two that are left, the first has 0.706
    ],
)
def test_unlikely_ids_are_left_out(settings, expected):
    logits = torch.tensor([0.25, 0.05, 0.6, 0.1]).log().expand(300, -1)
    settings = TextSettings(temperature=1.0, **settings)
    drawn = choose(logits, settings, None, torch.arange(300) / 300)
    assert set(drawn.tolist()) == expected


def test_the_likeliest_ids_end_where_they_reach_top_p():
    settings = TextSettings(temperature=1.0, top_p=0.5)
    assert set(choose(torch.zeros(8, 4), settings, None, torch.arange(8) / 8).tolist()) == {0, 1}


def test_ids_are_drawn_in_proportion_also_by_the_ends_of_the_random_numbers():
    shares = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]])
    uniform = torch.tensor([0.0, 0.5999, 0.6001, 0.8999, 0.9001, 1 - 2**-24])
    settings = TextSettings(temperature=1.0)
    drawn = [choose(row.log().expand(6, -1), settings, None, uniform).tolist() for row in shares]
    assert drawn == [[1, 1, 2, 2, 0, 0], [0, 2, 2, 2, 2, 2]]
    draws = choose(torch.zeros(2, 50_000), settings, None, torch.full((2,), 1 - 2**-24))
    assert draws.max() < 50_000, "rounding leads past no id"


def test_ids_that_were_used_become_less_likely_whatever_their_sign():
    settings, used = TextSettings(repetition_penalty=2.0), torch.tensor([[True, False]] * 3)
    logits = torch.tensor([[3.0, 2.0], [-1.0, -1.5], [5.0, 2.0]])
    assert choose(logits, settings, used, torch.zeros(3)).tolist() == [1, 1, 0]
    assert produced_by(chain({BOS: 1, 1: {1: 1.0, 2: 0.6}, 2: EOS}), text=settings) == [[[1, 2]]]


def test_patches_are_no_ids_that_were_used():
    model = chain({BOS: BOI, EOI: {0: 1.0, 2: 0.5}, 0: EOS})
    text = TextSettings(repetition_penalty=100.0)
    for prompt in ([torch.zeros(1, 2, 4)], [ids(3), torch.zeros(1, 2, 4), torch.zeros(2, 2, 4)]):
        assert produced_by(model, [prompt], text=text) == [[[0]]]
    assert produced_by(model, [[ids(0), torch.zeros(1, 2, 4)]], text=replace(text, max_tokens=1)) == [[[2]]]


def test_the_lowest_temperatures_and_penalties_leave_the_likeliest_id():
    logits, uniform = torch.tensor([[-9.0, 2.0, 1.0]]), torch.tensor([0.99])
    for temperature in (1e-30, 1e-40, 1e-300):
        assert choose(logits, TextSettings(temperature=temperature), None, uniform) == 1
    rewarding = TextSettings(temperature=1.0, repetition_penalty=1e-45)
    assert choose(logits, rewarding, torch.tensor([[False, False, True]]), uniform) == 2


def test_a_continuation_is_told_token_by_token_and_ends_where_it_is_stopped():
    told, model = [], chain({BOS: 1, 1: 2, 2: 3, 3: 4, 4: EOS, 7: 8, 8: EOS})
    text = TextSettings(stop=lambda so_far: so_far[-2:] == [2, 3])
    told_to = {"on_token": lambda *what: told.append(what), "prompt_numbers": [5, 6]}
    produced = produced_by(model, [[], [ids(7)]], text=text, **told_to)
    assert produced == [[[1, 2, 3]], [[8]]]
    assert told == [(0, 1), (1, 8), (0, 2), (0, 3)]
    assert produced_by(model, [[ids(1, 2)]], text=text) == [[[3, 4]]], "the text of the prompt does not stop it"
