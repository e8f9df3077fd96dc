"""The transformer's blocks, as in Llama, over flat packed sequences. Letters as in sequence.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transfusion_fast.config import TransformerConfig
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops
from transfusion_fast.model.sequence_parallel import exchange_heads

INIT_STD = 0.02


class Linear(nn.Linear):
    """A linear layer whose weights are normal with standard deviation `std`, and whose bias is zero.

    The constructor draws the weights, because ZeRO-3 scatters them over the ranks as soon as it returns.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, std: float = INIT_STD):
        self.std = std
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ResidualLinear(Linear):
    """A linear layer [T, K] -> [T, E] without bias, which adds its output to the residual within the matrix product.

    With dropout in training, or a gate [T, E] that the output is multiplied by, the sum is a pass of its own.
    """

    def __init__(self, in_features: int, config: TransformerConfig):
        # A smaller standard deviation, so that the variance of the residual stream does not grow with the depth.
        super().__init__(in_features, config.dim, std=INIT_STD / (2 * config.depth) ** 0.5)
        self.dropout = config.dropout

    def forward(self, x: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        dropout = self.dropout if self.training else 0.0
        # Under autocast addmm would make the sum as narrow as the product.
        if gate is None and not dropout and residual.dtype == x.dtype:
            return torch.addmm(residual, x, self.weight.t())
        out = F.dropout(super().forward(x), dropout)
        return residual + out if gate is None else torch.addcmul(residual, out, gate)


class Embedding(nn.Embedding):
    """A table of vectors that are normal with standard deviation `INIT_STD`."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class RMSNorm(nn.Module):
    """RMS norm over the last axis (arXiv 1910.07467), which returns x / rms(x) * weight, and x for the residual."""

    def __init__(self, dim: int, eps: float = 1e-5, backend: ops.Backend = "auto", initial: float = 1.0):
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, backend=self.backend)


class ContextAttention(Protocol):
    """Attention of a block in decoding, in place of a layout: over new positions and those in a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output [T, H, D] for rotated q [T, H, D] and k, and v, [T, G, D]."""


class Attention(nn.Module):
    """Attention that is causal over text and bidirectional within images, over packed documents.

    It adds its output [T, E] for x [T, E] to the residual. Given fewer positions than the layout has, it attends to
    those of the other ranks of its `sequence_group` too.
    """

    sequence_group: str = ""
    """Name of the process group of the ranks that share a pack."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.backend = backend
        self.qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = ResidualLinear(self.heads * self.head_dim, config)
        self.q_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None

    def forward(
        self, x: Tensor, residual: Tensor, rotary: ops.Rotary, layout: AttentionLayout | ContextAttention
    ) -> Tensor:
        out_THD = self.attend(self.project(x), rotary, layout, q_weight=self.q_norm, k_weight=self.k_norm)
        return self.out(out_THD.flatten(1), residual)

    def project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values, [T, H + 2G, D]."""
        return self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, self.head_dim)

    def attend(
        self, qkv: Tensor, rotary: ops.Rotary, layout: AttentionLayout | ContextAttention, **norm: Any
    ) -> Tensor:
        """Return the output of all heads, [T, H, D]; `norm` are the weights that `ops.rope` takes."""
        if not isinstance(layout, AttentionLayout):
            return layout.attend(*self._rotated(qkv, rotary, **norm))
        if self.sequence_group and len(qkv) < layout.total_length:
            attention = partial(ops.hybrid_attention, layout=layout, backend=self.backend)
            parts = layout.total_length // len(qkv)
            return exchange_heads(attention, *self._rotated(qkv, rotary, **norm), self.sequence_group, parts)
        return ops.rotary_attention(qkv, self.kv_heads, rotary, layout, backend=self.backend, **norm)

    def _rotated(self, qkv: Tensor, rotary: ops.Rotary, **norm: Any) -> tuple[Tensor, Tensor, Tensor]:
        q_THD, k_TGD, v_TGD = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return *ops.rope(q_THD, k_TGD, rotary, backend=self.backend, **norm), v_TGD


class SwiGLU(nn.Module):
    """residual + down(silu(gate(x)) * up(x)) (arXiv 2002.05202) for x and the residual [T, E]."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend):
        super().__init__()
        self.backend = backend
        self.gate_up = Linear(config.dim, 2 * config.hidden_dim)
        self.down = ResidualLinear(config.hidden_dim, config)

    def forward(self, x: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.down(ops.swiglu(self.gate_up(x), backend=self.backend), residual, gate)


class BlockLayers(nn.Module):
    """The layers of a block."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend, attention: type[Attention]):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, backend)
        self.attention = attention(config, backend)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, backend)
        self.mlp = SwiGLU(config, backend)


class Block(BlockLayers):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend):
        super().__init__(config, backend, Attention)

    def forward(self, x: Tensor, rotary: ops.Rotary, layout: AttentionLayout | ContextAttention) -> Tensor:
        x = self.attention(*self.attention_norm(x), rotary, layout)
        return self.mlp(*self.mlp_norm(x))


class TimestepEmbedding(nn.Module):
    """Timesteps [N] in (0, 1000] -> [N, dim]: sinusoids (arXiv 2006.11239), then a two-layer MLP."""

    def __init__(self, dim: int, frequencies: int = 128, hidden: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Linear(2 * frequencies, hidden, bias=True), nn.SiLU(), Linear(hidden, dim, bias=True))

    def forward(self, timesteps: Tensor) -> Tensor:
        exponent = torch.arange(self.frequencies, device=timesteps.device) / self.frequencies
        angles = timesteps[:, None] * torch.exp(-math.log(10000.0) * exponent)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


# Activation checkpointing. "selective" keeps a block's input and the output of attention, which takes most of the time
# and whose output and log-sum-exp take little memory. These are this project's ops and those behind
# scaled_dot_product_attention.
_KEPT = frozenset(
    {
        "transfusion_fast::hybrid_attention",
        "transfusion_fast::rotary_attention",
        "aten::_scaled_dot_product_flash_attention",
        "transfusion_fast::tiled_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation._schema.name in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def checkpointing(setting: str, dropout: float) -> Callable[..., Any]:
    """Return the function that calls a block, by the setting `model.activation_checkpointing`."""
    if setting == "none":
        return _call
    # The recomputation must drop the same values. Without dropout a block draws no random numbers, and the state of the
    # generator is not saved, which on a GPU would be a copy to the host.
    full = partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout > 0)
    return (
        partial(full, context_fn=partial(create_selective_checkpoint_contexts, _keep))
        if setting == "selective"
        else full
    )
