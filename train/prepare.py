"""Turn a source into a data folder: `python train/prepare.py digits OUT`, or `fashion-mnist` or `stories`; or files of
your own, `text`, `pairs` or `interleaved`. And look after one: `preview`, `info`, `verify`, `index`, `repack`.
"""

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from transfusion_fast.config import Config, parse
from transfusion_fast.data.autoencoder import read_autoencoder
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.index import Index, parse_index
from transfusion_fast.data.loader import batch_builder
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import PACKS_PER_SHARD
from transfusion_fast.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer, train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.build import LEFT_OUT, Built, DocumentEncoder, Recipe, build, tokenizer_of_before
from transfusion_fast.prepare.encode import Encoder, ImageRule
from transfusion_fast.prepare.examples.built_in import BuiltIn, prepare_splits
from transfusion_fast.prepare.examples.digits import Digits
from transfusion_fast.prepare.examples.fashion import DEBIAN, WEB, FashionMnist
from transfusion_fast.prepare.examples.stories import Stories
from transfusion_fast.prepare.images import BATCH, LatentRule
from transfusion_fast.prepare.inspect import draw_lengths, pack_statistics, rebuild_index, summed, verify
from transfusion_fast.prepare.preview import Decoder, pack_documents, page
from transfusion_fast.prepare.repack import PacksSource
from transfusion_fast.prepare.sources.base import RawDocument, Source
from transfusion_fast.prepare.sources.interleaved import InterleavedSource
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource
from transfusion_fast.sampling.pictures import check_picture, check_writable

CAPACITIES = (2048, 4096, 8192, 16384)  # whose waste `info` tells


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; 0 on success, 1 where verify finds damage, 2 with one line for bad input."""
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
        print("prepare: interrupted" + "; the same command goes on from there" * begun, file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description="Make data folders and look after them.")
    sources = parser.add_subparsers(required=True, metavar="COMMAND")
    digits = sources.add_parser("digits", help="scikit-learn's 1797 handwritten digits, and sums in words")
    _add_built_in(digits, lambda options: Digits(), sequence_length=512, packs_per_shard=16)
    fashion = sources.add_parser("fashion-mnist", help="70,000 pictures of clothes and their names")
    _add_origin(fashion)
    _add_built_in(fashion, lambda options: FashionMnist(options.source), sequence_length=2048, packs_per_shard=64)
    stories = sources.add_parser("stories", help="21,000 short stories, Fashion-MNIST's pictures between the sentences")
    _add_origin(stories)
    _add_built_in(
        stories, lambda options: Stories(FashionMnist(options.source)), sequence_length=4096, packs_per_shard=32
    )
    text = sources.add_parser("text", help="text: JSON lines, plain text files, Parquet")
    _add_files(text, ".jsonl (a document a line; also .jsonl.gz, .jsonl.zst), .txt (one a file), .parquet (one a row)")
    text.add_argument("--field", default="text", help="of JSON lines and Parquet (default: %(default)s)")
    text.set_defaults(run=_text)
    pairs = sources.add_parser("pairs", help="captioned images: WebDataset tars as img2dataset writes them")
    _add_files(pairs, ".tar, of KEY.jpg, .png or .webp beside KEY.txt or KEY.json with a caption")
    _add_images(pairs)
    pairs.set_defaults(run=_pairs, long="reject")  # a caption without its image is of no use
    interleaved = sources.add_parser("interleaved", help="texts and images in turn: JSON lines beside their pictures")
    _add_files(
        interleaved,
        '.jsonl (also .gz, .zst), a line a document: {"content": ["text", {"image": "PATH"}, {"base64": ".."}]}',
    )
    _add_images(interleaved)
    interleaved.set_defaults(run=_interleaved)
    repack = sources.add_parser("repack", help="the documents of a data folder in packs of another length")
    repack.add_argument("folder", type=_local, metavar="FOLDER", help="data folder; stays as it is")
    _add_packing(repack)
    repack.set_defaults(run=_repack, long=None, train_bpe=None)
    _add_upkeep(sources)
    return parser


def _add_built_in(
    parser: argparse.ArgumentParser,
    source: Callable[[argparse.Namespace], BuiltIn],
    sequence_length: int,
    packs_per_shard: int,
) -> None:
    parser.add_argument("out", type=_local, metavar="OUT", help="folder to make; gets train/ and heldout/")
    parser.add_argument(
        "--seq-len", type=int, default=sequence_length, help="positions of a pack (default: %(default)s)"
    )
    parser.set_defaults(run=_built_in, built_in=source, packs_per_shard=packs_per_shard)


def _add_origin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", default=DEBIAN if shutil.which("apt-get") else WEB, metavar=f"{DEBIAN}|{WEB}|PATH",
        help=f"of Fashion-MNIST: {DEBIAN} fetches Debian's package, {WEB} the files of its makers; or a folder of the "
        "files, or a .deb (default here: %(default)s)",
    )  # fmt: skip


def _add_upkeep(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    checks = commands.add_parser("verify", help="compare every byte of a data folder with its index")
    checks.set_defaults(run=_verify)
    info = commands.add_parser("info", help="what a data folder holds, and what other pack lengths would waste")
    info.add_argument("--picture", type=_local, metavar="PNG", help="draw the lengths of its documents")
    info.set_defaults(run=_info)
    index = commands.add_parser("index", help="write index.json anew, for the shards that lie in a folder")
    index.add_argument(
        "--like", type=_local, metavar="OTHER",
        help="data folder of the same tokenizer, modalities and pack length (default: FOLDER's own index)",
    )  # fmt: skip
    index.add_argument("--accept", action="store_true", help="although the old index has other shards")
    index.set_defaults(run=_index)
    preview = commands.add_parser(
        "preview",
        help="a pack as a page of HTML: text and images as a model with the default settings sees them",
    )
    preview.add_argument("--pack", type=int, default=0, metavar="N", help="its number (default: %(default)s)")
    preview.add_argument("--vae", type=_local, metavar="FOLDER", help="show latents as this autoencoder decodes them")
    preview.add_argument("--epoch", type=int, default=0, help="whose order and noise are drawn (default: %(default)s)")
    preview.add_argument("--seed", type=int, default=0, help="train.seed of the run (default: %(default)s)")
    preview.add_argument(
        "--out", type=_local, default=Path("preview.html"), metavar="HTML", help="(default: %(default)s)"
    )
    preview.set_defaults(run=_preview)
    for command in (checks, info, index, preview):
        command.add_argument("folder", type=_local, metavar="FOLDER", help="data folder, local")
    for command in (checks, index):
        _add_processes(command)


def _local(text: str) -> Path:
    """Path would take one of the slashes of a URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"files and folders must be local, got {text!r}; only training reads URLs")
    return Path(text)


