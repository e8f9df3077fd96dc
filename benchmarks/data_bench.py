"""Time the feed on one core: the loader stage by stage against a plain read of the tar, packing, and preparing.

    python benchmarks/data_bench.py --out DIR [--seconds 5]

Writes DIR/data.csv and data.md. All files are made here, in a folder that is removed, and lie in the page cache: the
times are the processor's work.
"""

import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tables
import timing
import tokenizers
import torch
import webdataset as wds
from PIL import Image
from tables import Row

from transfusion_fast.config import Config
from transfusion_fast.config_reading import parse
from transfusion_fast.data.batch import KeyedPack, draw
from transfusion_fast.data.loader import BatchSplit, batch_builder, open_data, training_batches
from transfusion_fast.data.pack import DOCUMENT_TOKENS, IMAGE_TOKENS, Document, ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer, FileTokenizer, train_bpe
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.packing import pack_stream
from transfusion_fast.prepare.sources.base import Source
from transfusion_fast.prepare.sources.pairs import PairsSource
from transfusion_fast.prepare.sources.text import TextSource

CAPACITY = 4096
LATENTS = ModalityInfo("latents", channels=8, patch_size=2, encoding="latents")  # 32 values a patch
PIXELS = ModalityInfo("images", channels=3, patch_size=16, encoding="pixels")
CAPACITIES = (2048, 4096, 8192, 16384)
_SEED = 0


class Stage(NamedTuple):
    """One stage of the feed; a call of `run` handles `count` units, which are `megabytes` on disk."""

    name: str
    unit: str
    count: int
    run: Callable[[], object]
    megabytes: float | None = None
    waste: float | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="to time each stage for (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def measure(device: torch.device) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            groups = [loader_stages(folder / "packs"), packing_stages(), preparing_stages(folder)]
            groups += tokenizing_stages(folder)
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
    return [Stage(name, "tokens", index.num_packs * CAPACITY, run, megabytes) for name, run in runs.items()]


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


def preparing_stages(scratch: Path, texts: int = 4000, images: int = 64) -> list[Stage]:
    """Return preparing in one process: JSON lines as bytes, and JPEGs of 512 x 512 cut to 256 x 256 pixels."""
    rng = np.random.default_rng(_SEED)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 9))) for _ in range(1000)]
    lines = [json.dumps({"text": " ".join(rng.choice(words, 200))}) for _ in range(texts)]
    text, tar = scratch / "texts.jsonl", scratch / "pairs.tar"
    text.write_text("\n".join(lines), encoding="utf-8")
    with wds.TarWriter(str(tar)) as writer:
        for number in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            stream = io.BytesIO()
            coarse.resize((512, 512), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            writer.write({"__key__": f"{number:06d}", "jpg": stream.getvalue(), "txt": "a picture of noise"})
    encoder = Encoder(ByteTokenizer(), CAPACITY)
    pairs = Encoder(ByteTokenizer(), CAPACITY, (PIXELS,), ImageRule("crop", 256, PIXELS.patch_size))

    build_once = partial(_build_once, scratch)
    size = {file: file.stat().st_size / 1e6 for file in (text, tar)}
    return [
        Stage("preparing text", "documents", texts, partial(build_once, TextSource.of([text]), encoder), size[text]),
        Stage("preparing pairs", "images", images, partial(build_once, PairsSource.of([tar]), pairs), size[tar]),
    ]


def tokenizing_stages(scratch: Path, captions: int = 20_000, vocabulary: int = 16_000) -> list[list[Stage]]:
    """Return for captions, and for web texts, the tokenizer's own batch call and then preparing, in parts and whole."""
    rng = np.random.default_rng(_SEED)
    letters = np.frombuffer(b"etaoinshrdlcumwfgypbvk", "S1")
    words = [b"".join(rng.choice(letters, rng.integers(2, 10))).decode() for _ in range(40_000)]
    lengths = {
        "captions": rng.integers(6, 16, captions),
        "web texts": rng.lognormal(6, 1, captions // 40).astype(int) + 1,
    }
    drawn = {kind: np.minimum(rng.zipf(1.3, n.sum()) - 1, len(words) - 1) for kind, n in lengths.items()}
    texts = {
        kind: [" ".join(words[i] for i in own) for own in np.split(drawn[kind], np.cumsum(n)[:-1])]
        for kind, n in lengths.items()
    }
    tokenizer = with_special_tokens(train_bpe([*texts["web texts"], *words], vocabulary))
    library = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    groups = []
    for kind, own in texts.items():
        path = scratch / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in own), encoding="utf-8")
        source, megabytes = TextSource.of([path]), path.stat().st_size / 1e6
        read = [document for unit in source.units() for document in source.documents(unit)]
        encoder = Encoder(tokenizer, CAPACITY)
        runs: dict[str, Callable[[], object]] = {
            "the tokenizer's own batch call": partial(library.encode_batch_fast, own, add_special_tokens=False),
            "tokenizing": lambda encoder=encoder, read=read: [*encoder.encode(read)],
            "preparing": partial(_build_once, scratch, source, encoder),
            "preparing as bytes": partial(_build_once, scratch, source, Encoder(ByteTokenizer(), CAPACITY)),
        }
        groups.append([Stage(f"{kind}: {name}", "texts", len(own), run, megabytes) for name, run in runs.items()])
    return groups


