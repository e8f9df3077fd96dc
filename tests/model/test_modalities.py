"""Modalities of 0 to 3 dimensions, their positions and weights, and encoders and decoders of the user."""

import math

import pytest
import torch
from small_models import ids, laid_out, seeded, small_model
from torch import nn

from transfusion_fast import Transfusion
from transfusion_fast.config import ModelConfig
from transfusion_fast.config_reading import parse
from transfusion_fast.errors import InputError
from transfusion_fast.kernels.reference import rotary
from transfusion_fast.model.inputs import Randomness, encode_pieces, pack_documents, pack_rows
from transfusion_fast.model.sequence import Vocabulary, positions_of
from transfusion_fast.sampling.decoder import generate_images
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

TRANSFORMER = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}
FOUR = [{"dims": dims, "dim_latent": 3 + dims, "positions": "axial"} for dims in range(4)]
GRIDS = [(), (5,), (2, 3), (2, 1, 2)]


def of_grid(modality, grid, seed=0):
    return torch.randn(*grid, 3 + modality, generator=seeded(seed))


def test_any_number_of_dimensions_trains_and_is_drawn():
    model = small_model(num_text_tokens=8, modalities=FOUR, transformer=TRANSFORMER)
    document = [ids(1), *((m, of_grid(m, grid)) for m, grid in enumerate(GRIDS)), ids(2)]
    batch = pack_documents([document], model.config, Randomness(seeded(), prob_uncond=0))
    for modality, images in enumerate(batch.modalities):
        torch.testing.assert_close(images.latents, document[1 + modality][1].reshape(-1, 3 + modality))
    model(batch).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for modality, grid in enumerate(GRIDS):
        drawn = generate_images(model, [document], grid, modality=modality, image=ImageSettings(1, guidance=1.0))
        assert drawn.shape == (1, *grid, 3 + modality) and drawn.isfinite().all()
    assert generate_images(model, [[]], image=ImageSettings(1)).shape == (1, 3), "a vector needs no size"


def test_axes_of_positions_are_those_of_the_modality_and_equal_elsewhere():
    """Text at 1 and after each grid; the grids of a video and of an image, then audio, sequential."""
    sequence = laid_out([[[5], (0, 3, 1, 2), (1, 1, 3), (2, 2)]], Vocabulary(10, (0, 1, 2)))
    modalities = [{"dims": dims, "positions": "axial" if dims > 1 else "shared"} for dims in (3, 2, 1)]
    got = positions_of(sequence, ModelConfig(modalities=modalities).modalities).tolist()
    video = [[3 + f, 3, 3 + c] for f in range(3) for c in range(2)]  # the frames are its longest side
    image = [[8, 8, 8 + c] for c in range(3)]
    expected = [*([i] * 3 for i in range(3)), *video, *([i] * 3 for i in (6, 7)), *image, *([i] * 3 for i in (11, 12))]
    assert got == [*expected, *([i] * 3 for i in (13, 13, 14, 15))]


