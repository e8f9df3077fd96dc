"""Draw images from captions, caption images, or continue texts, with a trained run.

python train/sample.py RUN --prompt seven --prompt "two" [--each 8] [--out grid.png]
python train/sample.py RUN --prompt seven --start picture.png --strength 0.6     # change an image
python train/sample.py RUN --prompt seven --start picture.png --inpaint mask.png # draw where the mask is white
python train/sample.py RUN --prompt "make it a two" --edit picture.png           # for models that saw such documents
python train/sample.py RUN --caption picture.png [--caption another.png]
python train/sample.py RUN --text "two plus five is"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from transfusion_fast.data.autoencoder import Autoencoder
from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import Piece
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.prepare.given_images import read_image, read_mask
from transfusion_fast.prepare.preview import Picture, page
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.pictures import (
    check_picture,
    check_writable,
    draw_grid,
    images_to_pixels,
    open_autoencoder,
)
from transfusion_fast.sampling.settings import ImageSettings, Sampler, TextSettings
from transfusion_fast.settings import MAX_SEED
from transfusion_fast.training.run_folder import DataDescription, open_model, read_data_description

MAX_SIDE = 8192  # pixels


def main() -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args()
    try:
        _sample(options)
    except (InputError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2
    return 0


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help that keeps the lines of the description and names every default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_HelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py or train/export.py")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--prompt", nargs="+", action="extend", help="captions to draw")
    task.add_argument("--caption", nargs="+", action="extend", type=Path, metavar="IMAGE", help="images to caption")
    task.add_argument(
        "--text", nargs="+", action="extend", help="texts to continue, with images if the model begins them"
    )
    add("--out", type=Path, default=Path("grid.png"), help="picture to write; with --text also a page, NAME.html")
    add("--each", type=int, default=8, help="images per prompt")
    _add_image_options(parser)
    add("--temperature", type=float, default=0.0, help="temperature of text; 0 is greedy")
    add("--top-k", type=int, default=0, help="choose from this many of the likeliest tokens of text; 0 is all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="keep the smallest set of tokens of text whose probability reaches this",
    )
    add("--min-p", type=float, default=0.0, help="leave out tokens less likely than this fraction of the likeliest one")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 makes tokens that were used before less likely")
    add("--stop", nargs="+", action="extend", metavar="TEXT", help="end a continuation where one of these appears")
    add("--max-images", type=int, default=1, help="most images in the continuation of a --text")
    add("--max-tokens", type=int, default=64, help="most new tokens of text")
    size_help = (
        "size of images in pixels (default: that of the first image of the training data; in the continuation of a "
        "--text, models with size tokens choose it)"
    )
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size_help)
    add("--seed", type=int, default=0, help="seed of text and noise")
    add("--vae", type=Path, metavar="FOLDER", help="autoencoder of the data, for a run on latents")
    add("--checkpoint", help="name of a checkpoint, such as step-00000500 (default: the latest)")
    add("--raw", action="store_true", help="use the weights of the last step, not their average")
    return parser


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add("--steps", type=int, default=50, help="evaluations of the model for an image")
    add("--sampler", choices=get_args(Sampler), default="auto", help="auto is ddpm, and euler for flow matching")
    add("--eta", type=float, default=1.0, help="noise that a step of ddpm adds: 0 is DDIM, above 1 may remove speckle")
    add("--guidance", type=float, default=3.0, help="guidance weight; 1 turns guidance off")
    add("--image-guidance", type=float, help="weight of the images of a prompt; --guidance is then that of its text")
    add("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), default=(0.0, 1000.0), help="timesteps")
    add("--guidance-rescale", type=float, default=0.0, help="how far the guided prediction's deviation is restored")
    add("--negative", metavar="TEXT", help="what guidance leads away from, in place of nothing")
    add("--edit", type=Path, metavar="IMAGE", help="image before each --prompt, which is then an instruction")
    add("--start", type=Path, metavar="IMAGE", help="image to begin with, in place of noise alone")
    add("--strength", type=float, default=1.0, help="how much noise --start gets, as a fraction of the timesteps")
    add(
        "--inpaint",
        type=Path,
        metavar="MASK",
        help="image; --start is redrawn where it is white, and kept where it is black",
    )


def _sample(options: argparse.Namespace) -> None:
    if not 0 <= options.seed <= MAX_SEED:
        raise InputError(f"--seed must be in 0..{MAX_SEED}, got {options.seed}; give another")
    for name, least in (("each", 1), ("max_images", 0), ("max_tokens", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    is_page = options.out.suffix == ".html" and options.text
    (check_writable if is_page or options.caption else check_picture)(options.out)  # captions need no matplotlib
    data = read_data_description(options.run)
    text, image = _text_settings(options, data), _image_settings(options)
    model = open_model(options.run, options.checkpoint, raw=options.raw)
    if not data.modalities and not options.text:
        raise InputError(
            f"--prompt and --caption need a run on images, got {options.run}, a run on text alone; give --text"
        )
    vae = open_autoencoder(options.vae, data.modalities, "--vae", str(options.run))
    if options.size:
        data = _sized(data, options.size, 1 if vae is None else vae.stride)
    if options.prompt:
        _draw(options, model, data, vae, image)
    else:
        _continue(options, model, data, vae, text, image)


def _sized(data: DataDescription, size: Sequence[int], stride: int) -> DataDescription:
    """Return the description with images of `size` pixels; a latent value covers `stride` pixels per side."""
    multiple = stride * data.modalities[0].patch_size if data.modalities else 1
    if any(not 1 <= side <= MAX_SIDE or side % multiple for side in size):
        raise InputError(f"--size must be multiples of {multiple} up to {MAX_SIDE}, got {size[0]} {size[1]}")
    height, width = (side // stride for side in size)
    return replace(data, image_sizes=((height, width), *data.image_sizes[1:]))


def _draw(
    options: argparse.Namespace,
    model: Transfusion,
    data: DataDescription,
    vae: Autoencoder | None,
    image: ImageSettings,
) -> None:
    """Draw a row of images for each --prompt."""
    given = data.modalities[0], data.image_sizes[0], vae
    before = [read_image(options.edit, *given)] if options.edit else []
    prompts = [[*before, _ids(data, prompt)] for prompt in options.prompt]
    count = options.each * len(prompts)
    start = read_image(options.start, *given).expand(count, -1, -1, -1) if options.start else None
    keep = read_mask(options.inpaint, *given).expand(count, -1, -1, -1) if options.inpaint else None
    latents = generate_images(
        model,
        prompts,
        data.grid(0) if options.size or options.start else None,
        images_per_prompt=options.each,
        image=image,
        negative=_negative(options, data),
        start=start,
        keep=keep,
        seed=options.seed,
    )
    pixels = images_to_pixels(latents, data.modalities[0], vae)
    rows = [(prompt, [pixels[i * options.each :][: options.each]]) for i, prompt in enumerate(options.prompt)]
    draw_grid(rows, options.out)
    height, width = pixels.shape[1:3]
    print(f"drew {count} images of {height} x {width}: {options.out}")


def _continue(
    options: argparse.Namespace,
    model: Transfusion,
    data: DataDescription,
    vae: Autoencoder | None,
    text: TextSettings,
    image: ImageSettings,
) -> None:
    """Print, and write if there are images, the continuation of each --caption or --text."""
    if options.caption:
        prompts = [[read_image(path, data.modalities[0], data.image_sizes[0], vae)] for path in options.caption]
    else:
        prompts = [[_ids(data, one)] for one in options.text]
    produced = sample(
        model,
        prompts,
        grids=[data.grid(m) for m in range(len(data.modalities))] if options.size else None,
        max_images=0 if options.caption else options.max_images,
        text=text,
        image=image,
        negative=_negative(options, data),
        seed=options.seed,
    )
    read = [[_piece(p, data, vae) for p in pieces] for pieces in produced]
    for what, pieces in zip(options.caption or options.text, read, strict=True):
        words = "".join(p if isinstance(p, str) else " <image> " for p in pieces)
        print(f"{what}: {words}" if options.caption else f"{what}{words}")
    if options.out.suffix == ".html" and options.text:
        documents = [[one, *pieces] for one, pieces in zip(options.text, read, strict=True)]
        options.out.write_text(page(str(options.run), documents), encoding="utf-8")
        print(f"page: {options.out}")
        return
    drawn = [[p.images[0] for p in pieces if isinstance(p, Picture)] for pieces in read]
    rows = [(what, [images]) for what, images in zip(options.caption or options.text, drawn, strict=True) if images]
    if rows:
        draw_grid(rows, options.out)
        print(f"pictures: {options.out}")


def _text_settings(options: argparse.Namespace, data: DataDescription) -> TextSettings:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stop = None
    if options.stop:
        if "" in options.stop:
            raise InputError("--stop must be texts of at least one character, got an empty one; leave it out")
        longest = max(len(one.encode()) for one in options.stop)  # in tokens too, as each stands for a byte or more

        def stop(ids: Sequence[int]) -> bool:
            end = data.tokenizer.decode(np.array(ids[-longest:]))
            return any(one in end for one in options.stop)

    return TextSettings(**{name: getattr(options, name) for name in names}, stop=stop)


def _image_settings(options: argparse.Namespace) -> ImageSettings:
    drawn_from = {"edit": options.edit, "start": options.start, "inpaint": options.inpaint}
    if given := [f"--{name}" for name, value in drawn_from.items() if value and not options.prompt]:
        raise InputError(f"{given[0]} must come with --prompt, got none; give what is drawn")
    if options.inpaint and not options.start:
        raise InputError("--inpaint must come with --start, got none; give the image that it keeps a part of")
    if options.image_guidance is not None and options.prompt and not options.edit:
        raise InputError("--image-guidance must come with --edit, got none; give the image, or --guidance alone")
    names = ("steps", "sampler", "eta", "guidance", "image_guidance", "guidance_rescale", "strength")
    interval = tuple(options.guidance_interval)
    return ImageSettings(**{name: getattr(options, name) for name in names}, guidance_interval=interval)


def _negative(options: argparse.Namespace, data: DataDescription) -> list[Piece] | None:
    return None if options.negative is None else [_ids(data, options.negative)]


def _piece(piece: Piece, data: DataDescription, vae: Autoencoder | None) -> str | Picture:
    modality, tensor = piece if isinstance(piece, tuple) else (0, piece)
    if not tensor.is_floating_point():
        return data.tokenizer.decode(tensor.numpy())
    return Picture((images_to_pixels(tensor[None], data.modalities[modality], vae)[0],), "")


def _ids(data: DataDescription, text: str) -> torch.Tensor:
    return torch.from_numpy(data.tokenizer.encode(text)).long()


if __name__ == "__main__":
    sys.exit(main())
