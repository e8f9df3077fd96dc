"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again.

none       everything that its operations save
selective  its input, and what attention returned: everything is computed again but attention, which takes most of
           the time and whose output and log-sum-exp take little memory
full       its input
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Attention by the kernel of this project, and by those behind scaled_dot_product_attention.
_KEPT = frozenset(
    {
        "transfusion_fast::hybrid_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation._schema.name in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _call(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


# Nothing in a block is random, so no state of a generator has to be kept, which on a GPU is a copy to the host.
_full = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_selective = partial(_full, context_fn=partial(create_selective_checkpoint_contexts, _keep))

CHECKPOINTING: dict[str, Callable[..., Tensor]] = {"none": _call, "selective": _selective, "full": _full}
"""How to call a block, by the setting `model.activation_checkpointing`."""
