"""The cache of keys and values: what it returns is what the whole sequence gives without it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import ids, small_model

from transfusion_fast.model.inputs import flat_latents, place_images
from transfusion_fast.model.packed_batch import build_batch
from transfusion_fast.sampling.decoder import generate_images, generate_text
from transfusion_fast.sampling.engine import Context, Engine
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

BOS, BOI, EOI, BOI1, EOI1 = 10, 12, 13, 14, 15
UNETS = [{"codec": "unet", "patch_size": 2, "dim_latent": width} for width in (4, 8)]


def uncached(model, contexts, t=1.0):
    """Return the hidden states of the last tokens, and the predictions for all patches of modality 0, as in training.

    The last image of each context has timestep t, those before it 1.
    """
    lengths = np.array([len(c.tokens) for c in contexts])
    starts = np.cumsum(lengths) - lengths
    tokens = np.array([token for c in contexts for token in c.tokens])
    images = [
        (s + i.offset, i.modality, i.latents) for s, c in zip(starts.tolist(), contexts, strict=True) for i in c.images
    ]
    times = torch.tensor([t if image is c.images[-1] else 1.0 for c in contexts for image in c.images])
    latents = flat_latents([(m, x) for _, m, x in images], model.config.dim_latent)
    sequence, causal = place_images(tokens, lengths, images), model.config.image_attention == "causal"
    clean = [(x, torch.zeros_like(x)) for x in latents]
    batch = build_batch(sequence, clean, times, model.config.modalities, causal_images=causal)
    hidden, encoded = model.hidden(batch, latents)
    return hidden[np.cumsum(lengths) - 1], model.prediction(hidden, batch, 0, encoded[0])


def contexts():
    beginnings = [Context([BOS, 1, 2, 3]), Context([BOS]), Context([BOS, 4, BOI]), Context([BOS, BOI1])]
    images = ((beginnings[2], 0, (1, 4, 4)), (beginnings[2], 0, (1, 2, 4)), (beginnings[3], 1, (2, 3, 8)))
    for context, modality, shape in images:
        context.append_image(modality, torch.randn(*shape))
        context.tokens += [EOI + 2 * modality, 5]
    return beginnings


def variable_length_attention(q, k, v, q_offsets, k_offsets, max_q, max_k, **given):
    """Do what torch's kernel documents, one stream after another, on any device and in any precision."""
    assert given["num_splits"] == 1 and q_offsets.dtype == k_offsets.dtype == given["seqused_k"].dtype == torch.int32
    out = torch.full_like(q, torch.nan)
    for i, used in enumerate(given["seqused_k"].tolist()):
        rows, keys = slice(*q_offsets[i : i + 2]), slice(k_offsets[i], k_offsets[i] + used)
        n = rows.stop - rows.start
        assert used <= k_offsets[i + 1] - k_offsets[i] and n <= max_q and used <= max_k
        seen = torch.ones(n, used, dtype=torch.bool)
        seen = seen.tril(used - n) if given["window_size"] == (-1, 0) else seen
        operands = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
        out[rows] = F.scaled_dot_product_attention(*operands, seen, enable_gqa=given["enable_gqa"]).transpose(0, 1)
    return out


KINDS_OF_MODELS = pytest.mark.parametrize(
    ("settings", "transformer"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"positions": "shared", "diffusion": {"process": "flow"}}, {}, id="shared positions"),
        pytest.param({"positions": "axial"}, {}, id="axial positions"),
        pytest.param({}, {"kv_heads": 2, "qk_norm": True}, id="grouped heads with norms"),
        pytest.param({"positions": "axial"}, {"modality_weights": "separate", "qk_norm": True}, id="separate weights"),
        pytest.param({"tie_embeddings": True}, {"conditioning": "adaln"}, id="adaln"),
        pytest.param({"image_attention": "causal"}, {"kv_heads": 1}, id="causal images"),
        pytest.param({"modalities": UNETS}, {}, id="unet"),
    ],
)


def make(settings, transformer):
    transformer = {"dim": 32, "depth": 2, "heads": 4, "ffn_dim": 48, **transformer}
    settings = settings if "modalities" in settings else {"dim_latent": (4, 8), **settings}
    return small_model(num_text_tokens=10, transformer=transformer, **settings)


@KINDS_OF_MODELS
@torch.no_grad()
def test_greedy_text_after_an_image_is_that_of_whole_sequences(settings, transformer):
    model, image = make(settings, transformer), torch.randn(2, 3, 4)
    prompts = [[ids(4), image, ids(5)], [ids(1, 2, 3)]]
    opened = [Context([BOS, 4, BOI]), Context([BOS, 1, 2, 3])]
    opened[0].append_image(0, image)
    opened[0].tokens += [EOI, 5]
    for context, text in zip(opened, generate_text(model, prompts, text=TextSettings(max_tokens=8)), strict=True):
        expected = []
        while len(expected) < 8:
            logits = model.head(uncached(model, [context])[0])[0]
            logits[[BOS, *range(BOI, model.vocabulary.size)]] = -torch.inf
            token = int(logits.argmax())
            if token == model.vocabulary.eos:
                break
            expected.append(token)
            context.tokens.append(token)
        assert text.tolist() == expected


