"""CLIP score (arXiv 2104.08718): how well images fit their captions, by a CLIP model from a local folder.

100 max(cos(image embedding, caption embedding), 0), where the paper has the factor 2.5
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from transfusion_fast.data.latent_encoder import device_of_latents
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.sampling.frechet import to_colour
from transfusion_fast.sampling.pictures import Images

_BATCH = 32  # pairs at once


class Clip:
    """A CLIP model and its processor, in fp32."""

    def __init__(self, folder: Path) -> None:
        """Read the folder that transformers' `save_pretrained` of both wrote.

        Raises:
            InputError: it holds none, its weights are pickled or incomplete, or transformers is missing.
        """
        transformers = optional_module("transformers", "encoder")
        logging.getLogger("transformers").setLevel(logging.ERROR)  # what it would warn of is an error below
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        remedy = "give a folder that save_pretrained of a CLIPModel and of its CLIPProcessor wrote"
        try:
            self.processor = transformers.CLIPProcessor.from_pretrained(folder, **local)
            model, found = transformers.CLIPModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **local
            )
        except (
            OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AttributeError, SafetensorError,
        ) as error:  # fmt: skip
            line = " ".join(str(error).split())
            raise InputError(f"CLIP model {folder} must be readable, got {line:.200}; {remedy}") from error
        if missing := sorted(map(str, found["missing_keys"])):
            raise InputError(f"weights in {folder} must be those of its config, got none for {missing[0]}; {remedy}")
        self.model = model.to(device_of_latents()).float().eval()

    @torch.inference_mode()
    def scores(self, images: Images, captions: Sequence[str]) -> np.ndarray:
        """Return the score of each image, uint8 [height, width, 1 or 3], with its caption: [n], from 0 to 100."""
        scores = []
        for start in range(0, len(images), _BATCH):
            some = slice(start, start + _BATCH)
            inputs = self.processor(
                images=[to_colour(image) for image in images[some]], text=list(captions[some]),
                return_tensors="pt", padding=True, truncation=True,
            )  # fmt: skip
            found = self.model(**inputs.to(self.model.device))
            scores.append(100 * torch.cosine_similarity(found.image_embeds, found.text_embeds).clamp(min=0).cpu())
        return torch.cat(scores).numpy()
