"""Transfusion models, trained fast: text by next-token prediction, images by diffusion, in one transformer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transfusion_fast.config import ModelConfig
    from transfusion_fast.loss import Losses
    from transfusion_fast.model import Transfusion
    from transfusion_fast.sequence import Document, Image, PackedBatch, Text, Vocabulary

__all__ = ["Document", "Image", "Losses", "ModelConfig", "PackedBatch", "Text", "Transfusion", "Vocabulary"]

_MODULES = {"ModelConfig": "config", "Losses": "loss", "Transfusion": "model"}


def __getattr__(name: str) -> Any:
    """Imports a name's module when it is first asked for: the kernels alone need no more than torch and triton."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'sequence')}"), name)
