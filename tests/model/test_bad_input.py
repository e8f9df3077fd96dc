"""Bad input is refused in one line: the document and piece, row or modality, the rule, the value, and what to do."""

from dataclasses import replace

import pytest
import torch
from small_models import ids, seeded

from transfusion_fast import ModelConfig, Transfusion, Weighted
from transfusion_fast.model.inputs import pack_documents
from transfusion_fast.model.loss import Counts

SMALL = {"num_text_tokens": 16, "transformer": {"dim": 32, "depth": 1}}
CONFIG = ModelConfig(**SMALL, dim_latent=(4, 6))
ROWS = torch.zeros(2, 8, dtype=torch.long)
SPAN = [[], [(2, 2)]]


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded())


X = latents(2, 4)


def piece(value, **settings):
    """Return the call with a document whose second piece is `value`."""
    config = ModelConfig(**SMALL, dim_latent=(4, 6), **settings)
    return lambda: Transfusion(config)([[ids(1), value]])


def rows(text_ids, tensors, positions):
    """Return the call with rows, which are cut at their images unless they are refused."""
    return lambda: Transfusion(CONFIG)(text_ids, tensors, positions, prob_uncond=1.0)


def call(batch, *images, **given):
    return lambda: Transfusion(CONFIG)(batch, *images, **given)


def batch():
    return pack_documents([[ids(1), X, latents(1, 4), (1, latents(1, 6)), (1, latents(3, 6))]], CONFIG)


def timesteps(*values: float):
    """Return the change of the timesteps of the second modality of a batch."""
    first, second = batch().modalities
    return lambda: replace(batch(), modalities=(first, replace(second, timesteps=torch.tensor(values))))


def where(place: str) -> str:
    return f"{place} must come with text_ids [B, T], got another batch; put them into it"


