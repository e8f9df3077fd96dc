"""Upload of a prepared folder to a URL, which readers find complete or not at all.

recipe.json is written first, so that an unfinished folder can be recognized, and each index.json last. A file is
uploaded if the target does not hold it already. Before and after an upload, these are compared: the sizes, every byte
of JSON, and the table at the end of a shard, which has the checksums of its packs. Readers that fetch a shard compare
its sha256.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from transfusion_fast.data.folder import PROTOCOLS, is_url, retried
from transfusion_fast.data.index import INDEX_NAME, Index, decode_index, parse_index
from transfusion_fast.data.shards import ShardInfo
from transfusion_fast.errors import InputError
from transfusion_fast.files import has_its_name, lock, remove_folder, write_atomically
from transfusion_fast.prepare.progress import progress
from transfusion_fast.prepare.staging import RECIPE, first_changes

_READ_ONLY = ("http", "https")
_TOGETHER = 8  # small files that are uploaded at once, as each waits for several answers
_SMALL = 16 << 20  # bytes; of a larger file, clients upload several parts of up to 50 MB at once
_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """A folder at a URL that fsspec can write."""

    url: str

    def __post_init__(self) -> None:
        writable = [protocol for protocol in PROTOCOLS if protocol not in _READ_ONLY]
        protocol, _, path = self.url.partition("://")
        if "::" in self.url or protocol not in writable or not path.strip("/"):
            raise InputError(
                f"URL to write to must name a folder by one of the protocols {', '.join(writable)}, without ::, "
                f"got {self.url!r}; give another, or a local folder"
            )

    def finished(self, recipe: dict[str, Any]) -> dict[str, Index]:
        """Return the indices of the data folders there by URL; none if they are not complete, or not of this recipe.

        Raises:
            InputError: it holds anything else, or cannot be reached.
        """
        held = self._sizes()
        if not held:
            return {}
        made_of = self._made_of(recipe)
        if first_changes(made_of, recipe):
            return {}
        hashes = made_of["index"] if isinstance(made_of["index"], dict) else {"": made_of["index"]}
        found: dict[str, Index] = {}
        for side, sha256 in hashes.items():
            name = f"{side}/{INDEX_NAME}".lstrip("/")
            content = self._read(name) if name in held else b""
            if hashlib.sha256(content).hexdigest() != sha256:
                return {}
            found[f"{self.url}/{side}".rstrip("/")] = decode_index(content, f"{self.url}/{name}")
        return found

    def upload(self, folder: Path) -> int:
        """Upload what is missing of a prepared folder, and return the number of files that were uploaded.

        Raises:
            InputError: the target holds anything else, or cannot be written; the same call resumes.
        """
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        indices = [name for name in names if Path(name).name == INDEX_NAME]
        held = self._sizes()
        if held:
            self._made_of(json.loads((folder / RECIPE).read_bytes()))
        for name in held:
            if name not in names or (name in indices and self._read(name) != (folder / name).read_bytes()):
                raise self._refusal(f"{'another' if name in names else 'also'} {name}")
        shards = {
            f"{Path(name).parent / shard.file}": shard
            for name in indices
            for shard in parse_index((folder / name).parent).shards
        }
        put = partial(self._put_missing, folder, held, shards)
        between = [name for name in names if name not in (*indices, RECIPE)]
        small = [name for name in between if (folder / name).stat().st_size < _SMALL]
        count = int(put(RECIPE))
        done = chain(_each(put, small, _TOGETHER), _each(put, sorted({*between} - {*small}), 1))
        count += sum(progress(done, "uploading", "file", len(between)))
        return count + sum(map(put, indices))

    def _put_missing(self, folder: Path, held: dict[str, int], shards: dict[str, ShardInfo], name: str) -> bool:
        """Upload a file if the target does not hold it; return True if it was uploaded."""
        local, shard = folder / name, shards.get(name)
        if held.get(name) == local.stat().st_size and self._holds(name, local, shard):
            return False
        self._at(name, partial(_put, local))
        if not self._holds(name, local, shard):
            raise InputError(f"{self.url}/{name} must be as {local}, got other bytes; run it again")
        return True

    def _holds(self, name: str, local: Path, shard: ShardInfo | None) -> bool:
        """Return whether the target holds a file, as far as can be told without fetching all of it."""
        if self._at(name, lambda files, path: files.info(path)["size"]) != local.stat().st_size:
            return False
        if shard:
            start, end = shard.table_span
            table = self._at(name, lambda files, path: files.cat_file(path, start=start, end=end))
            return zlib.crc32(table) == shard.table_crc32
        return local.suffix != ".json" or self._read(name) == local.read_bytes()

    def _made_of(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe at the URL; InputError if there is none, or another, whatever the times of its files."""
        made_of = None
        with suppress(ValueError, RecursionError):
            made_of = json.loads(self._read(RECIPE, b""))
        if not isinstance(made_of, dict):
            raise self._refusal(f"no {RECIPE}")
        if change := first_changes(_without_times(made_of), _without_times(recipe)):
            raise self._refusal(f"a folder of other settings: {change}")
        return {"index": None, **made_of}

    def _refusal(self, found: str) -> InputError:
        return InputError(
            f"{self.url} must be empty, or hold what this command writes, got {found}; choose another, or remove it"
        )

    def _sizes(self) -> dict[str, int]:
        """Return the size of each file below the URL by its relative name."""

        def sizes(files: Any, path: str) -> dict[str, int]:
            files.invalidate_cache()  # of listings, since when another process may have written there
            found = files.find(path, detail=True)
            return {name.removeprefix(path).lstrip("/"): info["size"] for name, info in found.items()}

        return self._at("", sizes)

    def _read(self, name: str, missing: bytes | None = None) -> bytes:
        def read(files: Any, path: str) -> bytes:
            try:
                return files.cat_file(path)
            except FileNotFoundError:
                if missing is None:
                    raise
                return missing

        return self._at(name, read)

    def _at(self, name: str, act: Callable[[Any, str], _T]) -> _T:
        """Return act(file system, path) for the file of that name, again after temporary faults."""
        from fsspec.core import url_to_fs  # here, because local folders do not need it

        def failed(reason: str) -> InputError:
            return InputError(
                f"{self.url} must be readable and writable, got {reason}; check the URL, the network and the "
                "credentials, and run it again: it resumes"
            )

        return retried(lambda: act(*url_to_fs(f"{self.url.rstrip('/')}/{name}".rstrip("/"))), self.url, failed)


