"""The memory and the disk space that preparing large sources takes: `data_bench.py --large GB`."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow
import tables
import timing
import torch
from data_sources import LARGE, SEED, SMALL, make_jpegs, make_texts, make_tokenizer, make_words, web_lengths, write_tar
from pyarrow import parquet
from tables import Row

PROCESSES = 2
_EVERY = 0.05  # seconds between two looks at the memory
_PREPARE = Path(__file__).parent.parent / "train" / "prepare.py"
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)
_ROWS = 1000  # of a row group of text; a hub's files have about as many


class Case(NamedTuple):
    """A source and the command that prepares it."""

    name: str
    file: str
    command: str
    make: Callable[[Path, float], None]
    options: tuple[str, ...] = ()


def measure(scratch: Path, gigabytes: float) -> Iterator[Row]:
    """Make a text of so many GB, and texts and pictures of half as many, prepare each, and yield its row."""
    machine = timing.describe_machine(torch.device("cpu"))
    tokenizer = scratch / "tokenizer.json"
    tokenizer.write_bytes(make_tokenizer(_texts(), 16_000, 1200).content)
    for case in _cases(tokenizer):
        source, out = scratch / case.file, scratch / "out"
        if not source.exists():
            for other in scratch.glob("source.*"):
                other.unlink()
            case.make(source, gigabytes * 1e9)
        print(f"{case.name}: preparing {source.stat().st_size / 1e9:.2f} GB", file=sys.stderr)
        yield {"source": case.name, "source_gb": source.stat().st_size / 1e9, **_prepare(case, source, out), **machine}
        shutil.rmtree(out)


def _cases(tokenizer: Path) -> list[Case]:
    trained = ("--tokenizer", str(tokenizer))
    return [
        Case("JSON lines, as bytes", "source.jsonl", "text", _write_lines),
        Case("JSON lines, tokenized", "source.jsonl", "text", _write_lines, trained),
        Case("Parquet of texts, tokenized", "source.parquet", "text", _write_text_parquet, trained),
        Case("tar of pictures", "source.tar", "pairs", _write_tar),
        Case("Parquet of pictures", "source.pictures.parquet", "pairs", _write_picture_parquet),
    ]


def _texts() -> list[str]:
    return make_texts(make_words(), web_lengths(4000))


def _endless_texts() -> Iterator[str]:
    """Yield texts in random order without end."""
    texts, rng = _texts(), np.random.default_rng(SEED)
    while True:
        yield from (texts[i] for i in rng.permutation(len(texts)).tolist())


def _endless_pairs() -> Iterator[tuple[bytes, str]]:
    """Yield pictures with captions without end: one in ten a photograph of three megapixels."""
    small, large = itertools.cycle(make_jpegs(SMALL, 90)), itertools.cycle(make_jpegs(LARGE, 10))
    for number in itertools.count():
        yield next(small if number % 10 else large), f"picture {number} of noise"


def _write_lines(path: Path, size: float) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in _endless_texts():
            file.write(f'{{"text": "{text}"}}\n')
            if file.tell() >= size:
                return


# In a dictionary, values that come again would be stored once, and the file would hold far more of them.
def _write_text_parquet(path: Path, size: float) -> None:
    texts, schema = _endless_texts(), pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        while path.stat().st_size < size / 2:
            rows = list(itertools.islice(texts, 64 * _ROWS))
            writer.write_table(pyarrow.table({"text": rows}, schema))


def _write_picture_parquet(path: Path, size: float) -> None:
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("caption", pyarrow.string())])
    pairs = _endless_pairs()
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        while path.stat().st_size < size / 2:
            rows = list(itertools.islice(pairs, _ROWS))
            images = [{"bytes": picture, "path": None} for picture, _ in rows]
            writer.write_table(pyarrow.table({"image": images, "caption": [caption for _, caption in rows]}, schema))


def _write_tar(path: Path, size: float) -> None:
    def pairs() -> Iterator[tuple[bytes, str]]:
        written = 0
        for picture, caption in _endless_pairs():
            if (written := written + len(picture)) > size / 2:
                return
            yield picture, caption

    write_tar(path, pairs())


def _prepare(case: Case, source: Path, out: Path) -> Row:
    """Run the command; return the most memory of its processes, and the most space of its staging folder, in GB."""
    command = [sys.executable, str(_PREPARE), case.command, str(source), "--out", str(out), *case.options]
    begin, memory, space = time.monotonic(), 0, 0
    process = psutil.Popen([*command, "--processes", str(PROCESSES)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        memory = max(memory, _tree_memory(process))
        space = max(space, _space(out.with_name(f"{out.name}.partial")))
        time.sleep(_EVERY)
    if process.returncode:
        raise timing.Unfinished(f"{' '.join(command)} must succeed, got exit code {process.returncode}")
    seconds = time.monotonic() - begin
    ratio = space / source.stat().st_size
    return {"peak_gb": memory / 1e9, "staging_gb": space / 1e9, "staging_ratio": ratio, "seconds": seconds}


def _tree_memory(process: psutil.Process) -> int:
    """Return the memory of a process and all below it in bytes; what several share counts once (PSS)."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(OSError):  # it has ended
                found = _PSS.search(Path(f"/proc/{each.pid}/smaps_rollup").read_text())
                total += 1024 * int(found[1]) if found else 0
    return total


def _space(folder: Path) -> int:
    """Return the bytes that the files of a folder take on disk."""
    total = 0
    for current, _, names in os.walk(folder):  # which passes over folders that are removed meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                total += 512 * os.stat(os.path.join(current, name)).st_blocks
    return total


COLUMNS = {
    "source": "{source}", "GB": "{source_gb:.2f}", "peak memory, GB": "{peak_gb:.2f}",
    "peak staging space, GB": "{staging_gb:.2f}", "staging / source": "{staging_ratio:.2f}", "s": "{seconds:.0f}",
}  # fmt: skip
NOTES = f"""\
`prepare.py` with --processes {PROCESSES}. Peak memory is the most that the whole tree of processes holds at any time,
interpreters and libraries included: the sum of its proportional set sizes, in which pages that several processes share
count once, looked at every {1000 * _EVERY:.0f} ms. Staging space is what the files of OUT.partial take on disk. Texts
have 400 words on the median. Of the pictures, one in ten has 2,048 x 1,536 pixels and the others have 500 x 400; they
become squares of 256 x 256. A row group of Parquet has {64 * _ROWS:,} texts or {_ROWS:,} pictures. What the seconds
say depends on who else uses the machine."""


def write_report(folder: Path, rows: list[Row]) -> None:
    """Write data_large.csv and data_large.md."""
    tables.write_report(folder / "data_large", "Preparing large sources", rows, COLUMNS, NOTES)
