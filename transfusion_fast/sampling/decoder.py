"""Decoding (arXiv 2408.11039, section 3.3): text token by token; at <boi> an image by diffusion; then text again.

All prompts are decoded together, over a cache of keys and values (engine.py). What is random is keyed by the seed, the
number of the prompt, and the number of the image or text, so that no prompt depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Document, Piece, check_document
from transfusion_fast.model.sequence import TEXT
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.checks import check_prompts, drawn_sizes, for_each_modality, known_size
from transfusion_fast.sampling.drawing import Drawer, Given, check_given
from transfusion_fast.sampling.engine import ROWS, Branch, Context, Engine, Grid
from transfusion_fast.sampling.generators import check_numbers, image_generator, text_generator
from transfusion_fast.sampling.settings import ImageSettings, TextSettings, is_integer
from transfusion_fast.sampling.text import choose

OnToken = Callable[[int, int], None]
"""Called with the index of a prompt and the id that was just added to its text."""
OnImages = Callable[[Sequence[int], int, Tensor], None]
"""Called after each step of images with the indices of their prompts, the modality, and the clean images that the model
predicts, fp32 [indices, *grid, C]."""


@dataclass
class _Stream:
    """A prompt that is being continued: its stream in the cache, its index among the prompts, and its number."""

    slot: int
    index: int
    number: int
    text_noise: torch.Generator
    context: Context
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
    grids: Sequence[Grid | None] | None = None,
    max_images: int = 1,
    begin: int | None = None,
    noise: Sequence[Tensor | None] | None = None,
    text: TextSettings | None = None,
    image: ImageSettings | None = None,
    negative: Document | None = None,
    seed: int = 0,
    prompt_numbers: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    on_images: OnImages | None = None,
) -> list[list[Piece]]:
    """Continue each prompt until <eos>, as many new ids as `text` allows, or the image after `max_images` of them.

    Args:
        prompts: documents as for training, [ids, latents, (modality, latents), ...]; may be empty.
        grids: for each modality the size in patches of what is drawn, (rows, columns) of an image; default: the size
            that the model chooses if it has size tokens, else the `shape` of the modality. The model does not begin
            what has no size, unless `max_images` is 0, which ends at any <boi>.
        begin: the modality of an image that each continuation begins with, whether or not the model would.
        noise: for each modality the noise, fp32 [rows, columns, C], that all its images begin with, in place of that of
            the seed; None is that of the seed.
        text, image: how text is chosen, and images are drawn.
        negative: a document in place of the empty context of guidance.
        seed: of text and noise, together with the `prompt_numbers`; default: 0, 1, ... in the order of the prompts.
        on_token, on_images: called after each new id, and after each step of images. An exception ends the decoding.

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
    if begin is not None and max_images == 0:
        raise InputError("max_images must be at least 1 for continuations that begin with an image, got 0; omit begin")
    given = for_each_modality(model, noise, "noise", "a tensor or None")
    sizes = drawn_sizes(model, grids, given, begin)
    for modality, (own, size) in enumerate(zip(given, sizes, strict=True)):
        if own is not None and size is not None:
            check_given((*size, model.config.dim_latent[modality]), own, None, None)
    with _evaluating(model):
        never = max_images > 0 and model.vocabulary.max_size == 0
        unavailable = [modality for modality, size in enumerate(sizes) if size is None and never]
        decoding = _Decoding(model, prompts, sizes, text, image, negative, seed, prompt_numbers, unavailable)
        decoding.on_token, decoding.on_images, decoding.noise = on_token, on_images, given
        return decoding.run(max_images, begin)


