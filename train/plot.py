"""Draw the curves of runs, or, with --overview, the samples of one run on pixels beside the attention mask of a pack.

python train/plot.py RUN [RUN ...] [--out curves.png]
python train/plot.py RUN --overview [--prompt zero one two] [--pack 0] [--out overview.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from transfusion_fast.config_reading import load_config
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.images import latents_to_pixels
from transfusion_fast.data.loader import batch_builder, open_data
from transfusion_fast.data.mixture import MixtureReader
from transfusion_fast.data.pack import TextSegment
from transfusion_fast.errors import InputError
from transfusion_fast.sampling.decoder import generate_images
from transfusion_fast.sampling.generators import image_generator
from transfusion_fast.sampling.overview import Samples, draw_overview
from transfusion_fast.sampling.pictures import check_picture
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.settings import MAX_SEED
from transfusion_fast.training.checkpoint_files import find_checkpoint, list_checkpoints, read_meta
from transfusion_fast.training.curves import draw_curves, read_curves
from transfusion_fast.training.metrics import METRICS, read_rows
from transfusion_fast.training.run_folder import CONFIG, load_model, read_data_description

MAX_COLUMNS, MAX_PROMPTS = 6, 10  # more would be too small to see


def main() -> int:
    """Draw what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train/pretrain.py")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: curves.png or overview.png in the first RUN")
    parser.add_argument("--overview", action="store_true", help="draw samples and a mask; the other options are for it")
    parser.add_argument("--prompt", nargs="+", action="extend", help="captions to draw (default: those of the pack)")
    parser.add_argument("--pack", type=int, default=0, help="number in the order of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="diffusion steps (default: %(default)s)")
    parser.add_argument("--eta", type=float, default=1.0, help="noise added in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    options = parser.parse_args()
    try:
        for name in ("prompt", "pack", "steps", "seed"):
            if not options.overview and getattr(options, name) != parser.get_default(name):
                raise InputError(f"--{name} must come with --overview, got it alone; add --overview")
        path = options.out or options.runs[0] / ("overview.png" if options.overview else "curves.png")
        if options.overview:
            _draw_overview(options, path)
        else:
            curves = read_curves(options.runs)
            check_picture(path)
            draw_curves(path, curves)
        print(f"picture: {path}")
    except (InputError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


def _draw_overview(options: argparse.Namespace, path: Path) -> None:
    if len(options.runs) > 1:
        raise InputError(f"--overview must be given one run, got {len(options.runs)}; draw them one at a time")
    [run] = options.runs
    data = read_data_description(run)
    if not data.modalities or data.modalities[0].encoding != "pixels":
        raise InputError(f"--overview needs a run on pixels, got {run}, on latents or text alone; use train/sample.py")
    for name, value in (("pack", options.pack), ("seed", options.seed)):
        if not 0 <= value <= MAX_SEED:
            raise InputError(f"--{name} must be in 0..{MAX_SEED}, got {value}; give another")
    check_picture(path)
    find_checkpoint(run)  # fails if there is none
    kept = list_checkpoints(run)
    checkpoints = [kept[i] for i in np.linspace(0, len(kept) - 1, min(len(kept), MAX_COLUMNS)).round().astype(int)]
    config = load_config(run / CONFIG)
    mixture, window = open_data(config), config.data.shuffle_window
    epoch, number = mixture.order(config.train.seed, window)[options.pack]
    keyed = KeyedPack(MixtureReader(mixture, window).read(number), epoch, number)

    pairs = (document for document in keyed.pack.documents(mixture.modalities) if len(document) == 2)
    captions = (data.tokenizer.decode(s.ids) for pair in pairs for s in pair if isinstance(s, TextSegment))
    prompts = options.prompt or list(dict.fromkeys(captions))[:MAX_PROMPTS]
    if not prompts:
        raise InputError(f"pack {options.pack} of {mixture} must hold a captioned image, got none; give --prompt")
    ids = [[torch.from_numpy(data.tokenizer.encode(prompt)).long()] for prompt in prompts]
    settings = ImageSettings(options.steps, eta=options.eta)
    columns = [generate_images(load_model(one), ids, image=settings, seed=options.seed) for one in checkpoints]
    generators = [image_generator(options.seed, number) for number in range(len(ids))]
    columns.insert(0, torch.stack([torch.randn(columns[0].shape[1:], generator=one) for one in generators]))
    pixels = np.stack([latents_to_pixels(column.numpy(), data.modalities[0].patch_size) for column in columns])
    steps = [0, *(read_meta(checkpoint).step for checkpoint in checkpoints)]
    rows = read_rows(run / METRICS, last_step=steps[-1])
    losses = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    samples = Samples(prompts, steps, pixels, losses)
    draw_overview(path, samples, keyed, batch_builder(config, mixture, packs=1), data.tokenizer)


if __name__ == "__main__":
    sys.exit(main())