def _add_files(parser: argparse.ArgumentParser, kinds: str) -> None:
    parser.add_argument("files", type=_local, nargs="+", metavar="FILE", help=f"files, or folders of them: {kinds}")
    _add_packing(parser)
    parser.add_argument("--tokenizer", type=_local, metavar="JSON", help="a tokenizer.json (default: bytes)")
    parser.add_argument("--train-bpe", type=int, metavar="VOCAB", help="train a tokenizer on these very texts")


def _add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=_local, required=True, metavar="OUT", help="folder to make; run again to go on")
    parser.add_argument("--seq-len", type=int, default=4096, help="positions of a pack (default: %(default)s)")
    parser.add_argument(
        "--long", choices=("split", "reject"), default="split",
        help="of documents longer than a pack: cut where a reader pauses, or left out (default: split; for pairs "
        "reject; for repack as the folder was prepared)",
    )  # fmt: skip
    parser.add_argument("--packs-per-shard", type=int, default=PACKS_PER_SHARD, help="(default: %(default)s)")
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: every core)")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-size", type=int, default=256, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument(
        "--patch-size",
        type=int,
        help="of a token: in pixels (default: 16), with --vae in latent values (default: 2)",
    )
    parser.add_argument(
        "--shape", choices=("crop", "native"), default="crop",
        help="the middle square, or the image's own shape with at most SIZE x SIZE pixels (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=_local, metavar="FOLDER",
        help="store latents of the AutoencoderKL in this local folder (diffusers' format, safetensors); each of the "
        "--processes holds one, on the GPUs that they share where there are any, else on a core of its own",
    )  # fmt: skip
    parser.add_argument(
        "--latents", choices=("sampled", "mean"),
        help="with --vae: a sample of each posterior, which is what its decoder was trained on and is drawn from the "
        "image itself, the same every time; or its mean (default: sampled)",
    )  # fmt: skip
    parser.add_argument(
        "--vae-batch", type=int, metavar="N",
        help=f"with --vae: images at a time; on a CPU one is as fast and takes less memory (default: {BATCH})",
    )  # fmt: skip


