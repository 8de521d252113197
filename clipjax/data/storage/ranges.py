"""Ranges of files wherever they lie: on this machine, gs://, s3://, https:// or hf://. Read with retries, by any thread."""

import asyncio
import importlib.util
import io
import os
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from clipjax.config import ConfigError
from clipjax.files import STORES

SCHEMES = STORES | {  # scheme -> the module that reads it, and clipjax's extra that installs it
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "hf": ("huggingface_hub", "hf"),
}
DELAYS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # seconds before each further try: a store may be away for most of a minute
PATIENCE = 30.0  # seconds for the first byte of a read; longer for one of many bytes
SLOWEST = 500_000  # bytes a second; a slower answer is asked for again
T = TypeVar("T")

_systems: dict[str, Any] = {}  # by scheme
_lock = threading.Lock()


class Stored(NamedTuple):
    """A file that was found."""

    url: str  # a path of this machine, or a URL
    size: int  # bytes
    tag: str  # names this version of its content: the store's ETag, or the time of modification in ns


def scheme_of(url: str) -> str | None:
    """`gs`, `s3`, `http`, `https` or `hf`; None for a path of this machine. Raises ConfigError for another."""
    kind, found, _ = url.partition("://")
    if not found or not kind.isalnum():
        return None
    if kind not in SCHEMES:
        raise ConfigError(f"{url}: is neither on this machine nor on gs://, s3://, https:// or hf://")
    return kind


def read(url: str, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes of a file from byte `start` on; to its end without a length. Thread-safe.

    A read that fails or ends too early is tried again, for about a minute. Raises FileNotFoundError, PermissionError or another
    OSError that names the file."""
    if length == 0:
        return b""
    kind = scheme_of(url)
    if kind is None:
        return _read_local(url, start, length)
    end = None if length is None else start + length

    def ask() -> bytes:
        content = _cat(kind, url, start, end)
        if length is not None and len(content) != length:
            raise OSError(f"{len(content):,} bytes came instead of {length:,} from byte {start:,} on")
        return content

    return attempt(url, ask)


def open_file(stored: Stored, least: int = 1 << 20) -> BinaryIO:
    """A file to seek and read in, as libraries want it. A remote one fetches with `read`, `least` bytes or more; 0: those that
    are wanted."""
    if scheme_of(stored.url) is None:
        return open(stored.url, "rb")
    ranges = _Ranges(stored)
    return io.BufferedReader(ranges, least) if least else cast(BinaryIO, ranges)


def system(kind: str) -> Any:
    """fsspec's file system of a scheme, one for all threads of this process. fsspec's own cache has one for each thread, and
    would let go of its connections with the thread."""
    with _lock:
        if kind not in _systems:
            _systems[kind] = _new_system(kind)
        return _systems[kind]


def forget() -> None:
    """Makes new file systems from now on: where the stores' addresses have changed, and in a forked child, in which their event
    loop does not run and another thread may seem to hold the lock."""
    global _lock
    _lock = threading.Lock()
    _systems.clear()


os.register_at_fork(after_in_child=forget)


def _new_system(kind: str) -> Any:
    module, extra = SCHEMES[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{kind}:// needs {module}, which is not installed: pip install 'clipjax[{extra}]'")
    import fsspec

    if kind in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
        # Bytes as they are stored, and the proxies that the environment names.
        client = dict(timeout=timeout, trust_env=True, headers={"Accept-Encoding": "identity"})
        return fsspec.filesystem(kind, skip_instance_cache=True, client_kwargs=client)
    # hf:// keeps listings: it would ask the hub about a file before each read.
    return fsspec.filesystem(kind, skip_instance_cache=True, use_listings_cache=kind == "hf")


def _cat(kind: str, url: str, start: int, end: int | None) -> bytes:
    import fsspec.asyn

    fs = system(kind)
    path = url if kind in ("http", "https") else fs._strip_protocol(url)
    if not fs.async_impl:
        return fs.cat_file(path, start, end, cache_type="none")
    # A whole web file is asked for without a range.
    limits = dict(start=start, end=end) if start or end is not None else {}
    seconds = PATIENCE + (0 if end is None else (end - start) / SLOWEST)

    async def bounded() -> bytes:
        return await asyncio.wait_for(fs._cat_file(path, **limits), seconds if end is not None else None)

    return cast(bytes, fsspec.asyn.sync(fs.loop, bounded))


def attempt(url: str, ask: Callable[[], T]) -> T:
    """`ask()`, again after failures that may pass. The last failure is raised as an OSError that names the file."""
    for delay in (*DELAYS, None):
        try:
            return ask()
        except Exception as error:  # each store's library has its own exceptions
            if isinstance(error, ConfigError):
                raise
            certain = _is_certain(error)
            if certain or delay is None:
                raise _kind(error, certain)(f"{url}: {type(error).__name__}: {error}") from error
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")


def _kind(error: Exception, certain: bool) -> type[OSError]:
    """The OSError that stands for an error of a store's library."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError
    if isinstance(error, IsADirectoryError):
        return IsADirectoryError
    refused = isinstance(error, PermissionError) or (certain and status in (None, 401, 403))
    return PermissionError if refused else OSError


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells."""
    answer = getattr(error, "response", None)
    found = str(getattr(error, "status", None) or getattr(error, "code", None) or getattr(answer, "status_code", None))
    return int(found) if found.isdecimal() else None


def _is_certain(error: BaseException) -> bool:
    """Whether the same question would fail again: what is asked for is absent or forbidden."""
    if (status := _status(error)) is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    refused = str(error).startswith("Forbidden") or "Credentials" in type(error).__name__  # gcsfs; botocore
    return refused or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


def _read_local(path: str, start: int, length: int | None) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        wanted = max(os.fstat(file).st_size - start, 0) if length is None else length
        content = os.pread(file, wanted, start)
        while len(content) < wanted:  # a read gives at most 2 GiB
            more = os.pread(file, wanted - len(content), start + len(content))
            if not more:
                raise OSError(f"{path}: ends at byte {os.fstat(file).st_size:,}, before byte {start + wanted:,}")
            content += more
        return content
    finally:
        os.close(file)


class _Ranges(io.RawIOBase):
    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self._stored, self._at = stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stored.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._stored.size - self._at), 0)
        buffer[:length] = read(self._stored.url, self._at, length)
        self._at += length
        return length
