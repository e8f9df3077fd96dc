"""Draws images from captions, or captions images, with a trained run.

python train/sample.py RUN --prompt seven --prompt "two" [--each 8] [--out grid.png]
python train/sample.py RUN --caption picture.png [--caption another.png]
python train/sample.py RUN --text "two plus five is"
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage

from transfusion_fast.data.autoencoder import Autoencoder, read_autoencoder
from transfusion_fast.data.images import from_grid, latents_to_pixels, pixels_to_latents, to_grid
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.model.sequence import Image, Text
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.prepare.encode import scaled_middle
from transfusion_fast.prepare.images import decode_image
from transfusion_fast.prepare.preview import Picture, page
from transfusion_fast.sampling.decoder import ImageSettings, generate_images, sample
from transfusion_fast.sampling.pictures import check_picture, check_writable, draw_grid
from transfusion_fast.training.run_folder import DataDescription, find_checkpoint, load_model, read_data_description


def main() -> int:
    """Samples what the command line asks for; returns the exit code."""
    options = _parser().parse_args()
    try:
        _sample(options)
    except (InputError, OSError) as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", action="extend", help="captions to draw")
    what.add_argument("--caption", nargs="+", action="extend", type=Path, metavar="IMAGE", help="images to caption")
    what.add_argument(
        "--text", nargs="+", action="extend", help="texts to go on with; images where the model begins them"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("grid.png"),
        help="picture to write; of --text also a page, NAME.html (default: %(default)s)",
    )
    parser.add_argument("--each", type=int, default=8, help="images of every prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="diffusion steps (default: %(default)s)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="(default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance weight, 1 is off (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of text, 0 is greedy (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=1, help="of each --text (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of text (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="of images in pixels (default: as the first image of the training data)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="of a run on latents: the autoencoder of its data")
    parser.add_argument("--checkpoint", help="its name, such as step-00000500 (default: the latest)")
    return parser


def _sample(options: argparse.Namespace) -> None:
    for name, least in (("each", 1), ("max_images", 0), ("max_tokens", 1), ("temperature", 0)):
        if not least <= getattr(options, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    is_page = options.out.suffix == ".html" and options.text
    (check_writable if is_page or options.caption else check_picture)(options.out)  # captions need no matplotlib
    data = read_data_description(options.run)
    model = load_model(find_checkpoint(options.run, options.checkpoint))
    if not data.modalities and not options.text:
        raise InputError(f"--prompt and --caption need a run on images, got {options.run}, on text alone; give --text")
    vae = _autoencoder(options, data)
    if options.size:
        data = _sized(data, options.size, 1 if vae is None else vae.stride)
    clip = 1.0 if data.modalities and data.modalities[0].encoding == "pixels" else None
    image = ImageSettings(options.steps, options.guidance, eta=float(options.sampler == "ddpm"), clip=clip)
    generator = torch.Generator().manual_seed(options.seed)
    if options.prompt:
        _draw(options, model, data, vae, image, generator)
    else:
        _continue(options, model, data, vae, image, generator)


def _sized(data: DataDescription, size: Sequence[int], stride: int) -> DataDescription:
    """The same with images of so many pixels, a value of which stands for `stride` of them a side."""
    multiple = stride * data.modalities[0].patch_size if data.modalities else 1
    if any(side < 1 or side % multiple for side in size):
        raise InputError(f"--size must be positive multiples of {multiple}, got {size[0]} {size[1]}")
    height, width = (side // stride for side in size)
    return replace(data, image_sizes=((height, width), *data.image_sizes[1:]))


def _autoencoder(options: argparse.Namespace, data: DataDescription) -> Autoencoder | None:
    """What the run's latents were made with; None where its images are pixels, or there are none."""
    latents = [modality for modality in data.modalities if modality.encoding == "latents"]
    if not latents and options.vae is None:
        return None
    if not latents:
        raise InputError(f"--vae needs a run on latents, got {options.run}, on pixels or text alone; leave it out")
    if options.vae is None:
        raise InputError(f"{options.run}: is on latents, which need the autoencoder of its data; give --vae FOLDER")
    vae = read_autoencoder(options.vae)
    for modality in latents:
        vae.check_made(modality.autoencoder, modality.channels, str(options.run))
    return vae


