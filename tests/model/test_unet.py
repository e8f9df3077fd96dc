"""The U-Net codec: images of mixed shapes in one pack are as each of them alone."""

import pytest
import torch
import torch.nn.functional as F
from small_models import ids, seeded, small_model

from transfusion_fast.data.images import patchify
from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Randomness, pack_documents
from transfusion_fast.model.sequence_parallel import split_batch
from transfusion_fast.model.unet import _fold, _unfold

SHAPES = [(2, 3), (1, 1), (4, 2), (2, 3), (3, 2)]


def make(patch_size, channels=5, **settings):
    unet = {"dim_latent": channels * patch_size**2, "codec": "unet", "patch_size": patch_size}
    transformer = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}
    return small_model(num_text_tokens=16, modalities=[unet], transformer=transformer, **settings)


def documents_of(model, shapes=SHAPES):
    width = model.config.dim_latent[0]
    images = [torch.randn(*shape, width, generator=seeded(i)) for i, shape in enumerate(shapes)]
    return [[ids(1, i), image, ids(3)] for i, image in enumerate(images)]


def batch_of(model, documents):
    return pack_documents(documents, model.config, Randomness(seeded(), prob_uncond=0))


def run(model, batch):
    """Return the predictions, and the gradients that a loss on them has."""
    hidden, encoded = model.hidden(batch, [m.latents + 0.5 for m in batch.modalities])
    prediction = model.prediction(hidden, batch, 0, encoded[0])
    loss = (prediction * torch.linspace(-1, 1, prediction.shape[1])).tanh().sum()
    return prediction, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("patch_size", [1, 2, 8])
def test_a_pack_of_mixed_shapes_is_each_image_alone(patch_size, tolerance):
    model = make(patch_size)
    documents = documents_of(model)
    batch = batch_of(model, documents)
    batches = [batch_of(model, [document]) for document in documents]
    for number, alone in enumerate(batches):  # the same timestep
        alone.modalities[0].timesteps.copy_(batch.modalities[0].timesteps[number : number + 1])
    assert [shape[0] for shape in batch.modalities[0].shapes] == [1, 2, 1, 1]
    prediction, slopes = run(model, batch)
    alone, slopes_alone = zip(*(run(model, one) for one in batches), strict=True)
    torch.testing.assert_close(prediction, torch.cat(alone), **tolerance["fp32"])
    for (name, _), packed, parts in zip(model.named_parameters(), slopes, zip(*slopes_alone, strict=True), strict=True):
        if packed is None:
            assert name == "head.weight"
            continue
        error = (packed - sum(parts)).norm()
        assert error <= 1e-5 * packed.norm() + 1e-6, name


def test_a_residual_block_computes_its_equation():
    """The last one up, which narrows what it reads, on one image."""
    model, taken = make(2), []
    codec, batch = model.codecs[0], batch_of(model, documents_of(model, [(2, 3)]))
    block = codec.up[0]
    block.register_forward_hook(lambda module, given, out: taken.append((given[0], out)))
    run(model, batch)
    [(x, out)] = taken
    timestep = F.silu(codec.timestep(batch.modalities[0].timesteps)) @ block.timestep.weight.T

    def convolved(x, norm, layer):
        x = F.silu(norm(x)).permute(0, 3, 1, 2)
        return F.conv2d(x, layer.weight, layer.bias, padding=1).permute(0, 2, 3, 1)

    x = x.view(1, 4, 6, -1)
    hidden = convolved(x, block.first_norm, block.first) + timestep
    expected = x @ block.skip.weight.T + convolved(hidden, block.second_norm, block.second)
    torch.testing.assert_close(out, expected.flatten(0, 2), rtol=1e-4, atol=1e-4)


def test_images_that_ranks_would_cut_are_refused():
    model = make(2)
    part = split_batch(batch_of(model, documents_of(model, [(2, 3)])), 0, 2)
    with pytest.raises(ValueError, match=r"shapes must be those of all \d patches, got \(\); do not cut images"):
        model(part)


def test_patches_of_data_are_folded_back_into_their_images():
    images = [torch.arange(float(n * h * w * 3)).view(n, h, w, 3) for n, h, w in ((2, 4, 12), (1, 8, 4))]
    patches = torch.cat([patchify(x, 4) for x in images])
    grids = [(2, 1, 3), (1, 2, 1)]
    pixels = _fold(patches, grids, 4)
    assert torch.equal(pixels, torch.cat([x.flatten(0, 2) for x in images]))
    assert torch.equal(_unfold(pixels, grids, 4), patches)


def test_the_model_compiles_to_one_graph(tolerance):
    model = make(2)
    batch = batch_of(model, documents_of(model)[:2])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch).total, model(batch).total, **tolerance["fp32"])


def test_the_first_prediction_is_near_zero_and_a_batch_without_images_reaches_every_weight():
    torch.manual_seed(0)
    model = type(make(2))(make(2).config)
    losses = model(batch_of(model, documents_of(model)))
    assert losses.diffusion.item() == pytest.approx(1, abs=0.15)
    model(batch_of(model, [[ids(1, 2)]])).total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.codecs.parameters())


@pytest.mark.parametrize("patch_size", [None, 4])
def test_patches_that_cannot_be_folded_back_are_refused(patch_size):
    modality = {"dim_latent": 24, "codec": "unet", "patch_size": patch_size}
    message = f"patch_size must be given with codec=unet, and its square must divide dim_latent=24, got {patch_size}"
    with pytest.raises(InputError, match=message):
        small_model(modalities=[modality])
