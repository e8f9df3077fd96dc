"""How the next id of text is chosen, and where a text stops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chain_models import BOI, BOS, EOI, EOS, chain, produced_by
from small_models import ids, seeded

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
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 0.1, "top_k": 3}, {0, 1, 2}),
    ],
)
def test_unlikely_ids_are_left_out(settings, expected):
    logits, generator = torch.tensor([0.6, 0.25, 0.1, 0.05]).log(), seeded()
    settings = TextSettings(temperature=1.0, **settings)
    assert {choose(logits, settings, (), generator) for _ in range(300)} == expected


def test_ids_that_were_used_become_less_likely_whatever_their_sign():
    settings = TextSettings(repetition_penalty=2.0)
    assert choose(torch.tensor([3.0, 2.0]), settings, [0], seeded()) == 1
    assert choose(torch.tensor([-1.0, -1.5]), settings, [0], seeded()) == 1
    assert choose(torch.tensor([5.0, 2.0]), settings, [0], seeded()) == 0
    assert produced_by(chain({BOS: 1, 1: {1: 1.0, 2: 0.6}, 2: EOS}), text=settings) == [[[1, 2]]]


def test_patches_are_no_ids_that_were_used():
    model = chain({BOS: BOI, EOI: {0: 1.0, 2: 0.5}, 0: EOS})
    text = TextSettings(repetition_penalty=100.0)
    for prompt in ([torch.zeros(1, 2, 4)], [ids(3), torch.zeros(1, 2, 4), torch.zeros(2, 2, 4)]):
        assert produced_by(model, [prompt], text=text) == [[[0]]]
    assert produced_by(model, [[ids(0), torch.zeros(1, 2, 4)]], text=replace(text, max_tokens=1)) == [[[2]]]


def test_the_lowest_temperatures_and_penalties_leave_the_likeliest_id():
    logits = torch.tensor([-9.0, 2.0, 1.0])
    for temperature in (1e-30, 1e-40, 1e-300):
        assert choose(logits, TextSettings(temperature=temperature), [], seeded()) == 1
    rewarding = TextSettings(temperature=1.0, repetition_penalty=1e-45)
    assert choose(logits, rewarding, [2], seeded()) == 2


def test_a_continuation_is_told_token_by_token_and_ends_where_it_is_stopped():
    told, model = [], chain({BOS: 1, 1: 2, 2: 3, 3: 4, 4: EOS, 7: 8, 8: EOS})
    text = TextSettings(stop=lambda so_far: so_far[-2:] == [2, 3])
    told_to = {"on_token": lambda *what: told.append(what), "prompt_numbers": [5, 6]}
    produced = produced_by(model, [[], [ids(7)]], text=text, **told_to)
    assert produced == [[[1, 2, 3]], [[8]]]
    assert told == [(0, 1), (1, 8), (0, 2), (0, 3)]
    assert produced_by(model, [[ids(1, 2)]], text=text) == [[[3, 4]]], "the text of the prompt does not stop it"
