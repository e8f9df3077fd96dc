"""The model: what influences what, what the loss is made of, and the three ways to call it."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_fast import ModelConfig, Transfusion
from transfusion_fast.errors import InputError
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.sequence import TEXT, Segments, build_batch, lay_out

SMALL = {
    "num_text_tokens": 16,
    "dim_latent": 4,
    "transformer": {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "qk_norm": True},
}


def make(**settings):
    """A small model whose every weight matters: nothing is near zero, as so much is after the usual initialisation."""
    torch.manual_seed(0)
    model = Transfusion(**SMALL | settings)
    for p in model.parameters():
        p.data = torch.randn(p.shape) * p.shape[1] ** -0.5 if p.ndim == 2 else p.data + 0.1 * torch.randn(p.shape)
    return model


@dataclass
class Picture:
    """An image with the noise and the timestep that it is trained with."""

    latents: Tensor  # [rows, columns, C]
    noise: Tensor
    timestep: float
    modality: int = 0


def picture(rows=1, columns=3, seed=0, timestep=300.0, modality=0, width=4):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, rows, columns, width, generator=generator)
    return Picture(latents, noise, timestep, modality)


def pack(model, documents, total_length=None, delimited=None):
    """Documents of texts (lists of ids) and pictures as one batch."""
    segments = [(number, piece) for number, document in enumerate(documents) for piece in document]
    pictures = [piece for _, piece in segments if isinstance(piece, Picture)]
    rows = [
        (number, TEXT, len(piece), 0, 0)
        if isinstance(piece, list)
        else (number, 1 + piece.modality, piece.latents[..., 0].numel(), *piece.latents.shape[:2])
        for number, piece in segments
    ]
    delimited = np.array([True] * len(documents) if delimited is None else delimited)
    ids = np.array([i for _, piece in segments if isinstance(piece, list) for i in piece], dtype=np.int64)
    sequence = lay_out(Segments(*np.array(rows).T, delimited=delimited), ids, model.vocabulary)
    images = []
    for modality, width in enumerate(model.config.dim_latent):
        own = [p for p in pictures if p.modality == modality]
        of_modality = [[p.latents for p in own], [p.noise for p in own]]
        latents, noise = (torch.cat([torch.zeros(0, width), *(x.reshape(-1, width) for x in xs)]) for xs in of_modality)
        images.append((latents, noise))
    timesteps = torch.tensor([p.timestep for p in pictures])
    return build_batch(sequence, images, timesteps, model.config.positions, total_length)


def noisy(model, batch):
    """x_t of each modality, as leaves."""
    return [
        model.objective.add_noise(m.latents, m.noise, m.timesteps.repeat_interleave(m.image_offsets.diff())[:, None])
        .clone()
        .requires_grad_()
        for m in batch.modalities
    ]


def hidden_of(model, *documents, **settings):
    batch = pack(model, documents, **settings)
    return model.hidden(batch, noisy(model, batch))


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], **tolerance["fp32"], msg=lambda text, name=name: f"{name}: {text}"
        )


def test_text_before_an_image_is_exactly_as_without_its_contents():
    """<bos> 1 2 3 <boi> are the first five positions."""
    model = make()
    one = hidden_of(model, [[1, 2, 3], picture(seed=1), [4]])
    other = hidden_of(model, [[1, 2, 3], picture(seed=2, timestep=900.0), [4]])
    assert torch.equal(one[:5], other[:5])
    assert not torch.isclose(one[5:], other[5:]).all(dim=-1).any(), "everything from the image on depends on it"


def test_later_text_changes_nothing_before_it():
    model = make()
    one = hidden_of(model, [[1, 2], picture(), [3, 4, 5]])
    other = hidden_of(model, [[1, 2], picture(), [3, 9, 5]])
    changed = 4 + 3 + 2  # <bos> 1 2 <boi>, the patches, <eoi> 3
    assert torch.equal(one[:changed], other[:changed])
    assert not torch.isclose(one[changed:], other[changed:]).all(dim=-1).any()


@pytest.mark.parametrize("positions", ["sequential", "shared", "axial"])
def test_the_last_patch_of_an_image_changes_every_patch_of_it(positions):
    model = make(positions=positions)
    whole, changed = picture(2, 3), picture(2, 3)
    changed.latents[-1, -1] += 1
    one, other = hidden_of(model, [[1, 2], whole, [3]]), hidden_of(model, [[1, 2], changed, [3]])
    assert torch.equal(one[:4], other[:4])
    assert not torch.isclose(one[4:], other[4:]).all(dim=-1).any()


def test_every_modality_goes_through_its_own_codec():
    model = make(dim_latent=(4, 6))
    document = [[1], picture(), [2], picture(modality=1, width=6)]
    one = hidden_of(model, document)
    with torch.no_grad():
        model.codecs[1].encoder.weight.mul_(2)
    other = hidden_of(model, document)
    second = 2 + 1 + 3 + 1 + 1 + 1  # <bos> 1, <boi>, the first image, <eoi> 2 <boi>
    assert torch.equal(one[:second], other[:second])
    assert not torch.isclose(one[second:], other[second:]).all(dim=-1).any()


def test_patches_of_an_image_with_one_shared_position_are_an_unordered_set(tolerance):
    """A patch differs from the other patches of its image only by its values and its position."""
    mirrored = picture(1, 4)
    mirrored = Picture(mirrored.latents.flip(1), mirrored.noise.flip(1), mirrored.timestep)
    shared, sequential = (
        [hidden_of(make(positions=scheme), [[1], image, [2]]) for image in (picture(1, 4), mirrored)]
        for scheme in ("shared", "sequential")
    )
    torch.testing.assert_close(shared[0][3:7].flip(0), shared[1][3:7], **tolerance["fp32"])
    torch.testing.assert_close(shared[0][7:], shared[1][7:], **tolerance["fp32"])
    assert not torch.isclose(sequential[0][3:7].flip(0), sequential[1][3:7]).all(dim=-1).any()


PACK = [
    [[1, 2, 3], picture(2, 2, seed=1), [4]],
    [picture(1, 5, seed=2, timestep=40.0), [5, 6, 7, 8]],
    [picture(3, 1, seed=3, timestep=990.0)],
    [[9, 10]],
    [[11], picture(1, 1, seed=4), picture(2, 3, seed=5, timestep=5.0), [12]],
]
DELIMITED = [True, True, False, True, True]


@pytest.mark.parametrize("number", range(len(PACK)))
@pytest.mark.parametrize("positions", ["sequential", "axial"])
def test_a_document_gives_the_same_outputs_and_gradients_in_a_full_pack_as_alone(number, positions, tolerance):
    """Its logits, its predictions, and the gradients that a loss on them has."""
    model = make(positions=positions)

    def outputs(batch, document, image_count, first_image):
        hidden = model.hidden(batch, noisy(model, batch))
        start, end = batch.layout.document_offsets[document : document + 2].tolist()
        offsets = batch.modalities[0].image_offsets
        prediction = model.prediction(hidden, batch, 0)
        return model.head(hidden[start:end]), prediction[offsets[first_image] : offsets[first_image + image_count]]

    images = [sum(isinstance(piece, Picture) for piece in document) for document in PACK]
    full = outputs(pack(model, PACK, 80, DELIMITED), number, images[number], sum(images[:number]))
    alone = outputs(pack(model, [PACK[number]], None, [DELIMITED[number]]), 0, images[number], 0)
    for got, expected in zip(full, alone, strict=True):
        torch.testing.assert_close(got, expected, **tolerance["fp32"])
    got, expected = (gradients(model, a.logsumexp(-1).mean() + b.square().mean(-1).sum()) for a, b in (full, alone))
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("number", range(len(PACK)))
def test_no_gradient_crosses_from_one_document_to_another(number):
    model = make()
    batch = pack(model, PACK, 80, DELIMITED)
    embedded = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    x_t = noisy(model, batch)
    hidden = model.hidden(batch, x_t)
    start, end = batch.layout.document_offsets[number : number + 2].tolist()
    into_tokens, into_patches = torch.autograd.grad(hidden[start:end].square().sum(), [embedded[0], x_t[0]])
    places = torch.arange(80)
    inside = (places >= start) & (places < end)
    images = batch.modalities[0]
    is_patch = torch.zeros(80, dtype=torch.bool).index_fill(0, images.sequence_index, True)
    assert (into_tokens[~inside] == 0).all()
    assert (into_tokens[inside & ~is_patch] != 0).any(dim=-1).all(), "every token of the document has its part"
    assert (into_tokens[is_patch] == 0).all(), "a patch stands in place of a token"
    of_document = inside[images.sequence_index]
    assert (into_patches[~of_document] == 0).all()
    assert (into_patches[of_document] != 0).any(dim=-1).all()


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_an_exact_prediction_has_no_diffusion_loss(objective, monkeypatch):
    model = make(objective=objective, dim_latent=(4, 6))
    batch = pack(model, [*PACK, [picture(modality=1, width=6)]])
    targets = [m.noise if objective == "ddpm" else m.noise - m.latents for m in batch.modalities]
    monkeypatch.setattr(model, "prediction", lambda hidden, batch, modality: targets[modality])
    losses = model(batch)
    assert losses.diffusion.item() == 0.0
    assert losses.total.item() == losses.text.item() > 0


@pytest.mark.parametrize("width", [4, 192])
def test_a_constant_error_of_one_is_a_diffusion_loss_of_one_at_any_width(width, monkeypatch):
    model = make(dim_latent=width, diffusion_weight=2.0)
    batch = pack(model, [[picture(1, 1, width=width), [1], picture(3, 5, width=width)]])
    monkeypatch.setattr(model, "prediction", lambda hidden, batch, modality: batch.modalities[modality].noise + 1)
    losses = model(batch)
    assert losses.diffusion.item() == pytest.approx(1.0, rel=1e-5)
    assert losses.total.item() == pytest.approx(losses.text.item() + 2.0, rel=1e-5)


def test_every_image_has_the_same_weight_at_any_number_of_patches(monkeypatch):
    """Errors of 1 in an image of 1 patch and 3 in one of 9, of another modality: squared 1 and 9, 5 on the mean."""
    model = make(dim_latent=(4, 6))
    batch = pack(model, [[picture(1, 1), [1], picture(3, 3, modality=1, width=6)]])
    off = (1.0, 3.0)
    monkeypatch.setattr(model, "prediction", lambda hidden, batch, m: batch.modalities[m].noise + off[m])
    assert model(batch).diffusion.item() == pytest.approx(5.0, rel=1e-5)


def test_the_text_loss_is_the_mean_over_supervised_tokens(tolerance):
    model = make()
    batch = pack(model, PACK, 80, DELIMITED)
    logits = model.head(model.hidden(batch, noisy(model, batch)))
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=-100)
    losses = model(batch)
    torch.testing.assert_close(losses.text, expected, **tolerance["fp32"])
    assert losses.counts == Counts(tokens=int((batch.labels != -100).sum()), images=5)


def test_padding_changes_no_loss_and_no_gradient(tolerance):
    model = make()
    plain, padded = (model(pack(model, PACK, length, DELIMITED)) for length in (None, 90))
    assert padded.counts == plain.counts
    torch.testing.assert_close(padded.total, plain.total, **tolerance["fp32"])
    assert_same(gradients(model, padded.total), gradients(model, plain.total), tolerance)


def test_losses_and_gradients_of_unequal_micro_batches_add_up(tolerance):
    """A micro-batch without an image among them."""
    model = make(dim_latent=(4, 6))
    documents = [*PACK, [[3], picture(modality=1, width=6)]]
    delimited = [*DELIMITED, True]
    whole = model(pack(model, documents, delimited=delimited))
    parts = [
        model(pack(model, documents[cut], delimited=delimited[cut]), counts=whole.counts)
        for cut in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6))
    ]
    for name in ("text", "diffusion", "total"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name), **tolerance["fp32"])
    summed = gradients(model, sum(part.total for part in parts))
    assert_same(summed, gradients(model, whole.total), tolerance)


@pytest.mark.parametrize("documents", [[[[1, 2, 3]]], [[picture()]]], ids=["text only", "images only"])
@pytest.mark.parametrize("delimited", [True, False])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(documents, delimited):
    model = make(dim_latent=(4, 6))
    model(pack(model, documents, delimited=[delimited])).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_training_on_one_batch_overfits_it(objective):
    torch.manual_seed(0)
    model = Transfusion(**SMALL | {"objective": objective})
    batch = pack(model, PACK[:2])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = model(batch)
    for _ in range(150):
        optimizer.zero_grad()
        losses = model(batch)
        losses.total.backward()
        optimizer.step()
    assert losses.text < first.text / 10
    assert losses.diffusion < first.diffusion / 10


@pytest.mark.parametrize("setting", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(setting):
    plain, thrifty = make(), make(activation_checkpointing=setting)
    losses = [model(pack(model, PACK, 80, DELIMITED)).total for model in (plain, thrifty)]
    assert torch.equal(*losses)
    for one, other in zip(
        *(gradients(m, x).values() for m, x in zip((plain, thrifty), losses, strict=True)), strict=True
    ):
        assert torch.equal(one, other)


class Calls(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("setting", "blocks", "attentions"), [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)])
@pytest.mark.parametrize(
    ("backend", "attention"),
    [
        ("torch", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("triton", "transfusion_fast::hybrid_attention"),
    ],
)
def test_selective_checkpointing_runs_the_blocks_again_but_not_their_attention(
    setting, blocks, attentions, backend, attention
):
    transformer = SMALL["transformer"] | {"heads": 2, "depth": 1}
    model = make(activation_checkpointing=setting, transformer=transformer, backend=backend)
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *call: runs.append(1))
    with Calls() as calls:
        model(pack(model, PACK[:1])).total.backward()
    assert len(runs) == blocks
    assert calls.count[attention] == attentions


def test_tied_embeddings_are_one_parameter_with_both_gradients():
    tied, untied = make(tie_embeddings=True), make()
    assert tied.head.weight is tied.embedding.weight
    names = dict(tied.named_parameters()).keys()
    assert names == dict(untied.named_parameters()).keys() - {"head.weight"}
    tied(pack(tied, [[[1]]])).total.backward()
    unused = 7  # no position holds it: its gradient is that of the head's softmax
    assert (tied.embedding.weight.grad[unused] != 0).all()
    untied(pack(untied, [[[1]]])).total.backward()
    assert (untied.embedding.weight.grad[unused] == 0).all()


@pytest.mark.parametrize(
    ("preset", "billions"), [("0.16b", 0.16), ("0.37b", 0.37), ("0.76b", 0.76), ("1.4b", 1.4), ("7b", 7.0)]
)
def test_a_preset_has_the_papers_number_of_parameters(preset, billions):
    """With a vocabulary of 32 000 and 2 x 2 patches of 8 channels, and 0.5 % of them in the codec at most."""
    with torch.device("meta"):
        model = Transfusion(num_text_tokens=32_000, dim_latent=32, preset=preset)
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(billions, rel=0.05)
    assert sum(p.numel() for p in model.codecs.parameters()) < 0.005 * total


def test_a_model_is_given_a_config_or_settings():
    config = ModelConfig(**SMALL)
    assert Transfusion(config).config == Transfusion(**SMALL).config
    with pytest.raises(ValueError, match=r"not both; got codec"):
        Transfusion(config, codec="linear")
    with pytest.raises(InputError, match="unknown key 'num_txt_tokens'; did you mean 'num_text_tokens'"):
        Transfusion(num_txt_tokens=3)
