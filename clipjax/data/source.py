"""What a source of images and captions is: examples by index. Another example replaces one that can't be read."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from clipjax.data.image import decode
from clipjax.status import CertainFailure

TRIES = 64  # other examples tried in place of an unreadable one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """An example as stored, its image not yet decoded."""

    image: bytes | Path  # empty: it has none
    captions: tuple[str, ...]  # the first is the main one
    key: str
    label: int = -1  # index of its class name; -1: none


@dataclass(frozen=True)
class Example:
    image: Image.Image  # RGB
    captions: tuple[str, ...]  # at least one
    key: str
    label: int
    index: int  # the number, in the source, of the example that was read: of a replacement, its own
    replaced: bool  # this example is used in place of one that can't be read


class Source(ABC):
    """Examples by index. A source can be pickled, and read by several threads at once."""

    name: str  # SPEC/SPLIT, or the SPEC alone where there are no splits
    classnames: tuple[str, ...] | None = None  # by label
    fields: dict[str, str]  # every field that is stored, and its kind

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _record(self, i: int) -> Record: ...

    def record(self, i: int) -> Record:
        """Example i, its image not decoded. If it can't be read, that is logged, and it has no caption and an empty image."""
        if i >= len(self):
            raise IndexError(i)
        try:
            return self._record(i)
        except Exception as e:  # a reader may raise anything
            self._warn(f"number {i}", "can't be read", e)
            return Record(b"", (), f"number {i}")

    def _warn(self, key: str, what: str, error: Exception) -> None:
        """Logs an error, once for each key. It stores the key, not the exception: that would keep arrays in memory."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s: example %s %s: %s", self.name, key, what, f"{type(error).__name__}: {error}")

    def captions(self) -> Iterator[str]:
        """All captions, without decoding images: what a tokenizer is trained on."""
        for i in range(len(self)):
            yield from self.record(i).captions

    def __getitem__(self, i: int) -> Example:
        return self.read(i)

    def read(self, i: int, min_side: int | None = None) -> Example:
        """Example i. If it can't be read, or has no image or caption: another one, always the same (`replaced`). That is logged.

        `min_side`: sides of that many pixels are enough (see `image.decode`). Raises CertainFailure if no other can be read."""
        if example := self._try(i, min_side):
            return example
        for j in np.random.default_rng(i).integers(len(self), size=TRIES).tolist():
            if example := self._try(j, min_side):
                return replace(example, replaced=True)
        bad = self.record(i)
        name = bad.image if isinstance(bad.image, Path) else bad.key
        remedy = "can't be read (the log has the reasons); check the files and their paths"
        raise CertainFailure(f"{self.name}: {name} and {TRIES} others {remedy}")

    def _try(self, i: int, min_side: int | None) -> Example | None:
        record = self.record(i)
        try:
            if not record.captions or not record.image:
                raise ValueError(f"it has no {'image' if record.captions else 'caption'}")
            return Example(decode(record.image, min_side), record.captions, record.key, record.label, i, replaced=False)
        except Exception as e:  # a decoder may raise anything, and a bad image must not end a run
            self._warn(record.key, "is replaced by another", e)
            return None
