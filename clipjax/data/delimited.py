"""Text that is a table: fields between separators, in quotes where they hold one, as pandas and spreadsheets write."""

import gzip
import logging
import mmap
import re
import zlib
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from clipjax.config import ConfigError
from clipjax.data import store
from clipjax.data.store import Stored

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
BOM = b"\xef\xbb\xbf"
LONG = 100  # lines of a row: it is more likely that a quote was left open
# What pandas.read_csv takes for a missing value.
MISSING = frozenset(
    b"|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split(b"|")
)
Row = tuple[int, list[bytes]]  # the number of its first line, from 1 on, and its fields

log = logging.getLogger(__name__)


class Delimited:
    """A file in UTF-8 whose first row has the names of the columns.

    A field may be in double quotes; then it may hold separators and line ends, and quotes that are doubled. A quote elsewhere is
    a character, also one that opens a field and is not closed before a separator or line end: `"one" and "two"`. Lines end with
    LF or CRLF; empty ones do not count. If each line of a table of tabs has as many fields as the header, then each is a row, so
    that no quote hides a row."""

    def __init__(self, stored: Stored, separators: Sequence[str], wanted: Sequence[str]) -> None:
        """Of several `separators`, that which divides the header so that it has the `wanted` columns, or the most columns.

        Raises ConfigError for what is no text in UTF-8."""
        self.name = stored.url
        self._content = _content(stored)
        if self._content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ConfigError(f"{self.name}: is UTF-16; save it as UTF-8")
        self._start = len(BOM) if self._content[: len(BOM)] == BOM else 0

        def fit(separator: str) -> tuple[int, int]:
            columns = self._header(separator)
            return sum(name in columns or name.partition(".")[0] in columns for name in wanted), len(columns)

        self.separator = max(separators, key=fit)
        self.columns = self._header(self.separator)

    @property
    def digest(self) -> bytes:
        """Of the whole file."""
        return blake2b(self._content).digest()

    def decoded(self, field: bytes, line: int) -> str:
        """A field as text. Raises ConfigError, with the line, if it is not UTF-8."""
        try:
            return field.decode()
        except UnicodeDecodeError as e:
            why = f"{e.reason} at byte {e.start} of {field[:60]!r}"
            raise ConfigError(f"{self.name}, line {line}: is not UTF-8 text ({why}); convert it") from e

    def __iter__(self) -> Iterator[Row]:
        """The rows below the header, each with as many fields as there are columns: a shorter one is filled up with empty fields.

        Raises ConfigError for a row with more."""
        rows = self._rows(self.separator, one_line=self.separator == "\t" and self._lines_are_rows())
        next(rows, None)
        width = len(self.columns)
        for line, fields in rows:
            if len(fields) > width:
                remedy = "put a field with a separator or a line end in double quotes, and double the quotes in it"
                what = f"has {len(fields)} fields, the header {width}, divided by {SEPARATORS[self.separator]}"
                raise ConfigError(f"{self.name}, line {line}: {what}; {remedy}")
            if len(fields) < width:
                fields.extend([b""] * (width - len(fields)))
            yield line, fields

    def _header(self, separator: str) -> list[str]:
        line, fields = next(self._rows(separator), (1, []))
        return [self.decoded(field, line) for field in fields]

    def _rows(self, separator: str, one_line: bool = False) -> Iterator[Row]:
        """`one_line`: a field in quotes holds neither separators nor line ends."""
        split, pattern = separator.encode(), _field(separator.encode(), one_line)
        at, number = self._start, 1
        while at < len(self._content):
            line, lines = self._line(at), 1
            if b'"' not in line:
                if text := line.rstrip(b"\r\n"):
                    yield number, text.split(split)
                at, number = at + len(line), number + 1
                continue
            fields, end = _fields(pattern.finditer(line), split)
            if not one_line and any(field.startswith(b'"') for field, is_plain in fields if is_plain):
                fields, end = _fields(pattern.finditer(self._content, at), split)
                end -= at
                lines = self._content[at : at + end].count(b"\n")
            yield number, [field for field, _ in fields]
            if lines > LONG:
                log.warning("%s, line %d: a row goes on for %d lines; is a quote left open?", self.name, number, lines)
            at, number = at + end, number + lines

    def _line(self, at: int) -> bytes:
        """The line that starts at `at`, with its LF."""
        stop = self._content.find(b"\n", at)
        return self._content[at:] if stop < 0 else self._content[at : stop + 1]

    def _lines_are_rows(self) -> bool:
        """Whether each line has as many separators as the header, quotes aside."""
        if self._content.find(b'"') < 0:
            return True
        expected, at = len(self.columns) - 1, self._start
        while at < len(self._content):
            line = self._line(at)
            if line.count(b"\t") != expected and line.strip(b"\r\n"):
                return False
            at += len(line)
        return True


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


def _field(separator: bytes, one_line: bool) -> re.Pattern[bytes]:
    """Matches a field: what is between its quotes, or else the field; and the separator or line end after it."""
    end = re.escape(separator)
    among = rb'[^"\n' + end + rb"]" if one_line else rb'[^"]'
    return re.compile(rb'(?:"((?:' + among + rb'++|"")*+)"|([^\n' + end + rb"]*))(" + end + rb"|\r*\n|\r*\Z)")


def _fields(found: Iterator[re.Match[bytes]], separator: bytes) -> tuple[list[tuple[bytes, bool]], int]:
    """The fields of a row and whether each is without quotes; and where the row ends, after its line end."""
    fields = []
    for match in found:
        quoted, plain, delimiter = match.groups()
        is_last = delimiter != separator
        if quoted is None:
            fields.append((plain.rstrip(b"\r") if is_last else plain, True))
        else:
            fields.append((quoted.replace(b'""', b'"'), False))
        if is_last:
            return fields, match.end()
    raise AssertionError("a row ends with a line or with the file")
