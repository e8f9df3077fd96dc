"""Data folders at a URL: their shards are fetched whole, on first use, into a local cache of bounded size.

A cached shard is `SHA256.tar`: shards alike are shared, and one that was replaced is never taken for what it was.
Ranks, loader processes and runs share a cache. A shard is fetched into `.SHA256.partial`, under a lock on that very
file, which ends with its process whatever ends that, and gets its name once size and sha256 are those of the index.
Room is made under the lock of `.lock`: first what crashes left behind goes, then the shards that were opened longest
ago. Who has one of them open reads on.

A shard that cannot be fetched (network, credentials, a full disk) is nobody's damaged data, and the cache of another
machine may hold it: that is a FetchError, which stops a run and is never quarantined. A shard that was fetched twice
and is not the one of the index is damaged: an InputError for each of its packs, like any pack that cannot be read.
One that was whole when it was fetched and has rotted in the cache is fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from transfusion_fast.data.shards import ShardInfo
from transfusion_fast.errors import InputError

PROTOCOLS = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
_BLOCK = 16 << 20
_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_SILENCE = 60.0  # seconds, after which a server's connection is taken for lost
_POLL = 0.2  # seconds
_FETCHES = 2  # of a shard that comes damaged
_LOST = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # which no waiting mends
_CLIENT_ERRORS = {  # of the file systems' own packages, beside OSError
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "httpx": ("HTTPError",),
}
_T = TypeVar("_T")


class FetchError(InputError):
    """What lies at a URL could not be fetched: no fault of the data."""


def is_url(path: str) -> bool:
    """Whether it names no local folder."""
    return "://" in path or path.startswith("pipe:")


def data_folder(path: str, cache: ShardCache) -> DataFolder:
    """The folder at a path or URL; InputError for a URL that is not supported."""
    if not is_url(path):
        return Path(path)
    protocol = path.partition(":")[0]
    if "::" in path or protocol not in PROTOCOLS:
        raise InputError(
            f"URL of a data folder must be of one of the protocols {', '.join(PROTOCOLS)}, without ::, got {path!r}; "
            "give another, or a local folder"
        )
    if protocol in ("http", "https") and ("?" in path or "#" in path):
        raise InputError(
            f"web address of a data folder must have no ? and no #, got {path!r}: names of files are put behind it; "
            "give the folder's own URL"
        )
    if protocol in ("http", "https") and not _has_host(path):
        raise InputError(f"URL of a data folder must name a host, and a port that can be, got {path!r}; mend it")
    return RemoteFolder(path.rstrip("/"), cache)


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@dataclass(frozen=True)
class RemoteFolder:
    """A data folder at a URL, and where its shards are kept."""

    url: str
    cache: ShardCache
    damaged: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """What is wrong with shards that were fetched, by sha256: they are not fetched again for every pack."""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """All of a small file; FetchError where that fails."""
        return _retrying(self / name, partial(_read, self / name))

    def open_shard(self, shard: ShardInfo) -> int:
        """A descriptor of the whole shard, which the caller closes.

        Raises:
            FetchError: it could not be fetched, or not be kept.
            InputError: it is not the one of the index.
        """
        if shard.sha256 in self.damaged:
            raise InputError(self.damaged[shard.sha256])
        try:
            return self.cache.open_shard(self / shard.file, shard)
        except OSError as error:
            raise FetchError(
                f"data.cache must be a folder to keep shards in, got {str(self.cache.folder)!r} ({error}); give another"
            ) from error
        except FetchError:
            raise
        except InputError as error:
            self.damaged[shard.sha256] = str(error)
            raise


DataFolder = Path | RemoteFolder


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards of at most `max_bytes` in all, shared by any number of processes."""

    folder: Path
    max_bytes: int

    def open_shard(self, url: str, shard: ShardInfo) -> int:
        """A descriptor of the shard, fetched from `url` if it is not here."""
        while True:
            descriptor = self._open(shard)
            if descriptor is None:
                descriptor = self._fetch(url, shard)
            if descriptor is not None:
                return descriptor

    def remove_if_rotten(self, descriptor: int, shard: ShardInfo) -> bool:
        """Whether a shard that is open is no longer what was fetched: then it is removed, to be fetched again."""
        with suppress(OSError):  # of a disk that is failing
            if _sha256(descriptor) == shard.sha256:
                return False
        self._remove(descriptor, shard)
        return True

    def _remove(self, descriptor: int, shard: ShardInfo) -> None:
        """Removes a shard that is open from the cache, unless another process has put a new one there."""
        with self._locked():
            if _is_named(descriptor, self._path(shard)):
                self._path(shard).unlink()

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _open(self, shard: ShardInfo) -> int | None:
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.bytes:
            self._remove(descriptor, shard)
            os.close(descriptor)
            return None
        os.utime(descriptor)  # when it was last opened, for `_reserve`
        return descriptor

    def _fetch(self, url: str, shard: ShardInfo) -> int | None:
        """A descriptor of the shard once it is fetched; None where another process was at it: look again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{shard.sha256}.partial"
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_named(stream.fileno(), path):
                return None
            if self._path(shard).exists():
                path.unlink()
                return None
            stream.truncate(0)  # of a fetch that was killed, whose size would count as another's
            try:
                while not self._reserve(stream, shard.bytes):
                    time.sleep(_POLL)
                _download(url, stream, shard)
                os.fsync(stream.fileno())
                descriptor = os.open(path, os.O_RDONLY)
                with self._locked():
                    path.rename(self._path(shard))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return descriptor

    def _reserve(self, stream: BinaryIO, size: int) -> bool:
        """Takes `size` bytes of the cache; False while what others are fetching leaves too few."""
        assert size <= self.max_bytes, "check_cache has seen to it"
        with self._locked():
            partials = list(self.folder.glob(".*.partial"))
            for path in partials:
                _remove_if_stale(path)
            room = self.max_bytes - sum(map(_size, partials))
            if room < size:
                return False
            shards = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob("*.tar"))
            room -= sum(_size(path) for _, path in shards)
            for _, path in shards:
                if room >= size:
                    break
                room += _size(path)
                path.unlink(missing_ok=True)
            stream.truncate(size)
            return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sha256(descriptor: int) -> str:
    """Of an open file, from its beginning; read at explicit offsets, as a forked process may have it open too."""
    sha256, start = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, start):
        sha256.update(block)
        start += len(block)
    return sha256.hexdigest()


def _size(path: Path) -> int:
    """0 for a file that went away."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove_if_stale(path: Path) -> None:
    """Removes what a fetch left that never ended; one under way has its process's lock."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(stream.fileno(), path):
            path.unlink()


def _download(url: str, stream: BinaryIO, shard: ShardInfo) -> None:
    for _ in range(_FETCHES):
        size, sha256 = _retrying(url, partial(_copy, url, stream, shard.bytes))
        if (size, sha256) == (shard.bytes, shard.sha256):
            return
    more = "more" if size > shard.bytes else f"{size} bytes, sha256 {sha256}"
    raise InputError(f"{url} must be {shard.bytes} bytes, sha256 {shard.sha256}, as its index says, got {more}")


def _copy(url: str, stream: BinaryIO, most: int) -> tuple[int, str]:
    """Size and sha256 of what is at the URL; no more is read and kept than shows that it is above `most` bytes."""
    sha256, size = hashlib.sha256(), 0
    stream.seek(0)
    stream.truncate(most)  # an attempt before may have left more
    with _open_url(url) as source:
        while size <= most and (block := source.read(min(_BLOCK, most + 1 - size))):
            size += len(block)
            sha256.update(block)
            stream.write(block)
    stream.flush()
    return size, sha256.hexdigest()


def _read(url: str) -> bytes:
    with _open_url(url) as source:
        return source.read()


def _open_url(url: str) -> BinaryIO:
    """A file system is asked for each time, as those of other processes must not be used after a fork."""
    from fsspec.core import url_to_fs  # of no use to a local folder

    if url.partition(":")[0] in ("http", "https"):
        return _open_http(url)
    filesystem, path = url_to_fs(url)
    return filesystem.open(path, "rb")


def _open_http(url: str) -> BinaryIO:
    """In one request, front to back, as a server need not know of ranges."""
    import aiohttp
    from fsspec.core import url_to_fs

    # By default a whole answer must come within minutes, however large it is.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    filesystem, path = url_to_fs(url, client_kwargs={"timeout": timeout})
    # It has no use for a size, but without one asks for it, and takes whatever goes wrong there for a missing file.
    return filesystem.open(path, "rb", block_size=0, size=1)


def _retrying(url: str, action: Callable[[], _T]) -> _T:
    """What the action returns, tried again after a fault that may pass; FetchError of the last one."""
    waits = iter(_WAITS)
    while True:
        try:
            return action()
        except ImportError as error:
            raise InputError(f"{url} needs a package that is missing ({error}); install it") from error
        except _faults() as error:
            wait = None if isinstance(error, _LOST) else next(waits, None)
            if wait is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise FetchError(
                    f"{url} must be fetched, and cannot be ({reason:.300}); "
                    "check the URL, the network, the credentials and the disk of data.cache"
                ) from error
            time.sleep(wait)


def _faults() -> tuple[type[BaseException], ...]:
    """What file systems raise: those of other packages are there where a file system has imported them."""
    found = [(sys.modules[name], names) for name, names in _CLIENT_ERRORS.items() if name in sys.modules]
    return (OSError, *(getattr(module, name) for module, names in found for name in names))