def _built_in(options: argparse.Namespace) -> None:
    source = options.built_in(options)
    built = prepare_splits(source, options.out, options.seq_len, options.packs_per_shard)
    for split, one in built.items():
        _tell(options.out / split, one)


def _text(options: argparse.Namespace) -> None:
    source = TextSource.of(options.files, options.field)
    _build(options, source, Encoder(_tokenizer(options, source), options.seq_len, long=options.long))


def _pairs(options: argparse.Namespace) -> None:
    _build_images(options, PairsSource.of(options.files))


def _interleaved(options: argparse.Namespace) -> None:
    _build_images(options, InterleavedSource.of(options.files))


def _build_images(options: argparse.Namespace, source: Source[RawDocument]) -> None:
    latents = _latents(options)
    patch = options.patch_size if options.patch_size is not None else 2 if latents else 16
    if latents:
        modality, stride = latents.modality("images", patch), latents.autoencoder.stride
    else:
        modality, stride = ModalityInfo("images", channels=3, patch_size=patch, encoding="pixels"), 1
    rule = ImageRule(options.shape, options.image_size, patch * stride)
    tokenizer = _tokenizer(options, source)
    _build(options, source, Encoder(tokenizer, options.seq_len, modality, rule, options.long, latents))


def _latents(options: argparse.Namespace) -> LatentRule | None:
    if options.vae is None:
        if options.latents is not None or options.vae_batch is not None:
            raise InputError("--latents and --vae-batch must come with --vae, got none; give the autoencoder's folder")
        return None
    batch = BATCH if options.vae_batch is None else options.vae_batch
    return LatentRule(read_autoencoder(options.vae), options.latents != "mean", batch)


def _repack(options: argparse.Namespace) -> None:
    source = PacksSource(options.folder)
    _build(options, source, source.fitter(options.seq_len, options.long))


def _tokenizer(options: argparse.Namespace, source: Source[RawDocument]) -> Tokenizer:
    _check_apart(options.out, options.files, source)
    if options.tokenizer and options.train_bpe is not None:
        raise InputError("--tokenizer and --train-bpe were both given; give one of them")
    if options.tokenizer:
        return read_tokenizer(options.tokenizer)
    if options.train_bpe is not None:
        if before := tokenizer_of_before(source, options.train_bpe, options.out):
            return before
        documents = (found for unit in source.units() for found in source.documents(unit))
        parts = (part for found in documents if isinstance(found, RawDocument) for part in found.parts)
        return train_bpe((part for part in parts if isinstance(part, str)), options.train_bpe)
    return ByteTokenizer()


def _check_apart(out: Path, given: Sequence[Path], source: Source[Any]) -> None:
    """What is made in a folder of the source would be read the next time."""
    folders = {path for path in given if path.is_dir()}
    for folder in {file.parent for file in source.files}:
        parents = (folder, *folder.parents)
        entered = list(itertools.takewhile(lambda parent: parent not in folders, parents))
        if len(entered) < len(parents):  # else the file was given, and not a folder that it is in
            folders.update(entered)
    resolved = {folder.resolve(): folder for folder in folders}
    out = out.resolve()
    for place in (out, out.with_name(f"{out.name}.partial")):
        for parent in (place, *place.parents):
            if parent in resolved:
                raise InputError(
                    f"output folder must lie outside of the sources, got {place} in {resolved[parent]}; choose another"
                )


def _build(options: argparse.Namespace, source: Source[Any], encoder: DocumentEncoder[Any]) -> None:
    recipe = Recipe(source, encoder, options.packs_per_shard, train_bpe=options.train_bpe)
    _tell(options.out, build(recipe, options.out, options.processes))


def _tell(folder: Path, built: Built) -> None:
    for line in _outcomes(built, folder):
        print(f"{folder}: {line}", file=sys.stderr)
    print(f"{folder}: {'already there' if built.reused else 'written'}: {_summary(built.index)}")


