"""A data folder to be read at a URL, and what tests ask of one."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from transfusion_fast.data import folder as remote
from transfusion_fast.data.folder import RemoteFolder, ShardCache, data_folder
from transfusion_fast.data.index import parse_index
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
FORK = multiprocessing.get_context("fork")


def write_source(folder: Path) -> Path:
    """6 shards of 3 packs, with a tokenizer of their own."""
    tokenizer = train_bpe(["some words to learn from, some more words to learn"] * 3, 260)
    rng = np.random.default_rng(0)
    documents = [
        (TextSegment(rng.integers(0, 260, 9, dtype=np.int32)), ImageSegment(rng.integers(0, 256, (4, 6, 1), np.uint8)))
        for _ in range(18)
    ]
    prepare(documents, folder, sequence_length=20, tokenizer=tokenizer, modalities=(GREY,), packs_per_shard=3)
    return folder


def log_fetches(log: Path, patch: pytest.MonkeyPatch) -> Path:
    """`log` gets the name of every shard that any process opens at its URL, a line each."""
    opened = remote._open_url
    log.touch()

    def logged(url):
        if url.endswith(".tar"):
            with log.open("a") as lines:
                lines.write(url.rpartition("/")[2] + "\n")
        return opened(url)

    patch.setattr(remote, "_open_url", logged)
    return log


def lines_of(log: Path) -> list[str]:
    return log.read_text().split()


def at(folder: Path, cache: Path, max_bytes: int = 10**9) -> RemoteFolder:
    found = data_folder(f"file://{folder}", ShardCache(cache, max_bytes))
    assert isinstance(found, RemoteFolder)
    return found


def refusal(action, *arguments, kind=InputError) -> str:
    with pytest.raises(InputError) as error:
        action(*arguments)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


def assert_reads(reader: PackReader, source: Path, numbers=None) -> None:
    plain = PackReader(source)
    for number in range(len(plain)) if numbers is None else numbers:
        for field in ("tokens", "segments", "latents"):
            got, expected = getattr(reader.read(number), field), getattr(plain.read(number), field)
            np.testing.assert_array_equal(got, expected, strict=True)


def shard_bytes(folder: Path) -> int:
    (size,) = {shard.bytes for shard in parse_index(folder).shards}
    return size
