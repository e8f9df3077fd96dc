"""Transfusion (arXiv 2408.11039): one transformer over text tokens and image patches, with a head for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from transfusion_fast.model.codec import Codec, make_codec
from transfusion_fast.model.diffusion import Diffusion
from transfusion_fast.model.grouped_layers import CONDITION_DIM, GroupedBlock, GroupedNorm, group_positions, merge
from transfusion_fast.model.inputs import (
    Document,
    Randomness,
    TrainingDocument,
    encode_pieces,
    pack_documents,
    pack_rows,
)
from transfusion_fast.model.layers import (
    INIT_STD,
    Block,
    ContextAttention,
    Embedding,
    RMSNorm,
    TimestepEmbedding,
    checkpointing,
)
from transfusion_fast.model.loss import Counts, Losses, combine, soft_cap, token_cross_entropy
from transfusion_fast.model.packed_batch import ModalityBatch, PackedBatch
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.weights import WeightFiles, load_weights

MODEL_CONFIG = "config.json"
"""File of an exported folder that holds the settings of the model."""


class LanguageHead(nn.Module):
    """A linear layer from vectors [S, E] to logits [S, V], or, given labels [S], to what `token_cross_entropy` returns.

    Logits start with standard deviation E ** -0.5, so that the first loss is ln V. If the weight is `tied`, the norm
    before this layer sees to that.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int, tied: Tensor | None = None):
        super().__init__()
        self.logit_cap, self.z_loss, dim = config.logit_cap, config.z_loss, config.transformer.dim
        self.weight = nn.Parameter(torch.empty(vocabulary_size, dim).normal_(std=1 / dim)) if tied is None else tied

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        if labels is None:
            return soft_cap(F.linear(hidden, self.weight), self.logit_cap)
        return token_cross_entropy(hidden, self.weight, labels, self.logit_cap, self.z_loss)


