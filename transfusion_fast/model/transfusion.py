"""Transfusion (arXiv 2408.11039): one transformer over text tokens and image patches, with a head for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_fast.config import NOISE_CAP, PROB_UNCOND, ModelConfig
from transfusion_fast.config_reading import parse
from transfusion_fast.errors import InputError
from transfusion_fast.files import read_json
from transfusion_fast.model import ops
from transfusion_fast.model.codec import LinearCodec
from transfusion_fast.model.diffusion import OBJECTIVES
from transfusion_fast.model.inputs import Randomness, TrainingDocument, pack_documents, pack_rows
from transfusion_fast.model.layers import CHECKPOINTING, Block, Embedding, RMSNorm
from transfusion_fast.model.loss import Counts, Losses, combine, token_cross_entropy
from transfusion_fast.model.sequence import ModalityBatch, PackedBatch, Vocabulary
from transfusion_fast.model.weights import WeightFiles, load_weights

MODEL_CONFIG = "config.json"
"""File of an exported folder that holds the settings of the model."""


class LanguageHead(nn.Module):
    """A linear layer from vectors [S, E] to logits [S, V], or, given labels [S], to cross-entropies fp32 [S].

    Logits start with standard deviation E ** -0.5, so that the first loss is ln V; but not if the weight is `tied`.
    """

    def __init__(self, dim: int, vocabulary_size: int, tied: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary_size, dim).normal_(std=1 / dim)) if tied is None else tied

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(hidden, self.weight)
        return token_cross_entropy(hidden, self.weight, labels)


class Transfusion(nn.Module):
    """The model. Letters as in sequence.py.

        model = Transfusion(num_text_tokens=256, dim_latent=192, transformer=dict(dim=512, depth=8))
        loss = model([[ids, latents, ids], [ids, (1, latents)]])                 # documents, see inputs.py
        loss = model(text_ids)                                                   # rows [B, T] that are laid out already
        loss, losses = model(text_ids, modality_tokens, modality_positions)      # and have images
        losses = model(packed_batch)                                             # the form that the trainer uses

    Args:
        config: every setting; or give the settings of `ModelConfig` by name.

    Raises:
        InputError: an unknown setting, or a value out of its range.
    """

    sample: Callable[..., list[Any]]
    """Continue prompts with text and images; `sampling/decoder.py`, which builds on the model, binds this method."""

    def __init__(self, config: ModelConfig | None = None, **settings: Any):
        super().__init__()
        if config is not None and settings:
            raise ValueError(f"give a ModelConfig or settings by name, not both, got {', '.join(settings)} as well")
        self.config = config = parse(ModelConfig, settings, "Transfusion(...)") if config is None else config
        transformer = config.transformer
        self.vocabulary = Vocabulary(config.num_text_tokens, len(config.dim_latent))
        self.objective = OBJECTIVES[config.objective]
        self.embedding = Embedding(self.vocabulary.size, transformer.dim)
        self.codecs = nn.ModuleList(LinearCodec(width, transformer.dim) for width in config.dim_latent)
        self.blocks = nn.ModuleList(Block(transformer, config.backend) for _ in range(transformer.depth))
        self.norm = RMSNorm(transformer.dim, transformer.norm_eps, config.backend)
        tied = self.embedding.weight if config.tie_embeddings else None
        self.head = LanguageHead(transformer.dim, self.vocabulary.size, tied)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Transfusion:
        """Return the model in a folder that train/export.py wrote, fp32, on one device, in evaluation mode.

        Raises:
            InputError: the folder is not an export, or its files are damaged or do not fit each other.
        """
        folder = Path(folder)
        with torch.device(device):
            model = cls(read_model_config(folder))
        load_weights(model, WeightFiles(folder), folder)
        return model.eval()

    @overload
    def __call__(self, batch: PackedBatch, *, counts: Counts | None = None) -> Losses: ...

    @overload
    def __call__(
        self,
        batch: Tensor | Sequence[TrainingDocument],
        *,
        generator: torch.Generator | None = None,
        noise_cap: float = NOISE_CAP,
        prob_uncond: float = PROB_UNCOND,
        noised_copies: int = 0,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        batch: Tensor,
        modality_tokens: Sequence[Sequence[Tensor]],
        modality_positions: Sequence[Sequence[tuple[int, ...]]],
        *,
        generator: torch.Generator | None = None,
        noise_cap: float = NOISE_CAP,
        prob_uncond: float = PROB_UNCOND,
        noised_copies: int = 0,
    ) -> tuple[Tensor, Losses]: ...

    def __call__(
        self,
        batch: PackedBatch | Tensor | Sequence[TrainingDocument],
        modality_tokens: Sequence[Sequence[Tensor]] | None = None,
        modality_positions: Sequence[Sequence[tuple[int, ...]]] | None = None,
        *,
        counts: Counts | None = None,
        generator: torch.Generator | None = None,
        noise_cap: float = NOISE_CAP,
        prob_uncond: float = PROB_UNCOND,
        noised_copies: int = 0,
    ) -> Losses | Tensor | tuple[Tensor, Losses]:
        """Return the training loss of a packed batch, of documents, or of rows.

        Args:
            batch: a `PackedBatch`; documents as `inputs.pack_documents` takes them; or rows of ids, int64 [B, T].
            modality_tokens, modality_positions: the images of rows, as `inputs.pack_rows` takes them.
            counts: divisors of the losses of a packed batch; default: its own tokens and images.
            generator: source of all that is random in documents and rows: timesteps, noise and dropped conditions.
            noise_cap: largest timestep, 1 to 1000, of an image that its document begins with and only text follows.
            prob_uncond: probability that an image is trained without what precedes it, for classifier-free guidance.
            noised_copies: number of noised copies of each image, which are trained while the image itself is a clean
                context for what follows; 0 noises images in place, as in the paper, and what follows sees them noised.

        Returns:
            `Losses` for a packed batch; the total loss for documents, and for rows without images; the total loss and
            `Losses` for rows with images.

        Raises:
            ValueError: naming the input that does not fit the model, or that does not belong to this form of `batch`.
        """
        if not isinstance(batch, Tensor) and (modality_tokens is not None or modality_positions is not None):
            raise ValueError("modality_tokens must come with text_ids [B, T], got another batch; put images into it")
        if isinstance(batch, PackedBatch):
            if generator is not None:
                raise ValueError("a generator must come with documents or rows, got a PackedBatch, which has its noise")
            return super().__call__(batch, counts)
        if counts is not None:
            raise ValueError("counts must come with a PackedBatch, got documents or rows; leave them out")
        randomness = Randomness(generator, noise_cap, prob_uncond, noised_copies)
        if isinstance(batch, Tensor):
            packed = pack_rows(batch, modality_tokens, modality_positions, self.config, randomness)
            losses = super().__call__(packed.to(self.device))
            return losses.total if modality_tokens is None and modality_positions is None else (losses.total, losses)
        return super().__call__(pack_documents(batch, self.config, randomness).to(self.device)).total

    def forward(self, batch: PackedBatch, counts: Counts | None = None) -> Losses:
        """Return the losses of a packed batch, divided by `counts`; default: its own tokens and images, weighted."""
        for images in batch.modalities:
            if images.timesteps.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"timesteps must be fp32, got {images.timesteps.dtype}, which rounds them; keep the batch in fp32, "
                    "with FSDP2 by MixedPrecisionPolicy(cast_forward_inputs=False)"
                )
        x_t = [self.noisy(images) for images in batch.modalities]
        hidden = self.hidden(batch, x_t)
        supervised = hidden.index_select(0, batch.supervised)
        token_losses = self.head(supervised, batch.labels.index_select(0, batch.supervised))
        none, backend = hidden.new_zeros(0, dtype=torch.float32), self.config.backend
        image_losses = [none]
        for number, images in enumerate(batch.modalities):
            prediction = self.prediction(hidden, batch, number)
            clean, noise = images.latents[: images.trained_patches], images.noise
            offsets = images.image_offsets[: images.num_trained + 1]
            errors = ops.diffusion_mse_from_noise(
                prediction, clean, noise, offsets, self.config.objective, backend=backend
            )
            image_losses.append(errors)
        image_weights = torch.cat([none, *(images.weights for images in batch.modalities)])
        weight = self.config.diffusion_weight
        return combine(token_losses, torch.cat(image_losses), weight, counts, batch.token_weights, image_weights)

    def hidden(self, batch: PackedBatch, x_t: Sequence[Tensor]) -> Tensor:
        """Return the last layer's output after its norm, [T, E], for a batch whose patches are x_t [P, C], noisy."""
        x = self.embedding(batch.tokens)
        for modality, (images, noisy) in enumerate(zip(batch.modalities, x_t, strict=True)):
            patches = self._codec(modality).encode(noisy, images.timesteps, images.image_offsets)
            x = x.index_copy(0, images.sequence_index, patches.to(x.dtype))
        transformer = self.config.transformer
        rotary = ops.rotary(batch.positions, transformer.head_dim, transformer.rope_theta)
        run = CHECKPOINTING[self.config.activation_checkpointing if self.training else "none"]
        for block in self.blocks:
            x = run(block, x, rotary, batch.layout)
        return self.norm(x)[0]

    def prediction(self, hidden: Tensor, batch: PackedBatch, modality: int) -> Tensor:
        """Return the diffusion head's output for one modality's trained images, [P', C] in the weights' dtype."""
        images = batch.modalities[modality]
        return self._codec(modality).decode(hidden.index_select(0, images.sequence_index[: images.trained_patches]))

    def noisy(self, images: ModalityBatch) -> Tensor:
        """Return the patches that the model sees, [P, C]: those of trained images noisy, those of others clean."""
        clean, timesteps = images.latents[: images.trained_patches], images.timesteps[: images.num_trained]
        patches = images.image_offsets[: images.num_trained + 1].diff()
        per_patch = timesteps.repeat_interleave(patches, output_size=len(clean))[:, None]
        noisy = self.objective.add_noise(clean, images.noise, per_patch)
        return torch.cat([noisy, images.latents[len(clean) :]]) if len(clean) < len(images.latents) else noisy

    def _codec(self, modality: int) -> LinearCodec:
        return cast(LinearCodec, self.codecs[modality])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.norm.weight.device


def read_model_config(folder: Path) -> ModelConfig:
    """Return the model settings of a folder that train/export.py wrote; raise InputError if it is none."""
    config = read_json(folder / MODEL_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise InputError(
            f"{folder} must be a folder that train/export.py wrote, got no {MODEL_CONFIG} of a model; export a run"
        )
    return parse(ModelConfig, config["model"], str(folder / MODEL_CONFIG))
