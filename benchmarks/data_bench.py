"""Time the feed on one core: the loader stage by stage against a plain read of the tar, packing, and preparing.

    python benchmarks/data_bench.py --out DIR [--seconds 5]
    python benchmarks/data_bench.py --out DIR --large GB

The first writes DIR/data.csv and data.md. All files are made here, in a folder that is removed, and lie in the page
cache: the times are the processor's work. The second writes DIR/data_large.csv and data_large.md, the memory and disk
space that `train/prepare.py` takes for a text of GB, and for texts and pictures of half of that. It needs six times GB
of disk.
"""

import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import data_large
import numpy as np
import tables
import timing
import tokenizers
import torch
from data_sources import (
    LARGE,
    SMALL,
    make_jpegs,
    make_texts,
    make_tokenizer,
    make_words,
    web_lengths,
    write_json_lines,
    write_tar,
)
from PIL import Image
from tables import Row

from transfusion_fast.config import Config
from transfusion_fast.config_reading import parse
from transfusion_fast.data.batch import KeyedPack, draw
from transfusion_fast.data.loader import BatchSplit, batch_builder, open_data, training_batches
from transfusion_fast.data.pack import DOCUMENT_TOKENS, IMAGE_TOKENS, Document, ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.build import build
from transfusion_fast.prepare.decoding import HEADROOM
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.packing import pack_stream
from transfusion_fast.prepare.recipe import Recipe
from transfusion_fast.prepare.sources.base import Source, SourceDocument
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

CAPACITY = 4096
LATENTS = ModalityInfo("latents", channels=8, patch_size=2, encoding="latents")  # 32 values a patch
PIXELS = ModalityInfo("images", channels=3, patch_size=16, encoding="pixels")
CAPACITIES = (2048, 4096, 8192, 16384)
SIDE = 256
"""Side in pixels of the squares that pictures become."""
_SEED = 0
_TEXTS_TOGETHER = 1024  # in a call of the tokenizer; in one of all texts each would take longer


