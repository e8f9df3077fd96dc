"""Decoding (arXiv 2408.11039, section 3.3): text token by token; at <boi> an image by diffusion; then text again.

All prompts are decoded together, over a cache of keys and values (engine.py). What is random is keyed by the seed, the
number of the prompt, and the number of the image or text, so that no prompt depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Document, Piece, check_document
from transfusion_fast.model.sequence import TEXT
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.engine import ROWS, Branch, Context, Engine, Grid
from transfusion_fast.sampling.settings import ImageSettings, TextSettings, is_integer
from transfusion_fast.settings import MAX_SEED

OnToken = Callable[[int, int], None]
"""Called with the index of a prompt and the id that was just added to its text."""


@dataclass
class _Stream:
    """A prompt that is being continued: its stream in the cache, its index among the prompts, and its number."""

    slot: int
    index: int
    number: int
    text_noise: torch.Generator
    used: set[int]
    logits: Tensor
    text: list[int] = field(default_factory=list)
    written: int = 0
    produced: list[Piece] = field(default_factory=list)
    num_drawn: int = 0
    done: bool = False

    def close_text(self) -> None:
        if self.text:
            self.produced.append(torch.tensor(self.text))
            self.text = []


@torch.no_grad()
def sample(
    model: Transfusion,
    prompts: Sequence[Document],
    *,
    grids: Sequence[Grid] | None = None,
    max_images: int = 1,
    text: TextSettings | None = None,
    image: ImageSettings | None = None,
    negative: Document | None = None,
    seed: int = 0,
    prompt_numbers: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[list[Piece]]:
    """Continue each prompt until <eos>, as many new ids as `text` allows, or the image after `max_images` of them.

    Args:
        prompts: documents as for training, [ids, latents, (modality, latents), ...]; may be empty.
        grids: for each modality the size in patches of what is drawn, (rows, columns) of an image; default: its
            `shape`. The model does not begin what has neither, unless `max_images` is 0, which ends at any <boi>.
        text, image: how text is chosen, and images are drawn.
        negative: a document in place of the empty context of guidance.
        seed: of text and noise, together with the `prompt_numbers`; default: 0, 1, ... in the order of the prompts.
        on_token: called after each new id.

    Returns:
        The continuation of each prompt, a document of the same form: ids int64 [n], and images fp32
        [rows, columns, C], alone for modality 0, else as (modality, latents); with channel_first [C, rows, columns].
        Where the model has a decoder for a modality, what it returns takes the place of latents.

    Raises:
        ValueError: a prompt that does not fit the model, a size that does not fit a modality, or logits or images that
            are not finite.
    """
    if not is_integer(max_images) or max_images < 0:
        raise InputError(f"max_images must be an integer from 0 on, got {max_images!r}; 0 draws none")
    given = [None] * len(model.codecs) if grids is None else grids
    if len(given) != len(model.codecs):
        raise InputError(f"grids must have a size for each of {len(model.codecs)} modalities, got {len(given)}")
    sizes = [_size(model, modality, grid) for modality, grid in enumerate(given)]
    with _evaluating(model):
        unavailable = [m for m, size in enumerate(sizes) if size is None and max_images > 0]
        decoding = _Decoding(model, prompts, sizes, text, image, negative, seed, prompt_numbers, unavailable)
        decoding.on_token = on_token
        return decoding.run(max_images)


@torch.no_grad()
def generate_images(
    model: Transfusion,
    prompts: Sequence[Document],
    grid: Grid | None = None,
    *,
    modality: int = 0,
    image: ImageSettings | None = None,
    negative: Document | None = None,
    seed: int = 0,
    prompt_numbers: Sequence[int] | None = None,
) -> Tensor:
    """Draw one image after each prompt, whether or not the model would begin one: fp32 [prompts, rows, columns, C].

    These are latents with channels last, also where the model has a decoder or takes channels first.

    Args:
        grid: size in patches, (rows, columns) of an image; default: the modality's `shape`.
        The others are those of `sample`.
    """
    if not is_integer(modality) or not 0 <= modality < len(model.codecs):
        raise InputError(f"the modality must be an integer in [0, {len(model.codecs)}), got {modality}; correct it")
    sizes: list[Grid | None] = [None] * len(model.codecs)
    sizes[modality] = _size(model, modality, grid)
    if sizes[modality] is None:
        rule = f"the size of what is drawn must be given for modality {modality}, which has no shape"
        raise InputError(f"{rule}, got none; give grid")
    with _evaluating(model):
        decoding = _Decoding(model, prompts, sizes, None, image, negative, seed, prompt_numbers)
        decoding.write(decoding.streams, [model.vocabulary.boi(modality)] * len(prompts))
        drawn = decoding.draw(decoding.streams, modality)
    return drawn[sorted(range(len(prompts)), key=lambda slot: decoding.streams[slot].index)]


@contextmanager
def _evaluating(model: Transfusion) -> Iterator[None]:
    """Turn dropout off, and leave the mode of every module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _size(model: Transfusion, modality: int, grid: Grid | None) -> Grid | None:
    """Return the size in patches that is drawn of a modality, None if none is known; refuse a wrong one."""
    config = model.config.modalities[modality]
    grid = config.shape if grid is None else grid
    if grid is None:
        return () if config.dims == 0 else None
    fits = isinstance(grid, Sequence) and len(grid) == config.dims and all(is_integer(n) and n >= 1 for n in grid)
    if not fits:
        rule = f"the size of what is drawn must be {config.dims} integers of at least 1 for modality {modality}"
        raise InputError(f"{rule}, got {grid}; correct it")
    return tuple(grid)