def local_and_target(out: str, work: Path | None) -> tuple[Path, Target | None]:
    """Return the folder to make for an output, and where to upload it if that is a URL.

    Raises:
        InputError: a URL comes without a folder to work in, or a path with one.
    """
    if is_url(out):
        if work is None:
            raise InputError(f"--out URL must come with --work FOLDER, got {out!r} alone; give a local folder")
        return work, Target(out.rstrip("/"))
    if work is not None:
        raise InputError(f"--work must come with a URL as --out, got {out!r}; leave it out")
    return Path(out), None


def upload_and_remove(folder: Path, target: Target) -> int | None:
    """Upload a prepared folder, delete it, and return the number of files that were uploaded.

    None if another process did so meanwhile: parts on several machines may find the folder finished at one moment.
    """
    try:
        recipe = (folder / RECIPE).open("r+b")  # over NFS only a file that can be written has a lock of its own
    except FileNotFoundError:
        return None
    with recipe:
        lock(recipe, wait=True)
        if not has_its_name(recipe):
            return None
        count = target.upload(folder)
        remove_folder(folder)
    return count


def _put(local: Path, files: Any, path: str) -> None:
    if "file" in files.protocol:  # where a reader could see half of an index
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if local.suffix == ".json":
            return write_atomically(Path(path), local.read_bytes())
    files.put_file(str(local), path)


def _each(put: Callable[[str], bool], names: Sequence[str], threads: int) -> Iterator[bool]:
    """Yield the result of put(name) for each name, in any order. An error cancels the calls that have not begun."""
    with ThreadPoolExecutor(threads) as executor:
        waiting = [executor.submit(put, name) for name in names]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _without_times(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without what changes if source files are only touched, and without its index."""
    files = recipe.get("files")
    sizes = {name: file.get("bytes") for name, file in files.items()} if isinstance(files, dict) else None
    return {**{name: value for name, value in recipe.items() if name not in ("index", "contents")}, "files": sizes}
