"""What a source of images and captions is: examples by number, one at a time or in chunks, with or without their images."""

import logging
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.data.bar import bar

CHUNK = 128  # examples of a chunk, where the storage has no larger unit of its own

logged = 5  # warnings of each kind that a process logs
log = logging.getLogger(__name__)
_warning = threading.Lock()  # not of the source, which can be pickled


@dataclass(frozen=True)
class Record:
    """An example as stored, its image not yet decoded."""

    image: bytes | Path  # empty: it has none, or it was not asked for
    captions: tuple[str, ...]  # the first is the main one
    key: str
    label: int = -1  # index of its class name; -1: none
    chances: tuple[float, ...] | None = None  # with which each caption is chosen; None: all alike
    number: float | None = None  # the value of data.filter.number, where that is asked for and there
    labels: tuple[int, ...] = ()  # of a source that is `multilabel`: the indices of all its classes
    group: int | None = None  # what metrics of the worst group divide examples by, as a region; None: nothing


@dataclass(frozen=True)
class Fetched:
    """A chunk in memory."""

    content: Any  # what the source's `record_in` reads
    nbytes: int


class Source(ABC):
    """Examples by number. A source can be pickled, and read by several threads at once.

    Storage that is read best in large pieces has chunks: runs of consecutive examples, each fetched with one read."""

    name: str  # SPEC/SPLIT, or the SPEC alone where there are no splits
    classnames: tuple[str, ...] | None = None  # by label
    templates: tuple[str, ...] | None = None  # of prompts, with {c} for a class name, that come with the dataset
    multilabel: bool = False  # an example may be of several classes: `Record.labels`, and no `Record.label`
    fields: dict[str, str]  # every field that is stored, and its kind
    version: str = ""  # names what is stored now, as far as the storage knows: part of the fingerprint
    captioned: bool = True  # False: images alone
    sources: tuple["Source", ...] = ()  # of a mixture: those that it mixes

    def __init__(self) -> None:
        self._warned: dict[str, set[str]] = {}  # kind -> keys of the examples that were logged

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _record(self, i: int) -> Record: ...

    def read(self, i: int) -> Record:
        """Example i, its image not decoded. May raise anything."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._record(i)

    def record(self, i: int) -> Record:
        """Example i, its image not decoded. If it can't be read, that is logged, and it has no caption and an empty image."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.guarded(lambda: self._record(i), f"number {i}")

    def text(self, i: int) -> Record:
        """Example i without its image: what the storage reads fastest."""
        return replace(self.record(i), image=b"")

    def texts(self) -> Iterator[Record]:
        """Every example without its image, in order."""
        return map(self.text, range(len(self)))

    def captions(self, texts: Iterable[Record] | None = None) -> Iterator[str]:
        """All captions: what a tokenizer is trained on. `texts`: the result of `self.texts()`, if somebody watches it."""
        return (caption for record in (self.texts() if texts is None else texts) for caption in record.captions)

    def part_of(self, i: int) -> tuple[int, int]:
        """Which part of a mixture example i is of, and its number there."""
        return 0, i

    def buckets(self) -> np.ndarray:
        """uint8 [n]: crc32 of each example's key in UTF-8, mod 100. Splits as `train#0-95` are ranges of it."""
        buckets = np.empty(len(self), np.uint8)
        with bar(self.name, len(self), "keys") as shown:
            for i, record in enumerate(self.texts()):
                buckets[i] = bucket(record.key)
                shown.update()
        return buckets

    def chunks(self) -> np.ndarray:
        """int64 [c]: how many examples each chunk has. Together they are all examples, in order."""
        starts = np.arange(0, len(self), CHUNK)
        return np.minimum(len(self) - starts, CHUNK)

    def fetch(self, chunk: int) -> Fetched:
        """Reads a chunk. May raise anything."""
        return Fetched(chunk * CHUNK, 0)

    def record_in(self, fetched: Fetched, chunk: int, j: int) -> Record:
        """Example j of a fetched chunk, counted from 0. May raise anything."""
        return self._record(fetched.content + j)

    def guarded(self, make: Callable[[], Record], key: str) -> Record:
        """The record that is made, or `unreadable`: what reads an example may raise anything."""
        try:
            return make()
        except Exception as error:
            return self.unreadable(error, key)

    def unreadable(self, error: Exception, key: str) -> Record:
        """What stands for an example that can't be read: nothing but its key. The error is logged."""
        self.warn(key, f"can't be read: {type(error).__name__}: {error}")
        return Record(b"", (), key)

    def warn(self, key: str, what: str) -> None:
        """Logs what is wrong with an example, as `can't be read: REASON`: of a kind, which is all before the colon, the first
        `logged` examples."""
        kind = what.partition(": ")[0]
        with _warning:
            keys = self._warned.setdefault(kind, set())
            if key in keys or len(keys) > logged:
                return
            keys.add(key)
            is_last = len(keys) > logged
        log.warning("%s: %s", self.name, f"further examples are only counted: {kind}" if is_last else f"example {key} {what}")


def share_warnings(processes: int) -> None:
    """This process is one of so many that read: it logs its share of the warnings."""
    global logged
    logged = max(1, logged // processes)


def bucket(key: str) -> int:
    """crc32 of a key mod 100."""
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % 100
