"""Tables of text as sources: csv and tsv files whose rows name images and have captions."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field
from clipjax.data.formats.delimited import SEPARATORS, Delimited
from clipjax.data.formats.locations import common_folder, image_at, key_of, name_of
from clipjax.data.source import Record, Source, bucket
from clipjax.data.storage import store

IMAGE, TEXT = "filepath", "title"  # the columns that open_clip reads by default
BLOCK = 65_536  # rows that are objects of Python at a time
NO_PATH = "\0"  # begins the key of a row without a path


class Table(Source):
    """Files of text with a header: column `filepath` (relative to the file's folder, absolute, or a URL) and `title`.

    Read as pandas does. `tsv:` has tabs, and each line is a row if all have as many fields as the header; of `csv:` the header
    tells the separator. Rows with the same path are one example with several captions, at the place of the first. An empty cell,
    or one that pandas reads as NaN, is none. There are no splits: `split` may be `train` or `test`, the defaults of training and
    evaluation, and both are all rows. The columns that are used are held in memory."""

    def __init__(self, data: config.Data, patterns: str) -> None:
        super().__init__()
        self.name = data.spec
        kind = data.spec.partition(":")[0]
        remedy = f"{data.spec} has no splits; leave it out, or take shares of it, as train#0-95 and train#95-100"
        config.require(data.split in ("train", "test"), "data.split", data.split, remedy)
        files = store.find("data.spec", patterns, (f".{kind}", f".{kind}.gz"), data.spec)
        separators = "\t" if kind == "tsv" else list(SEPARATORS)
        wanted = (data.image_field or IMAGE, data.text_field or TEXT)
        tables = [Delimited(file, separators, wanted, lines_first=kind == "tsv") for file in files]
        other = kind == "tsv" and len(header := tables[0].columns) == 1 and any(mark in header[0] for mark in SEPARATORS)
        config.require(not other, "data.spec", data.spec, f"the header has no tab; if it is a csv: csv:{patterns}")
        self._choose(data, tables[0])
        self._root, inner = common_folder([file.url for file in files])
        self._columns, keys = _read(tables, inner, self._image, self._used)
        if not len(keys):
            raise ConfigError(f"data.spec = {data.spec!r}: {name_of(files[0].url)} has a header but no rows")
        self._keys, self._rows = _grouped(keys)
        self.version = blake2b(b"".join(table.digest for table in tables), digest_size=8).hexdigest()
        self.classnames = self._names()
        self._classes = {name: i for i, name in enumerate(self.classnames)} if self.classnames else None

    def _choose(self, data: config.Data, table: Delimited) -> None:
        """The columns to use, by those of the first table. Raises ConfigError for one that is not there."""
        what = f"columns of {name_of(table.name)}"
        self.fields = dict.fromkeys(table.columns, "text")

        def place(field: str, name: str) -> Field:
            return columns.locate(field, f"data.{name}", table.columns, what)

        self._image = place(data.image_field or IMAGE, "image_field").column
        text = data.text_field or (TEXT if TEXT in table.columns else None)
        self._texts = columns.locate_texts(text, "data.text_field", table.columns, what) if text else ()
        self.captioned = bool(self._texts)
        self._label = None if data.label_field is None else place(data.label_field, "label_field")
        self._number = None if data.filter.number is None else place(data.filter.number, "filter.number")
        used = [*self._texts, *(field for field in (self._label, self._number) if field)]
        self._used = tuple(dict.fromkeys(field.column for field in used))

    def __len__(self) -> int:
        return len(self._keys)

    def _record(self, i: int) -> Record:
        key = self._keys[i].as_py()
        return self._complete(b"" if key.startswith(NO_PATH) else image_at(self._root, key), i, key)

    def text(self, i: int) -> Record:
        try:
            return self._complete(b"", i, self._keys[i].as_py())
        except ValueError as error:  # of a cell that is no JSON
            return self.unreadable(error, f"number {i}")

    def _complete(self, image: bytes | Path, i: int, key: str) -> Record:
        rows = [i]
        if self._rows is not None:
            order, starts = self._rows
            rows = order[starts[i] : starts[i + 1]].tolist()
        found = [(columns.texts([self._value(field, row) for row in rows]), field.chance) for field in self._texts]
        captions, chances = columns.gather(found)
        label = -1 if self._label is None else columns.label(self._value(self._label, rows[0]), self._classes)
        number = None if self._number is None else columns.number(self._value(self._number, rows[0]))
        return Record(image, captions, key.removeprefix(NO_PATH), label, chances, number)

    def _value(self, field: Field, row: int) -> Any:
        return columns.value_at(self._columns[field.column][row].as_py(), field.path)

    def buckets(self) -> np.ndarray:
        blocks = (self._keys[start : start + BLOCK].to_pylist() for start in range(0, len(self), BLOCK))
        return np.fromiter((bucket(key.removeprefix(NO_PATH)) for block in blocks for key in block), np.uint8, len(self))

    def _names(self) -> tuple[str, ...] | None:
        if self._label is None:
            return None
        values = self._columns[self._label.column].unique().to_pylist()
        return columns.class_names(columns.value_at(value, self._label.path) for value in values)


def _read(tables: Sequence[Delimited], folders: Sequence[str], image: str, used: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """The columns that are used, and the keys, as arrays of Arrow: they take a byte for a character and eight for a cell.

    A key is the path of the image, with the folder of its table where there are several folders."""
    import pyarrow as pa

    parts = []
    for table, folder in zip(tables, folders, strict=True):
        for name in (image, *used):
            columns.locate(name, "a field of data", table.columns, f"columns of {name_of(table.name)}")
        paths, *others = table.read((image, *used))
        parts.append([_keys(paths, folder), *others])
    keys, *others = (pa.chunked_array(several, pa.large_string()).combine_chunks() for several in zip(*parts, strict=True))
    return dict(zip(used, others, strict=True)), keys


def _keys(paths: Any, folder: str) -> Any:
    """The key of each path: with the folder of its table, where tables are in several."""
    import pyarrow as pa

    if not folder and not paths.null_count:
        return paths
    keys = (f"{NO_PATH}{folder}row {k}" if path is None else key_of(path, folder) for k, path in enumerate(paths.to_pylist(), 1))
    return pa.array(keys, pa.large_string())


def _grouped(keys: Any) -> tuple[Any, tuple[np.ndarray, np.ndarray] | None]:
    """The keys, each once, in the order of their first rows; int64 the rows sorted by key, and int64 where those of each key
    start, and the last ones end. None where no key comes twice."""
    found = keys.dictionary_encode()
    if len(found.dictionary) == len(keys):
        return keys, None
    numbers = found.indices.to_numpy()
    starts = np.concatenate([[0], np.cumsum(np.bincount(numbers))])
    return found.dictionary, (np.argsort(numbers, kind="stable"), starts)
