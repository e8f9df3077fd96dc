"""Prepare data folders: `python train/prepare.py digits OUT`, or `fashion-mnist` or `stories`, or `text`, `pairs` or
`interleaved` for your own files. Look after a folder: `preview`, `info`, `verify`, `index`, `repack`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.index import parse_index
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Built, build
from transfusion_fast.prepare.encode import Encoder, Long
from transfusion_fast.prepare.examples.built_in import BuiltIn, prepare_splits
from transfusion_fast.prepare.examples.digits import Digits, InterleavedDigits
from transfusion_fast.prepare.examples.fashion import FashionMnist
from transfusion_fast.prepare.examples.stories import Stories
from transfusion_fast.prepare.filters import Filters
from transfusion_fast.prepare.images import BATCH, ImageRule, LatentRule
from transfusion_fast.prepare.inspect import Statistics, draw_lengths, rebuild_index, summary, verify
from transfusion_fast.prepare.options import CAPTIONS, CHOICE, IMAGES, LATENTS, OUTPUT, TOKENS, add_options, local_path
from transfusion_fast.prepare.parts import Share, build_part
from transfusion_fast.prepare.progress import progress
from transfusion_fast.prepare.recipe import Recipe, measure_features, train_tokenizer
from transfusion_fast.prepare.repack import PacksSource
from transfusion_fast.prepare.selection import ALL, SIDES, Selection
from transfusion_fast.prepare.sources import layouts
from transfusion_fast.prepare.sources.base import Source
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import LAYOUTS, PairsSource
from transfusion_fast.prepare.sources.text import TextSource
from transfusion_fast.prepare.staging import check_outside
from transfusion_fast.prepare.upload import local_and_target, upload_and_remove

if TYPE_CHECKING:
    from transfusion_fast.prepare.preview import Decoder

CAPACITIES = (2048, 4096, 8192, 16384)
"""Pack lengths whose waste `info` prints."""
MOST_SHAPES = 16
"""Shapes of images that `info` prints, the most frequent ones; there are fewer buckets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return 0 for success, 1 if verify finds damage, 2 after one line for bad input."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be any bytes
    try:
        options.target = None
        if "work" in options:
            options.out, options.target = local_and_target(options.out, options.work)
        return options.run(options) or 0
    except (InputError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        out = getattr(options, "out", None)
        begun = out is not None and (out.is_dir() or out.with_name(f"{out.name}.partial").exists())
        print("prepare: interrupted" + "; the same command resumes" * begun, file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description="Make data folders and look after them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, *options: str, **defaults: Any
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        add_options(command, *options)
        command.set_defaults(run=run, **defaults)
        return command

    help = "scikit-learn's 1797 handwritten digits, and sums in words"
    digits = partial(_built_in, lambda o: InterleavedDigits() if o.interleaved else Digits(), packs_per_shard=16)
    add("digits", digits, help, "out", "--seq-len", "--patch-size", "--interleaved", seq_len=512, patch_size=4)
    fashion = partial(_built_in, lambda options: FashionMnist(options.source), packs_per_shard=64)
    help = "70,000 pictures of clothes and their names"
    add("fashion-mnist", fashion, help, "out", "--seq-len", "--patch-size", "--source", seq_len=2048)
    stories = partial(_built_in, lambda options: Stories(FashionMnist(options.source)), packs_per_shard=32)
    help = "21,000 short stories, Fashion-MNIST's pictures between the sentences"
    add("stories", stories, help, "out", "--seq-len", "--patch-size", "--source")
    help = "text: a field of .jsonl, .json, .parquet, .arrow or .csv, or .txt files"
    source = ("files", *OUTPUT, *CHOICE, *TOKENS)
    add("text", _text, help, *source, "--field", "--separator")
    help = "captioned images: WebDataset tars, folders of images, or .parquet, .jsonl, .csv, .. of images or paths"
    run = partial(_images, kind=PairsSource, long="reject")  # as a caption without its image is useless
    pairs = add("pairs", run, help, *source, *IMAGES, *LATENTS, *CAPTIONS)
    help = "tars, files (images with captions beside them), or records that hold or name images (default: detected)"
    pairs.add_argument("--layout", choices=LAYOUTS, help=help)
    help = 'texts and images in turn: .jsonl, .json, .parquet or .arrow, as {"content": ["text", {"image": "PATH"}]}'
    run = partial(_images, kind=InterleavedSource, long="split")
    interleaved = add("interleaved", run, help, *source, *IMAGES, *LATENTS, "--image-root", "--bad-images")
    help = "layout of all documents (default: detected for each)"
    interleaved.add_argument("--layout", choices=layouts.LAYOUTS, help=help)
    help = "the documents of a data folder, which stays as it is, in packs of another length"
    add("repack", _repack, help, "folder", *OUTPUT, train_bpe=None)
    add("verify", _verify, "compare every byte of a data folder with its index", "folder", "--processes")
    add("info", _info, "print what a data folder holds, and the waste at other pack lengths", "folder", "--picture")
    help = "rebuild index.json for the shards that are in a folder"
    add("index", _index, help, "folder", "--like", "--accept", "--processes")
    help = "a pack as a page of HTML: text and images as a model with the default settings sees them"
    view = add("preview", _preview, help, "folder", "--pack", "--vae", "--epoch", "--seed")
    view.add_argument(
        "--out", type=local_path, default=Path("preview.html"), metavar="HTML", help="(default: %(default)s)"
    )
    return parser


def _built_in(make: Callable[[argparse.Namespace], BuiltIn], options: argparse.Namespace, packs_per_shard: int) -> None:
    data, patch_size = make(options), options.patch_size
    for split, built in prepare_splits(data, options.out, options.seq_len, packs_per_shard, patch_size).items():
        _print_built(options.out / split, built)


def _text(options: argparse.Namespace) -> None:
    if options.dedup == "images":
        raise InputError("--dedup of texts must be documents, got images; give that")
    filters = _filters(options)
    source = TextSource.of(options.files, field=options.field, separator=options.separator, fields=filters.fields)
    tokenizer = _tokenizer(options, source)
    encoder = Encoder(tokenizer, options.seq_len, long=options.long or "split", filters=filters)
    _build(options, source, encoder, _selection(options))


def _filters(options: argparse.Namespace) -> Filters:
    names = ("where", "min_side", "max_aspect", "caption_length")
    return Filters.parse(**{name: vars(options)[name] for name in names if name in options})


def _images(options: argparse.Namespace, kind: type[Source], long: Long) -> None:
    filters, names = _filters(options), ("layout", "caption_field", "image_field", "image_root")
    settings = {name: vars(options)[name] for name in names if name in options}
    source, latents = kind.of(options.files, fields=filters.fields, **settings), _latents(options)
    size, patch = options.image_size, options.patch_size
    if latents is None:
        modality, stride, own_size = ModalityInfo("images", 3, 16 if patch is None else patch, "pixels"), 1, 256
    else:
        modality = latents.encoder.modality("images", (1 if options.encoder else 2) if patch is None else patch)
        stride, own_size = latents.encoder.stride, getattr(latents.encoder, "image_size", 256)
    rule = ImageRule(options.shape, own_size if size is None else size, modality.patch_size * stride)
    tokenizer = _tokenizer(options, source)
    bad_images = getattr(options, "bad_images", "reject")
    encoder = Encoder(tokenizer, options.seq_len, (modality,), rule, options.long or long, latents, bad_images, filters)
    if latents is not None and options.encoder and not modality.mean:
        vision = measure_features(encoder, source, options.train_bpe, options.out, _selection(options))
        modality = vision.modality(modality.name, modality.patch_size)
        encoder = replace(encoder, modalities=(modality,), latents=replace(latents, encoder=vision))
    _build(options, source, encoder, _selection(options))


def _latents(options: argparse.Namespace) -> LatentRule | None:
    """Return the rule of the encoder that is given; None for pixels, which are prepared without PyTorch."""
    batch = BATCH if options.vae_batch is None else options.vae_batch
    if options.vae is not None and options.encoder is not None:
        raise InputError("--vae or --encoder must be given alone, got both; give one of them")
    if options.latents is not None and options.vae is None:
        raise InputError("--latents must come with --vae, got none; give the autoencoder's folder")
    if options.encoder_like is not None and options.encoder is None:
        raise InputError("--encoder-like must come with --encoder, got none; give the vision encoder's folder")
    if options.vae is not None:
        from transfusion_fast.data.autoencoder import read_autoencoder

        return LatentRule(read_autoencoder(options.vae), options.latents != "mean", batch)
    if options.encoder is None:
        if options.vae_batch is not None:
            raise InputError("--vae-batch must come with --vae or --encoder, got none; give the encoder's folder")
        return None
    from transfusion_fast.data.vision_encoder import read_vision_encoder

    vision = read_vision_encoder(options.encoder)
    if options.encoder_like is not None:
        modalities = parse_index(options.encoder_like).modalities
        if len(modalities) != 1 or not modalities[0].mean:
            raise InputError(f"--encoder-like must be a folder of features, got {options.encoder_like}; give another")
        vision = vision.normalised_like(modalities[0], str(options.encoder_like))
    return LatentRule(vision, False, batch)


def _repack(options: argparse.Namespace) -> None:
    source = PacksSource.open(options.folder)
    _build(options, source, source.encoder(options.seq_len, options.long), ALL)


def _tokenizer(options: argparse.Namespace, source: Source) -> Tokenizer:
    check_outside(options.out, options.files, source.files)
    if options.tokenizer and options.train_bpe is not None:
        raise InputError("--tokenizer or --train-bpe must be given alone, got both; give one of them")
    if options.tokenizer:
        return read_tokenizer(options.tokenizer)
    if options.train_bpe is not None:
        if options.limit_tokens is not None:
            raise InputError("--limit-tokens must be given without --train-bpe, got both; give --limit instead")
        return train_tokenizer(source, options.train_bpe, options.out, _selection(options), _filters(options))
    return ByteTokenizer()


def _selection(options: argparse.Namespace) -> Selection:
    return Selection(options.heldout, options.limit, options.limit_tokens, options.dedup)


def _build(options: argparse.Namespace, source: Source, encoder: Encoder, selection: Selection) -> None:
    recipe = Recipe(source, encoder, options.packs_per_shard, train_bpe=options.train_bpe, selection=selection)
    if options.target and (indices := options.target.finished(recipe.describe())) and not options.out.exists():
        for url, index in indices.items():
            print(f"{url}: already there: {summary(index)}")
        return
    if options.part is None:
        made: Built | list[int] = build(recipe, options.out, options.processes)
    else:
        made = build_part(recipe, options.out, Share.parse(options.part), options.processes)
    if isinstance(made, list):
        missing = ", ".join(f"{number}/{options.part.partition('/')[2]}" for number in made)
        print(f"{options.out}: part {options.part} is read; missing: {missing}; the last part writes the shards")
        return
    _print_built(options.out, made)
    if options.target:
        count = upload_and_remove(options.out, options.target)
        done = "uploaded by another process" if count is None else f"{count} files uploaded; {options.out} is removed"
        print(f"{options.target.url}: complete: {done}")


def _print_built(folder: Path, built: Built) -> None:
    for line in built.remarks(folder):
        print(f"{folder}: {line}", file=sys.stderr)
    indices = {folder: built.index}
    if built.heldout is not None:
        indices = dict(zip((folder / side for side in SIDES), (built.index, built.heldout), strict=True))
    for path, index in indices.items():
        print(f"{path}: {'already there' if built.reused else 'written'}: {summary(index)}")


def _verify(options: argparse.Namespace) -> int:
    index, count = parse_index(options.folder), 0
    checked = verify(options.folder, index, options.processes)
    for findings in progress(checked, "verifying", "shard", len(index.shards) + 1):
        count += len(findings)
        for finding in findings:
            tqdm.write(finding, file=sys.stderr)
    if count:
        print(f"prepare: {options.folder}: {count} findings", file=sys.stderr)
        return 1
    print(f"{options.folder}: as its index says: {summary(index)}")
    return 0


def _info(options: argparse.Namespace) -> None:
    if options.picture:
        from transfusion_fast.sampling.pictures import check_picture

        check_picture(options.picture)
    reader = PackReader(options.folder)
    found = Statistics.of(reader.read(n) for n in progress(range(len(reader)), "reading", "pack", len(reader)))
    quantiles = ", ".join(f"{q}: {np.percentile(found.lengths, q):.0f}" for q in (5, 25, 50, 75, 95))
    wastes = ", ".join(f"{100 * found.waste_at(capacity):.2f} % at {capacity}" for capacity in CAPACITIES)
    print(f"{options.folder}: {summary(reader.index)}")
    print(f"text: {found.text} ids, {100 * found.text / (found.text + found.patches):.1f} % of ids and patches")
    print(f"images: {found.images} of {found.patches} patches")
    if len(found.shapes) > 1:
        print(f"shapes of images, {found.named_shapes(MOST_SHAPES)}")
    if found.ignored or found.weighted:
        print(f"ids and patches without loss: {found.ignored}, with another weight than 1: {found.weighted}")
    print(f"positions of a document: {found.lengths.min()} to {found.lengths.max()}; percentiles {quantiles}")
    print(f"waste if packed again, with longer documents cut anywhere: {wastes}")
    if options.picture:
        draw_lengths(found, f"{options.folder}: {len(found.lengths)} documents", options.picture)
        print(f"picture: {options.picture}")


def _index(options: argparse.Namespace) -> None:
    index = rebuild_index(options.folder, options.like, options.accept, options.processes)
    print(f"{options.folder}: index written: {summary(index)}")


def _preview(options: argparse.Namespace) -> None:
    from transfusion_fast.prepare.preview import page, preview
    from transfusion_fast.sampling.pictures import check_writable

    reader = PackReader(options.folder)
    decode = _decoder(options, reader.index.modalities)
    documents = preview(reader, options.pack, options.epoch, options.seed, decode)
    check_writable(options.out, ".html")
    title = f"{options.folder}: pack {options.pack}, epoch {options.epoch}, seed {options.seed}"
    options.out.write_text(page(title, documents), encoding="utf-8", errors="replace")
    print(f"{len(documents)} documents: {options.out}")


def _decoder(options: argparse.Namespace, modalities: Sequence[ModalityInfo]) -> Decoder | None:
    if options.vae is None:
        return None
    if not any(modality.encoding == "latents" for modality in modalities):
        raise InputError(f"--vae needs a folder of latents, got {options.folder}, of pixels or text; leave it out")
    from transfusion_fast.data.autoencoder import read_autoencoder

    vae = read_autoencoder(options.vae)
    for modality in modalities:
        vae.check_made(modality.autoencoder, modality.channels, str(options.folder))
    return vae.decode


if __name__ == "__main__":
    sys.exit(main())