PIECE, SECOND = "document 0, piece 1", "row 1, span (2, 2)"
REFUSED = {
    "a list": (piece([1, 2]), f"{PIECE} must be a tensor or (modality, tensor), got list; convert it"),
    "a list of a modality": (
        piece((0, [1.0])),
        f"{PIECE} must be a tensor or (modality, tensor), got (int, list); convert it",
    ),
    "three values": (
        piece((0, 1, X)),
        f"{PIECE} must be a tensor or (modality, tensor), got (int, int, Tensor); convert it",
    ),
    "ids of two dimensions": (
        piece(ids(1)[None]),
        f"{PIECE}: text ids must be integers [n], got torch.int64 (1, 1); give one for each token",
    ),
    "bool ids": (
        piece(ids(1).bool()),
        f"{PIECE}: text ids must be integers [n], got torch.bool (1,); give one for each token",
    ),
    "an id too large": (
        piece(ids(3, 16)),
        f"{PIECE}: text ids must lie in [0, 16), got 16; special tokens are added, do not give them",
    ),
    "a negative id": (
        piece(ids(3, -1, 20)),
        f"{PIECE}: text ids must lie in [0, 16), got -1; special tokens are added, do not give them",
    ),
    "NaN": (piece(X * torch.nan), f"{PIECE}: latents must be finite in fp32, got NaN or infinity; check the encoder"),
    "a value beyond fp32": (
        piece(torch.full((2, 4), 1e300, dtype=torch.float64)),
        f"{PIECE}: latents must be finite in fp32, got NaN or infinity; check the encoder",
    ),
    "infinity": (piece(X / 0), f"{PIECE}: latents must be finite in fp32, got NaN or infinity; check the encoder"),
    "integer latents": (
        piece((0, ids(1))),
        f"{PIECE}: a modality tensor must be floating point, got torch.int64; call its float()",
    ),
    **{
        f"modality {value!r}": (
            piece((value, latents(3, 6))),
            f"{PIECE}: modality must be an integer in [0, 2), got {value!r}; the model has no other",
        )
        for value in (True, 2, -1, "depth")
    },
    **{
        f"shape {shape} of modality {modality}": (
            piece((modality, latents(*shape))),
            f"{PIECE}: latents of modality {modality} must be [patches, {width}] or [rows, columns, {width}], "
            f"not empty, got {shape}; reshape them",
        )
        for modality, width, shape in ((1, 6, (3, 4)), (0, 4, (4,)), (0, 4, (1, 1, 1, 4)), (0, 4, (0, 4)))
    },
    "channels last where they are first": (
        piece(latents(2, 3, 4), channel_first=True),
        f"{PIECE}: latents of modality 0 must be [patches, 4] or [4, rows, columns], not empty, got (2, 3, 4); "
        "reshape them",
    ),
    "a doubtful shape": (
        piece(latents(4, 3, 4)),
        f"{PIECE}: latents must be [rows, columns, channels], got (4, 3, 4), which could be channels first; "
        "set channel_first to True or False",
    ),
    "an empty document": (
        call([[ids(1)], []]),
        "document 1 must hold at least one piece, got none; leave it out",
    ),
    "a weight around all": (
        call(Weighted([ids(1)], 2.0)),
        "documents must be a list of documents, got Weighted; give a list",
    ),
    "a document alone": (call([ids(1), X]), "document 0 must be a list of pieces, got Tensor; give a list"),
    "a number": (call([5]), "document 0 must be a list of pieces, got int; give a list"),
    "a text": (call(["one"]), "document 0 must be a list of pieces, got str; give a list"),
    "no documents": (call(None), "documents must be a list of documents, got NoneType; give a list"),
    "an iterator": (call(iter([[X]])), "documents must be a list of documents, got list_iterator; give a list"),
    "a batch for another model": (
        lambda: Transfusion(**SMALL, dim_latent=4)(batch()),
        "a PackedBatch must have modalities of (4,) channels, as this model, got (4, 6); "
        "make it with this model's config",
    ),
    "a row alone": (
        call(ROWS[0]),
        "text_ids must be integers [B, T], got torch.int64 (8,); give one row for each document",
    ),
    "bool rows": (
        call(ROWS.bool()),
        "text_ids must be integers [B, T], got torch.bool (2, 8); give one row for each document",
    ),
    "rows of floats": (
        call(ROWS.float()),
        "text_ids must be integers [B, T], got torch.float32 (2, 8); give one row for each document",
    ),
    "an id of a row too large": (
        call(ROWS.index_put((ids(1), ids(5)), ids(22))),
        "row 1, position 5: text ids must lie in [0, 22), got 22; check the tokenizer",
    ),
    "a negative id of a row": (
        call(ROWS - 1),
        "row 0, position 0: text ids must lie in [0, 22), got -1; check the tokenizer",
    ),
    **{
        f"{len(tensors)} rows of images": (
            rows(ROWS, tensors, positions),
            "modality_tokens and modality_positions must have an entry for each of the 2 rows, "
            f"got {len(tensors)} and {len(positions)}; give [] for a row without images",
        )
        for tensors, positions in (([[X]], SPAN), ([[X], []], [[(2, 2)]]))
    },
    "no position": (
        rows(ROWS, [[], [X]], [[], []]),
        "row 1 must have a position for each modality tensor, got 1 tensors and 0 positions; give as many",
    ),
    "no tensor": (
        rows(ROWS, [[], []], SPAN),
        "row 1 must have a position for each modality tensor, got 0 tensors and 1 positions; give as many",
    ),
    "an absent modality": (
        rows(ROWS, [[], [X]], [[], [(2, 2, 2)]]),
        "row 1, span (2, 2, 2): modality must be an integer in [0, 2), got 2; the model has no other",
    ),
    "a wrong length": (
        rows(ROWS, [[], [X]], [[], [(2, 3)]]),
        "row 1, span (2, 3): length must be 2, the patches of its tensor, got 3; correct it",
    ),
    **{
        f"an image at {offset}": (
            rows(ROWS, [[], [X]], [[], [(offset, 2)]]),
            f"row 1, span ({offset}, 2): an image must lie in [0, 8), got {offset}..{offset + 2}; move it",
        )
        for offset in (-1, 7)
    },
    "images that overlap": (
        rows(ROWS, [[], [X, X]], [[], [(3, 2), (2, 2)]]),
        "row 1: an image must not begin before 4, where the one before it ends, got 3; move it",
    ),
    "latents of another modality": (
        rows(ROWS, [[], [X]], [[], [(1, 2, 2)]]),
        "row 1, span (1, 2, 2): latents of modality 1 must be [patches, 6] or [rows, columns, 6], not empty, "
        "got (2, 4); reshape them",
    ),
    "four numbers": (
        rows(ROWS, [[], [X]], [[], [(0, 0, 2, 2)]]),
        "row 1, span (0, 0, 2, 2): a position must be (offset, length) or (modality, offset, length), got 4 numbers; "
        "correct it",
    ),
    **{
        f"the position {span}": (
            rows(ROWS, [[], [X]], [[], [span]]),
            "row 1: a position must be integers, (offset, length) or (modality, offset, length), "
            f"got {span}; convert it",
        )
        for span in ((2.5, 2), 3)
    },
    "integers as latents": (
        rows(ROWS, [[], [X.long()]], SPAN),
        f"{SECOND}: latents must be a floating point tensor, got torch.int64; convert them",
    ),
    "lists as latents": (
        rows(ROWS, [[], [X.tolist()]], SPAN),
        f"{SECOND}: latents must be a floating point tensor, got list; convert them",
    ),
    "NaN in a row": (
        rows(ROWS, [[], [X * torch.nan]], SPAN),
        f"{SECOND}: latents must be finite in fp32, got NaN or infinity; check the encoder",
    ),
    "a doubtful shape in a row": (
        rows(ROWS.repeat(1, 2), [[], [latents(4, 3, 4)]], [[], [(0, 12)]]),
        "row 1, span (0, 12): latents must be [rows, columns, channels], got (4, 3, 4), which could be channels first; "
        "set channel_first to True or False",
    ),
    "weights of another shape": (
        call(ROWS, text_weights=torch.ones(2, 7)),
        "text_weights must be (2, 8) like text_ids, got (2, 7); give one for each token",
    ),
    **{
        f"the weight {weight}": (
            call(ROWS, text_weights=torch.ones(2, 8).index_put((ids(1), ids(3)), torch.tensor(weight))),
            f"weight of row 1, position 3 must be a number in 0..1000000, got {weight}; 0 is no loss",
        )
        for weight in (-0.5, float("nan"), 2e6)
    },
    **{
        f"{', '.join(given)} of documents": (call([[ids(1)]], **given), where(next(iter(given))))
        for given in ({"modality_tokens": [[X]]}, {"modality_positions": [[(0, 2)]]}, {"text_weights": ROWS})
    },
    "images beside a batch": (call(batch(), [[X]]), where("modality_tokens")),
    **{
        f"{', '.join(given)} of a batch": (
            call(batch(), **given),
            "generator, noise_cap, prob_uncond and noised_copies must come with documents or rows, "
            "got a PackedBatch, which has its noise; leave them out",
        )
        for given in ({"generator": seeded()}, {"noised_copies": 2}, {"noise_cap": 3}, {"prob_uncond": 0.0})
    },
    "counts of documents": (
        call([[ids(1)]], counts=Counts(1, 1)),
        "counts must come with a PackedBatch, got documents or rows; leave them out",
    ),
    "a noise cap too small": (
        call([[ids(1)]], noise_cap=0.9),
        "noise_cap must be in 1..1000, got 0.9; 500.0 is the paper's",
    ),
    "a probability above 1": (
        call([[ids(1)]], prob_uncond=1.5),
        "prob_uncond must be in 0..1, got 1.5; 0 drops no condition",
    ),
    "a fraction of a copy": (
        call([[ids(1)]], noised_copies=0.5),
        "noised_copies must be an integer from 0 on, got 0.5; 0 noises images in place",
    ),
    **{
        f"the timestep {t}": (
            timesteps(1.0, t),
            f"modality 1, image 1: timestep must lie in (0, 1000], got {t:g}; 1 is almost clean",
        )
        for t in (0.0, -1.0, 1000.5, float("nan"), float("inf"))
    },
}


@pytest.mark.parametrize(("refused", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_in_one_line_with_place_rule_value_and_remedy(refused, message):
    with pytest.raises(ValueError) as error:
        refused()
    assert str(error.value) == message


@pytest.mark.parametrize("t", [1e-30, 1000.0])
def test_the_ends_of_the_timesteps_are_taken(t):
    assert timesteps(1.0, t)().modalities[1].timesteps[1] == t


def test_timesteps_are_checked_where_the_data_is_and_not_on_a_device():
    """A tensor of the device meta has no values to look at."""
    assert batch().to("meta").modalities[1].timesteps.is_meta
