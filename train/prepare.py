"""Prepare data folders: `python train/prepare.py digits OUT`, or `fashion-mnist` or `stories`, or `text`, `pairs` or
`interleaved` for your own files. Look after a folder: `preview`, `info`, `verify`, `index`, `repack`.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from transfusion_fast.data.autoencoder import read_autoencoder
from transfusion_fast.data.index import parse_index
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import PACKS_PER_SHARD
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import Built, Recipe, build, train_tokenizer
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.examples.built_in import BuiltIn, prepare_splits
from transfusion_fast.prepare.examples.digits import Digits
from transfusion_fast.prepare.examples.fashion import DEBIAN, WEB, FashionMnist
from transfusion_fast.prepare.examples.stories import Stories
from transfusion_fast.prepare.images import BATCH, ImageRule, LatentRule
from transfusion_fast.prepare.inspect import Statistics, draw_lengths, rebuild_index, summary, verify
from transfusion_fast.prepare.preview import Decoder, page, preview
from transfusion_fast.prepare.repack import PacksSource
from transfusion_fast.prepare.sources.base import Source
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource
from transfusion_fast.prepare.staging import check_outside
from transfusion_fast.sampling.pictures import check_picture, check_writable

CAPACITIES = (2048, 4096, 8192, 16384)
"""Pack lengths whose waste `info` prints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return 0 for success, 1 if verify finds damage, 2 after one line for bad input."""
    options = _parser().parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be any bytes
    try:
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
    _add_built_in_commands(commands)
    text = commands.add_parser("text", help="text: JSON lines, plain text files, Parquet")
    _add_files(text, ".jsonl (a document a line; also .jsonl.gz, .jsonl.zst), .txt (one a file), .parquet (one a row)")
    text.add_argument("--field", default="text", help="field of JSON lines, column of Parquet (default: %(default)s)")
    text.set_defaults(run=_text)
    pairs = commands.add_parser("pairs", help="captioned images: WebDataset tars as img2dataset writes them")
    _add_files(pairs, ".tar, of KEY.jpg, .png or .webp beside KEY.txt or KEY.json with a caption")
    _add_images(pairs)
    # A caption without its image is useless, so pairs are not split.
    pairs.set_defaults(run=lambda options: _images(options, PairsSource.of(options.files)), long="reject")
    interleaved = commands.add_parser("interleaved", help="texts and images in turn: JSON lines beside their images")
    content = '{"content": ["text", {"image": "PATH"}, {"base64": ".."}]}'
    _add_files(interleaved, f".jsonl (also .gz, .zst), a line a document: {content}")
    _add_images(interleaved)
    interleaved.set_defaults(run=lambda options: _images(options, InterleavedSource.of(options.files)))
    repack = commands.add_parser("repack", help="the documents of a data folder in packs of another length")
    repack.add_argument("folder", type=_local, metavar="FOLDER", help="data folder; stays as it is")
    _add_packing(repack)
    repack.set_defaults(run=_repack, long=None, train_bpe=None)
    _add_inspection(commands)
    return parser


def _add_built_in_commands(commands: Any) -> None:
    def add(name: str, make: Callable[[argparse.Namespace], BuiltIn], length: int, packs: int, help: str) -> None:
        command = commands.add_parser(name, help=help)
        command.add_argument("out", type=_local, metavar="OUT", help="folder to make; gets train/ and heldout/")
        command.add_argument("--seq-len", type=int, default=length, help="positions of a pack (default: %(default)s)")
        command.set_defaults(run=_built_in, make=make, packs_per_shard=packs)
        if name != "digits":
            command.add_argument(
                "--source", default=DEBIAN if shutil.which("apt-get") else WEB, metavar=f"{DEBIAN}|{WEB}|PATH",
                help=f"of Fashion-MNIST: {DEBIAN} downloads Debian's package, {WEB} its authors' files; or a folder "
                "of the files, or a .deb (default here: %(default)s)",
            )  # fmt: skip

    add("digits", lambda _: Digits(), 512, 16, "scikit-learn's 1797 handwritten digits, and sums in words")
    add("fashion-mnist", lambda o: FashionMnist(o.source), 2048, 64, "70,000 pictures of clothes and their names")
    help = "21,000 short stories, Fashion-MNIST's pictures between the sentences"
    add("stories", lambda o: Stories(FashionMnist(o.source)), 4096, 32, help)


def _add_inspection(commands: Any) -> None:
    checks = commands.add_parser("verify", help="compare every byte of a data folder with its index")
    checks.set_defaults(run=_verify)
    info = commands.add_parser("info", help="print what a data folder holds, and the waste at other pack lengths")
    info.add_argument("--picture", type=_local, metavar="PNG", help="draw the lengths of its documents")
    info.set_defaults(run=_info)
    index = commands.add_parser("index", help="rebuild index.json for the shards that are in a folder")
    index.add_argument(
        "--like", type=_local, metavar="OTHER",
        help="data folder of the same tokenizer, modalities and pack length (default: FOLDER's own index)",
    )  # fmt: skip
    index.add_argument("--accept", action="store_true", help="accept shards that differ from the old index")
    index.set_defaults(run=_index)
    view = commands.add_parser(
        "preview", help="a pack as a page of HTML: text and images as a model with the default settings sees them"
    )
    view.add_argument("--pack", type=int, default=0, metavar="N", help="its number (default: %(default)s)")
    view.add_argument("--vae", type=_local, metavar="FOLDER", help="show latents as this autoencoder decodes them")
    view.add_argument("--epoch", type=int, default=0, help="epoch of its order and noise (default: %(default)s)")
    view.add_argument("--seed", type=int, default=0, help="train.seed of the run (default: %(default)s)")
    view.add_argument("--out", type=_local, default=Path("preview.html"), metavar="HTML", help="(default: %(default)s)")
    view.set_defaults(run=_preview)
    for command in (checks, info, index, view):
        command.add_argument("folder", type=_local, metavar="FOLDER", help="data folder, local")
    for command in (checks, index):
        _add_processes(command)


def _local(text: str) -> Path:
    """Return a local path; Path would silently drop one of the slashes of a URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"files and folders must be local, got {text!r}; only training reads URLs")
    return Path(text)


