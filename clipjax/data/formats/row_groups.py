"""The row groups of parquet files, wherever they lie: the least of them that can be read."""

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np

from clipjax.config import ConfigError
from clipjax.data.formats.locations import name_of
from clipjax.data.storage import store
from clipjax.data.storage.recent import Recent
from clipjax.data.storage.store import Stored

HELD = 256 << 20  # bytes of row groups that are held for reads of single rows
LARGE = 1 << 30  # bytes of a row group that is too large for most machines, as several are held at once
FOOTERS = 64 << 20  # bytes of footers that are held
AT_ONCE = 16  # files whose footers are read at once

log = logging.getLogger(__name__)


class RowGroups:
    """All row groups of some files in order, by number, without those of no rows. Can be pickled, and read by several threads."""

    def __init__(self, files: Sequence[Stored], spec: str) -> None:
        """Reads the footer of every file. Raises ConfigError for one that is no parquet file, and where there are no rows."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            footers = list(pool.map(_footer, files))
        self.files, self._spec = tuple(files), spec
        footers, self.schemas = zip(*footers, strict=True)
        places, largest, digest = [], 0, blake2b(digest_size=8)
        for number, (file, footer) in enumerate(zip(files, footers, strict=True)):
            groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
            places += [(number, k, group.num_rows) for k, group in enumerate(groups) if group.num_rows]
            largest = max([largest, *(group.total_byte_size for group in groups)])
            digest.update(f"{name_of(file.url)} {file.size} {[group.num_rows for group in groups]}\n".encode())
        if not places:
            raise ConfigError(f"data.spec = {spec!r}: {name_of(files[0].url)} has no rows")
        if largest > LARGE:
            remedy = "each is read as a whole; write the files with smaller ones, as of 100 rows"
            log.warning("%s: row groups have up to %.1f GB: %s", spec, largest / 1e9, remedy)
        self.version = digest.hexdigest()
        self.file, self._place, self.sizes = np.array(places, np.int64).T  # of each group: its file, its number there, its rows
        self.ends = np.cumsum(self.sizes)  # the first row after each group
        self._file_starts = np.concatenate([[0], np.cumsum([footer.num_rows for footer in footers])])
        self._footers: Recent[Any] = Recent(FOOTERS)
        for file, footer in zip(files, footers, strict=True):
            self._footers.get(file.url, functools.partial(_with_size, footer))
        self._held: Recent[Any] = Recent(HELD)
        self._were_held: set[tuple[int, int]] = set()
        self._warned = False

    def find(self, row: int) -> tuple[int, int]:
        """The group of a row, and the row's number there."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        return group, row - int(self.ends[group] - self.sizes[group])

    def name_of_row(self, group: int, j: int) -> str:
        """The file of a row and its number there."""
        row = int(self.ends[group] - self.sizes[group]) + j - int(self._file_starts[self.file[group]])
        return f"{name_of(self.files[self.file[group]].url)}:{row}"

    def read(self, group: int, columns: Sequence[str]) -> Any:
        """Columns of a group as an Arrow table. Raises OSError that names the file, also if it is not what it was."""
        import pyarrow as pa
        from pyarrow import parquet

        file = self.files[self.file[group]]
        remote = store.scheme_of(file.url) is not None
        try:
            footer = self._footers.get(file.url, lambda: _with_size(_footer(file)[0]))
            source = store.open_file(file, least=0) if remote else file.url
            with parquet.ParquetFile(source, metadata=footer, pre_buffer=remote) as content:
                table = content.read_row_group(int(self._place[group]), columns=list(columns), use_threads=False)
        except (pa.ArrowException, ConfigError, OSError) as e:
            raise OSError(f"{file.url}, row group {self._place[group]}: can't be read: {e}") from e
        if len(table) != self.sizes[group]:
            raise OSError(f"{file.url}: is not what it was when it was opened; start again")
        return table

    def hold(self, group: int, columns: Sequence[str]) -> Any:
        """As `read`, for single rows: a group stays in memory for a while. Warns once if one that was dropped is read again."""

        def make() -> tuple[Any, int]:
            table = self.read(group, columns)
            if key in self._were_held and not self._warned:
                self._warned = True
                what = f"a row group ({table.nbytes / 1e6:,.1f} MB) is read again for a single row, as each must be in this order"
                remedy = "set data.order = windows, or write the files with smaller row groups"
                log.warning("%s: %s; %s", self._spec, what, remedy)
            return table, table.nbytes

        key = group, len(columns)
        table = self._held.get(key, make)
        self._were_held.add(key)
        return table


def _footer(file: Stored) -> tuple[Any, Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with store.open_file(file) as content:
            footer = parquet.read_metadata(content)
            return footer, footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as e:  # Arrow raises OSError, too, for what it can't parse
        if file.url in str(e):
            raise  # it can't be reached
        raise ConfigError(f"{file.url}: is no parquet file, or is damaged ({e}); copy it again, or leave it out") from e


def _with_size(footer: Any) -> tuple[Any, int]:
    return footer, footer.serialized_size
