"""Answers that are shown while they are made: what stands under a page or a server, one request at a time.

    streamer = Streamer(subject)
    for answer in streamer.start(Request("draw", "seven", seed=3)):
        show(answer.pieces)

All requests are decoded on one thread, in the order in which they were started. Each has a `Stream` of its own for its
answers, so none can reach another request. Any thread may start, read and stop streams.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Document, Piece
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.pictures import images_to_pixels
from transfusion_fast.sampling.settings import ImageSettings, TextSettings, is_integer
from transfusion_fast.sampling.subject import Subject
from transfusion_fast.settings import MAX_SEED

Task = Literal["draw", "change", "edit", "caption", "write"]
MAX_TOKENS = 4096
"""Most ids of a prompt, and most new ids of an answer: both take memory before the first answer."""
MAX_IMAGES = 16
"""Most images of an answer."""
STATES = 10
"""About as many states of an image are shown while it is drawn."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how it is answered.

    task: "draw" draws images of the prompt; "change" too, but begins with the `given` image, noised as
    `image.strength` says; "edit" puts the given image before the prompt, which is then an instruction; "caption"
    writes about the given image; "write" continues the prompt with text, and with images where the model begins them.
    given: an image of modality 0 as the model's input, fp32 [rows, columns, C].
    num_images: how many images are drawn, and with "write" how many at most.
    """

    task: Task
    prompt: str = ""
    given: Tensor | None = None
    text: TextSettings = field(default_factory=TextSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    num_images: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Answer:
    """The state of the answer to a request.

    pieces: texts, and images uint8 [height, width, channels], in their order; while the state is "running", the last
    text or the images drawn together at the end are unfinished.
    step: evaluations of the model for the images that are being drawn, 0 while text is written.
    """

    request: Request
    pieces: tuple[str | np.ndarray, ...]
    step: int
    state: Literal["running", "stopped", "done"]


class Stream(Iterator[Answer]):
    """The answers to one request, of which only the last is not "running".

    Iterating raises what decoding raised: InputError for a request that does not fit the model.
    """

    def __init__(self, request: Request):
        self.request, self.stopping = request, threading.Event()
        self._queue: SimpleQueue[Answer | Future[Answer]] = SimpleQueue()
        self._ended = False

    def stop(self) -> None:
        """End the decoding after the pass of the model that is under way; the next answer is then the last one."""
        self.stopping.set()

    def put(self, answer: Answer | Future[Answer]) -> None:
        """Append an answer, or the finished decoding with the last one."""
        self._queue.put(answer)

    def __next__(self) -> Answer:
        while not self._ended:
            answer = self._queue.get()
            if isinstance(answer, Future):
                self._ended = True
                return answer.result()
            if not self.stopping.is_set():
                return answer
        raise StopIteration


class Streamer:
    """Answers requests with one model, one after another."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="streamer")

    def start(self, request: Request) -> Stream:
        """Return the answers to a request; decoding begins when all requests before it have ended."""
        stream = Stream(request)
        self._thread.submit(self._answer, stream).add_done_callback(stream.put)
        return stream

    def _answer(self, stream: Stream) -> Answer:
        progress = _Progress(self.subject, stream)
        try:
            return progress.answer(self._decode(stream.request, progress), "done")
        except _Stopped:
            return progress.answer(progress.pieces, "stopped")

    def _decode(self, request: Request, progress: _Progress) -> list[str | np.ndarray]:
        progress.end_if_stopped()
        ids = self._check(request)
        before: list[Piece] = [] if request.given is None or request.task == "change" else [request.given]
        prompt: Document = before if request.task == "caption" else [*before, ids]
        if request.task in ("caption", "write"):
            [produced] = sample(
                self.subject.model,
                [prompt],
                max_images=0 if request.task == "caption" else request.num_images,
                text=request.text,
                image=request.image,
                seed=request.seed,
                on_token=progress.on_token,
                on_images=progress.on_images,
            )
            return [shown for piece in produced for shown in self._shown(piece)]
        given = request.given if request.task == "change" else None
        drawn = generate_images(
            self.subject.model,
            [prompt],
            None if given is None else given.shape[:-1],
            images_per_prompt=request.num_images,
            image=request.image,
            start=None if given is None else given.expand(request.num_images, *given.shape),
            seed=request.seed,
            on_images=progress.on_images,
        )
        return [*shown_pixels(self.subject, 0, drawn)]

    def _check(self, request: Request) -> Tensor:
        """Return the ids of the prompt; raise InputError unless the request can be answered."""
        task, tokens, images = request.task, request.text.max_tokens, request.num_images
        if task not in get_args(Task):
            raise InputError(f"the task must be one of {', '.join(get_args(Task))}, got {task!r}; take one of these")
        if task != "write" and not self.subject.modalities:
            raise InputError(f"the task must be write for a model of text alone, got {task}; write")
        if task in ("change", "edit", "caption") and request.given is None:
            raise InputError(f"an image must be given to {task}, got none; upload one")
        if not is_integer(images) or not 1 <= images <= MAX_IMAGES:
            raise InputError(f"the number of images must be in 1..{MAX_IMAGES}, got {images}; give another")
        if not is_integer(request.seed) or not 0 <= request.seed <= MAX_SEED:
            raise InputError(f"the seed must be an integer in 0..{MAX_SEED}, got {request.seed}; give another")
        if tokens > MAX_TOKENS:
            raise InputError(f"max_tokens must be at most {MAX_TOKENS}, got {tokens}; give fewer")
        ids = self.subject.ids(request.prompt)
        if task != "caption" and not 1 <= len(ids) <= MAX_TOKENS:
            rule = f"the prompt must have 1 to {MAX_TOKENS} tokens"
            raise InputError(f"{rule}, got {len(ids) or 'none'}; write {'fewer' if len(ids) else 'one'}")
        return ids

    def _shown(self, piece: Piece) -> Sequence[str | np.ndarray]:
        modality, tensor = piece if isinstance(piece, tuple) else (0, piece)
        if tensor.is_floating_point():
            return [*shown_pixels(self.subject, modality, tensor[None])]
        return [self.subject.tokenizer.decode(tensor.numpy())]


