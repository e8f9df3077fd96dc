"""The architecture against a second implementation of the published equations, in fp64 and with loops.

It shares no code with the model: block order, norms and their eps, the tensors that are rotated, the layout of fused
projections, the timestep embedding and the heads each have one right value here.
"""

import math

import pytest
import torch

from transfusion_fast import Transfusion
from transfusion_fast.model.inputs import pack_documents
from transfusion_fast.model.layers import INIT_STD

HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 4, 2, 8, 0.03, 500.0


def make(**transformer):
    torch.manual_seed(0)
    settings = {"dim": 32, "depth": 3, "heads": HEADS, "kv_heads": KV_HEADS, "ffn_dim": 48}
    settings |= {"norm_eps": EPS, "rope_theta": THETA, **transformer}
    model = Transfusion(num_text_tokens=16, dim_latent=4, transformer=settings)
    for parameter in model.parameters():  # no norm weight is 1 and no bias 0, so that each matters
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.double()


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, position):
    """Rotate the pairs (i, i + D/2) of one vector [D] by position * theta^(-2i/D) (arXiv 2104.09864)."""
    half, out = len(x) // 2, torch.empty_like(x)
    for i in range(half):
        angle = position * THETA ** (-2 * i / len(x))
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


def reference_forward(model, tokens, image, x_t, t, qk_norm=False):
    """Return logits [T, V] and the prediction [P, C] for one document whose patches are the positions `image`."""
    weights = dict(model.named_parameters())

    def under(prefix):
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    codec = under("codecs.0.")
    x = weights["embedding.weight"][tokens].clone()
    x[image] = (x_t + timestep_embedding(codec, t)) @ codec["encoder.weight"].T + codec["encoder.bias"]
    rows = torch.arange(len(tokens))
    in_image = (rows >= image.start) & (rows < image.stop)
    visible = (rows[:, None] >= rows[None, :]) | (in_image[:, None] & in_image[None, :])
    for number in range(model.config.transformer.depth):
        block = under(f"blocks.{number}.")
        x = x + attention(block, rms_norm(x, block["attention_norm.weight"], EPS), rows.tolist(), visible, qk_norm)
        x = x + feed_forward(block, rms_norm(x, block["mlp_norm.weight"], EPS))
    hidden = rms_norm(x, weights["norm.weight"], EPS)
    return hidden @ weights["head.weight"].T, hidden[image] @ codec["decoder.weight"].T + codec["decoder.bias"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_model_computes_the_published_equations(qk_norm):
    model = make(qk_norm=qk_norm)
    generator = torch.Generator().manual_seed(1)
    document = [torch.tensor([3, 1, 4]), torch.randn(5, 4, generator=generator), torch.tensor([1, 5])]
    batch = pack_documents([document], model.config, generator)
    [images] = batch.modalities
    x_t = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        hidden = model.hidden(batch, [x_t])
        logits, prediction = model.head(hidden), model.prediction(hidden, batch, 0)
        expected = reference_forward(model, batch.tokens, slice(5, 10), x_t, images.timesteps.item(), qk_norm)
    torch.testing.assert_close(logits, expected[0], rtol=1e-3, atol=1e-4)  # rotary table and timesteps are fp32
    torch.testing.assert_close(prediction, expected[1], rtol=1e-3, atol=1e-4)


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
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(weight.mean().item()) < 0.1 * expected, name
