"""Where pictures and captions come from: `emoji`, `tfds:NAME[/CONFIG][:VERSION]` and `tsv:FILE`, each read at random by index."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.image import decode

TRIES = 64  # other examples tried in place of an unreadable one
QUOTED = re.compile(r'"(?:[^"]|"")*"')

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """An example as stored, its picture not yet decoded."""

    picture: bytes | Path
    captions: tuple[str, ...]  # the first is the main one
    key: str
    label: int = -1  # index of its class name; -1: none


@dataclass(frozen=True)
class Example:
    picture: Image.Image  # RGB
    captions: tuple[str, ...]  # at least one
    key: str
    label: int
    index: int  # its place in the source; of a stand-in its own
    replaced: bool  # it stands in for one that can't be read

    @property
    def image(self) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return np.asarray(self.picture)


class Source(ABC):
    """Examples by index. It can be pickled, and read by several threads at once."""

    name: str  # SPEC/SPLIT, or the SPEC alone of what has no splits
    classnames: tuple[str, ...] | None = None  # by label
    fields: dict[str, str]  # every field that is stored, and its kind

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _record(self, i: int) -> Record: ...

    def record(self, i: int) -> Record:
        """Example i without decoding its picture. One that can't be read is logged, and has no caption and an empty picture."""
        if i >= len(self):
            raise IndexError(i)
        try:
            return self._record(i)
        except Exception as e:  # a reader may raise anything
            self._warn(f"number {i}", "can't be read", e)
            return Record(b"", (), f"number {i}")

    def _warn(self, key: str, what: str, error: Exception) -> None:
        """Once a key; it is the key that is kept, for an exception holds on to its frames and what lies in them."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s: example %s %s: %s", self.name, key, what, f"{type(error).__name__}: {error}")

    def captions(self) -> Iterator[str]:
        """All captions, without decoding pictures: what a tokenizer is trained on."""
        for i in range(len(self)):
            yield from self.record(i).captions

    def __getitem__(self, i: int) -> Example:
        return self.read(i)

    def read(self, i: int, least: int | None = None) -> Example:
        """Example i, or another, always the same, if it can't be read or lacks a part (`replaced`; logged once a key).

        `least`: sides of that many pixels are enough (see `image.decode`). Raises ConfigError if no other can be read."""
        if example := self._try(i, least):
            return example
        for j in np.random.default_rng(i).integers(len(self), size=TRIES).tolist():
            if example := self._try(j, least):
                return replace(example, replaced=True)
        bad = self.record(i)
        where = bad.picture if isinstance(bad.picture, Path) else bad.key
        remedy = "can't be read (the log has the reasons); check the files and their paths"
        raise ConfigError(f"{self.name}: {where} and {TRIES} others {remedy}")

    def _try(self, i: int, least: int | None) -> Example | None:
        record = self.record(i)
        try:
            if not record.captions or not record.picture:
                raise ValueError(f"it has no {'picture' if record.captions else 'caption'}")
            return Example(decode(record.picture, least), record.captions, record.key, record.label, i, replaced=False)
        except Exception as e:  # a decoder may raise anything, and none of it may end a run
            self._warn(record.key, "is replaced by another", e)
            return None


class Tsv(Source):
    """A tab-separated file with a header: column `filepath` (relative to the file's folder) and `title`, as open_clip reads.

    A line is a row, in UTF-8. A field in quotes with those inside doubled, as pandas writes it, is what they hold; a quote
    elsewhere is itself. Rows with the same path are one example with several captions, its place that of the first. There are no
    splits and no labels: `split` may be `train` or `test`, the defaults of training and evaluation, and is the whole file."""

    def __init__(self, data: config.Data, path: Path) -> None:
        super().__init__()
        self.name = data.spec
        if not path.is_file():
            raise ConfigError(f"data.spec = {data.spec!r}: there is no file {path}; give the path of a .tsv file")
        config.require(data.split in ("train", "test"), "data.split", data.split, f"{data.spec} has no splits; leave it out")
        self.folder = path.parent
        captions: dict[str, list[str]] = {}
        rows = _rows(path)
        _, columns = next(rows, (0, []))
        image = _choose("data.image_field", data.image_field or "filepath", columns, f"columns of {path.name}")
        text = _choose("data.text_field", data.text_field or "title", columns, f"columns of {path.name}")
        for number, fields in rows:
            if len(fields) != len(columns):
                remedy = f"has {len(fields)} fields, the header {len(columns)}: fields hold no tabs and no line ends"
                raise ConfigError(f"{path}, line {number}: {remedy}")
            row = dict(zip(columns, fields, strict=True))
            if not row[image] or not row[text]:
                raise ConfigError(f"{path}, line {number}: {image} or {text} is empty; fill it in or drop the line")
            captions.setdefault(row[image], []).append(row[text])
        if not captions:
            raise ConfigError(f"data.spec = {data.spec!r}: {path.name} has a header but no rows")
        self.fields = dict.fromkeys(columns, "text")
        self._paths, self._captions = list(captions), [tuple(texts) for texts in captions.values()]

    def __len__(self) -> int:
        return len(self._paths)

    def _record(self, i: int) -> Record:
        path = self._paths[i]
        return Record(self.folder / path, self._captions[i], path)

    def captions(self) -> Iterator[str]:
        return (text for texts in self._captions for text in texts)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that has any, with its number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                raise ConfigError(f"{path}, line {number}: is not UTF-8 text ({e.reason} at byte {e.start}); convert it") from e
            if text:
                yield number, [f[1:-1].replace('""', '"') if QUOTED.fullmatch(f) else f for f in text.split("\t")]


def _choose(name: str, value: str, known: list[str], what: str) -> str:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: is not among the {what}; there are {', '.join(known) or 'none'}")
    return value


def open_source(data: config.Data) -> Source:
    """The source that `data.spec` and `data.split` name. `emoji` is built first if it isn't there yet.

    Raises ConfigError, with what there is, for an unknown spec, dataset, split or field."""
    kind, _, rest = data.spec.partition(":")
    match kind:
        case "emoji" if not rest:
            from clipjax.data.tfds_source import open_emoji

            return open_emoji(data)
        case "tfds" if rest:
            from clipjax.data.tfds_source import Tfds, find_dataset

            return Tfds(data, find_dataset(data.spec, rest))
        case "tsv" if rest:
            return Tsv(data, Path(rest).expanduser())
    raise ConfigError(f"data.spec = {data.spec!r}: must be emoji, tfds:NAME[/CONFIG][:VERSION] or tsv:FILE")
