"""Parquet files as sources: rows with the bytes of an image, as on the Hugging Face hub, or with its path."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipjax import config
from clipjax.config import ConfigError
from clipjax.config.data import dataset_name
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field
from clipjax.data.formats.features import choose_features
from clipjax.data.formats.locations import PARQUET, common_folder, image_at, in_split, key_of, name_of
from clipjax.data.formats.row_groups import RowGroups
from clipjax.data.source import Fetched, Record, Source, bucket
from clipjax.data.storage import store

Row = Mapping[str, Any]  # values by column

log = logging.getLogger(__name__)


class Parquet(Source):
    """Files with an image and text or a class. Where their names tell splits, `data.split` takes its own; else all are taken.

    A column of lists of classes gives an example several labels. The image is bytes, a struct of `bytes` and `path`, or a
    path relative to the file's folder. A chunk is a row group, the least that can be read: a single row costs its group, so
    `data.order = windows` suits all that does not fit in memory. Of a group, only the columns that are used are read. Keys: a
    column `__key__`, `key`, `file_name`, `filename`, `image_id` or `id`; else the path, where images are paths; else the
    file's name and the number of the row in it."""

    def __init__(self, data: config.Data, patterns: str) -> None:
        super().__init__()
        self.name = dataset_name(data.spec, data.split)
        found = store.find("data.spec", patterns, PARQUET, data.spec)
        self._rows = RowGroups(in_split(found, data.spec, data.split), data.spec)
        self.version = self._rows.version
        self._root, self._folders = common_folder([file.url for file in self._rows.files])
        schema = self._rows.schemas[0]
        self.fields = {name: str(schema.field(name).type) for name in schema.names}
        self._features = choose_features(schema, data, name_of(self._rows.files[0].url))
        self._check_columns()
        self._warn_of_splits()
        self._all = self._features.columns(schema)
        self._but_image = self._features.columns(schema, image=self._features.image_is_path)
        self.captioned = bool(self._features.texts)
        self.classnames = self._features.label_names or self._features.text_names or self._class_names()
        self._classes = {name: i for i, name in enumerate(self.classnames)} if self.classnames else None
        self.multilabel = self._features.label_is_list

    def _warn_of_splits(self) -> None:
        """Of a column of splits, as in the hub's Flickr30k, whose one file holds all three: all rows are taken."""
        if "split" in self._rows.schemas[0].names:
            splits = {str(name) for name in self._rows.read(0, ["split"])["split"].to_pylist()}
            what = "its column split has %s, and rows of all of them are taken; for one, write its rows to files of their own"
            if len(splits) > 1:
                log.warning(f"%s: {what}", self.name, ", ".join(sorted(splits)))

    def _check_columns(self) -> None:
        """Raises ConfigError for a file that lacks a column that is used."""
        used = {field.column for field in self._features.fields()}
        first = name_of(self._rows.files[0].url)
        for file, schema in zip(self._rows.files, self._rows.schemas, strict=True):
            if missing := used - set(schema.names):
                raise ConfigError(f"{file.url}: has no column {min(missing)}, which {first} has; name files of one kind")

    def _class_names(self) -> tuple[str, ...] | None:
        """The names in the label field, if it has names: reads that column."""
        label = self._features.label
        if label is None:
            return None
        groups = (self._rows.read(group, [label.column]) for group in range(len(self._rows.sizes)))
        return columns.class_names(_at(row, label) for group in groups for row in group.to_pylist())

    def __len__(self) -> int:
        return int(self._rows.ends[-1])

    def chunks(self) -> np.ndarray:
        return self._rows.sizes

    def fetch(self, chunk: int) -> Fetched:
        table = self._rows.read(chunk, self._all)
        return Fetched(table, table.nbytes)

    def record_in(self, fetched: Fetched, chunk: int, j: int) -> Record:
        return self._complete(_row(fetched.content, j), chunk, j, image=True)

    def _record(self, i: int) -> Record:
        group, j = self._rows.find(i)
        return self._complete(_row(self._rows.hold(group, self._all), j), group, j, image=True)

    def text(self, i: int) -> Record:
        group, j = self._rows.find(i)
        return self._text(lambda: _row(self._rows.hold(group, self._but_image), j), group, j)

    def texts(self) -> Iterator[Record]:
        for group, size in enumerate(self._rows.sizes.tolist()):
            try:
                rows = self._rows_of(group, self._but_image)
            except OSError as error:
                self.warn(self._rows.name_of_row(group, 0), f"and the {size - 1} after it can't be read: {error}")
                yield from (Record(b"", (), self._rows.name_of_row(group, j)) for j in range(size))
                continue
            yield from (self._text(row, group, j) for j, row in enumerate(rows))

    def _rows_of(self, group: int, names: list[str]) -> list[Callable[[], Row]]:
        """What gives each row of a group: a single one may be unreadable."""
        size = int(self._rows.sizes[group])
        table = self._rows.read(group, names) if names else None
        try:
            rows = table.to_pylist() if table else [{}] * size
        except ValueError:  # a text that is not UTF-8
            return [partial(_row, table, j) for j in range(size)]
        return [partial(dict, row) for row in rows]

    def _text(self, read: Callable[[], Row], group: int, j: int) -> Record:
        try:
            return self._complete(read(), group, j, image=False)
        except Exception as error:  # a reader may raise anything
            return self.unreadable(error, self._rows.name_of_row(group, j))

    def buckets(self) -> np.ndarray:
        features = self._features
        names = [features.key] if features.key else [features.image.column] if features.image_is_path else []
        groups = enumerate(self._rows_of(group, names) for group in range(len(self._rows.sizes)))
        keys = (self._key_of(row, group, j) for group, rows in groups for j, row in enumerate(rows))
        return np.fromiter(map(bucket, keys), np.uint8, len(self))

    def _key_of(self, row: Callable[[], Row], group: int, j: int) -> str:
        try:
            return self._key(row(), group, j)
        except ValueError:
            return self._rows.name_of_row(group, j)

    def _complete(self, row: Row, group: int, j: int, image: bool) -> Record:
        """`image`: with it. May raise anything."""
        features = self._features
        captions, chances = columns.gather((self._captions(_at(row, field)), field.chance) for field in features.texts)
        stored = None if features.label is None else _at(row, features.label)
        label, labels = (
            (-1, columns.labels(stored, self._classes)) if self.multilabel else (columns.label(stored, self._classes), ())
        )
        number = None if features.number is None else columns.number(_at(row, features.number))
        content = self._image(_at(row, features.image), group) if image else b""
        return Record(content, captions, self._key(row, group, j), label, chances, number, labels)

    def _captions(self, value: Any) -> tuple[str, ...]:
        if (names := self._features.text_names) is None:
            return columns.texts(value)
        several = value if isinstance(value, list) else [value]
        return tuple(names[number] for number in several if number is not None and number >= 0)

    def _image(self, value: Any, group: int) -> bytes | Path:
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str):
            return value or b""
        return image_at(self._root + self._folders[self._rows.file[group]], value)

    def _key(self, row: Row, group: int, j: int) -> str:
        """Also where the key's own cell is empty: the file and the row."""
        folder, features = self._folders[self._rows.file[group]], self._features
        if features.key and row[features.key] is not None:
            return str(row[features.key])
        if features.image_is_path and (path := _at(row, features.image)):
            return key_of(path, folder)
        return folder + self._rows.name_of_row(group, j)


def _row(table: Any, j: int) -> Row:
    return {name: column[j].as_py() for name, column in zip(table.column_names, table.columns, strict=True)}


def _at(row: Row, field: Field) -> Any:
    return columns.value_at(row[field.column], field.path)