def with_special_tokens(tokenizer: FileTokenizer, number: int = 1200) -> FileTokenizer:
    """Return a tokenizer with as many special tokens as large models have."""
    library = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    library.add_special_tokens([f"<|special {n}|>" for n in range(number)])
    return FileTokenizer(library.to_str().encode())


def _build_once(scratch: Path, source: Source, encoder: Encoder) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        build(Recipe(source, encoder), Path(folder) / "out")


def time_group(stages: Sequence[Stage], seconds: float) -> list[Row]:
    """Time stages that take turns; return their rows, with None for what does not apply."""

    def step_of(stage: Stage) -> Callable[[], None]:
        stage.run()
        return lambda: None

    device = torch.device("cpu")
    timings = timing.time_steps({stage.name: partial(step_of, stage) for stage in stages}, device, seconds)
    machine = timing.describe_machine(device)
    rows = []
    for stage in stages:
        p20, p50, p80 = (timings[stage.name][f"forward_{quantile}"] for quantile in ("p20", "p50", "p80"))
        rows.append({
            "stage": stage.name, "unit": stage.unit, "count": stage.count, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
            "units_per_s": stage.count / p50 * 1e3,
            "mb_per_s": None if stage.megabytes is None else stage.megabytes / p50 * 1e3, "waste": stage.waste,
            **machine,
        })  # fmt: skip
    return rows


COLUMNS = {
    "stage": "{stage}", "units": "{count:,} {unit}", "ms": "{p50_ms:,.1f} ({p20_ms:,.1f}-{p80_ms:,.1f})",
    "units/s": "{units_per_s:,.0f}", "MB/s": "{mb_per_s:,.1f}", "waste": "{waste:.3%}",
}  # fmt: skip
NOTES = f"""\
Times are medians (20th to 80th percentile). The loader's packs are of {CAPACITY:,} tokens, half of them patches of 32
fp16 values. MB are those of the files read. In the mix, half of the documents are under 292 positions and one in twenty
is above 1,107, clipped to the capacity; captioned images are of 256 patches and about 15 tokens. Preparing is one
process, from JSON lines as bytes, or from JPEGs of 512 x 512 cut to 256 x 256, to a data folder in place. Captions have
6 to 15 words and web texts 400 on the median, in a vocabulary of 16,000 tokens and 1,200 special ones. Before they are
tokenized, they are in memory."""


if __name__ == "__main__":
    sys.exit(main())
