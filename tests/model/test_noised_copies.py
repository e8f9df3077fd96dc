"""Images that are a clean context for what follows, trained by noised copies behind their document."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import laid_out, seeded, small_model
from torch import Tensor

from transfusion_fast import ModelConfig, Transfusion
from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.inputs import Randomness, flat_latents, pack_documents, place_images
from transfusion_fast.model.packed_batch import CLEAN_TIMESTEP, PackedBatch, build_batch
from transfusion_fast.model.sequence import TokenSequence

WIDTHS = (4, 3)
UNET = ModalityConfig(dim_latent=4, codec="unet", patch_size=2, positions="axial")
MODALITIES = (UNET, ModalityConfig(dim_latent=3, positions="axial"))
COPIES = 3
DOCUMENTS = [[[1, 2], (0, 2, 2), [3], (1, 1, 3), (0, 1, 2), [4, 5]], [[6]], [(0, 1, 2), [7]]]
TRANSFORMER = {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48}


@pytest.fixture(scope="module")
def model() -> Transfusion:
    return small_model(num_text_tokens=16, modalities=MODALITIES, transformer=TRANSFORMER)


def tensors(sequence: TokenSequence) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return clean latents and the noise of each copy, for each modality, and timesteps [K, N]."""
    patches = [int(sequence.length[sequence.modality == m].sum()) for m in range(len(WIDTHS))]
    drawn = [torch.randn(1 + COPIES, n, width, generator=seeded(n)) for n, width in zip(patches, WIDTHS, strict=True)]
    timesteps = torch.rand(COPIES, len(sequence.start), generator=seeded(1)) * 999 + 1
    return [(x[0], x[1:]) for x in drawn], timesteps


def batch_of(model: Transfusion, documents: Sequence[Sequence[Any]], **arguments: Any) -> PackedBatch:
    sequence = laid_out(documents, model.vocabulary)
    return build_batch(sequence, *tensors(sequence), MODALITIES, **arguments)


def test_copies_stand_behind_their_document_in_the_order_of_its_images(model):
    sequence = laid_out([[[5], (0, 1, 2), (1, 1, 1)], [(0, 1, 1), [6]]], model.vocabulary)
    images, timesteps = tensors(sequence)
    batch = build_batch(sequence, images, timesteps, ModelConfig(dim_latent=WIDTHS).modalities, total_length=36)
    bos, eos, boi, eoi, boi_1, eoi_1 = range(16, 22)
    context = [[bos, 5, boi, 0, 0, eoi, boi_1, 0, eoi_1, eos], [bos, boi, 0, eoi, 6, eos]]
    assert batch.tokens.tolist() == [*context[0], *[0] * 9, *context[1], *[0] * 3, *[0] * 8]
    assert batch.positions.tolist() == [*range(10), *[3, 4] * 3, *[7] * 3, *range(6), *[2] * 3, *[0] * 8]
    assert batch.layout.document_offsets.tolist() == [0, 19, 28]
    assert batch.layout.image_spans.tolist() == [[3, 2], [7, 1], [21, 1]]
    places = [[10, 2, 3], [12, 2, 3], [14, 2, 3], [16, 1, 7], [17, 1, 7], [18, 1, 7]]
    assert batch.layout.noised_copies.tolist() == [*places, [25, 1, 21], [26, 1, 21], [27, 1, 21]]
    assert batch.supervised.tolist() == [0, 1, 5, 8, 19, 22, 23]
    assert (batch.num_tokens, batch.num_images) == (28, 9)

    first, clean = batch.modalities[0], images[0][0]
    assert first.sequence_index.tolist() == [*range(10, 16), 25, 26, 27, 3, 4, 21]
    assert first.image_offsets.tolist() == [0, 2, 4, 6, 7, 8, 9, 11, 12]
    assert (first.num_trained, first.trained_patches) == (6, 9)
    assert torch.equal(first.timesteps, torch.cat([timesteps[:, 0], timesteps[:, 2], torch.full((2,), CLEAN_TIMESTEP)]))
    assert torch.equal(first.latents, torch.cat([*[clean[:2]] * 3, *[clean[2:]] * 3, clean]))
    assert torch.equal(first.noise, torch.cat([*images[0][1][:, :2], *images[0][1][:, 2:]]))


