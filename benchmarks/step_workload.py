"""What the step benchmark trains: presets, documents, and how many FLOPs a step of them is."""

from __future__ import annotations

from itertools import pairwise

import mixes
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast import Transfusion
from transfusion_fast.config import PRESETS, ModelConfig, TransformerConfig
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import inputs
from transfusion_fast.model.sequence import PackedBatch

# Documents as a model takes them: integers are text, [patches, C] numbers an image.
Documents = list[list[Tensor]]

TEXT_TOKENS = 256
CHANNELS = 16
PATCHES = 64  # of an image of the ragged documents: 8 x 8
RAGGED_PRESET = "mini"
TRANSFORMERS = {RAGGED_PRESET: TransformerConfig(dim=256, depth=6, heads=8), **PRESETS}


def model_config(preset: str, backend: str, checkpointing: str = "none") -> ModelConfig:
    """The model of a preset: "mini", made for CPUs, or a size of the paper."""
    return ModelConfig(
        num_text_tokens=TEXT_TOKENS,
        dim_latent=(CHANNELS,),
        transformer=TRANSFORMERS[preset],
        backend=backend,
        activation_checkpointing=checkpointing,
    )


def ragged_documents(count: int = 24, seed: int = 0) -> Documents:
    """Documents of 4 to 160 text tokens, of which every other one ends in an image of 8 x 8 patches."""
    generator = torch.Generator().manual_seed(seed)
    documents: Documents = []
    for number in range(count):
        length = int(torch.randint(4, 161, (), generator=generator))
        documents.append([_text(length, generator)])
        if number % 2 == 0:
            documents[-1].append(torch.randn(PATCHES, CHANNELS, generator=generator))
    return documents


def mix_documents(mix: str, length: int, seed: int = 0) -> Documents:
    """The documents of a mix (mixes.py), whose special tokens fill places that the mix gives to text."""
    lengths, spans = mixes.fixed(mix) if length == mixes.FIXED_LENGTH else mixes.generate(mix, length)
    generator = torch.Generator().manual_seed(seed)
    documents, start = [], 0
    for size in lengths:
        own = [(at, patches) for at, patches in spans if start <= at < start + size]
        # Text lies between the ends of images; each end stands for a special token, as do those of the document.
        edges = [start, *(edge for at, patches in own for edge in (at, at + patches)), start + size]
        document: list[Tensor] = []
        for number, (first, end) in enumerate(pairwise(edges)):
            if number % 2:
                document.append(torch.randn(end - first, CHANNELS, generator=generator))
            elif end - first > 2:
                document.append(_text(end - first - 2, generator))
        documents.append(document)
        start += size
    return documents


def pack(model: Transfusion, documents: Documents) -> PackedBatch:
    """One micro-batch of the documents, with the same noise and timesteps each time."""
    return inputs.pack_documents(documents, model.config, torch.Generator().manual_seed(0))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None) -> Tensor:
    """One scaled_dot_product_attention under a dense mask that all layers share."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # without a batch the fused kernels are not taken
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.plan(_mask), scale=scale)[0].transpose(0, 1)


def _mask(layout: AttentionLayout) -> Tensor:
    mask = layout.dense_mask()
    return mask | ~mask.any(dim=-1, keepdim=True)  # padding may see anything but nothing, whose softmax is NaN


def model_flops(model: Transfusion, batch: PackedBatch) -> int:
    """FLOPs that forward and backward need: 6 for each use of a matrix's weight, 12 H D a layer for a visible pair.

    Nothing that is computed again is counted, nor embeddings, norms and the few vectors of timesteps.
    """
    transformer = model.config.transformer
    uses = len(batch.tokens) * sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    uses += len(batch.supervised) * model.head.weight.numel()
    uses += sum(2 * len(m.latents) * m.latents.shape[1] * transformer.dim for m in batch.modalities)
    return 6 * uses + 12 * transformer.depth * transformer.dim * batch.layout.area


def _text(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, TEXT_TOKENS, (length,), generator=generator)
