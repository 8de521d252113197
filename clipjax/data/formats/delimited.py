"""Text that is a table: fields between separators, in quotes where they hold one, as pandas and spreadsheets write."""

import csv
import gzip
import io
import itertools
import logging
import mmap
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from clipjax.config import ConfigError
from clipjax.data.storage import store
from clipjax.data.storage.store import Stored

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
HEADER = 1 << 20  # bytes in which the header ends
LONG = 100  # line ends in a field: it is likely that a quote was left open
# What pandas.read_csv takes for a missing value.
MISSING = [
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL"),
    *("NaN", "None", "n/a", "nan", "null"),
]
END = "\x1e"  # follows the last line
QUOTED = r'^"(?:[^"]|"")*"$'

log = logging.getLogger(__name__)
csv.field_size_limit(2**31 - 1)  # of all readers of this process; 128 KiB is less than a caption may have


class Delimited:
    """A file in UTF-8 whose first row has the names of the columns, as pandas reads it.

    A field may be in double quotes; then it may hold separators and line ends, and quotes that are doubled. Empty lines do not
    count. A row with too few fields lacks the last ones.

    Arrow reads a million rows in a fraction of a second. What it refuses, Python's csv module reads, or names the line."""

    def __init__(self, stored: Stored, separators: Sequence[str], wanted: Sequence[str], *, lines_first: bool) -> None:
        """Of several `separators`, that which divides the header so that it has the `wanted` columns, or the most columns.

        `lines_first`: each line is a row, if each has as many fields as the header, so that no quote hides a row; a field is in
        quotes, then, only if its last character closes them.

        Raises ConfigError for what is no text in UTF-8."""
        self.name = stored.url
        self._content = _content(stored)
        if self._content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ConfigError(f"{self.name}: is UTF-16; save it as UTF-8")
        headers = {separator: self._header(separator) for separator in separators}

        def fit(separator: str) -> tuple[int, int]:
            columns = headers[separator]
            return sum(name in columns or name.partition(".")[0] in columns for name in wanted), len(columns)

        self.separator = max(separators, key=fit)
        self.columns = headers[self.separator]
        self._lines_first = lines_first

    @property
    def digest(self) -> bytes:
        """Of the whole file."""
        return blake2b(self._content).digest()

    def read(self, names: Sequence[str]) -> list[Any]:
        """Columns, as arrays of Arrow's large strings; null where pandas reads NaN.

        Raises ConfigError that names the line where a row has too many fields, quotes stay open, or there is no UTF-8."""
        if not self.columns:
            return [_array([]) for _ in names]
        rows = self._by_arrow(quotes=False) or self._by_lines() if self._lines_first else None
        if rows:
            rows = [_without_quotes(column) for column in rows]
        else:
            rows = self._by_arrow(quotes=True) or self._by_csv()
        columns = [rows[self.columns.index(name)] for name in names]
        self._warn_of_long_fields(columns)
        return [_with_nulls(column) for column in columns]

    def _header(self, separator: str) -> list[str]:
        start = io.StringIO(self._content[:HEADER].decode("utf-8-sig", "replace"), newline="")
        return next((row for row in csv.reader(start, delimiter=separator) if row), [])

    def _by_arrow(self, quotes: bool) -> list[Any] | None:
        """All columns below the header. None: Arrow can't read this, or a quote may have been left open."""
        import pyarrow as pa
        from pyarrow import csv as arrow

        names = [str(k) for k in range(len(self.columns))]
        parse = arrow.ParseOptions(delimiter=self.separator, quote_char='"' if quotes else False, newlines_in_values=quotes)
        convert = arrow.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string()), strings_can_be_null=False)
        read = arrow.ReadOptions(column_names=names, block_size=1 << 24)
        try:
            table = arrow.read_csv(pa.BufferReader(pa.py_buffer(self._content)), read, parse, convert)
        except pa.ArrowInvalid:
            return None
        if quotes and any("\n" in text for text in table[-1:].to_pylist()[0].values()):
            return None  # Arrow lets a field end with the file
        return [column.combine_chunks() for column in table[1:].columns]

    def _by_lines(self) -> list[Any] | None:
        """The same for tabs, if each line has as many fields as the header. A CR in a line is a character."""
        lines = (line.rstrip("\r") for line in self._text().split("\n"))
        rows = [line.split(self.separator) for line in lines if line]
        width = len(self.columns)
        return None if any(len(row) != width for row in rows) else [_array(column) for column in zip(*rows[1:], strict=True)]

    def _by_csv(self) -> list[Any]:
        """The same by Python's csv module."""
        columns: list[list[str]] = [[] for _ in self.columns]
        width, first, opened, row = len(columns), 1, 1, []
        # The end is a row of its own, unless a quote is still open.
        reader = csv.reader(itertools.chain(io.StringIO(self._text(), newline=""), ["\n", END]), delimiter=self.separator)
        for row in reader:
            if len(row) > width:
                remedy = "put a field with a separator or a line end in double quotes, and double the quotes in it"
                what = f"has {len(row)} fields, the header {width}, divided by {SEPARATORS[self.separator]}"
                raise ConfigError(f"{self.name}, line {first}: {what}; {remedy}")
            for column, text in zip(columns, row + [""] * (width - len(row)), strict=True) if row else ():
                column.append(text)
            first, opened = reader.line_num + 1, first
        if row != [END]:
            raise ConfigError(f"{self.name}, line {opened}: a quote opens a field and nothing closes it; double it, or close it")
        return [_array(column[1:-1]) for column in columns]

    def _text(self) -> str:
        content = self._content[:]
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            start = content.rfind(b"\n", 0, e.start) + 1
            line, byte = content[:start].count(b"\n") + 1, e.start - start
            raise ConfigError(f"{self.name}, line {line}: is not UTF-8 text ({e.reason} at byte {byte}); convert it") from e

    def _warn_of_long_fields(self, columns: list[Any]) -> None:
        pc = _compute()
        most = max((pc.max(pc.count_substring(column, "\n")).as_py() or 0 for column in columns), default=0)
        if most > LONG:
            log.warning("%s: a field has %d line ends; is a quote left open?", self.name, most)


def _content(stored: Stored) -> bytes | mmap.mmap:
    if stored.url.endswith(".gz"):
        try:
            return gzip.decompress(store.read(stored.url))
        except (gzip.BadGzipFile, zlib.error, EOFError) as e:
            raise ConfigError(f"{stored.url}: can't be decompressed ({e}); is it cut off?") from e
    if store.scheme_of(stored.url) or not stored.size:
        return store.read(stored.url)
    with open(stored.url, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _compute() -> Any:
    """The module, whose functions are made when it is imported, so that type checkers do not know them."""
    import pyarrow.compute

    return pyarrow.compute


def _array(texts: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.array(texts, pa.large_string())


def _without_quotes(column: Any) -> Any:
    """Fields that are in quotes, as a whole, without them; those in them are no longer doubled."""
    pc = _compute()
    quoted = pc.match_substring_regex(column, QUOTED)
    if not pc.any(quoted).as_py():
        return column
    inner = pc.replace_substring(pc.utf8_slice_codeunits(column, 1, -1), '""', '"')
    return pc.if_else(quoted, inner, column)


def _with_nulls(column: Any) -> Any:
    pc = _compute()
    missing = pc.is_in(column, value_set=_array(MISSING))
    return pc.if_else(missing, None, column) if pc.any(missing).as_py() else column