def _add_files(parser: argparse.ArgumentParser, kinds: str) -> None:
    parser.add_argument("files", type=_local, nargs="+", metavar="FILE", help=f"files, or folders of them: {kinds}")
    _add_packing(parser)
    parser.add_argument("--tokenizer", type=_local, metavar="JSON", help="a tokenizer.json (default: bytes)")
    parser.add_argument("--train-bpe", type=int, metavar="VOCAB", help="train a tokenizer on these texts")


def _add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=_local, required=True, metavar="OUT", help="folder to make; run again to resume")
    parser.add_argument("--seq-len", type=int, default=4096, help="positions of a pack (default: %(default)s)")
    parser.add_argument(
        "--long", choices=("split", "reject"), default="split",
        help="split documents longer than a pack where a reader pauses, or leave them out (default: split; for pairs "
        "reject; for repack the setting of FOLDER)",
    )  # fmt: skip
    parser.add_argument("--packs-per-shard", type=int, default=PACKS_PER_SHARD, help="(default: %(default)s)")
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: every core)")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=int, default=256, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument(
        "--patch-size", type=int, help="side of a token: in pixels (default: 16), with --vae in latents (default: 2)"
    )
    parser.add_argument(
        "--shape", choices=("crop", "native"), default="crop",
        help="the middle square, or the image's own shape with at most SIZE x SIZE pixels (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=_local, metavar="FOLDER",
        help="store latents of the AutoencoderKL in this local folder (diffusers' format, safetensors); each of the "
        "--processes holds one, on the GPUs that they share if there are any, else on a core of its own",
    )  # fmt: skip
    parser.add_argument(
        "--latents", choices=("sampled", "mean"),
        help="with --vae: a sample of each posterior, which its decoder was trained on, with noise keyed by the image; "
        "or the mean (default: sampled)",
    )  # fmt: skip
    parser.add_argument(
        "--vae-batch", type=int, metavar="N",
        help=f"with --vae: images at a time; on a CPU one is as fast and takes less memory (default: {BATCH})",
    )  # fmt: skip


def _built_in(options: argparse.Namespace) -> None:
    built = prepare_splits(options.make(options), options.out, options.seq_len, options.packs_per_shard)
    for split, one in built.items():
        _print_built(options.out / split, one)


def _text(options: argparse.Namespace) -> None:
    source = TextSource.of(options.files, field=options.field)
    _build(options, source, Encoder(_tokenizer(options, source), options.seq_len, long=options.long))