class _Decoding:
    """The decoding of a batch of prompts."""

    on_token: OnToken | None = None

    def __init__(
        self,
        model: Transfusion,
        prompts: Sequence[Document],
        sizes: Sequence[Grid | None],
        text: TextSettings | None,
        image: ImageSettings | None,
        negative: Document | None,
        seed: int,
        numbers: Sequence[int] | None,
        unavailable: Sequence[int] = (),  # modalities that text cannot begin
    ):
        if not isinstance(prompts, Sequence) or not prompts:
            got = "none" if isinstance(prompts, Sequence) else type(prompts).__name__
            raise InputError(f"prompts must be a list of one or more documents, got {got}; [] is a document")
        self.model, self.sizes, self.seed, self.unavailable = model, sizes, seed, unavailable
        self.text, self.image = text or TextSettings(), image or ImageSettings()
        self.engine = Engine(model)
        numbers = _check_numbers(seed, range(len(prompts)) if numbers is None else numbers, len(prompts))
        contexts = [self._context(prompt, f"document {i}") for i, prompt in enumerate(model.encoded(prompts))]
        self.negative = self._context(model.encoded([negative])[0], "negative") if negative else None
        # Streams of one length are neighbours in the cache, so that attention takes them together.
        order = sorted(range(len(prompts)), key=lambda i: len(contexts[i].tokens))
        self.cache, hidden = self.engine.prefill([contexts[i] for i in order], 1 + self.text.max_tokens)
        logits = self._logits(hidden)
        self.streams = [
            _Stream(slot, i, numbers[i], _keyed(seed, numbers[i], 0), self._text_ids(contexts[i]), logits[slot])
            for slot, i in enumerate(order)
        ]

    def run(self, max_images: int) -> list[list[Piece]]:
        """Decode all streams to their ends."""
        while active := [s for s in self.streams if not s.done]:
            begun = self._write_text(active)
            for modality in sorted(set(begun.values())):
                drawing = [s for s in active if begun.get(s.slot) == modality]
                for stream in drawing:
                    stream.done = stream.num_drawn >= max_images
                drawing = [s for s in drawing if not s.done]
                if drawing:
                    drawn = self.draw(drawing, modality)
                    for stream, latents in zip(drawing, self.model.decoded(drawn, modality), strict=True):
                        stream.produced.append(latents if modality == 0 else (modality, latents))
                    self.engine.start_image([self._branch(drawing)], modality, drawn.shape[1:-1]).finish(drawn)
                    self.write(drawing, [self.model.vocabulary.eoi(modality)] * len(drawing))
        return [stream.produced for stream in sorted(self.streams, key=lambda stream: stream.index)]

    def write(self, streams: Sequence[_Stream], tokens: Sequence[int]) -> None:
        """Append a token to each of the streams, and leave them the logits of the next one."""
        hidden = self.engine.step(self.cache, [s.slot for s in streams], tokens)
        for stream, logits in zip(streams, self._logits(hidden), strict=True):
            stream.logits = logits

    def _write_text(self, streams: Sequence[_Stream]) -> dict[int, int]:
        """Append tokens to each stream until it ends or begins an image; return slot -> modality of that image."""
        vocabulary, begun = self.model.vocabulary, {}
        for stream in streams:
            stream.done = stream.written >= self.text.max_tokens
        while writing := [s for s in streams if not s.done and s.slot not in begun]:
            tokens = self._choose(writing)
            for stream, token in zip(writing, tokens, strict=True):
                if token < vocabulary.num_text_tokens:
                    self._add_text(stream, token)
                elif token == vocabulary.eos:
                    stream.done = True
                else:
                    begun[stream.slot] = (token - vocabulary.boi()) // 2
                if stream.done or stream.slot in begun:
                    stream.close_text()
            continued = [(s, token) for s, token in zip(writing, tokens, strict=True) if not s.done]
            if continued:
                self.write(*zip(*continued, strict=True))
        return begun

    def _choose(self, streams: Sequence[_Stream]) -> list[int]:
        """Return the next token of each stream; for greedy text, one number for each comes from the device."""
        logits = torch.stack([stream.logits for stream in streams])
        if logits.isnan().any():
            raise InputError("logits must be numbers, got NaN; check the model's weights")
        if self.text.is_greedy:
            return logits.argmax(dim=1).tolist()
        pairs = zip(logits.cpu(), streams, strict=True)
        return [choose(own, self.text, stream.used, stream.text_noise) for own, stream in pairs]

    def _add_text(self, stream: _Stream, token: int) -> None:
        stream.text.append(token)
        stream.used.add(token)
        stream.written += 1
        stopped = self.text.stop is not None and self.text.stop(stream.text)
        stream.done = stopped or stream.written >= self.text.max_tokens
        if self.on_token is not None:
            self.on_token(stream.index, token)

    def draw(self, streams: Sequence[_Stream], modality: int) -> Tensor:
        """Diffuse one image at the end of each stream, behind <boi>; return them, fp32 [streams, *grid, C].

        The unconditional branch of guidance is the image alone after <boi>, as in training.
        """
        settings, diffusion, grid = self.image, self.model.diffusion, self.sizes[modality]
        assert grid is not None
        noise = [image_generator(self.seed, s.number, s.num_drawn) for s in streams]
        config = self.model.config.modalities[modality]
        clip, shape = config.bound if settings.clip == "auto" else settings.clip, (*grid, config.dim_latent)
        branch = self._branch(streams)
        alone = self.engine.start_image([branch], modality, grid)
        timesteps = list(pairwise(diffusion.sampling_timesteps(settings.steps, alone.n)))
        if any(settings.guided(t) for t, _ in timesteps):
            unconditional = self._unconditional(len(streams), modality, alone.n)
            both = self.engine.start_image([branch, unconditional], modality, grid)
        x = self._noise(noise, shape)
        for t, t_next in timesteps:
            if settings.guided(t):
                prediction = _guided(both.predict(x, t), settings)
            else:
                [prediction] = alone.predict(x, t)
            is_random = settings.eta > 0 and t_next > 0 and not diffusion.is_flow
            fresh = self._noise(noise, shape) if is_random else None
            x = diffusion.step(x, prediction, t, t_next, eta=settings.eta if is_random else 0.0, noise=fresh, clip=clip)
        if not x.isfinite().all():
            rule = "a drawn image must be finite"
            raise InputError(f"{rule}, got NaN or infinity; check the model's weights, or lower eta and guidance")
        for stream in streams:
            stream.num_drawn += 1
        return x.cpu()

    def _branch(self, streams: Sequence[_Stream]) -> Branch:
        return self.cache, [stream.slot for stream in streams]

    def _unconditional(self, count: int, modality: int, patches: int) -> Branch:
        before = [] if self.negative is None else self.negative.tokens
        images = [] if self.negative is None else self.negative.images
        context = Context([*before, self.model.vocabulary.boi(modality)], images)
        return self.engine.prefill([context] * count, patches)[0], range(count)

    def _noise(self, generators: Sequence[torch.Generator], shape: Grid) -> Tensor:
        return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.model.device)

    def _text_ids(self, context: Context) -> set[int]:
        return {token for token in context.without_patches() if token < self.model.vocabulary.num_text_tokens}

    def _context(self, prompt: Document, name: str) -> Context:
        vocabulary = self.model.vocabulary
        context = Context([vocabulary.bos])
        for kind, tensor in check_document(prompt, self.model.config, name):
            if kind == TEXT:
                context.tokens.extend(tensor.tolist())
            else:
                context.tokens.append(vocabulary.boi(kind - 1))
                context.append_image(kind - 1, tensor)
                context.tokens.append(vocabulary.eoi(kind - 1))
        return context

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next tokens, fp32 [S, V]; -inf for tokens that cannot follow."""
        vocabulary, count = self.model.vocabulary, len(hidden)
        padded = torch.cat([hidden, hidden.new_zeros(-count % ROWS, hidden.shape[1])])
        logits = self.model.head(padded)[:count].float()
        never = [vocabulary.bos, *(vocabulary.eoi(modality) for modality in range(vocabulary.num_modalities))]
        logits[:, [*never, *(vocabulary.boi(modality) for modality in self.unavailable)]] = float("-inf")
        return logits


def image_generator(seed: int, number: int, image: int = 0) -> torch.Generator:
    """Return the generator of an image's noise, the initial noise first: the image-th that is drawn for a prompt."""
    return _keyed(seed, number, 1 + image)