def _draw(
    options: argparse.Namespace,
    model: Transfusion,
    data: DataDescription,
    vae: Autoencoder | None,
    image: ImageSettings,
    generator: torch.Generator,
) -> None:
    """--prompt: a row of images for each."""
    prompts = [[_ids(data, prompt)] for prompt in options.prompt for _ in range(options.each)]
    latents = generate_images(model, prompts, data.grid(0), image=image, generator=generator)
    pixels = _pixels(latents, data.modalities[0], vae)
    rows = [(prompt, [pixels[i * options.each :][: options.each]]) for i, prompt in enumerate(options.prompt)]
    draw_grid(rows, options.out)
    height, width = pixels.shape[1:3]
    print(f"drew {len(prompts)} images of {height} x {width}: {options.out}")


def _continue(
    options: argparse.Namespace,
    model: Transfusion,
    data: DataDescription,
    vae: Autoencoder | None,
    image: ImageSettings,
    generator: torch.Generator,
) -> None:
    """--caption and --text: what the model produces after an image or a text."""
    if options.caption:
        prompts = [[_read_image(path, data, vae)] for path in options.caption]
    else:
        prompts = [[_ids(data, text)] for text in options.text]
    produced = sample(
        model,
        prompts,
        grids=[data.grid(m) for m in range(len(data.modalities))],
        max_text_tokens=options.max_tokens,
        max_images=0 if options.caption else options.max_images,
        temperature=options.temperature,
        image=image,
        generator=generator,
    )
    read = [[_piece(p, data, vae) for p in pieces] for pieces in produced]
    for what, pieces in zip(options.caption or options.text, read, strict=True):
        words = "".join(p if isinstance(p, str) else " <image> " for p in pieces)
        print(f"{what}: {words}" if options.caption else f"{what}{words}")
    if options.out.suffix == ".html" and options.text:
        documents = [[text, *pieces] for text, pieces in zip(options.text, read, strict=True)]
        options.out.write_text(page(str(options.run), documents), encoding="utf-8")
        print(f"page: {options.out}")
        return
    drawn = [[p.images[0] for p in pieces if isinstance(p, Picture)] for pieces in read]
    rows = [(what, [images]) for what, images in zip(options.caption or options.text, drawn, strict=True) if images]
    if rows:
        draw_grid(rows, options.out)
        print(f"pictures: {options.out}")


def _piece(piece: Text | Image, data: DataDescription, vae: Autoencoder | None) -> str | Picture:
    if isinstance(piece, Text):
        return data.tokenizer.decode(piece.ids.numpy())
    return Picture((_pixels(piece.latents[None], data.modalities[piece.modality], vae)[0],), "")


def _ids(data: DataDescription, text: str) -> torch.Tensor:
    return torch.from_numpy(data.tokenizer.encode(text)).long()


def _pixels(latents: torch.Tensor, modality: ModalityInfo, vae: Autoencoder | None) -> np.ndarray:
    """uint8 [N, height, width, channels] of what the model draws, [N, rows, columns, C]."""
    if vae is None:
        return latents_to_pixels(latents.numpy(), modality.patch_size)
    return vae.decode(from_grid(latents.numpy(), modality.patch_size))


def _read_image(path: Path, data: DataDescription, vae: Autoencoder | None) -> torch.Tensor:
    """What the model sees, [rows, columns, C], of an image file, resized to the size of the training images."""
    info, (height, width) = data.modalities[0], data.image_sizes[0]
    if vae is not None:
        pixels = _read_pixels(path, (height * vae.stride, width * vae.stride), channels=3)
        return to_grid(vae.encode(pixels), info.patch_size)[0]
    if info.channels not in (1, 3):
        raise InputError(f"--caption needs a run on grey or colour pixels, got {info.channels} channels of pixels")
    return pixels_to_latents(_read_pixels(path, (height, width), info.channels), info.patch_size)[0]


def _read_pixels(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """uint8 [1, height, width, channels], grey or colour, read as `prepare.py` reads images."""
    height, width = size
    try:
        pixels = decode_image(path.read_bytes())
    except Rejected as error:
        raise InputError(f"{path}: must be a readable image, and is not ({error})") from error
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    middle = scaled_middle(pixels, height, width, scale)
    shown = PillowImage.fromarray(middle).convert("L" if channels == 1 else "RGB")
    return np.asarray(shown, dtype=np.uint8).reshape(1, height, width, channels)


if __name__ == "__main__":
    sys.exit(main())