class Stage(NamedTuple):
    """One stage of the feed; a call of `run` handles `count` units, which are `megabytes` on disk."""

    name: str
    unit: str
    count: int
    run: Callable[[], object]
    megabytes: float | None = None
    waste: float | None = None
    against: str = ""
    """Name of the stage of the same group whose time is the unit of this one's."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="to time each stage for (default: %(default)s)")
    parser.add_argument("--large", type=float, metavar="GB", help="measure memory and space of large sources instead")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def measure(device: torch.device) -> bool:
        with tempfile.TemporaryDirectory(dir=options.out) as scratch:
            folder = Path(scratch)
            if options.large is not None:
                data_large.write_report(options.out, list(data_large.measure(folder, options.large)))
                return True
            groups = [loader_stages(folder / "packs"), packing_stages()]
            groups += [*tokenizing_stages(folder), *picture_stages(folder)]
            rows = [row for group in groups for row in time_group(group, options.seconds)]
        tables.write_report(options.out / "data", "The feed, on one core", rows, COLUMNS, NOTES)
        return True

    return timing.run_benchmark("data_bench", options, measure)


def loader_stages(folder: Path, documents: int = 1024) -> list[Stage]:
    """Return a plain read of the tar, then the work of the loader on the same packs, in parts and as a whole."""
    rng = np.random.default_rng(_SEED)
    pairs: list[Document] = [
        (
            TextSegment(rng.integers(0, 256, int(rng.integers(100, 413)), dtype=np.int32)),
            ImageSegment(rng.standard_normal((32, 32, LATENTS.channels)).astype(np.float16)),
        )
        for _ in range(documents)
    ]
    index = prepare(pairs, folder, sequence_length=CAPACITY, tokenizer=ByteTokenizer(), modalities=(LATENTS,))
    settings = {
        "data": {"path": str(folder), "workers": 0},
        "model": {"num_text_tokens": 256, "dim_latent": [32], "transformer": {"dim": 32, "depth": 1, "heads": 1}},
        "train": {"micro_batch": 1, "global_batch": 1, "seed": _SEED},
    }
    config = parse(Config, settings, "data_bench")
    data = open_data(config)
    reader, builder = PackReader(folder, index), batch_builder(config, data, 1)
    numbers = range(index.num_packs)
    keyed = [KeyedPack(reader.read(number), 0, number) for number in numbers]
    loaded = training_batches(config, data, BatchSplit(0, 1, 1, 1), 0)
    megabytes = sum(shard.bytes for shard in index.shards) / 1e6

    def read_tars() -> None:
        for shard in index.shards:
            with tarfile.open(folder / shard.file) as archive:
                for member in archive:
                    if file := archive.extractfile(member):
                        file.read()

    runs: dict[str, Callable[[], object]] = {
        "plain read of the tar": read_tars,
        "read, checksum, decode, validate": lambda: [reader.read(number) for number in numbers],
        "draw order, timesteps, noise": lambda: [draw(pack, _SEED) for pack in keyed],
        "draw and lay out, attention's layout included": lambda: [builder([pack]) for pack in keyed],
        "loader, all of it": lambda: [each.batch for each in islice(loaded, index.num_packs)],
    }
    count, base = index.num_packs * CAPACITY, next(iter(runs))
    return [Stage(name, "tokens", count, run, megabytes, against=base) for name, run in runs.items()]


def packing_stages(documents: int = 200_000) -> list[Stage]:
    """Return the packing of a mix of lengths, and of captioned images of 256 patches, as the notes describe them."""
    rng = np.random.default_rng(_SEED)
    mix = rng.lognormal(np.log(292), np.log(1107 / 292) / 1.645, documents)
    captions = rng.lognormal(np.log(15), 0.6, documents)
    captioned = IMAGE_TOKENS + 256 + DOCUMENT_TOKENS + np.clip(captions, 1, 200)
    stages = []
    for name, lengths in (("a mix", mix), ("captioned images", captioned)):
        for capacity in CAPACITIES:
            clipped = np.clip(lengths, 4, capacity).astype(np.int64)
            pack = lambda clipped=clipped, capacity=capacity: list(pack_stream([clipped], capacity, _SEED))  # noqa: E731
            waste = 1 - float(clipped.sum()) / (capacity * len(pack()))
            stages.append(Stage(f"packing {name} to {capacity}", "documents", documents, pack, waste=waste))
    return stages


def tokenizing_stages(scratch: Path, captions: int = 20_000, vocabulary: int = 16_000) -> list[list[Stage]]:
    """Return for captions, and for web texts, the tokenizer's own batch calls, then preparing in parts and whole."""
    words = make_words()
    lengths = {
        "captions": np.random.default_rng(_SEED).integers(6, 16, captions),
        "web texts": web_lengths(captions // 40),
    }
    texts = {kind: make_texts(words, own) for kind, own in lengths.items()}
    tokenizer = make_tokenizer([*texts["web texts"], *words], vocabulary, special=1230)
    library = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    groups = []
    for kind, own in texts.items():
        path = scratch / f"{kind}.jsonl"
        write_json_lines(path, own)
        source, megabytes = TextSource.of([path]), path.stat().st_size / 1e6
        read = [document for unit in source.units() for document in source.documents(unit)]
        encoder = Encoder(tokenizer, CAPACITY)
        base = f"{kind}: the tokenizer's own batch calls"
        runs: dict[str, Callable[[], object]] = {
            base: partial(count_own_ids, library, own),
            f"{kind}: tokenizing": partial(count_ids, encoder, read),
            f"{kind}: preparing": partial(_build_once, scratch, source, encoder),
            f"{kind}: preparing as bytes": partial(_build_once, scratch, source, Encoder(ByteTokenizer(), CAPACITY)),
        }
        groups.append([Stage(name, "texts", len(own), run, megabytes, against=base) for name, run in runs.items()])
    return groups


def count_own_ids(library: tokenizers.Tokenizer, texts: Sequence[str]) -> int:
    """Have the tokenizer's library encode texts, and return the number of ids, which are not made Python's."""
    batches = (texts[first : first + _TEXTS_TOGETHER] for first in range(0, len(texts), _TEXTS_TOGETHER))
    return sum(len(found) for batch in batches for found in library.encode_batch_fast(batch, add_special_tokens=False))


def count_ids(encoder: Encoder, read: Sequence[SourceDocument]) -> int:
    """Encode documents of text, keeping none, and return the number of ids."""
    count = 0
    for outcome in encoder.encode(read):
        for document in outcome:
            count += sum([segment.ids.size for segment in document])
    return count


def picture_stages(scratch: Path, small: int = 128, large: int = 24) -> list[list[Stage]]:
    """Return for pictures from the web, and for photographs, decoding and scaling alone and then all of preparing."""
    groups = []
    for (height, width), number in ((SMALL, small), (LARGE, large)):
        kind, files = f"pictures of {width} x {height}", make_jpegs((height, width), number)
        path = scratch / f"{width}.tar"
        write_tar(path, iter([(file, f"picture {n} of noise") for n, file in enumerate(files)]))
        source, megabytes = PairsSource.of([path]), path.stat().st_size / 1e6
        read = [document for unit in source.units() for document in source.documents(unit)]
        encoder = Encoder(ByteTokenizer(), CAPACITY, (PIXELS,), ImageRule("crop", SIDE, PIXELS.patch_size))
        base = f"{kind}: decoding and scaling alone"
        runs: dict[str, Callable[[], object]] = {
            base: lambda files=files: [*map(decode_and_scale, files)],
            f"{kind}: decoding and scaling": lambda encoder=encoder, read=read: [*encoder.pixels(read)],
            f"{kind}: preparing": partial(_build_once, scratch, source, encoder),
        }
        groups.append([Stage(name, "images", number, run, megabytes, against=base) for name, run in runs.items()])
    return groups


def decode_and_scale(file: bytes) -> np.ndarray:
    """Return the middle square of a JPEG, by Pillow alone and with the settings of preparing."""
    with Image.open(io.BytesIO(file)) as image:
        width, height = image.size
        reduction = next(n for n in (8, 4, 2, 1) if min(width, height) >= n * HEADROOM * SIDE or n == 1)
        if reduction > 1:
            image.draft(None, (width // reduction, height // reduction))
        side = min(width, height)
        left, top = ((length - side) / 2 for length in (width, height))
        box = tuple(edge / reduction for edge in (left, top, left + side, top + side))
        pixels = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
        return np.asarray(pixels)


def _build_once(scratch: Path, source: Source, encoder: Encoder) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        build(Recipe(source, encoder), Path(folder) / "out")


def time_group(stages: Sequence[Stage], seconds: float) -> list[Row]:
    """Time stages that take turns, each for about `seconds`; return their rows, with None for what does not apply."""
    taken = np.array([*_cpu_times([stage.run for stage in stages], seconds)])
    names = [stage.name for stage in stages]
    machine = timing.describe_machine(torch.device("cpu"))
    rows = []
    for stage, own in zip(stages, taken.T, strict=True):
        p20, p50, p80 = (1e3 * np.quantile(own, (0.2, 0.5, 0.8))).tolist()
        ratio = float(np.median(own / taken[:, names.index(stage.against)])) if stage.against else None
        rows.append({
            "stage": stage.name, "unit": stage.unit, "count": stage.count, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
            "units_per_s": stage.count / p50 * 1e3,
            "mb_per_s": None if stage.megabytes is None else stage.megabytes / p50 * 1e3, "waste": stage.waste,
            "ratio": ratio, "against": stage.against, **machine,
        })  # fmt: skip
    return rows


def _cpu_times(runs: Sequence[Callable[[], object]], seconds: float) -> Iterator[list[float]]:
    """Yield the seconds of processor time of each run, at least three times.

    Every other turn is in reverse order: a run finds the caches as the one before left them.
    """
    begin, turn = time.monotonic(), 0
    while turn < 3 or time.monotonic() - begin < seconds * len(runs):
        taken = [0.0] * len(runs)
        for number in range(len(runs))[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            runs[number]()
            taken[number] = time.process_time() - start
        yield taken
        turn += 1


COLUMNS = {
    "stage": "{stage}", "units": "{count:,} {unit}", "ms": "{p50_ms:,.1f} ({p20_ms:,.1f}-{p80_ms:,.1f})",
    "units/s": "{units_per_s:,.0f}", "MB/s": "{mb_per_s:,.1f}", "ratio": "{ratio:.2f}", "waste": "{waste:.3%}",
}  # fmt: skip
NOTES = f"""\
Times are those of the processor, user and system, in one process of one thread: medians (20th to 80th percentile).
Ratios are medians over the turns that the stages of a group take: of the plain read, of the tokenizer's own calls, of
decoding and scaling alone. The loader's packs are of {CAPACITY:,} tokens, half of them patches of 32 fp16 values. MB
are those of the files read. In the mix, half of the documents are under 292 positions and one in twenty is above 1,107,
clipped to the capacity; captioned images are of 256 patches and about 15 tokens. Preparing goes from JSON lines, or
from a tar of JPEGs, to a data folder in place. Captions have 6 to 15 words and web texts 400 on the median, in a
vocabulary of 16,000 tokens and 1,230 special ones. The tokenizer's own calls are `encode_batch_fast` with
{_TEXTS_TOGETHER:,} texts each, whose ids are not made Python's. Pictures become squares of {SIDE} x {SIDE} pixels.
Alone they are decoded by Pillow with the same `draft`, filter and `reducing_gap`. Where not all of preparing is timed,
texts and files are in memory before."""


if __name__ == "__main__":
    sys.exit(main())
