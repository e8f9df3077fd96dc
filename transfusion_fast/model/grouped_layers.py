"""Layers over tokens that are grouped by kind: text and padding first, then the patches of each modality.

Groups are tensors [n, E] of their own through a whole forward pass, so that patches can have other weights than text
(mixture of transformers, arXiv 2411.04996) or be modulated by their timestep (adaLN-zero, arXiv 2212.09748), and each
weight sees one dense product for each group. Letters as in sequence.py.

Only attention needs the order of the sequence. In each block QKV [T, H + 2G, D] is written to that order once, and the
output [T, H, D] is read from it once; backward moves their gradients the same way. With reads and writes these are
4 (H + G) D numbers a position in each direction; the products of a block read and write about ten times as many.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_fast.config import TransformerConfig
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops
from transfusion_fast.model.layers import Attention, BlockLayers, ContextAttention, Linear, RMSNorm
from transfusion_fast.model.packed_batch import PackedBatch

Groups = tuple[Tensor, ...]
"""Tensors of text and of each modality, or their positions in the sequence, int64."""
CONDITION_DIM = 256
"""Width of the embedded timestep that modulates patches: a small one, as every block maps it to six vectors [E]."""
_EPS = 1e-6  # that of the norm in `ops.rope`
MODALITIES = "modalities"
"""Part of the names of modalities' own layers, between the name of text's layer and their number."""


def name_in_text(name: str) -> str:
    """Return the name of text's parameter in the place of a modality's; other names are returned as they are."""
    return re.sub(rf"\b{MODALITIES}\.\d+\.", "", name)


def of_text(name: str) -> bool:
    """Return whether a parameter belongs to text, if text has weights of its own."""
    return name_in_text(name) == name and not name.startswith(("codecs.", "conditions."))


def group_positions(batch: PackedBatch) -> Groups:
    """Return the positions of each group; their numbers are known without waiting for the device."""
    patches = tuple(images.sequence_index for images in batch.modalities)
    is_patch = torch.zeros_like(batch.tokens, dtype=torch.uint8)
    for index in patches:
        is_patch = is_patch.index_fill(0, index, 1)
    text = is_patch.argsort(stable=True)[: len(is_patch) - sum(map(len, patches))]
    return (text, *patches)


def merge(groups: Sequence[Sequence[Tensor]], positions: Groups) -> Tensor:
    """Write groups to the order of the sequence: [T, a + b, ..] of parts [n, a, ..] and [n, b, ..] of each group."""
    return _Merge.apply(len(groups[0]), *positions, *(part for group in groups for part in group))


def split(x: Tensor, positions: Groups) -> Groups:
    """Read the groups [n, ..] from [T, ..] in the order of the sequence."""
    return _Split.apply(x, *positions)


class _Merge(torch.autograd.Function):
    """Autograd would write the gradient of every group into zeros, and add them up."""

    @staticmethod
    def forward(ctx: Any, parts: int, *tensors: Tensor) -> Tensor:
        count = len(tensors) // (1 + parts)
        positions, tensors = tensors[:count], tensors[count:]
        ctx.save_for_backward(*positions)
        ctx.widths = [part.shape[1] for part in tensors[:parts]]
        shape = (sum(map(len, positions)), sum(ctx.widths), *tensors[0].shape[2:])
        return _write(tensors, positions, ctx.widths, tensors[0].new_empty(shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        positions = ctx.saved_tensors
        parts = gradient.split(ctx.widths, dim=1)
        read = (part.index_select(0, index) for index in positions for part in parts)
        return (None, *(None for _ in positions), *read)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *positions: Tensor) -> Groups:
        ctx.save_for_backward(*positions)
        return tuple(x.index_select(0, index) for index in positions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        positions = ctx.saved_tensors
        shape = (sum(map(len, positions)), *gradients[0].shape[1:])
        merged = _write(gradients, positions, [shape[1]], gradients[0].new_empty(shape))
        return (merged, *(None for _ in positions))


def _write(parts: Sequence[Tensor], positions: Sequence[Tensor], widths: list[int], out: Tensor) -> Tensor:
    """Write the parts of each group to their positions, as matrices, whose rows a CPU copies faster."""
    columns = out.flatten(1).split([width * math.prod(out.shape[2:]) for width in widths], dim=1)
    for number, part in enumerate(parts):
        columns[number % len(widths)].index_copy_(0, positions[number // len(widths)], part.flatten(1))
    return out


class Projection(Attention):
    """Queries, keys and values of one group; `attend` serves all groups."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the parts of [n, H + 2G, D]: all of it, or normed queries, normed keys, and values."""
        qkv = self.project(x)
        if self.q_norm is None or self.k_norm is None:
            return (qkv,)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        pairs = ((q, self.q_norm), (k, self.k_norm))
        return (*(ops.rms_norm(part, weight, _EPS, backend=self.backend)[0] for part, weight in pairs), v)