class Transfusion(nn.Module):
    """The model. Letters as in sequence.py.

        model = Transfusion(num_text_tokens=256, dim_latent=192, transformer=dict(dim=512, depth=8))
        loss = model([[ids, latents, ids], [ids, (1, latents)]])                 # documents, see inputs.py
        loss = model(text_ids)                                                   # rows [B, T] that are laid out already
        loss, losses = model(text_ids, modality_tokens, modality_positions)      # and have images
        losses = model(packed_batch)                                             # the form that the trainer uses

    Args:
        config: every setting; or give the settings of `ModelConfig` by name.
        encoders: modules that map raw tensors to the latents of a modality, by its number. Pieces of this modality,
            also those of prompts, are then raw tensors; those of one shape are encoded as a batch [n, ..], with their
            graph, so that the encoder can be trained jointly. They are submodules, but not in what train/export.py
            writes: after `from_pretrained`, put them into `model.encoders` under str(modality).
        decoders: modules for what `sample` returns of a modality, from a batch of latents [n, ..] in the form that
            documents have.

    Raises:
        InputError: an unknown setting, or a value out of its range.
    """

    # sampling/decoder.py, which builds on the model, binds these methods.
    sample: Callable[..., list[Any]]
    """Continue prompts with text and images."""
    generate_text: Callable[..., list[Tensor]]
    """Continue prompts with text alone."""
    generate_images: Callable[..., Tensor]
    """Draw images after prompts."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        encoders: Mapping[int, nn.Module] | None = None,
        decoders: Mapping[int, nn.Module] | None = None,
        **settings: Any,
    ):
        super().__init__()
        if config is not None and settings:
            raise ValueError(f"give a ModelConfig or settings by name, not both, got {', '.join(settings)} as well")
        self.config = config = parse(ModelConfig, settings, "Transfusion(...)") if config is None else config
        transformer = config.transformer
        self.vocabulary = Vocabulary.of(config)
        self.diffusion = Diffusion(config.diffusion)
        self.diffusion.warn_of_wide_patches(config.dim_latent)
        self.embedding = Embedding(self.vocabulary.size, transformer.dim)
        adaln, modalities = transformer.conditioning == "adaln", len(config.modalities)
        self.separate = transformer.modality_weights == "separate"
        self.codecs = nn.ModuleList(make_codec(modality, transformer.dim, not adaln) for modality in config.modalities)
        self.conditions = nn.ModuleList(TimestepEmbedding(CONDITION_DIM) for _ in range(adaln * modalities))
        self.grouped = adaln or self.separate
        block = partial(GroupedBlock, modalities=modalities) if self.grouped else Block
        self.blocks = nn.ModuleList(block(transformer, config.backend) for _ in range(transformer.depth))
        # Logits of tied weights would start near E * INIT_STD at the token that a position holds.
        initial = min(1.0, 1 / (transformer.dim * INIT_STD)) if config.tie_embeddings else 1.0
        norm = (transformer.dim, transformer.norm_eps, config.backend, initial)
        self.norm = GroupedNorm(modalities, *norm) if self.separate else RMSNorm(*norm)
        tied = self.embedding.weight if config.tie_embeddings else None
        self.head = LanguageHead(config, self.vocabulary.size, tied)
        for number in (*(encoders or {}), *(decoders or {})):
            if number not in range(modalities):
                rule = f"encoders and decoders must be of modalities in [0, {modalities})"
                raise ValueError(f"{rule}, got {number!r}; correct the number")
        self.encoders = nn.ModuleDict({str(number): module for number, module in (encoders or {}).items()})
        self.decoders = nn.ModuleDict({str(number): module for number, module in (decoders or {}).items()})

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
        text_weights: Tensor | None = None,
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
        text_weights: Tensor | None = None,
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
        text_weights: Tensor | None = None,
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
            text_weights: weights of the losses of the tokens of rows, [B, T], as `inputs.pack_rows` takes them.

        Returns:
            `Losses` for a packed batch; the total loss for documents, and for rows without images; the total loss and
            `Losses` for rows with images.

        Raises:
            ValueError: naming the input that does not fit the model, or that does not belong to this form of `batch`.
        """
        of_rows = {"modality_tokens": modality_tokens, "modality_positions": modality_positions}
        for name, value in (of_rows | {"text_weights": text_weights}).items():
            if value is not None and not isinstance(batch, Tensor):
                raise ValueError(f"{name} must come with text_ids [B, T], got another batch; put them into it")
        if isinstance(batch, PackedBatch):
            if generator is not None or (noise_cap, prob_uncond, noised_copies) != (NOISE_CAP, PROB_UNCOND, 0):
                rule = "generator, noise_cap, prob_uncond and noised_copies must come with documents or rows"
                raise ValueError(f"{rule}, got a PackedBatch, which has its noise; leave them out")
            if (widths := tuple(x.latents.shape[1] for x in batch.modalities)) != self.config.dim_latent:
                rule = f"a PackedBatch must have modalities of {self.config.dim_latent} channels, as this model"
                raise ValueError(f"{rule}, got {widths}; make it with this model's config")
            return super().__call__(batch, counts)
        if counts is not None:
            raise ValueError("counts must come with a PackedBatch, got documents or rows; leave them out")
        randomness = Randomness(generator, noise_cap, prob_uncond, noised_copies)
        if isinstance(batch, Tensor):
            images = (modality_tokens, modality_positions)
            packed = pack_rows(batch, *images, self.config, randomness, self.encoded, text_weights)
            losses = super().__call__(packed.to(self.device))
            return losses.total if modality_tokens is None and modality_positions is None else (losses.total, losses)
        return super().__call__(pack_documents(batch, self.config, randomness, self.encoded).to(self.device)).total

    def forward(self, batch: PackedBatch, counts: Counts | None = None) -> Losses:
        """Return the losses of a packed batch, divided by `counts`; default: its own tokens and images, weighted."""
        for images in batch.modalities:
            if images.timesteps.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"timesteps must be fp32, got {images.timesteps.dtype}, which rounds them; keep the batch in fp32, "
                    "with FSDP2 by MixedPrecisionPolicy(cast_forward_inputs=False)"
                )
        x_t = [self.noisy(images) for images in batch.modalities]
        hidden, encoded = self.hidden(batch, x_t)
        supervised = hidden.index_select(0, batch.supervised)
        token_losses, z_losses = self.head(supervised, batch.labels.index_select(0, batch.supervised))
        none, backend = hidden.new_zeros(0, dtype=torch.float32), self.config.backend
        image_losses, scaled = [none], [none]
        for number, images in enumerate(batch.modalities):
            prediction = self.prediction(hidden, batch, number, encoded[number])
            clean, offsets = images.latents[: images.trained_patches], images.image_offsets[: images.num_trained + 1]
            timesteps = images.timesteps[: images.num_trained]
            losses = self.diffusion.losses(prediction, clean, images.noise, timesteps, offsets, backend)
            image_losses.append(losses)
            scaled.append(losses * self.config.modalities[number].loss_weight)
        return combine(
            token_losses,
            torch.cat(image_losses),
            torch.cat(scaled),
            self.config.diffusion_weight,
            counts,
            image_weights=torch.cat([none, *(images.weights for images in batch.modalities)]),
            token_weights=batch.token_weights,
            z_losses=z_losses,
        )

    def hidden(
        self, batch: PackedBatch, x_t: Sequence[Tensor], attentions: Sequence[ContextAttention] | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Run the transformer on a batch whose patches are x_t [P, C], noisy, for each modality.

        In decoding, the batch holds new positions of sequences, and `attentions` takes the place of its layout in each
        block.

        Returns:
            the last layer's output after its norm, [T, E]; and for each modality what `prediction` needs of its codec.
        """
        inputs = enumerate(zip(batch.modalities, x_t, strict=True))
        encoded = [self._codec(modality).encode(noisy, images) for modality, (images, noisy) in inputs]
        patches, states = [vectors for vectors, _ in encoded], [state for _, state in encoded]
        transformer = self.config.transformer
        rotary = ops.rotary(batch.positions, transformer.head_dim, transformer.rope_theta)
        run = checkpointing(self.config.activation_checkpointing if self.training else "none", transformer.dropout)
        layouts = [batch.layout] * len(self.blocks) if attentions is None else attentions
        if self.grouped:
            return self._grouped_hidden(batch, patches, rotary, run, layouts), states
        x = self.embedding(batch.tokens)
        for images, vectors in zip(batch.modalities, patches, strict=True):
            x = x.index_copy(0, images.sequence_index, vectors.to(x.dtype))
        for block, layout in zip(self.blocks, layouts, strict=True):
            x = run(block, x, rotary, layout)
        return self.norm(x)[0], states

    def _grouped_hidden(
        self,
        batch: PackedBatch,
        patches: Sequence[Tensor],
        rotary: ops.Rotary,
        run: Callable[..., Any],
        layouts: Sequence[Any],
    ) -> Tensor:
        """Return the hidden states [T, E] from the vectors of the patches of each modality, [P, E]."""
        positions = group_positions(batch)
        text = self.embedding(batch.tokens.index_select(0, positions[0]))
        groups = (text, *(vectors.to(text.dtype) for vectors in patches))
        conditions = tuple(
            (F.silu(embed(images.timesteps)), _image_of_patch(images))
            for embed, images in zip(self.conditions, batch.modalities, strict=False)
        )
        for block, layout in zip(self.blocks, layouts, strict=True):
            groups = run(block, groups, rotary, layout, positions, conditions)
        if self.separate:
            return merge([[x] for x in self.norm(groups)], positions)
        return self.norm(merge([[x] for x in groups], positions))[0]

    def prediction(self, hidden: Tensor, batch: PackedBatch, modality: int, encoded: Any) -> Tensor:
        """Return the diffusion head's output for one modality's trained images, [P', C] in the weights' dtype.

        `hidden` and `encoded`, of this modality, are what `hidden` returned.
        """
        images = batch.modalities[modality]
        index = images.sequence_index[: images.trained_patches]
        return self._codec(modality).decode(hidden.index_select(0, index), encoded)

    def noisy(self, images: ModalityBatch) -> Tensor:
        """Return the patches that the model sees, [P, C]: those of trained images noisy, those of others clean."""
        clean, timesteps = images.latents[: images.trained_patches], images.timesteps[: images.num_trained]
        patches = images.image_offsets[: images.num_trained + 1].diff()
        per_patch = timesteps.repeat_interleave(patches, output_size=len(clean))[:, None]
        noisy = self.diffusion.add_noise(clean, images.noise, per_patch)
        return torch.cat([noisy, images.latents[len(clean) :]]) if len(clean) < len(images.latents) else noisy

    def encoded(self, documents: Sequence[Document]) -> Sequence[Document]:
        """Return documents with latents in place of the raw pieces that `encoders` map to them."""
        if not self.encoders:
            return documents
        return encode_pieces(documents, {int(k): module for k, module in self.encoders.items()}, self.device)

    def decoded(self, latents: Tensor, modality: int) -> Sequence[Any]:
        """Return the pieces of documents for latents [n, *grid, C], as the decoder gives them if there is one."""
        if self.config.modalities[modality].channel_first:
            latents = latents.movedim(-1, 1)
        name = str(modality)
        return self.decoders[name](latents.to(self.device)) if name in self.decoders else list(latents)

    def _codec(self, modality: int) -> Codec:
        return cast(Codec, self.codecs[modality])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.norm.weight.device


def _image_of_patch(images: ModalityBatch) -> Tensor:
    """Return the number of each patch's image, [P]."""
    return torch.repeat_interleave(images.image_offsets.diff(), output_size=len(images.latents))


def read_model_config(folder: Path) -> ModelConfig:
    """Return the model settings of a folder that train/export.py wrote; raise InputError if it is none."""
    config = read_json(folder / MODEL_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise InputError(
            f"{folder} must be a folder that train/export.py wrote, got no {MODEL_CONFIG} of a model; export a run"
        )
    return parse(ModelConfig, config["model"], str(folder / MODEL_CONFIG))
