"""Measure a run on captioned pixel images, such as the digits, and draw its samples beside real images.

    python train/evaluate.py RUN [--data FOLDER] [--each 8] [--steps 100] [--eta 1] [--guidance 3] [--out PICTURE.png]

It prints four figures and writes them to RUN/evaluation.json, or beside the picture for an exported folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from transfusion_fast.data.folder import is_url
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.digits import DIGIT_WORDS
from transfusion_fast.sampling.evaluation import Captioned, Report, evaluate, read_captioned
from transfusion_fast.sampling.frechet import MIN_IMAGES
from transfusion_fast.sampling.pictures import check_picture, draw_grid
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.training.run_folder import is_export, open_model, read_data_description


def main() -> int:
    """Evaluate the run that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py or train/export.py")
    parser.add_argument("--data", type=Path, help="folder with train/ and heldout/ (default: the run's own)")
    parser.add_argument("--checkpoint", help="name, such as step-00000500 (default: the latest)")
    parser.add_argument("--raw", action="store_true", help="use the weights of the last step, not their average")
    parser.add_argument("--each", type=int, default=8, help="images drawn of every caption (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="diffusion steps (default: %(default)s)")
    parser.add_argument("--eta", type=float, default=1.0, help="noise added in a step (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance weight (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="picture (default: RUN/samples.png)")
    options = parser.parse_args()
    try:
        _evaluate(options)
    except (InputError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    if options.each < 1:
        raise InputError(f"--each must be at least 1, got {options.each}")
    if is_export(options.run) and (options.out is None or options.data is None):
        raise InputError(
            f"--data and --out must be given for {options.run}, an exported folder, got one or none; add them"
        )
    picture = options.out or options.run / "samples.png"
    figures = picture.with_suffix(".json") if is_export(options.run) else options.run / "evaluation.json"
    data = read_data_description(options.run)
    if not data.modalities:
        raise InputError(f"evaluation needs a run on captioned images, got {options.run}, on text alone")
    check_picture(picture)
    model = open_model(options.run, options.checkpoint, raw=options.raw)
    folder = options.data or _data_of(options.run)
    if not (folder / "heldout").is_dir() or not (folder / "train").is_dir():
        raise InputError(
            f"evaluation needs a folder with train/ and heldout/ of captioned images, got {folder}; give --data"
        )
    train, heldout = (read_captioned(folder / split, data.tokenizer) for split in ("train", "heldout"))
    image = ImageSettings(options.steps, options.guidance, options.eta)
    patch_size = data.modalities[0].patch_size
    report, drawn = evaluate(
        model, data.tokenizer, train, heldout, each=options.each, image=image, patch_size=patch_size
    )
    figures.write_text(json.dumps(asdict(report), indent=1) + "\n")
    rows = [(caption, [drawn[caption], _real(heldout, caption)]) for caption in sorted(drawn, key=_in_counting_order)]
    draw_grid(rows, picture, headings=("drawn by the model", "real, held out"))
    print(
        f"generated images classified as prompted: {report.generated_accuracy:.3f} of {report.num_generated} "
        f"(the classifier gets {report.classifier_accuracy:.3f} of real held-out images)\n"
        f"Frechet distance to held-out images:     {_frechet(report)}\n"
        f"held-out images captioned exactly:       {report.caption_accuracy:.3f} of {report.num_captioned}\n"
        f"perplexity of held-out text, per token:  {_perplexity(report)}\n"
        f"pictures: {picture}"
    )


def _frechet(report: Report) -> str:
    drawn, real = report.num_generated, report.num_heldout
    if report.frechet_distance is None:
        return f"not measured, since it needs {MIN_IMAGES} images of each kind, got {drawn} drawn, {real} held out"
    floor = f"{report.frechet_floor:.3f} of as many training images"
    return f"{report.frechet_distance:.3f} of {drawn} to {real} ({floor})"


def _perplexity(report: Report) -> str:
    if report.text_perplexity is None:
        return "not measured, since no held-out document is text alone"
    return f"{report.text_perplexity:.3f} over {report.num_texts} texts"


def _in_counting_order(caption: str) -> tuple[int, str]:
    return (DIGIT_WORDS.index(caption) if caption in DIGIT_WORDS else len(DIGIT_WORDS), caption)


def _real(heldout: Captioned, caption: str, count: int = 4) -> list[np.ndarray]:
    own = [image for image, other in zip(heldout.images, heldout.captions, strict=True) if other == caption]
    return own[:count]


def _data_of(run: Path) -> Path:
    try:
        path = yaml.safe_load((run / "config.yaml").read_text())["data"]["path"]
        if not isinstance(path, dict) and not is_url(path):
            return Path(path).parent
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{run}: has no config that names its data ({error}); give --data") from error
    raise InputError(f"{run}: was trained on {path}, and evaluation needs one local folder; give --data")


if __name__ == "__main__":
    sys.exit(main())