class Modulation(nn.Module):
    """Shift, scale and gate of attention and of the feed-forward layer, six tensors [P, E], from embedded timesteps.

    They start at zero, so that patches pass a block unchanged. A patch reads its six vectors from a table [N, 6 E].
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(CONDITION_DIM, 6 * dim, bias=True, std=0.0)

    def forward(self, condition: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        embedded, image_P = condition
        return F.embedding(image_P, self.linear(embedded)).chunk(6, dim=1)  # its backward sums in a fixed order


class GroupLayers(BlockLayers):
    """The layers of a block for some groups."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend, modulated: bool):
        super().__init__(config, backend, Projection)
        self.modulation = Modulation(config.dim) if modulated else None


class GroupedBlock(GroupLayers):
    """Pre-norm attention over all positions, and feed-forward, with residuals, of grouped tokens.

    Its layers are those of text, or of all groups if the weights are shared.
    """

    def __init__(self, config: TransformerConfig, backend: ops.Backend, modalities: int):
        separate, modulated = config.modality_weights == "separate", config.conditioning == "adaln"
        super().__init__(config, backend, modulated and not separate)
        count = modalities if separate else 0
        self.modalities = nn.ModuleList(GroupLayers(config, backend, modulated) for _ in range(count))

    def forward(
        self,
        groups: Groups,
        rotary: ops.Rotary,
        layout: AttentionLayout | ContextAttention,
        positions: Groups,
        conditions: tuple[tuple[Tensor, Tensor], ...],
    ) -> Groups:
        """Map groups [n, E]; `conditions` are the embedded timesteps [N, 256] and image [P] of modulated modalities."""
        layers = [self, *(cast(GroupLayers, m) for m in self.modalities or [self] * (len(groups) - 1))]
        vectors: list[tuple[Tensor | None, ...]] = [(None,) * 6] * len(groups)
        for number, condition in enumerate(conditions, start=1):
            vectors[number] = cast(Modulation, layers[number].modulation)(condition)
        pairs = [layer.attention_norm(x) for layer, x in zip(layers, groups, strict=True)]
        normed = [_modulate(x, shift, scale) for (x, _), (shift, scale, *_) in zip(pairs, vectors, strict=True)]
        qkv = merge([layer.attention(x) for layer, x in zip(layers, normed, strict=True)], positions)
        outs = split(self.attention.attend(qkv, rotary, layout), positions)
        return tuple(
            _after_attention(layer, out, residual, *v[2:])
            for layer, out, (_, residual), v in zip(layers, outs, pairs, vectors, strict=True)
        )


def _after_attention(
    layer: GroupLayers,
    out_THD: Tensor,
    x: Tensor,
    attention_gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    x = layer.attention.out(out_THD.flatten(1), x, attention_gate)
    normed, residual = layer.mlp_norm(x)
    return layer.mlp(_modulate(normed, shift, scale), residual, gate)


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return x (1 + scale) + shift."""
    return x if shift is None or scale is None else torch.addcmul(shift, x, scale).add_(x)


class GroupedNorm(RMSNorm):
    """A norm of groups whose modalities have weights of their own."""

    def __init__(self, modalities: int, *settings: Any):
        super().__init__(*settings)
        self.modalities = nn.ModuleList(RMSNorm(*settings[:3]) for _ in range(modalities))

    def forward(self, groups: Groups) -> Groups:  # type: ignore[override]
        others = (norm(x)[0] for norm, x in zip(self.modalities, groups[1:], strict=True))
        return (super().forward(groups[0])[0], *others)