def _keyed(*key: int) -> torch.Generator:
    """Return a CPU generator for a key of numbers in 0..2^64 - 1; different keys give independent numbers."""
    words = [word for number in key for word in (number & 0xFFFFFFFF, number >> 32)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


def _check_numbers(seed: int, numbers: Sequence[int], count: int) -> list[int]:
    """Return the numbers of the prompts; raise InputError if they or the seed cannot key random numbers."""
    whole = all(is_integer(x) and 0 <= x <= MAX_SEED for x in (seed, *numbers))
    if not whole or len(numbers) != count:
        rule = f"seed and prompt_numbers must be integers in 0..{MAX_SEED}, with a number for each of {count} prompts"
        raise InputError(f"{rule}, got {seed} and {list(numbers)!s:.60}; correct them")
    return [int(number) for number in numbers]


def choose(logits: Tensor, settings: TextSettings, used: Collection[int], generator: torch.Generator) -> int:
    """Return the next id for logits fp32 [V] on the CPU; `used` are the text ids of the document so far."""
    if settings.repetition_penalty != 1 and used:
        ids = torch.tensor(sorted(used))
        own = logits[ids]
        divided = torch.where(own > 0, own / settings.repetition_penalty, own * settings.repetition_penalty)
        logits = logits.index_copy(0, ids, divided.clamp_max(torch.finfo(torch.float32).max))
    if settings.temperature == 0:
        return int(logits.argmax())
    # Relative to the likeliest id, and by a number that is not 0 in fp32: then no quotient is infinity or NaN.
    logits = (logits - logits.max()) / max(settings.temperature, torch.finfo(torch.float32).tiny)
    if 0 < settings.top_k < len(logits):
        logits[logits.topk(len(logits) - settings.top_k, largest=False).indices] = float("-inf")
    probabilities = logits.softmax(0)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.index_fill(0, order[before >= settings.top_p], 0.0)
    if settings.min_p > 0:
        probabilities = probabilities.where(probabilities >= settings.min_p * probabilities.max(), 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _guided(predictions: Tensor, settings: ImageSettings) -> Tensor:
    """Return one prediction for both, [2, S, *grid, C]: with the context and without."""
    conditional, unconditional = predictions
    guided = unconditional + settings.guidance * (conditional - unconditional)
    if settings.guidance_rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    wanted, own = (x.std(axes, correction=0, keepdim=True) for x in (conditional, guided))
    return torch.lerp(guided, torch.where(own > 0, guided * wanted / own, guided), settings.guidance_rescale)


Transfusion.sample = sample
