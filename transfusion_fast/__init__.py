"""Transfusion models, trained fast: text by next-token prediction, images by diffusion, in one transformer."""

from transfusion_fast.config import ModelConfig
from transfusion_fast.loss import Losses
from transfusion_fast.model import Transfusion
from transfusion_fast.sequence import Document, Image, PackedBatch, Text, Vocabulary

__all__ = ["Document", "Image", "Losses", "ModelConfig", "PackedBatch", "Text", "Transfusion", "Vocabulary"]
