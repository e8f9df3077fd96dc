"""Data folders: local ones, and remote ones whose shards are fetched on first use into a local cache of bounded size.

A cached shard is named `SHA256.tar`, so a replaced shard is never confused with its predecessor. Ranks, loader workers
and runs share a cache, which changes only under the lock `.lock`. A process that fetches a shard reserves its space
with the file `.SHA256.partial`, which it keeps locked; the operating system releases the lock when the process ends.
Room is made by removing partial files of dead processes, then the least recently opened shards. The file is renamed
once its size and sha256 match the index. A process that has an evicted shard open can still read it.

A shard that cannot be fetched (network, credentials, full disk) may be intact. It raises `FetchError`, which stops a
run and is never quarantined. A shard that differs from its index after two downloads is damaged: it raises `InputError`
for each of its packs. A shard that becomes corrupt in the cache is fetched again.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock

from transfusion_fast.data.shards import ShardInfo
from transfusion_fast.errors import InputError
from transfusion_fast.files import lock

PROTOCOLS = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
SILENCE_TIMEOUT = 60.0
"""Seconds without data after which a connection counts as lost."""
_BLOCK = 16 << 20
_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_POLL = 0.2  # seconds
_DOWNLOADS = 2  # of a shard that arrives damaged
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # not worth a retry
_CLIENT_ERRORS = (  # of the packages behind file systems; most do not derive from OSError
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
)
_T = TypeVar("_T")


class FetchError(InputError):
    """A file at a URL that could not be fetched. The data itself may be intact."""


class Folder(ABC):
    """A folder with an index, a tokenizer and shards. `str(folder)` is its path or URL."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Return the contents of a small file; raise InputError or FetchError if it cannot be read."""

    @abstractmethod
    def open_shard(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard, which the caller closes.

        Raises:
            FetchError: The shard cannot be fetched or cached.
            InputError: It is not the shard that the index describes.
        """

    def check_shards(self, shards: Iterable[ShardInfo]) -> None:  # noqa: B027
        """Raise InputError for a local shard that is missing or has another size. Remote shards are not checked."""

    def cache_bytes(self, shards: Iterable[ShardInfo], window: int) -> int:
        """Return the cache space in bytes that the largest `window` of these shards need together."""
        return 0

    def discard_if_corrupt(self, descriptor: int, shard: ShardInfo) -> bool:
        """Remove an open shard from the cache if its bytes have changed there; return True if they have."""
        return False

    def path_to(self, name: str) -> str:
        """Return the path or URL of a file in the folder."""
        return f"{self}/{name}"


def is_url(location: str) -> bool:
    """Return True for a location that is not a local path."""
    return "://" in location or location.startswith("pipe:")


def as_folder(location: Folder | Path | str, cache: ShardCache | None = None) -> Folder:
    """Return the folder at a path or URL, or InputError; `cache` holds the shards of remote folders."""
    if isinstance(location, Folder):
        return location
    if isinstance(location, Path) or not is_url(location):
        return LocalFolder(Path(location))
    if "::" in location or (protocol := location.partition(":")[0]) not in PROTOCOLS:
        raise InputError(
            f"URL of a data folder must use one of the protocols {', '.join(PROTOCOLS)}, without ::, "
            f"got {location!r}; give another, or a local folder"
        )
    if protocol in ("http", "https") and not _is_web_folder(location):
        raise InputError(
            f"URL of a data folder must have a host, a valid port, no ? and no #, got {location!r}; "
            "give a URL that file names can be appended to"
        )
    if cache is None:
        raise InputError(f"data folder at a URL must have a cache, got none for {location!r}; pass a ShardCache")
    return RemoteFolder(location.rstrip("/"), cache)


def _is_web_folder(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and "?" not in url and "#" not in url
    except ValueError:
        return False


@dataclass(frozen=True)
class LocalFolder(Folder):
    """A data folder on local disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            cure = "give one, or make one: python train/prepare.py digits OUT gives OUT/train"
            if (self.path / "train" / name).is_file():  # it was prepared with a held-out part
                cure = f"give its part {str(self.path / 'train')!r}"
            raise InputError(
                f"data folder must hold a readable {name}, got {str(self)!r} ({error.strerror}), which is not a "
                f"prepared data folder; {cure}"
            ) from error

    def open_shard(self, shard: ShardInfo) -> int:
        self.check_shards([shard])  # the index might describe packs larger than memory
        return os.open(self.path / shard.file, os.O_RDONLY)

    def check_shards(self, shards: Iterable[ShardInfo]) -> None:
        for shard in shards:
            path = self.path / shard.file
            if not path.is_file():
                raise InputError(f"shard {path} must exist, got none; copy it again or prepare the data again")
            if (size := path.stat().st_size) != shard.bytes:
                raise InputError(
                    f"shard {path} must have {shard.bytes} bytes as its index says, got {size}; "
                    "copy it again or prepare the data again"
                )


@dataclass(frozen=True)
class RemoteFolder(Folder):
    """A data folder at a URL that fsspec can read."""

    url: str
    cache: ShardCache
    damaged: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Error message for each damaged shard by sha256, so that it is not downloaded again for every pack."""

    def __str__(self) -> str:
        return self.url

    def read_bytes(self, name: str) -> bytes:
        return _fetch(self.path_to(name), lambda source: source.read())

    def open_shard(self, shard: ShardInfo) -> int:
        if shard.sha256 in self.damaged:
            raise InputError(self.damaged[shard.sha256])
        try:
            return self.cache.open_shard(self.path_to(shard.file), shard)
        except OSError as error:
            raise FetchError(
                f"data.cache must be a writable folder, got {str(self.cache.folder)!r} ({error}); give another"
            ) from error
        except FetchError:
            raise
        except InputError as error:
            self.damaged[shard.sha256] = str(error)
            raise

    def cache_bytes(self, shards: Iterable[ShardInfo], window: int) -> int:
        return sum(heapq.nlargest(window, (shard.bytes for shard in shards)))

    def discard_if_corrupt(self, descriptor: int, shard: ShardInfo) -> bool:
        return self.cache.discard_if_corrupt(descriptor, shard)


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards with at most `max_bytes` in all, shared by any number of processes."""

    folder: Path
    max_bytes: int

    def open_shard(self, url: str, shard: ShardInfo) -> int:
        """Return a descriptor of the shard, after fetching it from `url` if it is not cached."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, partial = self._path_of(shard), self.folder / f".{shard.sha256}.partial"
        while True:
            with self._locked():
                with suppress(FileNotFoundError):
                    descriptor = os.open(path, os.O_RDONLY)
                    os.utime(descriptor)  # the time of last use, by which shards are evicted
                    return descriptor
                if stream := self._reserve(partial, shard.bytes):
                    break
            time.sleep(_POLL)
        with stream:
            try:
                _download(url, stream, shard)
                os.fsync(stream.fileno())
                descriptor = os.open(partial, os.O_RDONLY)
                with self._locked():
                    partial.rename(path)
                return descriptor
            except BaseException:
                with self._locked():
                    partial.unlink(missing_ok=True)
                raise

    def discard_if_corrupt(self, descriptor: int, shard: ShardInfo) -> bool:
        """Remove an open shard if its bytes have changed; return True if they have."""
        with suppress(OSError):  # a failing disk counts as corruption
            if _sha256(descriptor) == shard.sha256:
                return False
        path = self._path_of(shard)
        with self._locked(), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # no other process has replaced it yet
                path.unlink()
        return True

    def _path_of(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _locked(self) -> FileLock:
        """Return a lock of the operating system, never one that a dead process could leave behind."""
        return FileLock(self.folder / ".lock", fallback_to_soft=False)

    def _reserve(self, path: Path, size: int) -> BinaryIO | None:
        """Return a locked file of `size` bytes; None while others fetch this shard or leave too little space."""
        assert size <= self.max_bytes, "check_cache compares them before training"
        free = self.max_bytes
        for other in self.folder.glob(".*.partial"):
            with other.open("r+b") as stream:  # network file systems lock only what may be written
                if lock(stream):
                    other.unlink()  # its process has died
                elif other == path:
                    return None
                else:
                    free -= os.fstat(stream.fileno()).st_size
        if free < size:
            return None
        shards = sorted(self.folder.glob("*.tar"), key=lambda shard: shard.stat().st_mtime_ns, reverse=True)
        free -= sum(shard.stat().st_size for shard in shards)
        while free < size:
            free += shards[-1].stat().st_size
            shards.pop().unlink()
        reserved = path.open("w+b")
        lock(reserved)
        reserved.truncate(size)
        return reserved


def _sha256(descriptor: int) -> str:
    """Return the sha256 of an open file. Reads use explicit offsets, as forked processes share the file position."""
    sha256, start = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, start):
        sha256.update(block)
        start += len(block)
    return sha256.hexdigest()


def _download(url: str, stream: BinaryIO, shard: ShardInfo) -> None:
    expected = f"{shard.bytes} bytes, sha256 {shard.sha256}"
    for _ in range(_DOWNLOADS):
        size = _fetch(url, lambda source: _copy(source, stream, shard.bytes))
        found = "more" if size > shard.bytes else f"{size} bytes, sha256 {_sha256(stream.fileno())}"
        if found == expected:
            return
    raise InputError(f"{url} must be {expected}, as its index says, got {found}; upload it again, or rebuild the index")


def _copy(source: BinaryIO, target: BinaryIO, limit: int) -> int:
    """Copy a file and return its size. Stops after one byte more than `limit`."""
    size = target.seek(0)
    while size <= limit and (block := source.read(min(_BLOCK, limit + 1 - size))):
        size += len(block)
        target.write(block[: len(block) - max(size - limit, 0)])
    target.flush()
    return size


def _open_url(url: str) -> BinaryIO:
    """Open a URL for reading. The file system is looked up each time, as one must not be used after a fork."""
    from fsspec.core import url_to_fs  # here, because local folders do not need it

    if not url.startswith(("http://", "https://")):
        filesystem, path = url_to_fs(url)
        return filesystem.open(path, "rb")
    import aiohttp

    # By default a whole response must arrive within minutes, however large it is.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_TIMEOUT, sock_read=SILENCE_TIMEOUT)
    filesystem, path = url_to_fs(url, client_kwargs={"timeout": timeout})
    # One request from front to back (block_size=0), as a server need not support ranges. The size is not used, but
    # without one fsspec asks the server for it and takes any failure there for a missing file.
    return filesystem.open(path, "rb", block_size=0, size=1)


def _fetch(url: str, read: Callable[[BinaryIO], _T]) -> _T:
    """Open a URL and read it, again after temporary faults; raise FetchError for the last fault."""

    def fetch() -> _T:
        with _open_url(url) as source:
            return read(source)

    def failed(reason: str) -> InputError:
        return FetchError(
            f"{url} must be fetched, got {reason}; "
            "check the URL, the network, the credentials and the disk of data.cache"
        )

    return retried(fetch, url, failed)


def retried(act: Callable[[], _T], url: str, failed: Callable[[str], InputError]) -> _T:
    """Return what `act` does at a URL, again after temporary faults; raise `failed` with the reason of the last one."""
    waits = iter(_WAITS)
    while True:
        try:
            return act()
        except ImportError as error:
            raise InputError(f"{url} needs a package that is missing ({error}); install it") from error
        except _transport_errors() as error:
            wait = None if isinstance(error, _PERMANENT) else next(waits, None)
            if wait is None:
                raise failed(f"{' '.join(f'{type(error).__name__}: {error}'.split()):.300}") from error
            time.sleep(wait)


def _transport_errors() -> tuple[type[BaseException], ...]:
    """Return the errors that a file system may raise; a package that raises its own has been imported by then."""
    return (OSError, *(getattr(sys.modules[name], error) for name, error in _CLIENT_ERRORS if name in sys.modules))
