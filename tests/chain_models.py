"""Models that predict text by the last token alone, and what they produce.

Ten text ids, so <bos> is 10, <eos> 11, <boi> and <eoi> 12 and 13 for modality 0, 14 and 15 for modality 1.
"""

import torch
from small_models import small_model

from transfusion_fast.sampling.decoder import sample
from transfusion_fast.sampling.settings import ImageSettings

BOS, EOS, BOI, EOI, BOI1, EOI1 = 10, 11, 12, 13, 14, 15
GRIDS = [(2, 2), (1, 3)]
ONE_STEP = ImageSettings(steps=1, guidance=1.0, eta=0.0, clip=1.0)


def make(**settings):
    transformer = {"dim": 32, "depth": 2, "heads": 2, "ffn_dim": 48}
    return small_model(num_text_tokens=10, dim_latent=(4, 6), transformer=transformer, **settings)


def chain(links, **settings):
    """Return a model that predicts by the last token alone: links[token] are its likely tokens, and how likely."""
    model = make(**settings)
    model.norm.weight.data.fill_(1.0)
    for block in model.blocks:
        block.attention.out.weight.data.zero_()
        block.mlp.down.weight.data.zero_()
    model.embedding.weight.data = torch.eye(model.vocabulary.size, 32)
    model.head.weight.data.zero_()
    for token, following in links.items():
        for likely, weight in (following if isinstance(following, dict) else {following: 1.0}).items():
            model.head.weight.data[likely, token] = 5 * weight
    return model


def produced_by(model, prompts=((),), **settings):
    """Return what was produced after each prompt, text as lists of ids and images as (modality, shape)."""
    documents = sample(model, prompts, **{"grids": GRIDS, "image": ONE_STEP} | settings)
    return [[described(piece) for piece in document] for document in documents]


def described(piece):
    modality, tensor = piece if isinstance(piece, tuple) else (0, piece)
    return (modality, tuple(tensor.shape)) if tensor.is_floating_point() else tensor.tolist()
