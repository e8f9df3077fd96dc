"""Measure a run or an export on held-out data, and draw its samples beside real images.

    python train/evaluate.py RUN [--data FOLDER] [--each 8] [--steps 100] [--eta 1] [--guidance 3] [--out PICTURE.png]
    python train/evaluate.py RUN --prompts FILE.jsonl --judge MODULE:FUNCTION

The figures are printed and written to RUN/evaluation.json, or beside the picture for an exported folder. With --prompts
the images of a file's prompts are judged instead; the figures are then beside the picture, RUN/judged-FILE.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from transfusion_fast.config import Config
from transfusion_fast.data.loader import spread
from transfusion_fast.data.vision_encoder import read_vision_encoder
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.digits import DIGIT_WORDS
from transfusion_fast.sampling.clip import Clip
from transfusion_fast.sampling.evaluation import Report, evaluate
from transfusion_fast.sampling.judging import judge_prompts, load_judge, read_prompts
from transfusion_fast.sampling.pictures import check_picture, draw_grid, open_autoencoder
from transfusion_fast.sampling.settings import ImageSettings, Sampler
from transfusion_fast.sampling.subject import Captioned, Subject, read_captioned
from transfusion_fast.training.heldout_losses import measure_losses
from transfusion_fast.training.run_folder import (
    DataDescription,
    is_export,
    open_model,
    read_data_description,
    read_settings,
)
from transfusion_fast.training.splits import Split, open_splits

SHOWN = 20  # captions in the picture


def main() -> int:
    """Evaluate the run that the command line names, and return the exit code."""
    options = _parser().parse_args()
    try:
        _run(options)
    except (InputError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py or train/export.py")
    add("--data", type=Path, help="data folder, or folder with heldout/ and train/ (default: the run's own)")
    add("--checkpoint", help="name, such as step-00000500 (default: the latest)")
    add("--raw", action="store_true", help="use the weights of the last step, not their average")
    add("--each", type=int, default=8, help="images drawn of every caption or prompt (default: %(default)s)")
    add("--steps", type=int, default=100, help="diffusion steps (default: %(default)s)")
    add("--sampler", choices=get_args(Sampler), default="auto", help="how images are drawn (default: %(default)s)")
    add("--eta", type=float, default=1.0, help="noise added in a step (default: %(default)s)")
    add("--guidance", type=float, default=3.0, help="guidance weight (default: %(default)s)")
    add("--vae", type=Path, metavar="FOLDER", help="autoencoder of the data, to draw with a run on latents")
    add("--encoder", type=Path, metavar="FOLDER", help="vision encoder whose features the Frechet distance compares")
    add("--clip", type=Path, metavar="FOLDER", help="CLIP model and processor, to measure the CLIP score")
    add("--prompts", type=Path, metavar="FILE.jsonl", help="draw and judge these prompts, and measure nothing else")
    add("--judge", metavar="MODULE:FUNCTION", help="function of an entry of --prompts and its images")
    add("--out", type=Path, help="picture (default: RUN/samples.png)")
    return parser


def _run(options: argparse.Namespace) -> None:
    _check(options)
    data = read_data_description(options.run)
    entries = read_prompts(options.prompts) if options.prompts else []
    picture = options.out or options.run / (f"judged-{options.prompts.stem}.png" if entries else "samples.png")
    if data.modalities:
        check_picture(picture)
    model = open_model(options.run, options.checkpoint, raw=options.raw)
    vae = open_autoencoder(options.vae, data.modalities, "--vae", str(options.run)) if options.vae or entries else None
    subject = Subject(model, data.tokenizer, data.modalities, vae)
    image = ImageSettings(options.steps, options.guidance, options.eta, sampler=options.sampler)
    if entries:
        _judge(options, subject, data, entries, image, picture)
    else:
        _measure(options, subject, data, image, picture)


def _check(options: argparse.Namespace) -> None:
    if options.each < 1:
        raise InputError(f"--each must be at least 1, got {options.each}")
    if bool(options.prompts) != bool(options.judge):
        raise InputError("--prompts and --judge must be given together, got one of them; add the other")
    needed = {"--data": options.data or options.prompts, "--out": options.out}
    if is_export(options.run) and not all(needed.values()):
        raise InputError(
            f"--data and --out must be given for {options.run}, an exported folder, got one or none; add them"
        )


def _measure(
    options: argparse.Namespace, subject: Subject, data: DataDescription, image: ImageSettings, picture: Path
) -> None:
    config = read_settings(options.run, options.checkpoint)
    splits = open_splits(options.run, config, data, options.data)
    train, heldout = (one and read_captioned(one.folder, data.tokenizer, one.numbers) for one in splits)
    encoder = read_vision_encoder(options.encoder) if options.encoder else None
    clip = Clip(options.clip) if options.clip else None
    report, drawn = evaluate(subject, train, heldout, each=options.each, image=image, encoder=encoder, clip=clip)
    validation = _losses(subject, config, splits[1])
    figures = picture.with_suffix(".json") if is_export(options.run) else options.run / "evaluation.json"
    figures.parent.mkdir(parents=True, exist_ok=True)
    found = asdict(report) | {"frechet_features": str(options.encoder or "classifier"), "validation": validation}
    figures.write_text(json.dumps(found, indent=1) + "\n")
    if drawn:
        _draw_samples(drawn, subject, heldout, picture)
    _print(report, validation)
    print(f"pictures: {picture}" if drawn else f"figures: {figures}")


def _losses(subject: Subject, config: Config | None, heldout: Split) -> dict[str, float | None] | None:
    """Return the losses of the packs that training would measure; None without the settings that lay them out."""
    if config is None:
        return None
    numbers = spread(heldout.numbers, config.train.validate_packs)
    losses = measure_losses(subject.model, config, heldout.mixture, numbers, subject.modalities)
    return losses | {"packs": len(numbers)}


def _draw_samples(drawn: dict[str, np.ndarray], subject: Subject, heldout: Captioned, picture: Path) -> None:
    rows = []
    for caption in sorted(drawn, key=_in_counting_order)[:SHOWN]:
        real = [image for image, other in zip(heldout.images, heldout.captions, strict=True) if other == caption]
        rows.append((caption, [drawn[caption], subject.pixels(real[:4], heldout.modality)]))
    draw_grid(rows, picture, headings=("drawn by the model", "real, held out"))


def _print(report: Report, validation: dict[str, float | None] | None) -> None:
    """Print each figure, or why it is not measured."""
    drawn, captioned = report.num_generated, report.num_captioned
    classifier = _figure(report, "classifier_accuracy", "the classifier gets {:.3f} of real held-out images")
    floor = _figure(report, "frechet_floor", "{:.3f} of as many training images")
    clip = _figure(report, "clip_score_heldout", "{:.3f} of held-out images and their captions")
    for title, name, form in (
        ("generated images classified as prompted: ", "generated_accuracy", f"{{:.3f}} of {drawn} ({classifier})"),
        (
            "Frechet distance to held-out images:     ",
            "frechet_distance",
            f"{{:.3f}} of {drawn} to {report.num_heldout} ({floor})",
        ),
        ("CLIP score of images and their prompts:   ", "clip_score", f"{{:.3f}} of {drawn} ({clip})"),
        ("held-out images captioned exactly:       ", "caption_accuracy", f"{{:.3f}} of {captioned}"),
        ("BLEU of captions of held-out images:     ", "caption_bleu", f"{{:.3f}} of {captioned}"),
        ("perplexity of held-out text, per token:  ", "text_perplexity", f"{{:.3f}} over {report.num_texts} texts"),
    ):
        if getattr(report, name) is not None or name in report.not_measured:
            print(f"{title}{_figure(report, name, form)}")
    if report.num_others:
        print(f"documents of other parts than one image and its caption, of which only losses are: {report.num_others}")
    if validation is None:
        print("losses of held-out packs:                not measured, since the export has no layout; export it again")
    else:
        losses = [f"{name} {_or_none(validation[f'{name}_loss'])}" for name in ("text", "diffusion")]
        quarters = ", ".join(_or_none(validation[f"diffusion_loss_q{q}"]) for q in (1, 2, 3, 4))
        print(
            f"losses of {validation['packs']} held-out packs: {', '.join(losses)} (by quarter of timesteps: {quarters})"
        )


def _figure(report: Report, name: str, form: str) -> str:
    value = getattr(report, name)
    return form.format(value) if value is not None else f"not measured, since {report.not_measured.get(name)}"


def _or_none(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _judge(
    options: argparse.Namespace,
    subject: Subject,
    data: DataDescription,
    entries: list[dict[str, Any]],
    image: ImageSettings,
    picture: Path,
) -> None:
    if not data.modalities:
        raise InputError(f"--prompts needs a run on images, got {options.run}, on text alone")
    sys.path.append(os.getcwd())  # where `python -m` would look for the judge too
    judge, size = load_judge(options.judge), data.image_sizes[0]
    found, first = judge_prompts(subject, entries, judge, size, each=options.each, image=image)
    figures = picture.with_suffix(".json")
    figures.write_text(json.dumps(found, indent=1) + "\n")
    draw_grid([(prompt, [images]) for prompt, images in [*first.items()][:SHOWN]], picture)
    for tag, means in {"overall": found["overall"], **found["by_tag"]}.items():
        print(f"{tag}: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    print(f"figures: {figures}\npictures: {picture}")


def _in_counting_order(caption: str) -> tuple[int, str]:
    return (DIGIT_WORDS.index(caption) if caption in DIGIT_WORDS else len(DIGIT_WORDS), caption)


if __name__ == "__main__":
    sys.exit(main())