def hidden_of(model: Transfusion, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return model.hidden(batch, [model.noisy(images) for images in batch.modalities])[0]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_else_sees_a_copy_and_what_follows_sees_the_clean_image(backend):
    settings = {"num_text_tokens": 16, "dim_latent": WIDTHS, "transformer": TRANSFORMER}
    model = small_model(**settings, backend=backend)
    batch = batch_of(model, DOCUMENTS)
    images = batch.modalities[0]
    usual = hidden_of(model, batch)

    def changed(latents: Tensor, noise: Tensor) -> set[int]:
        other = replace(images, latents=latents, noise=noise)
        difference = hidden_of(model, replace(batch, modalities=(other, batch.modalities[1]))) - usual
        return set(difference.abs().amax(1).nonzero()[:, 0].tolist())

    start, length, _ = batch.layout.noised_copies[1].tolist()  # the second copy of the first image
    noise = images.noise.clone()
    noise[length : 2 * length] += 1
    assert changed(images.latents, noise) == set(range(start, start + length))

    latents = images.latents.clone()
    latents[images.trained_patches : images.trained_patches + length] += 1  # the clean first image
    end = int(batch.layout.document_offsets[1])
    copies_of_it = set(range(start - length, start + 2 * length))
    first = int(batch.layout.image_spans[0, 0])
    assert changed(latents, images.noise) == set(range(first, end)) - copies_of_it


def test_copies_equal_as_many_documents_that_end_in_a_noised_image(model, tolerance):
    """Compare predictions, hidden states of the context, and gradients of a function of both, as sampling lays out."""
    sequence = laid_out(DOCUMENTS, model.vocabulary)
    images, timesteps = tensors(sequence)
    batch = build_batch(sequence, images, timesteps, MODALITIES)
    hidden, encoded = model.hidden(batch, [model.noisy(m) for m in batch.modalities])
    predictions = [model.prediction(hidden, batch, m, encoded[m]) for m in range(len(WIDTHS))]
    in_context = torch.ones(len(hidden), dtype=torch.bool)
    for start, length, _ in batch.layout.noised_copies.tolist():
        in_context[start : start + length] = False

    grids = sequence.shape[:, 1:].tolist()
    used, contexts, alone = [0, 0], [], [[] for _ in WIDTHS]
    clean: list[tuple[int, int, Tensor]] = []  # offset, modality and latents of each image
    noises = []
    for offset, modality, (rows, columns) in zip(sequence.start, sequence.modality, grids, strict=True):
        own = slice(used[modality], used[modality] + rows * columns)
        used[modality] = own.stop
        clean.append((int(offset), int(modality), images[modality][0][own].unflatten(0, (rows, columns))))
        noises.append(images[modality][1][:, own].unflatten(1, (rows, columns)))
    end = 0
    for length in sequence.document_lengths.tolist():
        start, end = end, end + length
        own = [i for i, image in enumerate(clean) if start <= image[0] < end]
        contexts.append(_run(model, sequence, start, end, [clean[i] for i in own], CLEAN_TIMESTEP)[0])
        for i in own:
            offset, modality, x = clean[i]
            for noise, t in zip(noises[i], timesteps[:, i], strict=True):
                seen = [clean[j] for j in own if j < i]
                noisy = (offset, modality, model.diffusion.add_noise(x, noise, t))
                stop = offset + x[..., 0].numel()
                alone[modality].append(_run(model, sequence, start, stop, [*seen, noisy], float(t))[1])
    torch.testing.assert_close(predictions, [torch.cat(x) for x in alone], **tolerance["fp32"])
    torch.testing.assert_close(hidden[in_context], torch.cat(contexts), **tolerance["fp32"])
    weights = [torch.randn(x.shape, generator=seeded(9)) for x in (hidden[in_context], *predictions)]
    got = sum((x * w).sum() for x, w in zip((hidden[in_context], *predictions), weights, strict=True))
    expected = [torch.cat(contexts), *(torch.cat(x) for x in alone)]
    expected = sum((x * w).sum() for x, w in zip(expected, weights, strict=True))
    parameters = [p for name, p in model.named_parameters() if name != "head.weight"]
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (got, expected)), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def _run(
    model: Transfusion, sequence: TokenSequence, start: int, end: int, images: list[tuple[int, int, Tensor]], t: float
) -> tuple[Tensor, Tensor]:
    """Run the tokens [start, end) as a document, its last image at timestep t and the others clean; return the hidden
    states and the prediction of the last image."""
    placed = [(offset - start, modality, x) for offset, modality, x in images]
    document = place_images(sequence.tokens[start:end], np.array([end - start]), placed)
    latents = flat_latents([(modality, x) for _, modality, x in placed], WIDTHS)
    timesteps = torch.full((len(images),), CLEAN_TIMESTEP)
    timesteps[-1:] = t
    batch = build_batch(document, [(x, torch.zeros_like(x)) for x in latents], timesteps, MODALITIES)
    hidden, encoded = model.hidden(batch, latents)
    if not images:
        return hidden, hidden[:0]
    modality, x = images[-1][1:]
    return hidden, model.prediction(hidden, batch, modality, encoded[modality])[-x[..., 0].numel() :]


def test_the_first_copy_from_python_draws_what_an_image_noised_in_place_does(model):
    """The cap of image-first pairs is not used."""
    documents = [[torch.ones(1, 2, 4), torch.tensor([1])] for _ in range(40)]
    one, copied = (
        pack_documents(documents, model.config, Randomness(seeded(), noised_copies=k, noise_cap=1)) for k in (0, 2)
    )
    assert one.modalities[0].timesteps.max() == 1 and copied.modalities[0].timesteps.max() > 900
    assert len(copied.modalities[0].timesteps) == 3 * 40 and copied.num_images == 80
    times, noise = copied.modalities[0].timesteps[:80], copied.modalities[0].noise
    assert times.unique().numel() > 60, "each copy has a timestep of its own"
    assert noise.unique(dim=0).shape == noise.shape, "and noise of its own"
    total = model(documents, generator=seeded(), noised_copies=2)
    torch.testing.assert_close(
        total, model(pack_documents(documents, model.config, Randomness(seeded(), noised_copies=2))).total
    )
    with pytest.raises(ValueError, match="noised_copies must be an integer from 0 on, got -1; 0 noises"):
        model(documents, noised_copies=-1)
    causal = model.config.model_copy(update={"image_attention": "causal"})
    with pytest.raises(ValueError, match=r"noised_copies must be 0 with image_attention=causal, .* got 2"):
        pack_documents(documents, causal, Randomness(seeded(), noised_copies=2))


def test_causal_images_see_what_text_would(model):
    bidirectional, causal = (batch_of(model, [[[1], (0, 2, 2), [2]]], causal_images=c).layout for c in (False, True))
    assert causal.area < bidirectional.area
