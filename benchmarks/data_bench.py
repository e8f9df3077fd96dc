"""Times the feed on one core: the loader stage by stage against a plain read of the tar, packing, and preparing.

    python benchmarks/data_bench.py --out DIR [--seconds 5]

Writes DIR/data.csv and data.md. All files are made here, in a folder that is removed, and lie in the page cache: what
is timed is the processor's work. The loader's packs are of 4,096 tokens, half of them patches of 32 fp16 values.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import measure
import numpy as np
import torch
from measure import Effort, Machine, write_csv
from PIL import Image

from transfusion_fast.config import Config, parse
from transfusion_fast.data.batch import KeyedPack, draw
from transfusion_fast.data.loader import Share, batch_builder, open_data, training_batches
from transfusion_fast.data.pack import DOCUMENT_TOKENS, IMAGE_TOKENS, Document, ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
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
IMAGE_SIDE = 32  # of latents: 256 patches
PIXELS = ModalityInfo("images", channels=3, patch_size=16, encoding="pixels")
CAPACITIES = (2048, 4096, 8192, 16384)
PACKED_DOCUMENTS = 200_000
_SEED = 0


@dataclass(frozen=True)
class Row:
    """One stage on one core. None where it does not apply."""

    stage: str
    unit: str
    count: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    units_per_s: float
    mb_per_s: float | None
    waste: float | None
    hardware: str
    torch: str
    git: str


@dataclass(frozen=True)
class Stage:
    """What one call of `run` does: `count` units, which are `megabytes` on disk."""

    name: str
    unit: str
    count: int
    run: Callable[[], object]
    megabytes: float | None = None
    waste: float | None = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=5, help="to time each stage for (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            groups = [loader_stages(Path(scratch) / "packs"), packing_stages(), preparing_stages(Path(scratch))]
            rows = [row for group in groups for row in time_group(group, Effort(30, options.seconds))]
    except OSError as error:
        print(f"data_bench: {error}", file=sys.stderr)
        return 2
    write_csv(rows, options.out / "data.csv")
    text = markdown(rows)
    (options.out / "data.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def loader_stages(folder: Path, documents: int = 1024) -> list[Stage]:
    """A plain read of the tar, then what the loader does with the same packs, alone and together."""
    index = prepare(
        list(_pair_documents(documents)), folder,
        sequence_length=CAPACITY, tokenizer=ByteTokenizer(), modalities=(LATENTS,),
    )  # fmt: skip
    config = parse(
        Config,
        {
            "data": {"path": str(folder), "workers": 0},
            "model": {"num_text_tokens": 256, "dim_latent": [32], "transformer": {"dim": 32, "depth": 1, "heads": 1}},
            "train": {"micro_batch": 1, "global_batch": 1, "seed": _SEED},
        },
        "data_bench",
    )
    data = open_data(config)
    reader, builder = PackReader(folder, index), batch_builder(config, data, 1)
    numbers = range(index.num_packs)
    keyed = [KeyedPack(reader.read(number), 0, number) for number in numbers]
    loaded = training_batches(config, data, Share(0, 1, 1, 1), 0)
    tokens = index.num_packs * CAPACITY
    megabytes = sum(shard.bytes for shard in index.shards) / 1e6
    runs: dict[str, Callable[[], object]] = {
        "plain read of the tar": lambda: [_read_tar(folder / shard.file) for shard in index.shards],
        "read, checksum, decode, validate": lambda: [reader.read(number) for number in numbers],
        "draw order, timesteps, noise": lambda: [draw(pack, _SEED) for pack in keyed],
        "draw and lay out, attention's layout included": lambda: [builder([pack]) for pack in keyed],
        "loader, all of it": lambda: [each.batch for each in islice(loaded, index.num_packs)],
    }
    return [Stage(name, "tokens", tokens, run, megabytes) for name, run in runs.items()]


def packing_stages(documents: int = PACKED_DOCUMENTS) -> list[Stage]:
    """Of a mix with a median of 292 positions and one in twenty above 1,107; and of captioned images of 256 patches."""
    rng = np.random.default_rng(_SEED)
    mix = rng.lognormal(np.log(292), np.log(1107 / 292) / 1.645, documents)
    captions = rng.lognormal(np.log(15), 0.6, documents)
    captioned = IMAGE_TOKENS + 256 + DOCUMENT_TOKENS + np.clip(captions, 1, 200)
    stages = []
    for name, lengths in (("a mix", mix), ("captioned images", captioned)):
        for capacity in CAPACITIES:
            clipped = np.clip(lengths, 4, capacity).astype(np.int64)
            pack = partial(_packs, clipped, capacity)
            waste = 1 - clipped.sum() / (capacity * pack())
            stages.append(Stage(f"packing {name} to {capacity}", "documents", documents, pack, waste=float(waste)))
    return stages


def preparing_stages(scratch: Path, texts: int = 4000, images: int = 64) -> list[Stage]:
    """From files to shards in one process: JSON lines as bytes, and JPEGs of 512 x 512 to 256 x 256 pixels."""
    rng = np.random.default_rng(_SEED)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 9))) for _ in range(1000)]
    lines = [json.dumps({"text": " ".join(rng.choice(words, 200))}) for _ in range(texts)]
    text, tar = scratch / "texts.jsonl", scratch / "pairs.tar"
    text.write_text("\n".join(lines), encoding="utf-8")
    _write_pairs(tar, images, rng)
    encoder = Encoder(ByteTokenizer(), CAPACITY)
    pairs = Encoder(ByteTokenizer(), CAPACITY, (PIXELS,), ImageRule("crop", 256, PIXELS.patch_size))
    return [
        _building("preparing text", "documents", texts, TextSource.of([text]), encoder, text),
        _building("preparing pairs", "images", images, PairsSource.of([tar]), pairs, tar),
    ]


def _building(name: str, unit: str, count: int, source: Source, encoder: Encoder, file: Path) -> Stage:
    def run() -> None:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            build(Recipe(source, encoder), Path(folder) / "out")

    return Stage(name, unit, count, run, file.stat().st_size / 1e6)


def time_group(stages: Sequence[Stage], effort: Effort) -> list[Row]:
    """Stages that take turns."""
    device = torch.device("cpu")
    timings = measure.time_steps({stage.name: partial(_step, stage) for stage in stages}, device, effort)
    machine = measure.describe_machine(device)
    return [_row(stage, timings[stage.name].forward, machine) for stage in stages]


def _step(stage: Stage) -> Callable[[], None]:
    stage.run()
    return lambda: None


def _row(stage: Stage, times: measure.Quantiles, machine: Machine) -> Row:
    seconds = times.p50 / 1e3
    return Row(
        stage=stage.name,
        unit=stage.unit,
        count=stage.count,
        p20_ms=times.p20,
        p50_ms=times.p50,
        p80_ms=times.p80,
        units_per_s=stage.count / seconds,
        mb_per_s=None if stage.megabytes is None else stage.megabytes / seconds,
        waste=stage.waste,
        hardware=machine.hardware,
        torch=machine.torch,
        git=machine.git,
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table, and what it means."""
    first = rows[0]
    lines = [
        "# The feed, on one core",
        "",
        f"{first.hardware}; torch {first.torch}, revision {first.git}. Files in the page cache.",
        "",
        "| stage | units | ms | units/s | MB/s | waste |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        rate = "-" if r.mb_per_s is None else f"{r.mb_per_s:,.1f}"
        waste = "-" if r.waste is None else f"{r.waste:.3%}"
        lines.append(
            f"| {r.stage} | {r.count:,} {r.unit} | {r.p50_ms:,.1f} ({r.p20_ms:,.1f}-{r.p80_ms:,.1f}) | "
            f"{r.units_per_s:,.0f} | {rate} | {waste} |"
        )
    lines += [
        "",
        f"Times are medians (20th to 80th percentile). The loader's packs are of {CAPACITY:,} tokens, half of them "
        "patches of 32 fp16 values. MB are those of the files read. Of the mix half of the documents are under 292 "
        "positions and one in twenty is above 1,107, clipped to the capacity; captioned images are of 256 patches and "
        "about 15 tokens. Preparing is one process, from JSON lines as "
        "bytes, or from JPEGs of 512 x 512 cut to 256 x 256, to a data folder in place. On a CPU that others use too, "
        "times are worth no more than their ratios.",
        "",
    ]
    return "\n".join(lines)


def _pair_documents(count: int) -> list[Document]:
    rng = np.random.default_rng(_SEED)
    shape = (IMAGE_SIDE, IMAGE_SIDE, LATENTS.channels)
    return [
        (
            TextSegment(rng.integers(0, 256, int(rng.integers(100, 413)), dtype=np.int32)),
            ImageSegment(rng.standard_normal(shape).astype(np.float16)),
        )
        for _ in range(count)
    ]


def _packs(lengths: np.ndarray, capacity: int) -> int:
    return sum(1 for _ in pack_stream([lengths], capacity, _SEED))


def _read_tar(path: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                file.read()


def _write_pairs(path: Path, count: int, rng: np.random.Generator) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            stream = io.BytesIO()
            coarse.resize((512, 512), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            for extension, data in (("jpg", stream.getvalue()), ("txt", b"a picture of noise")):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    sys.exit(main())