@pytest.mark.parametrize("kernel", ["scaled_dot_product", "variable_length"])
@KINDS_OF_MODELS
@torch.no_grad()
def test_passes_over_the_cache_give_what_whole_sequences_give(settings, transformer, kernel, monkeypatch):
    if kernel == "variable_length":
        monkeypatch.setattr("transfusion_fast.sampling.engine.takes_lengths", lambda cache: True)
        monkeypatch.setattr("transfusion_fast.sampling.cache.varlen_attn", variable_length_attention)
    model = make(settings, transformer)
    streams, close = contexts(), {"rtol": 1e-4, "atol": 1e-5}
    engine = Engine(model)
    cache, hidden = engine.prefill(streams)
    torch.testing.assert_close(hidden, uncached(model, streams)[0], **close)

    writing, tokens = [0, 2, 3], [7, BOI, BOI]
    hidden = engine.step(cache, writing, tokens)
    for stream, token in zip(writing, tokens, strict=True):
        streams[stream].tokens.append(token)
    own = [streams[stream] for stream in writing]
    torch.testing.assert_close(hidden, uncached(model, own)[0], **close)

    x, t = torch.randn(2, 2, 3, 4), 600.0
    alone = [Context([BOI]), Context([BOI])]
    image = engine.start_image([(cache, [2, 3]), (engine.prefill(alone)[0], [0, 1])], 0, (2, 3))
    got = image.predict(x, t)
    image.finish(x)
    for context, image in zip([*own[1:], *alone], [*x, *x], strict=True):
        context.append_image(0, image)
    expected = [uncached(model, [context], t)[1][-6:] for context in (*own[1:], *alone)]
    torch.testing.assert_close(got.flatten(2, 3).flatten(0, 1), torch.stack(expected), **close)

    hidden = engine.step(cache, writing, [1, EOI, EOI])
    for context, token in zip(own, [1, EOI, EOI], strict=True):
        context.tokens.append(token)
    torch.testing.assert_close(hidden, uncached(model, own)[0], **close)


@torch.no_grad()
def test_a_cache_grows_by_doubling_and_has_the_memory_that_its_formula_says():
    transformer = {"dim": 32, "depth": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 48}
    model = small_model(num_text_tokens=10, transformer=transformer)
    engine, tokens = Engine(model), [BOS, *[1, 2, 3] * 10]
    cache, _ = engine.prefill([Context([BOS]), Context(tokens)])
    assert cache.capacity == 47 and cache.nbytes == 2 * 3 * 2 * 47 * 2 * 8 * 4
    for n in range(100):
        hidden = engine.step(cache, [0, 1], [n % 10] * 2)
    assert cache.capacity == 4 * 47 and cache.lengths == [101, 131]
    wholes = [Context([*beginning, *[n % 10 for n in range(100)]]) for beginning in ([BOS], tokens)]
    torch.testing.assert_close(hidden, uncached(model, wholes)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dims", "grid"), [(0, ()), (1, (6,)), (2, (6, 2)), (3, (2, 3, 2))])
@pytest.mark.parametrize("given", [True, False])
def test_images_of_any_number_of_dimensions_have_the_shape_asked_or_that_of_their_modality(dims, grid, given):
    shape = {} if given else {"shape": grid}
    modality = {"dims": dims, "dim_latent": 4, "positions": "axial", **shape}
    model = small_model(num_text_tokens=10, modalities=[modality])
    before = [ids(1), torch.randn(*grid, 4)]
    settings = ImageSettings(steps=2, clip=1.0)
    drawn = generate_images(model, [[], before], grid if given else None, image=settings)
    assert drawn.shape == (2, *grid, 4) and drawn.isfinite().all()


@torch.no_grad()
def test_a_context_that_is_repeated_is_run_once_and_continued_by_each_of_its_streams(monkeypatch):
    transformer = {"dim": 32, "depth": 2, "heads": 2}
    model = small_model(num_text_tokens=10, dim_latent=(4, 8), positions="shared", transformer=transformer)
    engine, (first, *_, image) = Engine(model), contexts()
    given, rows = [first, image, first.copy(), image.copy(), first], []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda batch, *rest: (rows.append(len(batch.tokens)), hidden(batch, *rest))[1])
    cache, last = engine.prefill(given)
    engine.prefill([first, image])
    assert rows[0] == rows[1]
    alone = [engine.prefill([context]) for context in given]
    torch.testing.assert_close(last, torch.cat([hidden for _, hidden in alone]))
    for _ in range(2):
        steps = [engine.step(own, [0], [token]) for token, (own, _) in enumerate(alone, start=1)]
        torch.testing.assert_close(engine.step(cache, range(5), [1, 2, 3, 4, 5]), torch.cat(steps))
    assert cache.lengths == [own.lengths[0] for own, _ in alone]
    assert cache.next_position == [own.next_position[0] for own, _ in alone]
