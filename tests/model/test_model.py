"""The model on packs of several documents: the loss, its gradients, and activation checkpointing.

test_architecture.py holds what the model computes for one document.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from small_models import laid_out, seeded, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_fast import ModelConfig, Transfusion
from transfusion_fast.config import PRESETS
from transfusion_fast.model import ops
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import build_batch

SMALL = {
    "num_text_tokens": 16,
    "dim_latent": 4,
    "transformer": {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "qk_norm": True},
}


def make(**settings):
    return small_model(**SMALL | settings)


@dataclass
class Picture:
    """An image with the noise and the timestep that it is trained with."""

    latents: Tensor  # [rows, columns, C]
    noise: Tensor
    timestep: float
    modality: int = 0


def picture(rows=1, columns=3, seed=0, timestep=300.0, modality=0, width=4):
    latents, noise = torch.randn(2, rows, columns, width, generator=seeded(seed))
    return Picture(latents, noise, timestep, modality)


def pack(model, documents, total_length=None):
    """Return documents of texts (lists of ids) and pictures as one batch."""
    grids = [[p if isinstance(p, list) else (p.modality, *p.latents.shape[:2]) for p in d] for d in documents]
    pictures = [piece for document in documents for piece in document if isinstance(piece, Picture)]
    images = []
    for modality, width in enumerate(model.config.dim_latent):
        own = [(p.latents, p.noise) for p in pictures if p.modality == modality]
        tensors = zip(*own, strict=True) if own else ([], [])
        images.append([torch.cat([torch.zeros(0, width), *(x.reshape(-1, width) for x in xs)]) for xs in tensors])
    sequence, timesteps = laid_out(grids, model.vocabulary), torch.tensor([p.timestep for p in pictures])
    return build_batch(sequence, images, timesteps, model.config.modalities, total_length)


def hidden_of(model, batch):
    timesteps = [m.timesteps.repeat_interleave(m.image_offsets.diff())[:, None] for m in batch.modalities]
    pairs = zip(batch.modalities, timesteps, strict=True)
    return model.hidden(batch, [model.diffusion.add_noise(m.latents, m.noise, t) for m, t in pairs])


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


PACK = [
    [[1, 2, 3], picture(2, 2, seed=1), [4]],
    [picture(1, 5, seed=2, timestep=40.0), [5, 6, 7, 8]],
    [picture(3, 1, seed=3, timestep=990.0)],
    [[9, 10]],
    [[11], picture(1, 1, seed=4), picture(2, 3, seed=5, timestep=5.0), [12]],
]


@pytest.mark.parametrize("number", range(len(PACK)))
@pytest.mark.parametrize("positions", ["sequential", "axial"])
def test_a_document_gives_the_same_outputs_and_gradients_in_a_full_pack_as_alone(number, positions, tolerance):
    """Its logits, its predictions, and the gradients that a loss on them has."""
    model = make(positions=positions)

    def outputs(batch, document, image_count, first_image):
        hidden, [encoded] = hidden_of(model, batch)
        start, end = batch.layout.document_offsets[document : document + 2].tolist()
        offsets = batch.modalities[0].image_offsets
        prediction = model.prediction(hidden, batch, 0, encoded)
        return model.head(hidden[start:end]), prediction[offsets[first_image] : offsets[first_image + image_count]]

    images = [sum(isinstance(piece, Picture) for piece in document) for document in PACK]
    full = outputs(pack(model, PACK, 80), number, images[number], sum(images[:number]))
    alone = outputs(pack(model, [PACK[number]]), 0, images[number], 0)
    torch.testing.assert_close(full, alone, **tolerance["fp32"])
    got, expected = (gradients(model, a.logsumexp(-1).mean() + b.square().mean(-1).sum()) for a, b in (full, alone))
    torch.testing.assert_close(got, expected, **tolerance["fp32"])


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_gradients_under_autocast_are_near_those_in_single_precision(backend):
    """With a vocabulary whose logits are computed in chunks."""
    model = make(backend=backend, num_text_tokens=5000, transformer=SMALL["transformer"] | {"heads": 2, "kv_heads": 1})
    batch = pack(model, PACK, 80)
    expected = gradients(model, model(batch).total)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch).total
    for name, got in gradients(model, loss).items():
        assert got.dtype == torch.float32
        assert (got - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_the_diffusion_loss_is_the_mean_squared_error_of_an_image_whatever_its_size(process, monkeypatch):
    """Errors of 1 in an image of 1 x 4 values and of 3 in one of 9 x 192: squared 1 and 9, 5 on the mean."""
    model = make(diffusion={"process": process}, dim_latent=(4, 192), diffusion_weight=2.0)
    batch = pack(model, [[picture(1, 1), [1], picture(3, 3, modality=1, width=192)]])
    targets = [m.noise if process == "ddpm" else m.noise - m.latents for m in batch.modalities]
    monkeypatch.setattr(model, "prediction", lambda hidden, batch, m, encoded: targets[m] + (1.0, 3.0)[m])
    losses = model(batch)
    assert losses.diffusion.item() == pytest.approx(5.0, rel=1e-5)
    assert losses.total.item() == pytest.approx(losses.text.item() + 10.0, rel=1e-5)


def test_the_text_loss_is_the_mean_over_supervised_tokens(tolerance):
    model = make()
    batch = pack(model, PACK, 80)
    logits = model.head(hidden_of(model, batch)[0])
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=-100)
    losses = model(batch)
    torch.testing.assert_close(losses.text, expected, **tolerance["fp32"])
    assert losses.counts == Counts(tokens=int((batch.labels != -100).sum()), images=5)


def test_losses_and_gradients_of_unequal_micro_batches_add_up(tolerance):
    """A micro-batch without an image is among them."""
    model = make(dim_latent=(4, 6))
    documents = [*PACK, [[3], picture(modality=1, width=6)]]
    whole = model(pack(model, documents))
    parts = [
        model(pack(model, documents[cut]), counts=whole.counts)
        for cut in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6))
    ]
    sums = [sum(losses) for losses in zip(*(part[:3] for part in parts), strict=True)]
    torch.testing.assert_close(sums, list(whole[:3]), **tolerance["fp32"])
    torch.testing.assert_close(gradients(model, sums[2]), gradients(model, whole.total), **tolerance["fp32"])


@pytest.mark.parametrize("documents", [[[[1, 2, 3]]], [[picture()]]], ids=["text only", "images only"])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(documents):
    model = make(dim_latent=(4, 6))
    model(pack(model, documents)).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


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
    [("torch", "transfusion_fast::tiled_attention"), ("triton", "transfusion_fast::rotary_attention")],
)
def test_checkpointing_runs_blocks_again_selective_not_their_attention_and_changes_no_bit(
    setting, blocks, attentions, backend, attention
):
    small = {"backend": backend, "transformer": SMALL["transformer"] | {"heads": 2, "depth": 1}}
    plain, model = make(**small), make(activation_checkpointing=setting, **small)
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *call: runs.append(1))
    with Calls() as calls:
        loss = model(pack(model, PACK[:1])).total
        got = gradients(model, loss)
    assert len(runs) == blocks
    assert calls.count[attention] == attentions
    expected = plain(pack(plain, PACK[:1])).total
    torch.testing.assert_close((loss, got), (expected, gradients(plain, expected)), rtol=0, atol=0)


def test_every_op_of_the_model_runs_on_its_backend(monkeypatch):
    """Each op is named "reference", and that backend's table records what it runs."""
    ran, table = set(), ops.IMPLEMENTATIONS["reference"]
    for op, function in table.items():
        monkeypatch.setitem(table, op, lambda *args, op=op, function=function: (ran.add(op), function(*args))[1])
    model = make(backend="reference")
    model(pack(model, PACK))
    assert ran == set(table)


def test_tied_embeddings_are_one_parameter_with_both_gradients():
    tied, untied = make(tie_embeddings=True), make()
    assert tied.head.weight is tied.embedding.weight
    assert dict(untied.named_parameters()).keys() - dict(tied.named_parameters()).keys() == {"head.weight"}
    unused = 7  # no position holds it: its gradient is that of the head's softmax
    for model in (tied, untied):
        model(pack(model, [[[1]]])).total.backward()
        assert (model.embedding.weight.grad[unused] != 0).all() == (model is tied)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_papers_number_of_parameters(preset):
    """With a vocabulary of 32 000 and 2 x 2 patches of 8 channels, and 0.5 % of them in the codec at most."""
    with torch.device("meta"):
        model = Transfusion(num_text_tokens=32_000, dim_latent=32, preset=preset)
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(float(preset.removesuffix("b")), rel=0.05)
    assert sum(p.numel() for p in model.codecs.parameters()) < 0.005 * total


def test_a_model_is_given_a_config_or_settings():
    config = ModelConfig(**SMALL)
    assert Transfusion(config).config == Transfusion(**SMALL).config
    with pytest.raises(ValueError, match=r"not both, got codec"):
        Transfusion(config, codec="linear")
