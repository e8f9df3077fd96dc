"""Load the engine under the page for a while with good, stopped and malformed requests from several threads at once.

python tools/soak.py RUN [--minutes 20]

Good requests come from a pool that is answered alone first; every later answer must equal that one bit for bit. Prints
a line and JSON, and exits with status 1 after a wrong answer, an unexpected error, a request that never ends, or growth
of the resident memory beyond `MAX_GROWTH` after the first tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from transfusion_fast.errors import InputError
from transfusion_fast.prepare.given_images import read_image
from transfusion_fast.sampling.pictures import open_autoencoder
from transfusion_fast.sampling.settings import ImageSettings, TextSettings
from transfusion_fast.sampling.streaming import Answer, Request, Streamer
from transfusion_fast.sampling.subject import Subject
from transfusion_fast.training.run_folder import open_model, read_data_description

CLIENTS, POOL = 3, 40
MAX_GROWTH = 48 << 20
PATIENCE = 300.0  # seconds after which a request counts as hanging


def main() -> int:
    """Run the soak of the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py or train/export.py")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: %(default)s)")
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="autoencoder of the data, for a run on latents")
    options = parser.parse_args()
    try:
        report = Soak(options).run()
    except (InputError, OSError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    print(
        f"soak: {'failed' if report['failures'] else 'passed'} after {report['minutes']:.1f} min: "
        f"{report['answered']} answers as alone, {report['stopped']} stopped (in {report['slowest_stop']:.2f} s at "
        f"most), {report['refused']} malformed ones refused, {len(report['failures'])} failures; "
        f"memory {report['memory_mb']:.0f} MB, grew by {report['growth_mb']:.1f} MB"
    )
    print(json.dumps(report), flush=True)
    if report["failures"]:
        os._exit(1)  # without waiting for threads that may hang
    return 0


class Soak:
    """The requests, and what became of them."""

    def __init__(self, options: argparse.Namespace):
        self.data, self.seconds, self.seed = read_data_description(options.run), 60 * options.minutes, options.seed
        self.vae = open_autoencoder(options.vae, self.data.modalities, "--vae", str(options.run))
        model = open_model(options.run)
        self.subject = Subject(model, self.data.tokenizer, self.data.modalities, self.vae)
        self.streamer, self.counts, self.slowest_stop = Streamer(self.subject), Counter[str](), 0.0

    def run(self) -> dict[str, Any]:
        """Answer requests for as long as asked; return the report."""
        rng = random.Random(self.seed)
        pool = [self._request(rng) for _ in range(POOL)]
        self.pool = [(request, [*self.streamer.start(request)][-1]) for request in pool]
        begun, memory, process = time.monotonic(), [], psutil.Process()
        self.end = begun + self.seconds
        clients = ThreadPoolExecutor(CLIENTS)
        with tempfile.TemporaryDirectory() as folder:
            futures = [clients.submit(self._client, random.Random(rng.random()), Path(folder)) for _ in range(CLIENTS)]
            while time.monotonic() < self.end and not any(future.done() for future in futures):
                time.sleep(min(1.0, self.seconds / 100))
                memory.append(process.memory_info().rss)
            self.end = begun
            waiting = wait(futures, PATIENCE).not_done
        failures = [repr(future.exception()) for future in futures if future.done() and future.exception()]
        failures += [f"a client waits for an answer after {PATIENCE:.0f} s"] * len(waiting)
        tenth = max(1, len(memory) // 10)
        first, last = median(memory[tenth : 2 * tenth] or memory), median(memory[-tenth:])
        if last - first > MAX_GROWTH:
            failures.append(
                f"memory must grow by at most {MAX_GROWTH >> 20} MiB, grew by {(last - first) / 1e6:.0f} MB"
            )
        return {
            "minutes": (time.monotonic() - begun) / 60,
            **{name: self.counts[name] for name in ("answered", "stopped", "refused")},
            "slowest_stop": self.slowest_stop,
            "memory_mb": last / 1e6,
            "growth_mb": (last - first) / 1e6,
            "failures": failures,
        }

    def _request(self, rng: random.Random) -> Request:
        """Return a random request that the model can answer."""
        tasks = ("draw", "change", "caption", "write") if self.data.modalities else ("write",)
        task, given = rng.choice(tasks), None
        if task in ("change", "caption"):
            shape = (*self.data.grid(0), self.subject.model.config.dim_latent[0])
            given = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 31))) * 2 - 1
        alphabet = rng.choice(["abcdefghij klmnop", "zweiundvierzig éß", "\u4e00\u4e8c\u4e09 <b>&\n\0"])
        return Request(
            task,
            "".join(rng.choices(alphabet, k=rng.randint(1, 60))),
            given,
            TextSettings(max_tokens=rng.randint(1, 64), temperature=rng.choice([0.0, 0.7, 1.5])),
            ImageSettings(
                steps=rng.randint(1, 50),
                guidance=rng.uniform(1, 8),
                sampler=rng.choice(["auto", "euler", "heun", "dpm++"]),
                strength=rng.uniform(0.1, 1) if task == "change" else 1.0,
            ),
            num_images=rng.randint(1, 4),
            seed=rng.randrange(1 << 63),
        )

    def _client(self, rng: random.Random, folder: Path) -> None:
        """Send requests, one after another, until the time is over."""
        while time.monotonic() < self.end:
            kind = rng.random()
            if kind < 0.15:
                self._send_malformed(rng, folder)
            else:
                self._send(rng, stopping=kind < 0.4)

    def _send(self, rng: random.Random, stopping: bool) -> None:
        request, alone = rng.choice(self.pool)
        request = replace(request)  # another object, which every answer must name
        stream, wanted = self.streamer.start(request), rng.randrange(12) if stopping else -1
        seen, asked = 0, None
        while True:
            if seen == wanted:
                time.sleep(rng.random() * 0.05)
                asked = time.monotonic()
                stream.stop()
                if rng.random() < 0.2:
                    return  # as a closed page, which reads no more
            answer = next(stream)
            seen += 1
            if answer.request is not request:
                raise AssertionError(f"answer to {answer.request}, expected one to {request}")
            if answer.state != "running":
                break
        if asked is not None and wanted > 0:  # others may be decoded before the first answer
            self.slowest_stop = max(self.slowest_stop, time.monotonic() - asked)
        if not _fits(answer, alone):
            raise AssertionError(f"{answer!s:.400} must equal the answer alone, {alone!s:.400}")
        self.counts["answered" if answer.state == "done" else "stopped"] += 1

    def _send_malformed(self, rng: random.Random, folder: Path) -> None:
        request, nan = rng.choice(self.pool)[0], float("nan")
        size = self.data.image_sizes[0] if self.data.modalities else (8, 8)

        def broken(content: bytes) -> Any:
            path = folder / f"{rng.random()}.png"
            path.write_bytes(content)
            return read_image(path, self.data.modalities[0], size, self.vae)

        makers: list[Callable[[], Request]] = [
            lambda: replace(request, task="write", prompt=""),
            lambda: replace(request, task="write", prompt="long " * rng.randint(5000, 50000)),
            lambda: replace(request, image=ImageSettings(guidance=nan)),
            lambda: replace(request, text=TextSettings(temperature=nan)),
            lambda: replace(request, image=ImageSettings(steps=rng.choice([0, -1, 10**9]))),
            lambda: replace(request, text=TextSettings(max_tokens=10**9)),
            lambda: replace(request, seed=-1),
            lambda: replace(request, num_images=10**6),
        ]
        if self.data.modalities:
            png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
            contents = [b"", rng.randbytes(1000), png, png + b"\xff" * 50, b"GIF89a" + rng.randbytes(50)]
            makers += [lambda one=one: replace(request, given=broken(one)) for one in contents]
            makers += [lambda: replace(request, task="change", prompt="a", given=torch.full((3, 3, 1), nan))]
        try:
            for _ in self.streamer.start(rng.choice(makers)()):
                pass
        except InputError as error:
            if "\n" in str(error):
                raise AssertionError(f"an error must be one line, got {error}") from error
            self.counts["refused"] += 1
        else:
            raise AssertionError("a malformed request was answered")


def _fits(answer: Answer, alone: Answer) -> bool:
    """Return whether an answer is that of the request alone, or a part of its text if it was stopped."""
    if answer.state == "done":
        return len(answer.pieces) == len(alone.pieces) and all(map(np.array_equal, answer.pieces, alone.pieces))
    text, whole = ([piece for piece in one.pieces if isinstance(piece, str)] for one in (answer, alone))
    return all(part == other or other.startswith(part) for part, other in zip(text, whole, strict=False))


if __name__ == "__main__":
    sys.exit(main())
