"""Draw digits with every checkpoint of a run, by the code of the revision that trained it.

    cd WORKTREE && PYTHONPATH=. python draw_digits.py RUN OUT [--each 8] [--steps 25] [--eta 1]

tools/time_to_accuracy.py runs it in the working tree of each revision, so it uses only what all of them have: the names
that train/evaluate.py imports. OUT/STEP.npy is uint8 [10, each, height, width, channels], zero to nine. Each core draws
with a checkpoint of its own. Drawings that exist are not repeated.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import os
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOVED_TO = {
    "generate_images": "transfusion_fast.sampling.decoder",
    "latents_to_pixels": "transfusion_fast.data.images",
}
"""The modules that hold these functions in revisions whose evaluation does not import them."""


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--each", type=int, default=8, help="images of each digit (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="diffusion steps (default: %(default)s)")
    parser.add_argument("--eta", type=float, default=1.0, help="noise added in a step (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    names = sorted(path.name for path in (options.run / "checkpoints").glob("step-*"))
    missing = [name for name in names if not _drawing(options.out, name).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(partial(_draw, options), missing))


def _draw(options: argparse.Namespace, checkpoint: str) -> None:
    command = runpy.run_path("train/evaluate.py")
    evaluation = vars(sys.modules[command["evaluate"].__module__])
    draw, to_pixels = (
        evaluation[name] if name in evaluation else getattr(importlib.import_module(later), name)
        for name, later in MOVED_TO.items()
    )
    if "open_model" in command:
        model = command["open_model"](options.run, checkpoint)
    else:  # revisions without exports of runs
        model = command["load_model"](command["find_checkpoint"](options.run, checkpoint))
    data = command["read_data_description"](options.run)
    image = command["ImageSettings"](steps=options.steps, eta=options.eta, clip=1.0)
    prompts = [[torch.from_numpy(data.tokenizer.encode(word)).long()] for word in WORDS for _ in range(options.each)]
    keyed = "seed" in inspect.signature(draw).parameters  # earlier revisions draw noise from a generator
    noise = {"seed": 0} if keyed else {"generator": torch.Generator().manual_seed(0)}
    latents = draw(model, prompts, data.grid(0), image=image, **noise)
    pixels = to_pixels(latents.numpy(), data.modalities[0].patch_size)
    drawing = _drawing(options.out, checkpoint)
    staged = drawing.with_suffix(".tmp")
    with staged.open("wb") as file:
        np.save(file, pixels.reshape(len(WORDS), options.each, *pixels.shape[1:]))
    os.replace(staged, drawing)


def _drawing(out: Path, checkpoint: str) -> Path:
    return out / f"{int(checkpoint.removeprefix('step-'))}.npy"


if __name__ == "__main__":
    main()
