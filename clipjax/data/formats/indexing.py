"""Making the index of a set of tars. Any number of processes and hosts that share its folder share the work, and one that was
interrupted goes on: each shard has a part of its own, which appears whole. A part is claimed by a file beside it. What is claimed
and never comes is made by another: work that is done twice does no harm.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clipjax.config import ConfigError
from clipjax.data import bar
from clipjax.data.formats import index
from clipjax.data.formats.spans import Scanned, scan
from clipjax.data.formats.tar import TarError
from clipjax.data.storage.ranges import Stored, scheme_of
from clipjax.files import as_path, check_writable, store, write_atomic
from clipjax.process import birth

AT_ONCE = 8  # shards that a process reads at once
READ_AT_ONCE = 32  # parts that are read at once when they are joined
PATIENCE = 60.0  # seconds without a new part, after which what others claimed is made here
POLL = 0.5  # seconds between two looks at what others have made
SHOWN = 5  # broken shards that a message lists


def index_command(spec: str, out: str | None) -> str:
    """`clipjax data index`: makes the index of `wds:...` unless it is there, and says in words what it holds."""
    kind, _, patterns = spec.partition(":")
    if kind != "wds":
        raise ConfigError(f"SPEC = {spec!r}: only tars need an index; give wds:SHARDS")
    place = out or writable_place(patterns)
    shards, root = index.shards_of(patterns), index.shard_folder(patterns)
    build(spec, shards, root, place)
    made = index.open_index(spec, patterns, place)
    found = ", ".join(f"{name} {count:,}" for name, count in made.suffixes.items())
    lost = ", ".join(f"{count:,} {reason}" for reason, count in made.dropped.items())
    lines = [f"{len(made):,} samples in {len(shards):,} shards; suffixes: {found or 'none'}"]
    lines += [f"left out: {lost}"] if lost else []
    usual = place in index.places(patterns, None)
    return "\n".join([*lines, f"index: {place}" + ("" if usual else f" (train with data.index = {place!r})")])


def writable_place(patterns: str) -> str:
    """The folder for a new index: beside the shards if one may write there, else in the user's cache."""
    place = index.beside(patterns)
    if scheme_of(place) is None:
        root = index.shard_folder(patterns) or "."
        return place if os.access(place if os.path.isdir(place) else root, os.W_OK) else index.cache_place(patterns)
    if scheme_of(place) in ("gs", "s3"):
        with contextlib.suppress(ConfigError, OSError):
            check_writable(as_path(place))
            return place
    return index.cache_place(patterns)


def build(spec: str, shards: list[Stored], root: str, place: str) -> None:
    """Makes the index of the shards in a folder, unless it is there.

    Raises ConfigError that names the shards that are no whole tars, once all others are read, and OSError where a store fails."""
    if scheme_of(place) not in (None, "gs", "s3"):
        raise ConfigError(f"{place}: can't be written to; name a folder of this machine, or on gs:// or s3://")
    _Build(spec, shards, root, as_path(place)).run()