def test_each_axis_rotates_its_share_of_the_pairs():
    positions = torch.tensor([[4, 1, 7]])
    cos, _ = rotary(positions, 12)
    for pair in range(6):
        angle = positions[0, pair % 3].item() * 10000.0 ** (-2 * pair / 12)
        assert cos[0, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_loss_weight_of_a_modality_scales_its_part_of_the_loss_and_nothing_else():
    settings = {"num_text_tokens": 8, "transformer": TRANSFORMER}
    plain = small_model(**settings, modalities=[{"dim_latent": 5}, {"dim_latent": 5}])
    heavy = small_model(**settings, modalities=[{"dim_latent": 5}, {"dim_latent": 5, "loss_weight": 3}])
    document = [ids(1), (0, of_grid(2, (2, 2))), (1, of_grid(2, (1, 4)))]
    batch = pack_documents([document], plain.config, Randomness(seeded(), prob_uncond=0))
    one, other = plain(batch), heavy(batch)
    first, second = one.per_image.tolist()
    assert torch.equal(one.per_image, other.per_image) and torch.equal(one.text, other.text)
    assert one.diffusion.item() == pytest.approx((first + second) / 2)
    assert other.diffusion.item() == pytest.approx((first + 3 * second) / 2)


class Pixels(nn.Module):
    """Maps [n, 2, 6] to audio latents [n, 6, 4], or back if it is a decoder."""

    def __init__(self, decodes=False):
        super().__init__()
        self.decodes, self.calls = decodes, 0
        self.matrix = nn.Linear(4, 2) if decodes else nn.Linear(2, 4)

    def forward(self, x):
        self.calls += 1
        return self.matrix(x).movedim(1, 2) if self.decodes else self.matrix(x.movedim(1, 2))


def test_encoders_train_jointly_and_decoders_give_what_sampling_returns():
    settings = {"num_text_tokens": 8, "modalities": [{"dims": 1, "shape": [6]}], "transformer": TRANSFORMER}
    torch.manual_seed(1)
    encoder, decoder = Pixels(), Pixels(decodes=True)
    model = small_model(**settings, encoders={0: encoder}, decoders={0: decoder})
    raw = [torch.randn(2, 6, generator=seeded(i)) for i in range(2)]
    documents = [[ids(1), raw[0]], [raw[1], ids(2)]]
    loss = model(documents, generator=seeded())
    assert encoder.calls == 1, "tensors of one shape are a batch"
    [gradient] = torch.autograd.grad(loss, [encoder.matrix.weight])
    latents = [encoder(x[None])[0] for x in raw]
    bare = Transfusion(model.config)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("encoders", "decoders"))})
    expected = bare([[ids(1), latents[0]], [latents[1], ids(2)]], generator=seeded())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, [encoder.matrix.weight])[0])
    rows = (ids(1, 0, 0, 0, 0, 0, 0)[None], [raw[:1]], [[(1, 6)]])
    got, _ = model(*rows, generator=seeded())
    expected, _ = bare(rows[0], [latents[:1]], rows[2], generator=seeded())
    torch.testing.assert_close(got, expected)

    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[model.vocabulary.boi()] = 1
        model.embedding.weight.fill_(1)
        model.norm.weight.fill_(1)
    sampled = {"image": ImageSettings(2), "text": TextSettings(max_tokens=4)}
    [[piece]] = model.sample([[raw[0]]], **sampled)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("encoders", "decoders"))})
    [[drawn]] = bare.sample([[latents[0].detach()]], **sampled)
    torch.testing.assert_close(piece, decoder(drawn[None])[0].detach())
    given = [(model, raw[0]), (bare, latents[0].detach())]
    got, expected = (generate_images(m, [[x]], image=ImageSettings(1)) for m, x in given)
    torch.testing.assert_close(got, expected)  # latents, also where there is a decoder


def test_raw_pieces_of_one_shape_and_type_are_encoded_as_a_batch_and_types_are_kept_apart():
    seen = []

    def encoder(x):
        seen.append((x.dtype, len(x)))
        return x.float() + len(seen)

    pixels = torch.ones(2, dtype=torch.uint8)
    documents = [[(0, pixels), torch.full((2,), 0.5), ids(7)], [(0, pixels + 1)]]
    encoded = encode_pieces(documents, {0: encoder}, torch.device("cpu"))
    assert seen == [(torch.uint8, 2), (torch.float32, 1)]
    [[(_, first), (_, second), text], [(_, last)]] = encoded
    assert [x.tolist() for x in (first, second, text, last)] == [[2, 2], [2.5, 2.5], [7], [3, 3]]


