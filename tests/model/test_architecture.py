"""The architecture against a second implementation of the published equations, in fp64 and with loops.

It shares no code with the model: block order, norms and their eps, the tensors that are rotated, the layout of fused
projections, the timestep embedding and the heads each have one right value here.
"""

import math

import pytest
import torch
from small_models import ids, seeded, small_model

from transfusion_fast import Transfusion
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.model.layers import INIT_STD

HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 4, 2, 8, 0.03, 500.0
TRANSFORMER = {"dim": 32, "depth": 3, "heads": HEADS, "kv_heads": KV_HEADS, "ffn_dim": 48}


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, position):
    """Rotate the pairs (i, i + D/2) of one vector [D] by position * theta^(-2i/D) (arXiv 2104.09864).

    A position is (row, column); rows turn the even pairs, columns the odd ones.
    """
    half, out = len(x) // 2, torch.empty_like(x)
    for i in range(half):
        angle = position[i % 2] * THETA ** (-2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def attention(weights, x, positions, visible, qk_norm):
    q, k, v = (x @ weights["attention.qkv.weight"].T).split([HEADS * 8, KV_HEADS * 8, KV_HEADS * 8], dim=-1)
    out = torch.zeros(len(x), HEADS * HEAD_DIM, dtype=x.dtype)
    for head in range(HEADS):
        own, shared = slice(8 * head, 8 * head + 8), head // (HEADS // KV_HEADS)
        of_group = slice(8 * shared, 8 * shared + 8)
        queries, keys = q[:, own], k[:, of_group]
        if qk_norm:
            queries = rms_norm(queries, weights["attention.q_norm"], 1e-6)
            keys = rms_norm(keys, weights["attention.k_norm"], 1e-6)
        queries = torch.stack([rotated(vector, p) for vector, p in zip(queries, positions, strict=True)])
        keys = torch.stack([rotated(vector, p) for vector, p in zip(keys, positions, strict=True)])
        scores = (queries @ keys.T / math.sqrt(HEAD_DIM)).masked_fill(~visible, -math.inf)
        out[:, own] = scores.softmax(-1) @ v[:, of_group]
    return out @ weights["attention.out.weight"].T


def feed_forward(weights, x):
    gate, up = (x @ weights["mlp.gate_up.weight"].T).chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up) @ weights["mlp.down.weight"].T


def timestep_embedding(weights, t):
    """Sinusoids of arXiv 2006.11239, cosines first, then two linear layers with SiLU between them."""
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    sinusoids = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    hidden = weights["timestep.mlp.0.weight"] @ sinusoids + weights["timestep.mlp.0.bias"]
    return weights["timestep.mlp.2.weight"] @ (hidden / (1 + (-hidden).exp())) + weights["timestep.mlp.2.bias"]


def reference_forward(model, tokens, positions, images, qk_norm):
    """Return logits [T, V] and the prediction for each image of one document; images are (first patch, x_t, t)."""
    weights = dict(model.named_parameters())

    def under(prefix):
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    x, rows = weights["embedding.weight"][tokens].clone(), torch.arange(len(tokens))
    visible = rows[:, None] >= rows[None, :]
    for modality, (first, x_t, t) in enumerate(images):
        codec = under(f"codecs.{modality}.")
        patches = slice(first, first + len(x_t))
        x[patches] = (x_t + timestep_embedding(codec, t)) @ codec["encoder.weight"].T + codec["encoder.bias"]
        visible[patches, patches] = True
    for number in range(model.config.transformer.depth):
        block = under(f"blocks.{number}.")
        x = x + attention(block, rms_norm(x, block["attention_norm.weight"], EPS), positions, visible, qk_norm)
        x = x + feed_forward(block, rms_norm(x, block["mlp_norm.weight"], EPS))
    hidden = rms_norm(x, weights["norm.weight"], EPS)
    decoders = [(under(f"codecs.{modality}.decoder."), first, x_t) for modality, (first, x_t, _) in enumerate(images)]
    predictions = [hidden[first : first + len(x_t)] @ d["weight"].T + d["bias"] for d, first, x_t in decoders]
    return hidden @ weights["head.weight"].T, *predictions


@pytest.mark.parametrize(("scheme", "qk_norm"), [("sequential", False), ("shared", True), ("axial", False)])
def test_the_model_computes_the_published_equations_and_their_gradients(scheme, qk_norm):
    """On one document with a grid of patches of modality 1, and a row of them of modality 0."""
    settings = TRANSFORMER | {"norm_eps": EPS, "rope_theta": THETA, "qk_norm": qk_norm}
    model = small_model(num_text_tokens=16, dim_latent=(4, 6), positions=scheme, transformer=settings).double()
    generator = seeded(1)
    document = [ids(3, 1), (1, torch.randn(2, 3, 6, generator=generator)), ids(5), torch.randn(5, 4), ids(9)]
    batch = pack_documents([document], model.config, Randomness(generator, prob_uncond=0))
    x_t = [torch.randn(m.latents.shape, generator=generator, dtype=torch.float64) for m in batch.modalities]
    images = [(first, x, m.timesteps.item()) for first, x, m in zip((13, 4), x_t, batch.modalities, strict=True)]
    positions = [pair if scheme == "axial" else [pair] * 2 for pair in batch.positions.tolist()]
    hidden, encoded = model.hidden(batch, x_t)
    got = (model.head(hidden), *(model.prediction(hidden, batch, m, encoded[m]) for m in (0, 1)))
    expected = reference_forward(model, batch.tokens, positions, images, qk_norm)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)  # rotary table and timesteps are fp32
    slopes = [torch.autograd.grad(sum(x.square().mean() for x in xs), [*model.parameters()]) for xs in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


def test_weights_start_with_their_standard_deviations():
    torch.manual_seed(0)
    depth = 8
    model = Transfusion(num_text_tokens=500, dim_latent=64, transformer={"dim": 256, "depth": depth})
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            expected = float("norm" in name)  # norms start at 1, biases at 0
            assert torch.equal(weight, torch.full_like(weight, expected)), name
            continue
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        expected = INIT_STD / (2 * depth) ** 0.5 if residual else INIT_STD
        if name.endswith(("head.weight", "decoder.weight")):
            expected = 1 / 256
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(weight.mean().item()) < 0.1 * expected, name


@pytest.mark.parametrize(("process", "tied"), [("ddpm", False), ("ddpm", True), ("flow", False)])
@pytest.mark.parametrize("width", [64, 4096])
def test_the_first_losses_are_those_of_a_model_that_knows_nothing(width, process, tied):
    """ln V, and the mean square of the target: 1 for noise, 2 for the velocity between normal latents and noise."""
    torch.manual_seed(0)
    settings = {"dim": width, "depth": 1, "heads": 2, "ffn_dim": 64}
    sizes = {"num_text_tokens": 996, "dim_latent": 16, "transformer": settings}
    model = Transfusion(diffusion={"process": process}, tie_embeddings=tied, **sizes)
    batch = pack_documents([[torch.randint(0, 996, (200,)), torch.randn(400, 16)]], model.config)
    with torch.no_grad():
        losses = model(batch)
    assert losses.text.item() == pytest.approx(math.log(1000), abs=0.02)
    assert losses.diffusion.item() == pytest.approx({"ddpm": 1.0, "flow": 2.0}[process], abs=0.08)
