"""Transfusion models, trained fast: text by next-token prediction, images by diffusion, in one transformer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfusion_fast.config import ModelConfig
    from transfusion_fast.model.loss import Losses
    from transfusion_fast.model.loss_weights import Weighted
    from transfusion_fast.model.packed_batch import PackedBatch
    from transfusion_fast.model.sequence import Vocabulary
    from transfusion_fast.sampling.decoder import Transfusion
    from transfusion_fast.sampling.settings import ImageSettings, TextSettings

__all__ = [
    "ImageSettings", "Losses", "ModelConfig", "PackedBatch", "TextSettings", "Transfusion", "Vocabulary", "Weighted",
]  # fmt: skip

_MODULES = {
    "ImageSettings": "sampling.settings",
    "Losses": "model.loss",
    "ModelConfig": "config",
    "PackedBatch": "model.packed_batch",
    "TextSettings": "sampling.settings",
    "Transfusion": "sampling.decoder",
    "Vocabulary": "model.sequence",
    "Weighted": "model.loss_weights",
}


def __getattr__(name: str) -> Any:
    """Import the module of a name when the name is first used: the kernels need nothing but torch and triton."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