class _Build:
    def __init__(self, spec: str, shards: list[Stored], root: str, place: Path) -> None:
        self.spec, self.shards, self.root, self.place = spec, shards, root, place
        self.parts = place / "parts"
        self.names = [index.short_name(shard.url, root) for shard in shards]
        facts = zip(self.names, shards, strict=True)
        self.keys = [hashlib.blake2b(repr((name, s.size, s.tag)).encode(), digest_size=12).hexdigest() for name, s in facts]
        self.lock, self.stopped = threading.Lock(), False

    def run(self) -> None:
        if self._is_complete():
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        self._reuse()
        present = self._present()
        todo = [i for i, key in enumerate(self.keys) if key not in present]
        size = sum(shard.size for shard in self.shards)
        done = size - sum(self.shards[i].size for i in todo)
        with bar.bar(f"index of {self.spec}", size, "B", initial=done) as shown:
            self._make_all(todo, shown)
            self._await_others(shown)
        self._refuse_broken()
        self._join()

    def _is_complete(self) -> bool:
        stored = index.load(str(self.place))
        return stored is not None and not index.difference(stored, self.shards, self.root)

    def _present(self) -> dict[str, str]:
        """The shards, by key, whose parts are there; and the kind of each part: `npz`, or `bad` for a broken shard."""
        with contextlib.suppress(FileNotFoundError):  # another process has joined the parts
            names = [path.name.partition(".") for path in self.parts.iterdir()]
            return {key: kind for key, _, kind in names if key and kind in ("npz", "bad")}
        return {}

    def _reuse(self) -> None:
        """Takes from an older index in this place what it has of shards that have not changed."""
        if (stored := index.load(str(self.place))) is None:
            return
        old = index.opened(str(self.place), stored, [])
        known = dict(zip(zip(self.names, self.shards, strict=True), self.keys, strict=True))
        known = {(name, shard.size, shard.tag): key for (name, shard), key in known.items()}
        for i, row in enumerate(stored["shards"]):
            if key := known.get((row["name"], row["size"], row["tag"])):
                part = slice(int(old.starts[i]), int(old.starts[i + 1]))
                facts = (row["suffixes"], row["dropped"], row["digest"])
                self._write(f"{key}.npz", Scanned(old.spans[part], old.buckets[part], *facts).to_bytes())

    def _make_all(self, todo: list[int], shown: tqdm) -> None:
        """Makes the parts of all shards that nobody has claimed."""

        def take(i: int) -> None:
            if self._claim(self.keys[i]):
                self._make(i, shown)

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for _ in pool.map(take, todo):
                pass
        finally:
            self.stopped = True  # after an error or Ctrl-C
            pool.shutdown(cancel_futures=True)
            self.stopped = False

    def _make(self, i: int, shown: tqdm) -> None:
        def advance(length: int) -> None:
            if self.stopped:
                raise InterruptedError("stopped")
            with self.lock:
                shown.update(length)

        try:
            self._write(f"{self.keys[i]}.npz", scan(self.shards[i], advance).to_bytes())
        except TarError as error:
            self._write(f"{self.keys[i]}.bad", str(error).encode())

    def _claim(self, key: str) -> bool:
        """Whether this process may make a part: nobody else has said that he does, or he has died on this machine."""
        path, ours = self.parts / f"{key}.claim", f"{os.uname().nodename} {os.getpid()}"
        try:
            with contextlib.ExitStack() as stack:
                if scheme_of(str(path)):  # no store is asked to be exclusive: work that is done twice does no harm
                    if path.exists():
                        raise FileExistsError
                    path.write_text(ours)
                else:
                    stack.enter_context(path.open("x")).write(ours)
            return True
        except FileExistsError:
            host, _, process = path.read_text().partition(" ")
            of_this_machine = host == os.uname().nodename and process.isdigit()
            return of_this_machine and (int(process) == os.getpid() or birth(int(process)) is None)

    def _await_others(self, shown: tqdm) -> None:
        """Waits for the parts that others have claimed. Makes those that do not come."""
        since, before = time.monotonic(), -1
        while missing := self._missing():
            if len(missing) != before:
                since, before = time.monotonic(), len(missing)
            elif time.monotonic() - since > PATIENCE:
                self._make(missing[os.getpid() % len(missing)], shown)
                continue
            time.sleep(POLL)

    def _missing(self) -> list[int]:
        present = self._present()
        missing = [i for i, key in enumerate(self.keys) if key not in present]
        return [] if missing and self._is_complete() else missing

    def _refuse_broken(self) -> None:
        broken = [i for i, key in enumerate(self.keys) if self._present().get(key) == "bad"]
        if not broken:
            return
        reasons = [f"{self.shards[i].url} {(self.parts / f'{self.keys[i]}.bad').read_text()}" for i in broken[:SHOWN]]
        reasons += ["..."] if len(broken) > SHOWN else []
        what = f"{len(broken):,} of {len(self.shards):,} shards are no whole tars (the others are indexed)"
        raise ConfigError(f"data.spec = {self.spec!r}: {what}: {'; '.join(reasons)}; or name the shards without them")

    def _join(self) -> None:
        """Makes the index of all parts. Of several processes that come here, one does, and the others wait."""
        since = time.monotonic()
        while not self._is_complete():
            try:
                if self._claim("join") or time.monotonic() - since > PATIENCE:
                    self._write_index()
            except FileNotFoundError:  # another process has finished, and removed the parts
                continue
            time.sleep(0 if self._is_complete() else POLL)

    def _write_index(self) -> None:
        rows, n, spans, buckets = [], 0, self.place / "spans.npy", self.place / "buckets.npy"
        digest = hashlib.blake2b(digest_size=8)
        with write_atomic(spans) as a, write_atomic(buckets) as b, a.open("wb") as spans_file, b.open("wb") as buckets_file:
            for file, header in ((spans_file, _header("<u4", 0, 2)), (buckets_file, _header("|u1", 0))):
                file.write(header)
            for name, shard, part in zip(self.names, self.shards, self._read_parts(), strict=True):
                spans_file.write(part.spans.tobytes())
                buckets_file.write(part.buckets.tobytes())
                digest.update(part.digest.encode())
                facts = dict(samples=len(part.spans), dropped=part.dropped, suffixes=part.suffixes, digest=part.digest)
                rows.append(dict(name=name, size=shard.size, tag=shard.tag) | facts)
                n += len(part.spans)
            for file, header in ((spans_file, _header("<u4", n, 2)), (buckets_file, _header("|u1", n))):
                file.seek(0)
                file.write(header)
            sizes = dict(spans=len(header) + 8 * n, buckets=len(header) + n)
        head = dict(format=index.FORMAT, spec=self.spec, samples=n, digest=digest.hexdigest(), bytes=sizes)
        text = json.dumps(head)[:-1] + ', "shards": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
        with write_atomic(self.place / "index.json") as part:
            part.write_bytes(text.encode())
        if scheme_of(str(self.place)) is None:
            shutil.rmtree(self.parts, ignore_errors=True)
        else:
            store(self.parts).rm(os.fspath(self.parts), recursive=True)

    def _read_parts(self) -> Iterator[Scanned]:
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            for start in range(0, len(self.keys), 4 * READ_AT_ONCE):  # not all at once, which would fill the memory
                some = self.keys[start : start + 4 * READ_AT_ONCE]
                yield from map(Scanned.from_bytes, pool.map(lambda key: (self.parts / f"{key}.npz").read_bytes(), some))

    def _write(self, name: str, content: bytes) -> None:
        with write_atomic(self.parts / name) as part:
            part.write_bytes(content)


def _header(dtype: str, *shape: int) -> bytes:
    """The beginning of an .npy file. Its length does not depend on the number of rows."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr=dtype, fortran_order=False, shape=shape))
    return out.getvalue()