def _verify(options: argparse.Namespace) -> int:
    index = parse_index(options.folder)
    found = 0
    checked = verify(options.folder, index, options.processes)
    for findings in tqdm(checked, "verifying", len(index.shards) + 1, unit="shard", disable=None):
        found += len(findings)
        for finding in findings:
            tqdm.write(finding, file=sys.stderr)
    if found:
        print(f"prepare: {options.folder}: {found} findings", file=sys.stderr)
        return 1
    print(f"{options.folder}: as its index says: {_summary(index)}")
    return 0


def _info(options: argparse.Namespace) -> None:
    if options.picture:
        check_picture(options.picture)
    reader = PackReader(options.folder)
    packs = tqdm(pack_statistics(reader), "reading", len(reader), unit="pack", disable=None)
    found = summed(packs)
    print(f"{options.folder}: {_summary(reader.index)}")
    print(f"text: {found.text} ids, {100 * found.text_share:.1f} % of ids and patches")
    print(f"images: {found.images} of {found.patches} patches")
    quantiles = ", ".join(f"{q} % {np.percentile(found.lengths, q):.0f}" for q in (5, 25, 50, 75, 95))
    print(f"lengths of documents: {found.lengths.min()} to {found.lengths.max()}, {quantiles}")
    wastes = ", ".join(f"{100 * found.waste_at(capacity):.2f} % at {capacity}" for capacity in CAPACITIES)
    print(f"waste, packed anew, longer documents cut anywhere: {wastes}")
    if options.picture:
        draw_lengths(found, f"{options.folder}: {len(found.lengths)} documents", options.picture)
        print(f"picture: {options.picture}")


def _index(options: argparse.Namespace) -> None:
    index = rebuild_index(options.folder, options.like, options.accept, options.processes)
    print(f"{options.folder}: index written: {_summary(index)}")


def _preview(options: argparse.Namespace) -> None:
    reader = PackReader(options.folder)
    index = reader.index
    if not 0 <= options.pack < len(reader):
        raise InputError(f"--pack must be in 0..{len(reader) - 1}, got {options.pack}")
    for name in ("epoch", "seed"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name} must be 0 or more, got {getattr(options, name)}")
    widths = [info.channels * info.patch_size**2 for info in index.modalities]
    model = {"num_text_tokens": index.num_text_tokens, "dim_latent": widths}
    config = parse(Config, {"model": model, "train": {"seed": options.seed}}, str(options.folder))
    keyed = KeyedPack(reader.read(options.pack), options.epoch, options.pack)
    tokenizer = load_tokenizer(index.tokenizer, options.folder)
    documents = pack_documents(keyed, batch_builder(config, index, packs=1), tokenizer, _decoder(options, index))
    check_writable(options.out)
    title = f"{options.folder}: pack {options.pack}, epoch {options.epoch}, seed {options.seed}"
    options.out.write_text(page(title, documents), encoding="utf-8", errors="replace")
    print(f"{len(documents)} documents: {options.out}")


def _decoder(options: argparse.Namespace, index: Index) -> Decoder | None:
    if options.vae is None:
        return None
    if not any(modality.encoding == "latents" for modality in index.modalities):
        raise InputError(
            f"--vae needs a folder of latents, got {options.folder}, of pixels or text alone; leave it out"
        )
    vae = read_autoencoder(options.vae)
    for modality in index.modalities:
        vae.check_made(modality.autoencoder, modality.channels, str(options.folder))
    return vae.decode


def _outcomes(built: Built, folder: Path) -> Iterator[str]:
    """What became of documents that are not in the folder as they were."""
    for reason, count in built.rejected.items():
        yield f"left out {count}: {built.examples[reason]}"
    if sum(built.rejected.values()) > len(built.rejected):
        yield f"all that was left out is named in {folder / LEFT_OUT}"
    if built.cut:
        yield f"cut {built.cut} documents that no pack has room for"


def _summary(index: Index) -> str:
    return (
        f"{index.num_packs} packs of {index.sequence_length} in {len(index.shards)} shards, "
        f"{index.documents} documents, {index.tokens} tokens, {100 * index.waste:.2f} % waste"
    )


if __name__ == "__main__":
    sys.exit(main())
