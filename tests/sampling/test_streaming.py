"""Answers while they are made: they grow into what the Python interface gives, each reaches its own request, and they
can be stopped."""

import numpy as np
import pytest
import torch
from small_models import small_model

from transfusion_fast.data.images import latents_to_pixels
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.settings import ImageSettings, TextSettings
from transfusion_fast.sampling.streaming import MAX_TOKENS, Request, Streamer
from transfusion_fast.sampling.subject import Subject

EOS, BOI = 257, 258
IMAGE = ImageSettings(steps=20)
GIVEN = torch.linspace(-1, 1, 16).view(2, 2, 4)


@pytest.fixture(scope="module")
def model():
    modality = {"dim_latent": 4, "shape": (2, 2), "bound": 1.0}
    return small_model(modalities=[modality], transformer={"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}).eval()


@pytest.fixture(scope="module")
def streamer(model):
    info = ModalityInfo("image", channels=1, patch_size=2, encoding="pixels")
    return Streamer(Subject(model, ByteTokenizer(), (info,)))


@pytest.fixture
def written(monkeypatch):
    """Return a function that lets the model write given ids."""

    def write(*tokens):
        left = iter(tokens)
        monkeypatch.setattr("transfusion_fast.sampling.decoder.choose", lambda *_: torch.tensor([next(left)]))

    return write


def ids(text):
    return torch.tensor([*text.encode()])


def pixels(latents):
    return latents_to_pixels(latents.numpy(), patch_size=2)


def last(stream):
    [*_, answer] = stream
    return answer


def test_text_grows_by_one_id_to_what_sample_gives(streamer, model):
    settings = TextSettings(max_tokens=9, temperature=1.0)
    [[expected]] = sample(model, [[GIVEN]], max_images=0, text=settings, seed=4)
    *answers, end = streamer.start(Request("caption", given=GIVEN, text=settings, seed=4))
    decoded = [ByteTokenizer().decode(expected[:n]) for n in range(1, len(expected) + 1)]
    assert len(answers) == len(expected) > 1 and [a.state for a in answers] == ["running"] * len(answers)
    assert [a.pieces for a in answers] == [(text.rstrip("\ufffd"),) for text in decoded]
    assert end.pieces == (decoded[-1],) and end.state == "done"


def test_a_character_is_shown_when_all_of_its_ids_are_there(streamer, written):
    written(*"é".encode(), EOS)
    assert [a.pieces for a in streamer.start(Request("write", "caf"))] == [("",), ("é",), ("é",)]


@pytest.mark.parametrize("task", ["draw", "change", "edit"])
def test_images_pass_through_ten_states_to_what_generate_images_gives(streamer, model, task):
    settings = ImageSettings(steps=20, strength=0.5) if task == "change" else IMAGE
    prompt = [GIVEN, ids("a")] if task == "edit" else [ids("a")]
    start = GIVEN.expand(3, 2, 2, 4) if task == "change" else None
    expected = pixels(generate_images(model, [prompt], images_per_prompt=3, image=settings, start=start, seed=2))
    given = None if task == "draw" else GIVEN
    *answers, end = streamer.start(Request(task, "a", given, image=settings, num_images=3, seed=2))
    assert [a.step for a in answers] == [1, *range(2, 21, 2)] and end.state == "done"
    assert all(a.state == "running" and np.shape(a.pieces) == (3, 4, 4, 1) for a in answers)
    assert (np.array(end.pieces) == expected).all() and len({np.array(a.pieces).tobytes() for a in answers}) > 5


def test_images_in_text_stay_where_the_text_goes_on(streamer, written):
    written(*b"a", BOI, BOI, *b"bc", EOS)
    answers = [*streamer.start(Request("write", "z", image=IMAGE, num_images=2))]
    kinds = ["".join(p if isinstance(p, str) else "#" for p in a.pieces) for a in answers]
    assert list(dict.fromkeys(kinds)) == ["a", "a#", "a##", "a##b", "a##bc"]
    final = answers[-1].pieces
    for answer in answers:
        same = zip(answer.pieces[:-1], final, strict=False)
        assert all(one == other if isinstance(one, str) else (one == other).all() for one, other in same)


def test_requests_at_once_get_the_answers_that_they_get_alone(streamer):
    def requests():
        text = TextSettings(max_tokens=5, temperature=1.0)
        return [Request(t, p, text=text, image=IMAGE, seed=s) for s, p in enumerate("ab") for t in ("draw", "write")]

    alone = [last(streamer.start(request)) for request in requests()]
    streams = [streamer.start(request) for request in requests()]
    together = [last(stream) for stream in reversed(streams)][::-1]
    assert len({repr(answer.pieces) for answer in alone}) == 4
    for stream, one, other in zip(streams, alone, together, strict=True):
        assert other.request is stream.request
        assert all(map(np.array_equal, one.pieces, other.pieces))


@pytest.mark.parametrize("task", ["draw", "write"])
def test_a_stopped_request_ends_at_once_with_what_there_is(streamer, written, task):
    written(*[97] * MAX_TOKENS)
    text = TextSettings(max_tokens=MAX_TOKENS)
    long = streamer.start(Request(task, "a", text=text, image=ImageSettings(steps=1000)))
    waiting = streamer.start(Request(task, "b", image=ImageSettings(steps=1000)))
    first = next(long)
    waiting.stop()
    long.stop()
    [end] = long
    assert (first.state, end.state) == ("running", "stopped") and end.step < 1000 and len(end.pieces) == 1
    assert task == "draw" or len(end.pieces[0]) < MAX_TOKENS
    [end] = waiting
    assert end.state == "stopped" and end.pieces == ()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("paint", "a"), "the task must be one of draw, .*, got 'paint'"),
        (Request("draw"), f"the prompt must have 1 to {MAX_TOKENS} tokens, got none; write one"),
        (Request("write", "a" * 5000), f"the prompt must have 1 to {MAX_TOKENS} tokens, got 5000; write fewer"),
        (Request("caption"), "an image must be given to caption, got none; upload one"),
        (Request("edit", "a", torch.zeros(2, 2, 5)), "piece 0: .*5"),
        (Request("change", "a", torch.full((2, 2, 4), torch.nan)), "start must be finite, got NaN"),
        (Request("draw", "a", num_images=17), "the number of images must be in 1..16, got 17"),
        (Request("draw", "a", seed=None), "the seed must be an integer in 0.*, got None"),
        (Request("write", "a", text=TextSettings(max_tokens=10**9)), "max_tokens must be at most 4096, got 1000000000"),
    ],
)
def test_a_request_that_does_not_fit_raises_one_line_and_the_next_is_answered(streamer, request_, message):
    stream = streamer.start(request_)
    with pytest.raises(ValueError, match=message) as raised:
        next(stream)
    assert "\n" not in str(raised.value) and [*stream] == []
    assert last(streamer.start(Request("draw", "a", image=IMAGE))).state == "done"


def test_a_model_of_text_alone_writes_and_refuses_to_draw():
    transformer = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}
    streamer = Streamer(Subject(small_model(dim_latent=(), transformer=transformer), ByteTokenizer(), ()))
    with pytest.raises(ValueError, match="the task must be write for a model of text alone, got draw"):
        next(streamer.start(Request("draw", "a")))
    assert last(streamer.start(Request("write", "a", text=TextSettings(max_tokens=2)))).state == "done"
