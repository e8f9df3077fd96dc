"""Data folders: local ones, and remote ones whose shards are fetched on first use into a local cache of bounded size.

A cached shard is named `SHA256.tar`, so a replaced shard is never confused with its predecessor. Ranks, loader workers
and runs share a cache. A process that fetches a shard holds the lock `.SHA256.lock`, which the operating system
releases when the process ends. It downloads to `.SHA256.partial` and renames that file once size and sha256 match the
index. Space is reserved under the lock `.lock`: partial files of dead processes are removed first, then the least
recently opened shards. A process that has an evicted shard open can still read it.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from transfusion_fast.data.shards import ShardInfo
from transfusion_fast.errors import InputError

PROTOCOLS = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
SILENCE_TIMEOUT = 60.0
"""Seconds without data after which a connection counts as lost."""
_BLOCK = 16 << 20
_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_POLL = 0.2  # seconds
_DOWNLOADS = 2  # of a shard that arrives damaged
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # not worth a retry
_CLIENT_ERRORS = {  # of the packages behind file systems; most do not derive from OSError
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "httpx": ("HTTPError",),
}
_T = TypeVar("_T")


class FetchError(InputError):
    """A file at a URL that could not be fetched. The data itself may be intact."""


class Folder(ABC):
    """A folder with an index, a tokenizer and shards. Its `str` is its path or URL."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Return the contents of a small file; raise InputError or FetchError if it cannot be read."""

    @abstractmethod
    def open_shard(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard, which the caller closes.

        Raises:
            FetchError: The shard cannot be fetched or cached.
            InputError: It is not the shard that the index describes.
            OSError: The shard of a local folder cannot be opened.
        """

    @abstractmethod
    def check_shards(self, shards: Iterable[ShardInfo]) -> None:
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
    """Return the folder at a path or URL; `cache` holds the shards of remote folders.

    Raises:
        InputError: The URL is not supported.
    """
    if isinstance(location, Folder):
        return location
    if isinstance(location, Path) or not is_url(location):
        return LocalFolder(Path(location))
    protocol = location.partition(":")[0]
    if "::" in location or protocol not in PROTOCOLS:
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
        if not self.path.is_dir():
            raise InputError(
                f"data folder must exist, got {str(self)!r}; to make one, run: python train/prepare.py digits OUT"
            )
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise InputError(
                f"data folder must hold a readable {name}, got {str(self)!r} ({error.strerror}), which is not a "
                "prepared data folder; give one that train/prepare.py wrote, such as OUT/train"
            ) from error

    def open_shard(self, shard: ShardInfo) -> int:
        descriptor = os.open(self.path / shard.file, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:  # the index might describe packs larger than memory
            os.close(descriptor)
            raise InputError(f"shard must have {shard.bytes} bytes as its index says, got {size}")
        return descriptor

    def check_shards(self, shards: Iterable[ShardInfo]) -> None:
        for shard in shards:
            path = self.path / shard.file
            if not path.is_file():
                raise InputError(f"shard {path} must exist, and is missing; copy it again or prepare the data again")
            size = path.stat().st_size
            if size != shard.bytes:
                raise InputError(
                    f"shard {path} must have {shard.bytes} bytes as its index says, got {size}, so it is truncated or "
                    "replaced; copy it again or prepare the data again"
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
        url = self.path_to(name)
        return _retry(url, partial(_read, url))

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

    def check_shards(self, shards: Iterable[ShardInfo]) -> None:
        """Do nothing: remote shards are checked when they are fetched."""

    def cache_bytes(self, shards: Iterable[ShardInfo], window: int) -> int:
        return sum(heapq.nlargest(window, (shard.bytes for shard in shards)))

    def discard_if_corrupt(self, descriptor: int, shard: ShardInfo) -> bool:
        with suppress(OSError):  # a failing disk counts as corruption
            if _sha256(descriptor) == shard.sha256:
                return False
        self.cache.remove(descriptor, shard)
        return True


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards with at most `max_bytes` in all, shared by any number of processes."""

    folder: Path
    max_bytes: int

    def open_shard(self, url: str, shard: ShardInfo) -> int:
        """Return a descriptor of the shard, after fetching it from `url` if it is not cached."""
        descriptor = self._open_cached(shard)
        if descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._shard_locked(shard.sha256):
                descriptor = self._open_cached(shard)  # another process may have fetched it meanwhile
                if descriptor is None:
                    descriptor = self._fetch(url, shard)
        return descriptor

    def remove(self, descriptor: int, shard: ShardInfo) -> None:
        """Remove an open shard, unless another process has already replaced it."""
        with self._locked(), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), self._path_of(shard).stat()):
                self._path_of(shard).unlink()

    def _path_of(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _open_cached(self, shard: ShardInfo) -> int | None:
        try:
            descriptor = os.open(self._path_of(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        os.utime(descriptor)  # the time of last use, by which shards are evicted
        return descriptor

    def _fetch(self, url: str, shard: ShardInfo) -> int:
        """Download a shard whose lock this process holds; return a descriptor of it."""
        path = self.folder / f".{shard.sha256}.partial"
        try:
            with path.open("w+b") as stream:
                while not self._reserve(stream, path, shard.bytes):
                    time.sleep(_POLL)
                _download(url, stream, shard)
                os.fsync(stream.fileno())
            descriptor = os.open(path, os.O_RDONLY)
            with self._locked():
                path.rename(self._path_of(shard))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return descriptor

    def _reserve(self, stream: BinaryIO, own: Path, size: int) -> bool:
        """Extend the partial file `own` to `size` bytes; return False while other downloads leave too little space."""
        assert size <= self.max_bytes, "check_cache compares them before training"
        with self._locked():
            others = [path for path in self.folder.glob(".*.partial") if path != own]
            for path in others:
                with suppress(Timeout), self._shard_locked(path.stem[1:], blocking=False):
                    path.unlink(missing_ok=True)  # its process has died, as its lock was free
            free = self.max_bytes - sum(map(_size, others))
            if free < size:
                return False
            shards = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob("*.tar"))
            free -= sum(_size(path) for _, path in shards)
            for _, path in shards:
                if free >= size:
                    break
                free += _size(path)
                path.unlink(missing_ok=True)
            stream.truncate(size)
            return True

    def _locked(self, name: str = ".lock", *, blocking: bool = True) -> FileLock:
        """Return a lock of the operating system, never one that a dead process could leave behind."""
        return FileLock(self.folder / name, blocking=blocking, fallback_to_soft=False)

    @contextmanager
    def _shard_locked(self, sha256: str, *, blocking: bool = True) -> Iterator[None]:
        name = f".{sha256}.lock"
        with self._locked(name, blocking=blocking):
            try:
                yield
            finally:
                (self.folder / name).unlink(missing_ok=True)  # waiting processes notice, and lock a new file


def _sha256(descriptor: int) -> str:
    """Return the sha256 of an open file. Reads use explicit offsets, as forked processes share the file position."""
    sha256, start = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, start):
        sha256.update(block)
        start += len(block)
    return sha256.hexdigest()


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it no longer exists."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _download(url: str, stream: BinaryIO, shard: ShardInfo) -> None:
    for _ in range(_DOWNLOADS):
        size, sha256 = _retry(url, partial(_copy, url, stream, shard.bytes))
        if (size, sha256) == (shard.bytes, shard.sha256):
            return
    found = "more" if size > shard.bytes else f"{size} bytes, sha256 {sha256}"
    raise InputError(f"{url} must be {shard.bytes} bytes, sha256 {shard.sha256}, as its index says, got {found}")


def _copy(url: str, stream: BinaryIO, limit: int) -> tuple[int, str]:
    """Copy a file to `stream`; return its size and sha256. Stops after one byte more than `limit`."""
    sha256, size = hashlib.sha256(), 0
    stream.seek(0)
    with _open_url(url) as source:
        while size <= limit and (block := source.read(min(_BLOCK, limit + 1 - size))):
            size += len(block)
            sha256.update(block)
            stream.write(block[: len(block) - max(size - limit, 0)])
    stream.flush()
    return size, sha256.hexdigest()


def _read(url: str) -> bytes:
    with _open_url(url) as source:
        return source.read()


def _open_url(url: str) -> BinaryIO:
    """Open a URL for reading. The file system is looked up each time, as one must not be used after a fork."""
    from fsspec.core import url_to_fs  # of no use to a local folder

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


def _retry(url: str, action: Callable[[], _T]) -> _T:
    """Return the action's result, with retries after temporary faults; raise FetchError for the last fault."""
    waits = iter(_WAITS)
    while True:
        try:
            return action()
        except ImportError as error:
            raise InputError(f"{url} needs a package that is missing ({error}); install it") from error
        except _transport_errors() as error:
            wait = None if isinstance(error, _PERMANENT) else next(waits, None)
            if wait is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise FetchError(
                    f"{url} must be fetched, and cannot be ({reason:.300}); "
                    "check the URL, the network, the credentials and the disk of data.cache"
                ) from error
            time.sleep(wait)


def _transport_errors() -> tuple[type[BaseException], ...]:
    """Return the errors that a file system may raise; a package that raises its own has been imported by then."""
    loaded = [(sys.modules[name], names) for name, names in _CLIENT_ERRORS.items() if name in sys.modules]
    return (OSError, *(getattr(module, name) for module, names in loaded for name in names))