def shown_pixels(subject: Subject, modality: int, latents: Tensor) -> np.ndarray:
    """Return images [N, rows, columns, C] of a modality as pixels, uint8 [N, height, width, channels]."""
    return images_to_pixels(latents.cpu(), subject.modalities[modality], subject.autoencoder)


class _Stopped(Exception):
    """Raised in the decoder's callbacks, where it ends the decoding."""


class _Progress:
    """Collects the pieces of an answer in the decoder's callbacks, and puts each state of it into the stream."""

    def __init__(self, subject: Subject, stream: Stream):
        self.subject, self.stream = subject, stream
        self.pieces: list[str | np.ndarray] = []
        self.ids: list[int] = []  # of the text that is being written
        self.step = 0  # of the images that are being drawn
        self.drawn = 0

    def end_if_stopped(self) -> None:
        if self.stream.stopping.is_set():
            raise _Stopped

    def answer(self, pieces: Sequence[str | np.ndarray], state: Literal["running", "stopped", "done"]) -> Answer:
        return Answer(self.stream.request, tuple(pieces), self.step, state)

    def on_token(self, _: int, token: int) -> None:
        self.end_if_stopped()
        if not self.ids:
            self.pieces.append("")
        self.ids.append(token)
        self.step = 0
        # A character may be several ids, of which the first alone are no text.
        self.pieces[-1] = self.subject.tokenizer.decode(self.ids).rstrip("\ufffd")
        self.stream.put(self.answer(self.pieces, "running"))

    def on_images(self, indices: Sequence[int], modality: int, predicted: Tensor) -> None:
        self.end_if_stopped()
        steps = self.stream.request.image.steps
        if self.step in (0, steps):
            self.ids, self.step, self.drawn = [], 0, len(self.pieces)
        self.step += 1
        if self.step in (1, steps) or self.step % max(1, steps // STATES) == 0:
            in_order = predicted[torch.tensor(indices).argsort().to(predicted.device)]
            self.pieces[self.drawn :] = shown_pixels(self.subject, modality, in_order)
            self.stream.put(self.answer(self.pieces, "running"))
