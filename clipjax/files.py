"""Files that appear whole or not at all, however their writing ends; and paths that may lie on gs:// or s3://.

A path is pathlib's where it is local, and etils' with the same methods where it is not. Only `place` makes one of a text:
pathlib.Path("s3://bucket/run") is the local folder s3:/bucket/run, and etils' own resolve() and absolute() answer alike.
"""

import contextlib
import importlib.util
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipjax.config import ConfigError

STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> the module that reads it, and clipjax's extra that brings it
CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; another store than Amazon's: AWS_ENDPOINT_URL",
}
PATIENCE = 20  # seconds that a store has for its first answer


def scheme(path: str | os.PathLike) -> str | None:
    """`gs` or `s3`; None for a local path. Raises ConfigError for a store that clipjax does not know."""
    name, found, _ = os.fspath(path).partition("://")
    if not found or not name.isalnum():
        return None
    if name not in STORES:
        raise ConfigError(f"{os.fspath(path)}: is neither local nor on gs:// or s3://")
    return name


def place(text: str | os.PathLike) -> Path:
    """The path of a text, to be used as pathlib's. Raises ConfigError where the store's extra is not installed."""
    kind = scheme(text)
    if kind is None:
        return Path(text)
    module, extra = STORES[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{os.fspath(text)}: {kind}:// needs {module}, which is not installed: pip install 'clipjax[{extra}]'")
    import fsspec.config
    from etils import epath

    # TensorStore writes past fsspec, whose remembered listings would not show what it wrote.
    fsspec.config.conf.setdefault(kind, {})["use_listings_cache"] = False
    return epath.Path(text)


def resolve(path: Path) -> Path:
    """`path.resolve()`, which etils gets wrong for a remote one: that is absolute as it is."""
    return path.resolve() if scheme(path) is None else path


def reach(path: Path, ask: Callable[[], Any]) -> Any:
    """What `ask` finds out about `path`. Where a store refuses, or does not answer: a ConfigError that says what to look at."""
    kind = scheme(path)
    if kind is None:
        return ask()
    answer: list[Any] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # each store's libraries have their own
            failure.append(error)

    asking = threading.Thread(target=run, daemon=True)  # the libraries try again for minutes; nobody waits for that
    asking.start()
    asking.join(PATIENCE)
    if answer:
        return answer[0]
    why = f"{type(failure[0]).__name__}: {failure[0]}" if failure else f"no answer within {PATIENCE} s"
    remedy = f"does the bucket exist, and may you use it? Credentials: {CREDENTIALS[kind]}"
    raise ConfigError(f"{path}: can't be reached ({why}); {remedy}") from (failure[0] if failure else None)


def check_writable(folder: Path) -> None:
    """Writes an object to a remote folder and takes it away again. Raises ConfigError where that can't be done."""

    def attempt() -> bool:
        probe = os.fspath(folder / f".clipjax-{os.uname().nodename}-{os.getpid()}")
        _store(folder).pipe_file(probe, b"clipjax")
        _store(folder).rm_file(probe)
        return True

    reach(folder, attempt)


@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A local path: what is written there takes the place of `path` in the end, in a folder that is made if need be.

    Beside `path`; for a remote one in a temporary folder, from which it is uploaded, which replaces an object at once.
    """
    path = place(path)
    if scheme(path):
        with tempfile.TemporaryDirectory(prefix="clipjax-") as folder:
            part = Path(folder) / path.name
            yield part
            _store(path).put_file(str(part), os.fspath(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Mirror:
    """A local folder, for files that grow, of which a remote one is to have copies: object stores can't append.

    `push` returns when the copies are there. `pulse` starts a push in the background, now and then.
    """

    EVERY = 30.0  # seconds between two pushes in the background: what a killed process loses at most

    def __init__(self, remote: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="clipjax-")
        self.local = Path(self._folder.name)
        self._remote = remote
        self._sent: dict[Path, tuple[int, int]] = {}  # file -> size and time of what was sent
        self._last = time.monotonic()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def fetch(self, name: str) -> None:
        """Copies a remote file here, if there is one."""
        if (self._remote / name).exists():
            (self.local / name).write_bytes((self._remote / name).read_bytes())

    def push(self) -> None:
        """Uploads every file that changed, whole."""
        with self._lock:
            self._last = time.monotonic()
            for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
                stat = file.stat()
                if self._sent.get(file) != (stat.st_size, stat.st_mtime_ns):
                    content = file.read_bytes()  # one moment's: others may be writing
                    _store(self._remote).pipe_file(os.fspath(self._remote / file.relative_to(self.local).as_posix()), content)
                    self._sent[file] = (stat.st_size, stat.st_mtime_ns)

    def pulse(self) -> None:
        """Pushes in the background if the last time is long ago. A failure is a warning: the next push sends it all again."""
        if time.monotonic() - self._last < self.EVERY or (self._worker and self._worker.is_alive()):
            return

        def attempt() -> None:
            try:
                self.push()
            except Exception as error:
                logging.getLogger(__name__).warning("%s: not uploaded, will be tried again: %s", self._remote, error)

        self._worker = threading.Thread(target=attempt, daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Pushes for the last time."""
        try:
            self.push()
        finally:
            self._folder.cleanup()


def _store(path: Path) -> Any:
    """fsspec's file system of a remote path."""
    import fsspec

    return fsspec.filesystem(scheme(path))
