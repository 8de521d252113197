"""Karpathy's splits of COCO, Flickr8k and Flickr30k (1412.2306): one JSON with the captions and the split of every image."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np

from clipjax import config
from clipjax.config import ConfigError, require
from clipjax.config.data import dataset_name
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field
from clipjax.data.formats.locations import ALIASES, image_at
from clipjax.data.source import Record, Source, bucket
from clipjax.data.storage import store

CAPTIONS = "sentences.raw"
PARTS = {"restval": "train"}  # of COCO's train split: the images of val2014 that are neither validation nor test


class Karpathy(Source):
    """The images of one split of `karpathy:FILE.json[::IMAGES]`, each with all of its captions, by the names of their files.

    The JSON has `images`: dicts of `filename`, `split` (`train`, with COCO's `restval`; `val`; `test`), `sentences` with `raw`,
    and for COCO `filepath`, the folder below IMAGES (the JSON's own folder, unless told) that has the image; the images may also
    lie together in IMAGES. All captions of the split are held in memory."""

    def __init__(self, data: config.Data, patterns: str) -> None:
        super().__init__()
        self.name = dataset_name(data.spec, data.split)
        require(data.image_field is None, "data.image_field", data.image_field, "the JSON names the images itself; leave it out")
        file, _, images = expanduser(patterns).partition("::")
        items, self.version = _load(store.find("data.spec", file, (".json",), data.spec)[0].url, data.spec)
        chosen = _in_split(items, data.spec, data.split)
        self.fields = {name: type(value).__name__ for name, value in chosen[0].items()}
        what = f"entries of an image of {data.spec}"
        self._texts = columns.locate_texts(data.text_field or CAPTIONS, "data.text_field", self.fields, what)
        self._label = columns.locate_any(data.label_field, "data.label_field", self.fields, what)
        self._number = columns.locate_any(data.filter.number, "data.filter.number", self.fields, what)
        if self._label:
            path = (self._label.column, *self._label.path)
            self.classnames = columns.class_names(columns.value_at(item, path) for item in chosen)
        self._classes = {name: i for i, name in enumerate(self.classnames)} if self.classnames else None
        self._root = f"{expanduser(images).rstrip('/')}/" if images else file[: file.rfind("/") + 1]
        self._paths = _paths(chosen, self._root, data.spec)
        self._records = [self._described(item) for item in chosen]

    def __len__(self) -> int:
        return len(self._records)

    def _record(self, i: int) -> Record:
        return replace(self._records[i], image=image_at(self._root, self._paths[i]))

    def text(self, i: int) -> Record:
        return self._records[i]

    def texts(self) -> Iterator[Record]:
        return iter(self._records)

    def buckets(self) -> np.ndarray:
        return np.fromiter((bucket(record.key) for record in self._records), np.uint8, len(self))

    def _described(self, item: Mapping[str, Any]) -> Record:
        """The record of an image without the image."""

        def value(field: Field) -> Any:
            return columns.value_at(item, (field.column, *field.path))

        try:
            captions, chances = columns.gather((columns.texts(value(field)), field.chance) for field in self._texts)
            label = -1 if self._label is None else columns.label(value(self._label), self._classes)
            number = None if self._number is None else columns.number(value(self._number))
        except ValueError as error:
            return self.unreadable(error, item["filename"])
        return Record(b"", captions, item["filename"], label, chances, number)


def _load(url: str, spec: str) -> tuple[list[dict[str, Any]], str]:
    """The images that a JSON tells, and a digest of it."""
    content = store.read(url)
    form = "must be a Karpathy split: a JSON with images, each with filename, split and sentences"
    try:
        items = json.loads(content)["images"]
        whole = bool(items) and all({"filename", "split"} <= item.keys() for item in items)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, items = False, []
    require(whole, "data.spec", spec, form)
    return items, blake2b(content, digest_size=8).hexdigest()


def _in_split(items: list[dict[str, Any]], spec: str, split: str) -> list[dict[str, Any]]:
    """The images of a split. Raises ConfigError, with those that there are, for another."""
    names = [str(PARTS.get(item["split"], item["split"])) for item in items]
    chosen = [item for item, name in zip(items, names, strict=True) if ALIASES.get(name, name) == ALIASES.get(split, split)]
    require(bool(chosen), "data.split", split, f"{spec} has {', '.join(sorted(set(names)))}")
    return chosen


def _paths(items: list[dict[str, Any]], root: str, spec: str) -> list[str]:
    """Where each image lies below `root`: in the folder that its `filepath` names, or all of them in `root` itself.

    On this machine the first image tells which; raises ConfigError where it is in neither place."""
    inner = [f"{item['filepath']}/{item['filename']}" if item.get("filepath") else item["filename"] for item in items]
    if store.scheme_of(root) or Path(root, inner[0]).exists():
        return inner
    if Path(root, items[0]["filename"]).exists():
        return [item["filename"] for item in items]
    where = f"there is no {root}{inner[0]}; name the folder of the images: {spec.partition('::')[0]}::FOLDER"
    raise ConfigError(f"data.spec = {spec!r}: {where}")
