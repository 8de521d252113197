"""Atomic writes: a file appears complete or not at all. And paths that are local or on gs:// or s3://.

A local path is pathlib's. A remote path is etils', which has the same methods. Only `as_path` makes one from a string:
pathlib.Path("s3://bucket/run") would be the local folder s3:/bucket/run, and etils' own resolve() and absolute() give that too.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from clipjax.config.fields import ConfigError

STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> its module, and clipjax's extra that installs it
CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; another store than Amazon's: AWS_ENDPOINT_URL",
}
TIMEOUT = 20  # seconds to wait for the first answer of a store


def scheme(path: str | os.PathLike) -> str | None:
    """`gs` or `s3`; None for a local path. Raises ConfigError for a store that clipjax does not know."""
    name, found, _ = os.fspath(path).partition("://")
    if not found or not name.isalnum():
        return None
    if name not in STORES:
        raise ConfigError(f"{os.fspath(path)}: is neither local nor on gs:// or s3://")
    return name


def as_path(text: str | os.PathLike) -> Path:
    """The path that a string names, to be used like pathlib's. Raises ConfigError if the store's extra is not installed."""
    kind = scheme(text)
    if kind is None:
        return Path(text)
    module, extra = STORES[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{os.fspath(text)}: {kind}:// needs {module}, which is not installed: pip install 'clipjax[{extra}]'")
    import fsspec.config
    from etils import epath

    # TensorStore does not write through fsspec: fsspec's cache of listings would not show the new files.
    fsspec.config.conf.setdefault(kind, {})["use_listings_cache"] = False
    return cast(Path, epath.Path(text))  # another class with the same methods


def local_path(name: str, text: str) -> Path:
    """The path of a file or folder that must be on this machine, else ConfigError. `name`: what the user calls it."""
    if re.match(r"\w+://", text):
        raise ConfigError(f"{name} = {text!r}: must be on this machine: copy it, or mount the bucket and name the path there")
    return Path(text)


def resolve(path: Path) -> Path:
    """`path.resolve()` of a local path. A remote one is absolute already, and etils' resolve() would break it."""
    return path.resolve() if scheme(path) is None else path


def reach(path: Path, ask: Callable[[], Any]) -> Any:
    """Returns `ask()`, a question about `path`. Raises ConfigError, with what to check, if the store refuses, and OSError if it
    can't be reached now, so that launchers try again."""
    kind = scheme(path)
    if kind is None:
        return ask()
    answer: list[Any] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # each store's library has its own exceptions
            failure.append(error)

    asking = threading.Thread(target=run, daemon=True)  # the libraries retry for minutes, which is too long to wait
    asking.start()
    asking.join(TIMEOUT)
    if answer:
        return answer[0]
    why = f"{type(failure[0]).__name__}: {failure[0]}" if failure else f"no answer within {TIMEOUT} s"
    remedy = f"does the bucket exist, and may you use it? Credentials: {CREDENTIALS[kind]}"
    kind_of_error = OSError if _may_pass(failure) else ConfigError
    raise kind_of_error(f"{path}: can't be reached ({why}); {remedy}") from (failure[0] if failure else None)


def _may_pass(failure: list[Exception]) -> bool:
    """Whether a store may answer in a while: it was silent, or there was no way to it. gcsfs calls a refusal OSError, too."""
    if not failure or "Connect" in type(failure[0]).__name__:
        return True
    refused = isinstance(failure[0], FileNotFoundError | PermissionError) or str(failure[0]).startswith("Forbidden")
    return isinstance(failure[0], OSError) and not refused


def check_writable(folder: Path) -> None:
    """Writes an object to a remote folder and deletes it. Raises as `reach` does."""

    def attempt() -> bool:
        probe = os.fspath(folder / f".clipjax-{os.uname().nodename}-{os.getpid()}")
        store(folder).pipe_file(probe, b"clipjax")
        store(folder).rm_file(probe)
        return True

    reach(folder, attempt)


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary local path to write to. At the end that file replaces `path` in one step; after an error it is deleted.

    Makes the folder of `path` if needed. The temporary file is beside `path`. For a remote path it is in a temporary folder,
    and is uploaded at the end; a store replaces an object in one step.
    """
    path = as_path(path)
    if scheme(path):
        with tempfile.TemporaryDirectory(prefix="clipjax-") as folder:
            part = Path(folder) / path.name
            yield part
            store(path).put_file(str(part), os.fspath(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def strict(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have; of a dict, its values."""
    if isinstance(value, Mapping):
        return {key: strict(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    with write_atomic(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Mirror:
    """A local folder for files that grow, copied to a remote folder: object stores can't append.

    `push` uploads and waits until the copies are complete. `push_if_due` starts a push in the background every 30 s at most.
    """

    EVERY = 30.0  # seconds between two pushes in the background: a killed process loses this much at most

    def __init__(self, remote: Path, check: Callable[[], None] = lambda: None) -> None:
        """`check`: called before each push; raises where nothing may be written."""
        self._folder = tempfile.TemporaryDirectory(prefix="clipjax-")
        self.local = Path(self._folder.name)
        self._remote, self._check = remote, check
        self._sent: dict[Path, tuple[int, int]] = {}  # file -> size and modification time of the uploaded version
        self._last = time.monotonic()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def fetch(self, name: str) -> None:
        """Copies a remote file to the local folder, if it exists."""
        if (self._remote / name).exists():
            (self.local / name).write_bytes((self._remote / name).read_bytes())

    def push(self) -> None:
        """Uploads every file that has changed, in full."""
        with self._lock:
            self._last = time.monotonic()
            self._check()
            for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
                stat = file.stat()
                if self._sent.get(file) != (stat.st_size, stat.st_mtime_ns):
                    content = file.read_bytes()  # a snapshot: other threads may be writing
                    store(self._remote).pipe_file(os.fspath(self._remote / file.relative_to(self.local).as_posix()), content)
                    self._sent[file] = (stat.st_size, stat.st_mtime_ns)

    def push_if_due(self) -> None:
        """Pushes in the background if the last push is EVERY seconds old. A failure is only logged: the next push retries."""
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


def store(path: Path) -> Any:
    """fsspec's file system of a remote path."""
    import fsspec

    return fsspec.filesystem(scheme(path))