def _images(options: argparse.Namespace, source: Source) -> None:
    if options.vae is None:
        if options.latents is not None or options.vae_batch is not None:
            raise InputError("--latents and --vae-batch must come with --vae, got none; give the autoencoder's folder")
        latents, stride, patch = None, 1, 16
    else:
        batch = BATCH if options.vae_batch is None else options.vae_batch
        latents = LatentRule(read_autoencoder(options.vae), options.latents != "mean", batch)
        stride, patch = latents.autoencoder.stride, 2
    patch = patch if options.patch_size is None else options.patch_size
    modality = latents.modality("images", patch) if latents else ModalityInfo("images", 3, patch, "pixels")
    rule = ImageRule(options.shape, options.image_size, patch * stride)
    tokenizer = _tokenizer(options, source)
    _build(options, source, Encoder(tokenizer, options.seq_len, (modality,), rule, options.long, latents))


def _repack(options: argparse.Namespace) -> None:
    source = PacksSource.open(options.folder)
    _build(options, source, source.encoder(options.seq_len, options.long))


def _tokenizer(options: argparse.Namespace, source: Source) -> Tokenizer:
    check_outside(options.out, options.files, source.files)
    if options.tokenizer and options.train_bpe is not None:
        raise InputError("--tokenizer or --train-bpe must be given alone, got both; give one of them")
    if options.tokenizer:
        return read_tokenizer(options.tokenizer)
    if options.train_bpe is not None:
        return train_tokenizer(source, options.train_bpe, options.out)
    return ByteTokenizer()


def _build(options: argparse.Namespace, source: Source, encoder: Encoder) -> None:
    recipe = Recipe(source, encoder, options.packs_per_shard, train_bpe=options.train_bpe)
    _print_built(options.out, build(recipe, options.out, options.processes))


def _print_built(folder: Path, built: Built) -> None:
    for line in built.remarks(folder):
        print(f"{folder}: {line}", file=sys.stderr)
    print(f"{folder}: {'already there' if built.reused else 'written'}: {summary(built.index)}")


def _verify(options: argparse.Namespace) -> int:
    index, count = parse_index(options.folder), 0
    checked = verify(options.folder, index, options.processes)
    for findings in tqdm(checked, "verifying", len(index.shards) + 1, unit="shard", disable=None):
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
        check_picture(options.picture)
    reader = PackReader(options.folder)
    found = Statistics.of(reader.read(n) for n in tqdm(range(len(reader)), "reading", unit="pack", disable=None))
    quantiles = ", ".join(f"{q} % {np.percentile(found.lengths, q):.0f}" for q in (5, 25, 50, 75, 95))
    wastes = ", ".join(f"{100 * found.waste_at(capacity):.2f} % at {capacity}" for capacity in CAPACITIES)
    print(f"{options.folder}: {summary(reader.index)}")
    print(f"text: {found.text} ids, {100 * found.text_share:.1f} % of ids and patches")
    print(f"images: {found.images} of {found.patches} patches")
    print(f"lengths of documents: {found.lengths.min()} to {found.lengths.max()}, {quantiles}")
    print(f"waste if packed again, longer documents cut anywhere: {wastes}")
    if options.picture:
        draw_lengths(found, f"{options.folder}: {len(found.lengths)} documents", options.picture)
        print(f"picture: {options.picture}")


def _index(options: argparse.Namespace) -> None:
    index = rebuild_index(options.folder, options.like, options.accept, options.processes)
    print(f"{options.folder}: index written: {summary(index)}")


def _preview(options: argparse.Namespace) -> None:
    reader = PackReader(options.folder)
    decode = _decoder(options, reader.index.modalities)
    documents = preview(reader, options.pack, options.epoch, options.seed, decode)
    check_writable(options.out)
    title = f"{options.folder}: pack {options.pack}, epoch {options.epoch}, seed {options.seed}"
    options.out.write_text(page(title, documents), encoding="utf-8", errors="replace")
    print(f"{len(documents)} documents: {options.out}")


def _decoder(options: argparse.Namespace, modalities: Sequence[ModalityInfo]) -> Decoder | None:
    if options.vae is None:
        return None
    if not any(modality.encoding == "latents" for modality in modalities):
        raise InputError(f"--vae needs a folder of latents, got {options.folder}, of pixels or text; leave it out")
    vae = read_autoencoder(options.vae)
    for modality in modalities:
        vae.check_made(modality.autoencoder, modality.channels, str(options.folder))
    return vae.decode


if __name__ == "__main__":
    sys.exit(main())
