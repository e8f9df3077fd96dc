"""A data folder to be read at a URL, and common checks of one."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from shard_damage import GREY, assert_same_pack

from transfusion_fast.data.folder import Folder, ShardCache, as_folder
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import train_bpe
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare

FORK = multiprocessing.get_context("fork")


def write_source(folder: Path) -> Path:
    """Write 6 shards of 3 packs, with a tokenizer of their own."""
    tokenizer = train_bpe(["some words to learn from, some more words to learn"] * 3, 260)
    rng = np.random.default_rng(0)
    documents = [
        (TextSegment(rng.integers(0, 260, 9, dtype=np.int32)), ImageSegment(rng.integers(0, 256, (4, 6, 1), np.uint8)))
        for _ in range(18)
    ]
    prepare(documents, folder, sequence_length=20, tokenizer=tokenizer, modalities=(GREY,), packs_per_shard=3)
    return folder


def at(folder: Path, cache: Path, max_bytes: int = 10**9) -> Folder:
    """Return a local folder as a remote one."""
    return as_folder(f"file://{folder}", ShardCache(cache, max_bytes))


def intercept_fetches(patch: pytest.MonkeyPatch, fetch: Callable[[str, Callable[[], BinaryIO]], BinaryIO]) -> None:
    """Let `fetch(name, open)` replace the opening of every shard at a file:// URL, in forked processes too."""
    really_open = LocalFileSystem.open

    def opened(self, path, *arguments, **options):
        if not path.endswith(".tar"):
            return really_open(self, path, *arguments, **options)
        return fetch(Path(path).name, lambda: really_open(self, path, *arguments, **options))

    patch.setattr(LocalFileSystem, "open", opened)


def run_forked(*actions: Callable[[], None], timeout: float = 60) -> None:
    """Run each action in a forked process, all at once; fail if one fails or hangs."""
    processes = [FORK.Process(target=action, daemon=True) for action in actions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(actions), "None: it hangs"


def refusal(action, *arguments, kind=InputError) -> str:
    """Return the one line of the error of exactly this class that an action must raise."""
    with pytest.raises(InputError) as error:
        action(*arguments)
    assert type(error.value) is kind and "\n" not in str(error.value)
    return str(error.value)


def assert_reads(reader: PackReader, source: Path, numbers=None) -> None:
    """Assert that a reader returns the packs of a local folder."""
    local = PackReader(source)
    for number in range(len(local)) if numbers is None else numbers:
        assert_same_pack(reader.read(number), local.read(number))
