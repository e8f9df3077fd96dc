"""The transformer's blocks, as in Llama, over flat packed sequences. Letters as in sequence.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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
    """A linear layer [T, K] -> [T, E] without bias, which adds its output to the residual within the matrix product."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        if residual.dtype != x.dtype:  # under autocast, which would make the sum as narrow as the product
            return residual + super().forward(x)
        return torch.addmm(residual, x, self.weight.t())


class Embedding(nn.Embedding):
    """A table of vectors that are normal with standard deviation `INIT_STD`."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class RMSNorm(nn.Module):
    """RMS norm over the last axis (arXiv 1910.07467), which returns x / rms(x) * weight, and x for the residual."""

    def __init__(self, dim: int, eps: float = 1e-5, backend: ops.Backend = "auto"):
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, backend=self.backend)


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
        self.out = ResidualLinear(self.heads * self.head_dim, config.dim, std=_residual_std(config))
        self.q_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, residual: Tensor, rotary: ops.Rotary, layout: AttentionLayout) -> Tensor:
        qkv = self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, self.head_dim)
        norm: dict[str, Any] = {"q_weight": self.q_norm, "k_weight": self.k_norm, "backend": self.backend}
        if self.sequence_group and len(x) < layout.total_length:
            q_THD, k_TGD, v_TGD = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            q_THD, k_TGD = ops.rope(q_THD, k_TGD, rotary, **norm)
            attention = partial(ops.hybrid_attention, layout=layout, backend=self.backend)
            parts = layout.total_length // len(x)
            out_THD = exchange_heads(attention, q_THD, k_TGD, v_TGD, self.sequence_group, parts)
        else:
            out_THD = ops.rotary_attention(qkv, self.kv_heads, rotary, layout, **norm)
        return self.out(out_THD.flatten(1), residual)


class SwiGLU(nn.Module):
    """residual + down(silu(gate(x)) * up(x)) (arXiv 2002.05202) for x and the residual [T, E]."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend):
        super().__init__()
        self.backend = backend
        self.gate_up = Linear(config.dim, 2 * config.hidden_dim)
        self.down = ResidualLinear(config.hidden_dim, config.dim, std=_residual_std(config))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate_up(x), backend=self.backend), residual)


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: TransformerConfig, backend: ops.Backend):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, backend)
        self.attention = Attention(config, backend)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, backend)
        self.mlp = SwiGLU(config, backend)

    def forward(self, x: Tensor, rotary: ops.Rotary, layout: AttentionLayout) -> Tensor:
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


def _residual_std(config: TransformerConfig) -> float:
    """Return the smaller standard deviation of the weights that write to the residual stream.

    The stream's variance then does not grow with the depth.
    """
    return INIT_STD / (2 * config.depth) ** 0.5


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


def _call(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


# A block draws no random numbers, so no generator state needs saving, which on a GPU would be a copy to the host.
_full = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_selective = partial(_full, context_fn=partial(create_selective_checkpoint_contexts, _keep))

CHECKPOINTING: dict[str, Callable[..., Tensor]] = {"none": _call, "selective": _selective, "full": _full}
"""Functions that call a block, by the setting `model.activation_checkpointing`."""
