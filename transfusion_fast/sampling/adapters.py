"""The calls of two earlier systems, in terms of this project's model.

`TransfusionAdapter` has those of transfusion-pytorch 0.20, `SegmentAdapter` those of systems that take a sample as
segments, `(patches, timestep)` pairs of images among them. Both wrap a `Transfusion`, so that a program can be moved
call by call; docs/sampling.md lists what replaces each call. Weights of the earlier systems do not fit this model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Document, Piece, place_images
from transfusion_fast.model.packed_batch import CLEAN_TIMESTEP, PackedBatch, build_batch
from transfusion_fast.sampling.checks import check_modality, drawn_sizes, known_size
from transfusion_fast.sampling.decoder import Transfusion, generate_images, generate_text, sample
from transfusion_fast.sampling.engine import Grid
from transfusion_fast.sampling.settings import ImageSettings, TextSettings

Prompt = Document | Piece | None
Segment = Tensor | tuple[Tensor, Tensor]
"""Ids int64 [T], or (patches fp32 [N, C], timestep [1]) of an image."""
_REPLACED = {
    "model_output_clean": "diffusion={'process': 'flow', 'prediction': 'x0', 'loss': 'velocity'}",
    "add_pos_emb": "positions='axial'",
    "pre_post_transformer_enc_dec": "codec='unet'",
    "fallback_to_default_shape_if_invalid": "size_tokens, with which no size that the model chooses is invalid",
    "to_modality_shape_fn": "size_tokens, with which the model chooses sizes by tokens of their own",
    "modality_num_dim": "modality_default_shape, which has as many numbers",
    "ignore_index": "Weighted(piece, 0) in documents, or text_weights of rows",
    "flow_loss_weight": "diffusion_weight",
    "text_loss_weight": "diffusion_weight, the weight of images against text",
    "reconstruction_loss_weight": "a loss of your own on model.encoders and model.decoders",
    "odeint_kwargs": "ImageSettings(sampler=...)",
    "prob_uncond": "prob_uncond of the call, model(documents, prob_uncond=...)",
}
"""Settings of the earlier constructor, and what takes their place."""


def _refuse(name: str, got: object, instead: str) -> None:
    raise InputError(f"{name} must be left out, got {got!s:.40}; use {instead}")


def _each(value: Any, count: int, name: str) -> tuple[Any, ...]:
    """Return the values of a setting for each modality; one value stands for all."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * count
    if len(values) != count:
        raise InputError(f"{name} must have a value for each of {count} modalities, got {len(values)}; correct it")
    return values


def _is_text(piece: Any) -> bool:
    return isinstance(piece, Tensor) and piece.dtype == torch.int64 and piece.ndim == 1


def _joined(pieces: Sequence[Any]) -> list[Any]:
    """Return a document in which neighbouring texts are one, on the CPU, and all images are (modality, tensor)."""
    joined: list[Any] = []
    for piece in pieces:
        if not _is_text(piece):
            joined.append(piece if isinstance(piece, tuple) else (0, piece))
        elif joined and _is_text(joined[-1]):
            joined[-1] = torch.cat([joined[-1], piece.cpu()])
        else:
            joined.append(piece.cpu())
    return joined


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**62, ()).item()) if seed is None else seed