@torch.no_grad()
def generate_text(
    model: Transfusion,
    prompts: Sequence[Document],
    *,
    text: TextSettings | None = None,
    seed: int = 0,
    prompt_numbers: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[Tensor]:
    """Continue each prompt with text alone, until <eos>: int64 [n] of each. The arguments are those of `sample`."""
    with _evaluating(model):
        every = range(len(model.codecs))
        decoding = _Decoding(model, prompts, [None for _ in every], text, None, None, seed, prompt_numbers, every)
        decoding.on_token = on_token
        produced = decoding.run(max_images=0)
    none = torch.zeros(0, dtype=torch.int64)
    return [torch.cat([none, *(x for x in pieces if isinstance(x, Tensor))]) for pieces in produced]


@torch.no_grad()
def generate_images(
    model: Transfusion,
    prompts: Sequence[Document],
    grid: Grid | None = None,
    *,
    modality: int = 0,
    images_per_prompt: int = 1,
    image: ImageSettings | None = None,
    negative: Document | None = None,
    noise: Tensor | None = None,
    start: Tensor | None = None,
    keep: Tensor | None = None,
    seed: int = 0,
    prompt_numbers: Sequence[int] | None = None,
    on_images: OnImages | None = None,
) -> Tensor:
    """Draw images after each prompt, whether or not the model would begin one: fp32 [images, rows, columns, C].

    These are latents with channels last, also where the model has a decoder or takes channels first. The images of a
    prompt are neighbours, and begin with the noise of the first, second, ... image that `sample` draws after it.

    Args:
        grid: size in patches, (rows, columns) of an image; default: the modality's `shape`.
        noise: fp32, the noise that the images begin with, in place of that of the seed.
        start: fp32, images to begin with: they are noised as the `strength` of `image` says.
        keep: bool, or one value for a patch, [images, rows, columns]: where `start` is kept, and the rest is drawn to
            fit (inpainting).
        The others are those of `sample`. `noise`, `start` and `keep` have the shape that is returned.
    """
    size = known_size(model, modality, grid)
    if not is_integer(images_per_prompt) or images_per_prompt < 1:
        raise InputError(f"images_per_prompt must be an integer of at least 1, got {images_per_prompt!r}; correct it")
    sizes: list[Grid | None] = [None] * len(model.codecs)
    sizes[modality] = size
    check_prompts(prompts)
    shape = (images_per_prompt * len(prompts), *size, model.config.dim_latent[modality])
    given = check_given(shape, noise, start, keep)
    with _evaluating(model):
        decoding = _Decoding(
            model, prompts, sizes, None, image, negative, seed, prompt_numbers, repeats=images_per_prompt
        )
        decoding.on_images = on_images
        decoding.write(decoding.streams, [model.vocabulary.boi(modality)] * len(decoding.streams))
        [(_, streams)] = decoding.sized(decoding.streams, modality)
        for stream in streams:
            stream.num_drawn = stream.index % images_per_prompt
        order = torch.tensor([stream.index for stream in streams])
        drawn = decoding.draw(streams, modality, size, given.select(order))
    return drawn[order.argsort()]


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


class _Decoding:
    """The decoding of a batch of prompts."""

    on_token: OnToken | None = None
    on_images: OnImages | None = None
    noise: Sequence[Tensor | None] | None = None

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
        repeats: int = 1,  # streams of each prompt
    ):
        check_prompts(prompts)
        self.model, self.sizes, self.seed = model, sizes, seed
        self.text = text or TextSettings()
        self.engine = Engine(model)
        self.not_text, self.not_sizes = self._excluded(unavailable)
        numbers = check_numbers(seed, range(len(prompts)) if numbers is None else numbers, len(prompts))
        prompted = [self._context(prompt, f"document {i}") for i, prompt in enumerate(model.encoded(prompts))]
        contexts = [context for context in prompted for _ in range(repeats)]
        numbers = [number for number in numbers for _ in range(repeats)]
        unwanted = self._context(model.encoded([negative])[0], "negative") if negative is not None else None
        self.drawer = Drawer(self.engine, image or ImageSettings(), unwanted)
        # Streams of one length are neighbours in the cache, so that attention takes them together.
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].tokens))
        self.cache, hidden = self.engine.prefill([contexts[i] for i in order], 1 + self.text.max_tokens)
        logits = self._logits(hidden)
        self.streams = [
            _Stream(slot, i, numbers[i], text_generator(seed, numbers[i]), contexts[i].copy(), logits[slot])
            for slot, i in enumerate(order)
        ]
        self.used = self._text_ids() if self.text.repetition_penalty != 1 else None

    def run(self, max_images: int, begin: int | None = None) -> list[list[Piece]]:
        """Decode all streams to their ends; each begins with an image of the modality `begin` if there is one."""
        begun = {} if begin is None else {stream.slot: begin for stream in self.streams}
        if begin is not None:
            self.write(self.streams, [self.model.vocabulary.boi(begin)] * len(self.streams))
        while active := [s for s in self.streams if not s.done]:
            begun = begun or self._write_text(active)
            for modality in sorted(set(begun.values())):
                drawing = [s for s in active if begun.get(s.slot) == modality]
                for stream in drawing:
                    stream.done = stream.num_drawn >= max_images
                for grid, streams in self.sized([s for s in drawing if not s.done], modality):
                    self._add_images(streams, modality, grid)
            begun = {}
        return [stream.produced for stream in sorted(self.streams, key=lambda stream: stream.index)]

    def _add_images(self, streams: Sequence[_Stream], modality: int, grid: Grid) -> None:
        """Draw an image at the end of each stream, append it, and close it."""
        noise = self.noise[modality] if self.noise else None
        given = Given(noise=None if noise is None else noise.expand(len(streams), *noise.shape))
        drawn = self.draw(streams, modality, grid, given)
        for stream, latents in zip(streams, self.model.decoded(drawn, modality), strict=True):
            stream.produced.append(latents if modality == 0 else (modality, latents))
        self.engine.start_image([self._branch(streams)], modality, grid).finish(drawn)
        for stream, latents in zip(streams, drawn, strict=True):
            stream.context.append_image(modality, latents)
        self.write(streams, [self.model.vocabulary.eoi(modality)] * len(streams))

    def sized(self, streams: Sequence[_Stream], modality: int) -> list[tuple[Grid, list[_Stream]]]:
        """Append the size tokens of the images that begin, which the model chooses where no size is given.

        Return the streams of each size.
        """
        vocabulary, given = self.model.vocabulary, self.sizes[modality]
        forced = None if given is None else vocabulary.opening(modality, given)[1:]
        grids: list[Grid] = [given or ()] * len(streams)
        for i in range(vocabulary.num_sizes[modality] if streams else 0):
            tokens = [forced[i]] * len(streams) if forced else self._choose(streams, self.not_sizes)
            self.write(streams, tokens)
            if not forced:
                grids = [(*grid, vocabulary.side(token)) for grid, token in zip(grids, tokens, strict=True)]
        sized: dict[Grid, list[_Stream]] = {}
        for grid, stream in zip(grids, streams, strict=True):
            sized.setdefault(grid, []).append(stream)
        return [*sized.items()]

    def write(self, streams: Sequence[_Stream], tokens: Sequence[int]) -> None:
        """Append a token to each of the streams, and leave them the logits of the next one."""
        hidden = self.engine.step(self.cache, [s.slot for s in streams], tokens)
        for stream, token, logits in zip(streams, tokens, self._logits(hidden), strict=True):
            stream.logits = logits
            stream.context.tokens.append(token)

    def _write_text(self, streams: Sequence[_Stream]) -> dict[int, int]:
        """Append tokens to each stream until it ends or begins an image; return slot -> modality of that image."""
        vocabulary, begun = self.model.vocabulary, {}
        for stream in streams:
            stream.done = stream.written >= self.text.max_tokens
        while writing := [s for s in streams if not s.done and s.slot not in begun]:
            tokens = self._choose(writing, self.not_text)
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

    def _choose(self, streams: Sequence[_Stream], excluded: Tensor) -> list[int]:
        """Return the next token of each stream, none of those `excluded`; they come from the device together."""
        used, uniform = None, torch.zeros(len(streams))
        logits = torch.stack([stream.logits for stream in streams]).masked_fill(excluded, float("-inf"))
        if self.text.temperature > 0:
            uniform = torch.cat([torch.rand(1, generator=stream.text_noise) for stream in streams])
        if self.used is not None:
            used = self.used[torch.tensor([stream.slot for stream in streams], device=logits.device)]
        tokens = choose(logits, self.text, used, uniform.to(logits.device)).tolist()
        if -1 in tokens:
            raise InputError("logits must be numbers, got NaN; check the model's weights")
        return tokens

    def _add_text(self, stream: _Stream, token: int) -> None:
        stream.text.append(token)
        stream.written += 1
        if self.used is not None:
            self.used[stream.slot, token] = True
        stopped = self.text.stop is not None and self.text.stop(stream.text)
        stream.done = stopped or stream.written >= self.text.max_tokens
        if self.on_token is not None:
            self.on_token(stream.index, token)

    def draw(self, streams: Sequence[_Stream], modality: int, grid: Grid, given: Given) -> Tensor:
        """Draw one image at the end of each stream, which opens it; return them, fp32 [streams, *grid, C]."""
        generators = [image_generator(self.seed, s.number, s.num_drawn) for s in streams]
        contexts = [stream.context for stream in streams]
        told = self.on_images and partial(self.on_images, [stream.index for stream in streams], modality)
        drawn = self.drawer.draw(self._branch(streams), contexts, modality, grid, generators, given, told)
        for stream in streams:
            stream.num_drawn += 1
        return drawn

    def _branch(self, streams: Sequence[_Stream]) -> Branch:
        return self.cache, [stream.slot for stream in streams]

    def _text_ids(self) -> Tensor:
        """Return the text ids in each stream's context, bool [S, V]."""
        used = torch.zeros(len(self.streams), self.model.vocabulary.size, dtype=torch.bool)
        for stream in self.streams:
            used[stream.slot, [token for part in stream.context.text_between_images() for token in part]] = True
        used[:, self.model.vocabulary.num_text_tokens :] = False
        return used.to(self.model.device)

    def _context(self, prompt: Document, name: str) -> Context:
        vocabulary = self.model.vocabulary
        context = Context([vocabulary.bos])
        for kind, tensor in check_document(prompt, self.model.config, name):
            if kind == TEXT:
                context.tokens.extend(tensor.tolist())
            else:
                context.tokens.extend(vocabulary.opening(kind - 1, tensor.shape[:-1]))
                context.append_image(kind - 1, tensor)
                context.tokens.append(vocabulary.eoi(kind - 1))
        return context

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next tokens, fp32 [S, V]."""
        padded = torch.cat([hidden, hidden.new_zeros(-len(hidden) % ROWS, hidden.shape[1])])
        return self.model.head(padded)[: len(hidden)].float()

    def _excluded(self, unavailable: Sequence[int]) -> Tensor:
        """Return masks of the tokens that are never chosen as text, and never as a size: bool [2, V]."""
        vocabulary = self.model.vocabulary
        excluded = torch.zeros(2, vocabulary.size, dtype=torch.bool)
        never = [vocabulary.bos, *(vocabulary.eoi(modality) for modality in range(vocabulary.num_modalities))]
        excluded[0, [*never, *(vocabulary.boi(modality) for modality in unavailable)]] = True
        excluded[0, vocabulary.first_size :] = True
        excluded[1, : vocabulary.first_size] = True
        return excluded.to(self.model.device)


Transfusion.sample, Transfusion.generate_text, Transfusion.generate_images = sample, generate_text, generate_images