def test_an_encoder_takes_the_pieces_of_its_own_modality_alone():
    raw = torch.full((2,), 0.5)
    pieces = [raw, (0, raw), (1, raw), (1, raw.double()), ids(7)]
    [encoded] = encode_pieces([pieces], {1: lambda x: x + 1}, torch.device("cpu"))
    assert all(got is given for got, given in zip(encoded[:2] + encoded[4:], pieces[:2] + pieces[4:], strict=True))
    assert [modality for modality, _ in encoded[2:4]] == [1, 1]
    assert [(x.dtype, x.tolist()) for _, x in encoded[2:4]] == [(torch.float32, [1.5] * 2), (torch.float64, [1.5] * 2)]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ((0, torch.ones(1, 3)), r"document 0, piece 1: latents of modality 0 must be \[3\], not empty, got \(1, 3\)"),
        ((1, torch.ones(4)), r"document 0, piece 1: latents of modality 1 must be \[length, 4\], .*got \(4,\)"),
        ((3, torch.ones(2, 2, 6)), r"latents of modality 3 must be \[frames, rows, columns, 6\], .*got \(2, 2, 6\)"),
        ((1, torch.ones(4, 4)), r"must be \[length, channels\], got \(4, 4\), which could be channels first"),
        ((4, torch.ones(2, 2, 6)), r"document 0, piece 1: modality must be an integer in \[0, 4\), got 4"),
    ],
)
def test_a_shape_that_does_not_fit_the_modality_is_named(piece, message):
    with pytest.raises(ValueError, match=message):
        pack_documents([[ids(1), piece]], ModelConfig(modalities=FOUR))


def test_a_position_of_an_absent_modality_and_a_size_of_other_dimensions_are_named():
    with pytest.raises(ValueError, match=r"row 0, span \(4, 0, 1\): modality must be an integer in \[0, 4\), got 4"):
        pack_rows(ids(1, 2)[None], [[torch.ones(1, 1, 3)]], [[(4, 0, 1)]], ModelConfig(modalities=FOUR))
    model = Transfusion(modalities=FOUR, transformer=TRANSFORMER)
    with pytest.raises(InputError, match=r"must be 2 integers of at least 1 for modality 2, got \(3,\)"):
        generate_images(model, [[]], (3,), modality=2)
    with pytest.raises(InputError, match="must be given for modality 3, which has no shape, got none; give its grid"):
        generate_images(model, [[]], modality=3)
    with pytest.raises(ValueError, match=r"modalities in \[0, 4\), got 4"):
        Transfusion(modalities=FOUR, transformer=TRANSFORMER, encoders={4: nn.Identity()})


def test_shorthands_are_folded_into_the_modalities():
    config = parse(ModelConfig, {"dim_latent": [4, 8], "positions": "axial", "codec": "linear"}, "an older run")
    assert [(m.dim_latent, m.positions) for m in config.modalities] == [(4, "axial"), (8, "axial")]
    assert parse(ModelConfig, config.model_dump(mode="json"), "saved") == config
    filled = parse(ModelConfig, {"modalities": [{"dims": 1}, {}], "positions": "shared"}, "both")
    assert [m.positions for m in filled.modalities] == ["shared"] * 2
    for values, message in (
        (
            {"modalities": [{"positions": "shared"}], "positions": "axial"},
            "positions must be 'shared' like modalities",
        ),
        ({"modalities": [{}], "dim_latent": [4, 5]}, r"dim_latent must have a width for each of 1 modalities, got \["),
        ({"modalities": [{"shape": [2]}]}, r"modalities.0: shape must have dims=2 numbers, got \(2,\)"),
        ({"modalities": [{"codec": "unet", "dims": 1}]}, "modalities.0: dims must be 2 for codec=unet, got 1"),
        ({"modalities": [{"patch_size": 2}]}, "modalities.0: patch_size must come with codec=unet, got 2 with linear"),
        ({"codec": "unet", "modalities": [{"patch_size": 3}]}, "patch_size: Input should be 1, 2, 4, 8 or 16, got 3"),
        ({"modalities": [{"dim": 1}]}, "unknown key 'modalities.0.dim'; did you mean 'dims'?"),
    ):
        with pytest.raises(InputError, match=message):
            parse(ModelConfig, values, "given")