class TransfusionAdapter(nn.Module):
    """A `Transfusion` with the constructor's settings and the methods of transfusion-pytorch 0.20.

    Calling it calls the model. Prompts and results hold no special tokens. A `seed` that is not given is drawn from
    torch's generator.
    """

    def __init__(self, model: Transfusion):
        super().__init__()
        self.model = model

    @classmethod
    def create(
        cls,
        *,
        transformer: Mapping[str, Any],
        dim_latent: int | tuple[int, ...] | None = None,
        channel_first_latent: bool | tuple[bool, ...] = False,
        modality_default_shape: Grid | tuple[Grid | None, ...] | None = None,
        modality_encoder: nn.Module | tuple[nn.Module | None, ...] | None = None,
        modality_decoder: nn.Module | tuple[nn.Module | None, ...] | None = None,
        **settings: Any,
    ) -> TransfusionAdapter:
        """Return an adapter of a new model.

        Args:
            dim_latent: width of the latents of each modality; default: that of the transformer.
            channel_first_latent: whether latents are [C, rows, columns]; our `channel_first`.
            modality_default_shape: size in patches that is drawn of each modality; our `shape` and `dims`.
            modality_encoder, modality_decoder: modules for batches of each modality; our `encoders` and `decoders`.
            settings: those of `ModelConfig`. `diffusion={"process": "flow"}` trains as the earlier system.
        """
        for name in settings.keys() & _REPLACED.keys():
            _refuse(name, settings[name], _REPLACED[name])
        widths = transformer["dim"] if dim_latent is None else dim_latent
        widths = widths if isinstance(widths, tuple | list) else (widths,)
        count, shape = len(widths), modality_default_shape
        one = isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)
        shapes = _each((shape,) * count if one else shape, count, "modality_default_shape")
        channel_first = _each(channel_first_latent, count, "channel_first_latent")
        modalities = [
            {"dim_latent": width, "channel_first": first, "shape": own, "dims": 2 if own is None else len(own)}
            for width, first, own in zip(widths, channel_first, shapes, strict=True)
        ]
        encoders = {n: x for n, x in enumerate(_each(modality_encoder, count, "modality_encoder")) if x is not None}
        decoders = {n: x for n, x in enumerate(_each(modality_decoder, count, "modality_decoder")) if x is not None}
        settings |= {"modalities": modalities, "transformer": transformer}
        return cls(Transfusion(encoders=encoders, decoders=decoders, **settings))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, with the arguments of `Transfusion`."""
        return self.model(*args, **kwargs)

    def sample(self, prompt: Prompt = None, *, cache_kv: bool = True, **arguments: Any) -> list[Piece]:
        """Continue one prompt; the other arguments are those of `sample_many`. There is always a cache."""
        if not cache_kv:
            _refuse("cache_kv", cache_kv, "the cache, which changes no result")
        return self.sample_many([prompt], **arguments)[0]

    def sample_many(
        self,
        prompts: Sequence[Prompt] | None = None,
        max_length: int = 2048,
        text_temperature: float = 1.0,
        text_min_p: float = 0.1,
        fixed_modality_shape: Grid | None = None,
        force_modality_at_start: int | tuple[int, Grid] | None = None,
        init_modality_noise: Tensor | None = None,
        modality_steps: int = 16,
        return_unprocessed_modalities: bool = False,
        return_without_prompt: bool = False,
        cfg_scale: float = 3.0,
        *,
        seed: int | None = None,
    ) -> list[list[Piece]]:
        """Continue each prompt, a document, a single piece of one, or None, until <eos> or `max_length`.

        Args:
            max_length: most new ids and patches. No image begins beyond it; one that began before it is whole.
            text_temperature, text_min_p: `temperature` and `min_p` of `TextSettings`.
            fixed_modality_shape: `grids` of `sample`, the same for all modalities.
            force_modality_at_start: `begin` of `sample`, or (begin, the size of all images of this modality).
            init_modality_noise: fp32 [patches, C], the noise of every image, which takes as many rows and columns as it
                has patches and values; `noise` of `sample`.
            modality_steps, cfg_scale: `steps` and `guidance` of `ImageSettings`.
            return_without_prompt: return only the new images.

        Returns:
            The prompt and its continuation, as one document each, in which each image is (modality, tensor).
        """
        if return_unprocessed_modalities:
            _refuse("return_unprocessed_modalities", True, "generate_modality_only, or a model without decoders")
        given = [None] if prompts is None else prompts
        documents: list[Any] = [[] if one is None else one if isinstance(one, list) else [one] for one in given]
        begin, chooses = force_modality_at_start, self.model.vocabulary.max_size > 0
        grids = [fixed_modality_shape] * len(self.model.codecs)
        if isinstance(begin, tuple):
            check_modality(self.model, begin[0])
            grids[begin[0]], begin = begin[1], begin[0]
        sizes = drawn_sizes(self.model, grids, [init_modality_noise if chooses else None] * len(grids), begin)
        if chooses and any(sizes[int(number)] is None for number in self.model.decoders):
            rule = "fixed_modality_shape must be given for a model with size tokens and decoders"
            raise InputError(f"{rule}, got None, and patches cannot be counted up to max_length; use model.sample")
        least = min((math.prod(size or ()) for size in sizes if chooses or size is not None), default=1)
        produced = sample(
            self.model,
            documents,
            grids=sizes,
            begin=begin,
            noise=None if init_modality_noise is None else self._noise(init_modality_noise, sizes),
            max_images=1 + max_length // least,
            text=TextSettings(max_tokens=max_length, temperature=text_temperature, min_p=text_min_p),
            image=ImageSettings(steps=modality_steps, guidance=cfg_scale),
            seed=_seed(seed),
        )
        continuations = [_within(_joined(one), sizes, self.model.config.dim_latent, max_length) for one in produced]
        if return_without_prompt:
            return [[piece for piece in pieces if not _is_text(piece)] for pieces in continuations]
        return [_joined([*before, *pieces]) for before, pieces in zip(documents, continuations, strict=True)]

    def generate_text_only(
        self, prompt: Tensor, seq_len: int, temperature: float = 1.0, min_p: float = 0.1, *, seed: int | None = None
    ) -> Tensor:
        """Continue rows of ids [B, T] with text alone: int64 [B, seq_len - T], filled with <eos> after its end."""
        text = TextSettings(max_tokens=max(0, seq_len - prompt.shape[1]), temperature=temperature, min_p=min_p)
        texts = generate_text(self.model, [[row] for row in prompt], text=text, seed=_seed(seed))
        filled = torch.full((len(texts), text.max_tokens), self.model.vocabulary.eos)
        for row, ids in zip(filled, texts, strict=True):
            row[: len(ids)] = ids
        return filled

    def generate_modality_only(
        self,
        batch_size: int = 1,
        modality_type: int | None = None,
        fixed_modality_shape: Grid | None = None,
        modality_steps: int = 16,
        return_unprocessed_modalities: bool = False,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """Draw images of a modality without any prompt or guidance: what its decoder returns, or latents.

        Latents are fp32 [batch_size, rows, columns, C], or [batch_size, C, rows, columns] with channels first; they are
        returned in place of decoded images with `return_unprocessed_modalities`.
        """
        count, seed = len(self.model.codecs), _seed(seed)
        if modality_type is None and count > 1:
            raise InputError(f"modality_type must be in [0, {count}) for this model, got None; give a number")
        modality, prompts, image = modality_type or 0, [()] * batch_size, ImageSettings(modality_steps, guidance=1.0)
        size = known_size(self.model, modality, fixed_modality_shape)
        if return_unprocessed_modalities:
            latents = generate_images(self.model, prompts, size, modality=modality, image=image, seed=seed)
            return latents.movedim(-1, 1) if self.model.config.modalities[modality].channel_first else latents
        grids, text = [size if number == modality else None for number in range(count)], TextSettings(max_tokens=0)
        drawn = sample(self.model, prompts, grids=grids, begin=modality, text=text, image=image, seed=seed)
        return torch.stack([tensor for pieces in drawn for _, tensor in _joined(pieces)])

    def create_ema(self, beta: float = 0.99) -> AveragedAdapter:
        """Return an adapter of the moving average of this model over the calls of its `update`."""
        return AveragedAdapter(self, beta)

    def _noise(self, noise: Tensor, sizes: Sequence[Grid | None]) -> list[Tensor | None]:
        """Return the part of the noise [patches, C] that the images of each modality begin with."""
        parts: list[Tensor | None] = []
        for width, size in zip(self.model.config.dim_latent, sizes, strict=True):
            patches = 0 if size is None else math.prod(size)
            if noise.ndim != 2 or noise.shape[0] < patches or noise.shape[1] < width:
                rule = f"init_modality_noise must be at least [{patches}, {width}] for every modality that can be drawn"
                raise InputError(f"{rule}, got {tuple(noise.shape)}; give more, or `noise` to model.sample")
            parts.append(None if size is None else noise[:patches, :width].reshape(*size, width))
        return parts


class AveragedAdapter(TransfusionAdapter):
    """The moving average of another adapter's model: beta average + (1 - beta) weights at each call of `update`."""

    def __init__(self, online: TransfusionAdapter, beta: float):
        super().__init__(deepcopy(online.model).requires_grad_(False))
        self._average = get_ema_multi_avg_fn(beta)
        self._online = (online.model,)  # in a tuple, or it would be a submodule

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the average; call it after each step of the optimizer."""
        [online] = self._online
        self._average(list(self.model.parameters()), list(online.parameters()), 0)
        for average, own in zip(self.model.buffers(), online.buffers(), strict=True):
            average.copy_(own)


def _within(pieces: Sequence[Any], sizes: Sequence[Grid | None], widths: Sequence[int], max_length: int) -> list[Any]:
    """Return the pieces of a continuation up to a number of ids and patches; an image is never cut."""
    kept: list[Any] = []
    for piece in pieces:
        if max_length <= 0:
            break
        kept.append(piece[:max_length] if _is_text(piece) else piece)
        size = (len(piece),) if _is_text(piece) else sizes[piece[0]]
        max_length -= piece[1].numel() // widths[piece[0]] if size is None else math.prod(size)
    return kept


def _pairs(segments: Sequence[Any], strings: Sequence[Any]) -> list[tuple[Any, Any]]:
    if not segments or len(segments) != len(strings):
        got = f"{len(segments)} and {len(strings)}"
        raise InputError(f"there must be as many strings as segments, and at least one, got {got}; correct them")
    return list(zip(segments, strings, strict=True))


class SegmentAdapter(nn.Module):
    """A `Transfusion` of one modality and no size tokens, called with samples of segments that are laid out already.

        outputs, _ = SegmentAdapter(model)([[ids, (patches, timestep), ids]], [["text", "image", "text"]])

    Text is ids int64 [T] with the special tokens of `model.vocabulary` among them: <bos> first, <boi> before each image
    and <eoi> after it, <eos> last. An image is (patches, timestep): fp32 [N, C], noisy already, and a timestep in
    0..1000 of which 0 is clean. Patches have the modality's `shape` if it has N, else they are one row.
    """

    def __init__(self, model: Transfusion):
        super().__init__()
        others = model.encoders or model.decoders or model.config.size_tokens
        if len(model.codecs) != 1 or others or model.config.modalities[0].channel_first:
            rule = "the model must have one modality, with channels last, and no encoder, decoder or size tokens"
            raise InputError(f"{rule}, got another model; call it with documents")
        self.model, [self.width] = model, model.config.dim_latent

    def forward(
        self, modality_tokens: Sequence[Sequence[Segment]], modality_strings: Sequence[Sequence[str]]
    ) -> tuple[list[list[Tensor]], Sequence[Sequence[str]]]:
        """Return an output for each segment of each sample, and the strings; all samples run together.

        The output is the logits [1, T, V] of the next tokens for text, and the model's prediction [1, N, C] for an
        image, which is the noise unless `model.diffusion` says otherwise.
        """
        samples = [self._parts(*pair) for pair in _pairs(modality_tokens, modality_strings)]
        parts = [part for sample in samples for part in sample]
        batch = self._batch(parts, [sum(len(x) for x, _ in sample) for sample in samples])
        hidden, [encoded] = self.model.hidden(batch, [images.latents for images in batch.modalities])
        prediction = self.model.prediction(hidden, batch, 0, encoded)
        images = iter(prediction.split([len(x) for x, t in parts if t is not None]))
        text = hidden.split([len(x) for x, _ in parts])
        outputs = iter(
            (self.model.head(own) if t is None else next(images))[None] for (_, t), own in zip(parts, text, strict=True)
        )
        return [[next(outputs) for _ in sample] for sample in samples], modality_strings

    def generate(
        self,
        modality_tokens: Sequence[Segment],
        modality_strings: Sequence[str],
        diff_utils: object = None,
        autocast: AbstractContextManager[Any] | None = None,
        **settings: Any,
    ) -> tuple[list[Segment], list[str]]:
        """Continue a sample, which begins and ends with text, with text and images; after <boi> with an image.

        `settings` are those of `sample`, such as `text`, `image`, `max_images` and `seed`; they replace `diff_utils`.
        The result is the segments and strings of the sample and its continuation: clean images at timestep 0, between
        <boi> and <eoi>, and no <eos>.
        """
        if diff_utils is not None:
            _refuse("diff_utils", type(diff_utils).__name__, "image=ImageSettings(steps=..., guidance=...)")
        parts, vocabulary = self._parts(modality_tokens, modality_strings), self.model.vocabulary
        boi, eoi = torch.tensor([[vocabulary.boi()], [vocabulary.eoi()]])
        if parts[0][1] is not None or parts[-1][1] is not None:
            raise InputError(f"a sample must begin and end with text, got {modality_strings}; begin with <bos>")
        tokens, strings, last = list(modality_tokens[:-1]), list(modality_strings), parts[-1][0].cpu()
        begin = 0 if torch.equal(last[-1:], boi) else None
        last = last if begin is None else last[:-1]
        if noisy := [t for _, t in parts if t is not None and t > CLEAN_TIMESTEP]:
            raise InputError(f"images of a prompt must be clean, at timestep 0, got {noisy[0]:g}; give clean patches")
        prompt = [x[x < vocabulary.num_text_tokens] if t is None else self._in_grid(x) for x, t in parts]
        with autocast or nullcontext():
            [produced] = sample(self.model, [prompt], begin=begin, **settings)
        for piece in produced:
            if _is_text(piece):
                last = torch.cat([last, cast(Tensor, piece)])
            else:
                patches = cast(Tensor, piece).reshape(-1, self.width)
                tokens += [torch.cat([last, boi]), (patches, torch.zeros(1))]
                strings, last = [*strings, "image", "text"], eoi
        return [*tokens, last], strings

    def _parts(self, tokens: Sequence[Segment], strings: Sequence[str]) -> list[tuple[Tensor, float | None]]:
        """Return each segment as ids and None, or as patches and their timestep."""
        parts: list[tuple[Tensor, float | None]] = []
        size = self.model.vocabulary.size
        for number, (segment, string) in enumerate(_pairs(tokens, strings)):
            x, t = segment if isinstance(segment, tuple) and len(segment) == 2 else (segment, None)
            is_patches = isinstance(x, Tensor) and x.is_floating_point() and x.shape[1:] == (self.width,)
            if string == "image" and t is not None and is_patches and len(x):
                parts.append((x, float(t) or CLEAN_TIMESTEP))
            elif string == "text" and _is_text(segment) and ((x >= 0) & (x < size)).all():
                parts.append((x, None))
            else:
                rule = f"'text' of ids int64 [T] in 0..{size - 1}, or 'image' of (patches [N, {self.width}], timestep)"
                got = f"{string!r:.40} of {type(segment).__name__} {tuple(getattr(x, 'shape', ()))}"
                raise InputError(f"segment {number} must be {rule}, got {got}; call the model itself for other content")
        return parts

    def _batch(self, parts: Sequence[tuple[Tensor, float | None]], lengths: Sequence[int]) -> PackedBatch:
        """Return the batch of samples of these lengths, whose images are noisy already."""
        starts = np.cumsum([0, *(len(x) for x, _ in parts)]).tolist()
        images = [(start, x.float().cpu(), t) for start, (x, t) in zip(starts, parts, strict=False) if t is not None]
        ids = [x.cpu() if t is None else torch.zeros(len(x), dtype=torch.int64) for x, t in parts]
        placed = [(start, 0, self._in_grid(x)) for start, x, _ in images]
        sequence = place_images(torch.cat(ids).numpy(), np.array(lengths), placed)
        noisy = torch.cat([torch.zeros(0, self.width), *(x for _, x, _ in images)])
        config, inputs = self.model.config, [(noisy, torch.zeros_like(noisy))]
        timesteps, causal = torch.tensor([t for *_, t in images]), config.image_attention == "causal"
        batch = build_batch(sequence, inputs, timesteps, config.modalities, causal_images=causal)
        return batch.to(self.model.device)

    def _in_grid(self, patches: Tensor) -> Tensor:
        """Return patches [N, C] in the modality's grid if they fill it."""
        shape = self.model.config.modalities[0].shape
        return patches if shape is None or math.prod(shape) != len(patches) else patches.reshape(*shape, -1)
