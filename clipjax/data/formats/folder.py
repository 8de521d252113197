"""Folders of images as sources: captions in files beside them, or classes as sub-folders."""

from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field
from clipjax.data.formats.locations import BESIDE, FOLDER, in_split_folder, root_of
from clipjax.data.formats.sample import IMAGES, TEXTS
from clipjax.data.source import Record, Source, bucket
from clipjax.data.storage import store
from clipjax.data.storage.store import Stored

PROBED = 8  # examples of which one must have a caption in .json, else they are images alone
AT_ONCE = 16  # small files that are read at once
BLOCK = 4096  # examples whose captions are read ahead at most
ABSENT = 65_535  # no suffix has this number


class Folder(Source):
    """The images in a folder and its sub-folders, by their keys: the path in the folder without its suffix.

    Captions: a.txt of a.jpg, or `data.text_field` in a.json (`json.caption` unless told). Without such files, the sub-folders of
    the folder are the classes, and their names the captions. Without those, too, they are images alone. If all sub-folders are
    called train, test or validation (val), `data.split` takes its own; else `train` and `test` are all.

    Every file is listed once at the start, and read by itself: for millions, or on a store, tars are faster."""

    def __init__(self, data: config.Data, patterns: str) -> None:
        super().__init__()
        self.name = data.name
        files = store.find("data.spec", patterns, FOLDER, data.spec)
        self._root, files = in_split_folder(root_of(patterns), files, data.spec, data.split)
        self._place(files)
        config.require(len(self) > 0, "data.spec", data.spec, "there is no image; name a folder of images")
        self.fields = {"image": "file", **dict.fromkeys(self._beside, "text")}
        what = f"kinds of files beside the images of {data.spec}"
        if data.image_field not in (None, "image"):
            raise ConfigError(f"data.image_field = {data.image_field!r}: a folder has images of one kind; leave it out")
        label = data.label_field or ("cls" if "cls" in self._beside else None)
        self._number = columns.locate_any(data.filter.number, "data.filter.number", self._beside, what)
        self._label = columns.locate_any(label, "data.label_field", self._beside, what)
        self._texts = self._choose_texts(data, what)
        self._folder_classes = not self._texts and self._label is None
        self._folders = sorted({stem.partition("/")[0] for stem in self._stems if "/" in stem}) if self._folder_classes else []
        self.classnames = self._class_names()
        self._classes = {name: i for i, name in enumerate(self.classnames)} if self.classnames else None
        self.captioned = bool(self._texts or (self._folder_classes and self.classnames))

    def _place(self, files: list[Stored]) -> None:
        """What there is: images, and what stands beside each."""
        found: list[tuple[str, str]] = []  # of images: path without suffix, and suffix
        others: dict[str, dict[str, str]] = {kind: {} for kind in BESIDE}  # by kind: the suffix of each path, as it is written
        digest = blake2b(digest_size=8)
        for file in files:
            path = file.url.removeprefix(self._root)
            stem, _, suffix = path.rpartition(".")
            digest.update(f"{path} {file.size}\n".encode("utf-8", "surrogatepass"))
            if suffix.lower() in IMAGES:
                found.append((stem, suffix))
            elif suffix.lower() in others:
                others[suffix.lower()][stem] = suffix
        found.sort()
        self.version = digest.hexdigest()
        self._stems = [stem for stem, _ in found]
        self._suffixes = sorted({suffix for _, suffix in found}.union(*(kind.values() for kind in others.values())))
        code = {suffix: number for number, suffix in enumerate(self._suffixes)}
        self._image = np.array([code[suffix] for _, suffix in found], np.uint16)
        self._beside = {}  # by kind: uint16 [n], the suffix of the file beside each image
        for kind, suffix_of in others.items():
            codes = np.array([code[suffix_of[stem]] if stem in suffix_of else ABSENT for stem in self._stems], np.uint16)
            self._beside |= {kind: codes} if (codes != ABSENT).any() else {}

    def _choose_texts(self, data: config.Data, what: str) -> tuple[Field, ...]:
        if data.text_field:
            return columns.locate_texts(data.text_field, "data.text_field", self._beside, what)
        if usual := next((suffix for suffix in TEXTS if suffix in self._beside), None):
            return (Field(usual),)
        guessed = (Field("json", ("caption",)),)
        with_json = np.flatnonzero(self._beside["json"] != ABSENT)[:PROBED].tolist() if "json" in self._beside else []
        return guessed if any(columns.texts(self._value(i, guessed[0])) for i in with_json) else ()

    def _class_names(self) -> tuple[str, ...] | None:
        """The names of the sub-folders, or those in the label files, which are all read."""
        if self._folder_classes:
            return tuple(name.replace("_", " ") for name in self._folders) or None
        if (label := self._label) is None:
            return None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return columns.class_names(pool.map(lambda i: self._value(i, label), range(len(self))))

    def __len__(self) -> int:
        return len(self._stems)

    def _key(self, i: int) -> str:
        """The path without its suffix, unless several images differ in that alone."""
        stem = self._stems[i]
        alone = self._stems[i - 1 : i] != [stem] and self._stems[i + 1 : i + 2] != [stem]
        return stem if alone else f"{stem}.{self._suffixes[self._image[i]]}"

    def _record(self, i: int) -> Record:
        url = f"{self._root}{self._stems[i]}.{self._suffixes[self._image[i]]}"
        return replace(self._text(i), image=store.read(url) if store.scheme_of(url) else Path(url))

    def text(self, i: int) -> Record:
        return self.guarded(lambda: self._text(i), self._key(i))

    def texts(self) -> Iterator[Record]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for start in range(0, len(self), BLOCK):
                yield from pool.map(self.text, range(start, min(start + BLOCK, len(self))))

    def buckets(self) -> np.ndarray:
        return np.fromiter((bucket(self._key(i)) for i in range(len(self))), np.uint8, len(self))

    def _text(self, i: int) -> Record:
        """Example i without its image."""
        if self._folder_classes:
            name, slash, _ = self._stems[i].partition("/")
            label = bisect_left(self._folders, name) if slash else -1
            captions = (self.classnames[label],) if self.classnames and slash else ()
            return Record(b"", captions, self._key(i), label)
        captions, chances = columns.gather((columns.texts(self._value(i, field)), field.chance) for field in self._texts)
        label = -1 if self._label is None else columns.label(self._value(i, self._label), self._classes)
        number = None if self._number is None else columns.number(self._value(i, self._number))
        return Record(b"", captions, self._key(i), label, chances, number)

    def _value(self, i: int, field: Field) -> Any:
        """What stands in a file beside image i. None: there is none."""
        code = int(self._beside[field.column][i])
        if code == ABSENT:
            return None
        content = store.read(f"{self._root}{self._stems[i]}.{self._suffixes[code]}")
        return columns.value_at(content, field.path) if field.path else content.decode("utf-8-sig").strip("\r\n")
