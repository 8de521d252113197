"""Embeddings of the training examples, from a file that `clipjax embed RUN --data SPEC --out FILE.npz` wrote: a teacher's, or
those of a tower that is not trained and need not run."""

import struct
import zipfile
from collections.abc import Mapping
from os import SEEK_CUR
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from clipjax.config import ConfigError
from clipjax.data import reading
from clipjax.data.faults import shown
from clipjax.data.source import Source
from clipjax.files import local_path

KEY = "key"


class Use(NamedTuple):
    """What the vectors of a file are for."""

    field: str  # that names the file
    arrays: Mapping[str, str]  # those of the file that are read, and their names in a batch


TEACHER = Use("data.teacher", MappingProxyType({"image": "teacher_image", "text": "teacher_text"}))
EMBEDDED = {side: Use("data.embeddings", MappingProxyType({side: "embedded"})) for side in ("image", "text")}


class Vectors:
    """The vectors of every example of a source, matched by key. Of several rows with the same key the first counts.

    They stay in the file and are memory-mapped, so that workers share them. It can be pickled."""

    def __init__(self, path: str, source: Source, quiet: bool = False, use: Use = TEACHER) -> None:
        """Reads the key of every record, with a progress line unless `quiet`. Decodes only the images of examples without a row:
        one that can't be read needs no row, because another example replaces it.

        Raises ConfigError where the file or an array of it is missing, or is not what `clipjax embed` writes, and where examples
        have no row."""
        self.use, self._path = use, local_path(use.field, path).expanduser()
        self.name = f"{use.field} = {path!r}"
        keys = self._open()
        row_of: dict[str, int] = {}
        for row, key in enumerate(keys):
            row_of.setdefault(key, row)
        self._rows = np.fromiter((row_of.get(record.key, -1) for record in reading.texts(source, quiet)), np.int32, len(source))
        absent = np.flatnonzero(self._rows < 0).tolist()
        missing = next((x.number for x in shown(source, absent) if x.record.captions), None)
        if missing is not None:
            what = f"has no row for {len(absent):,} of the {len(source):,} examples of {source.name}"
            remedy = "write it from the same dataset and split with `clipjax embed`"
            raise ConfigError(f"{self.name}: {what}, the first with key {source.text(missing).key!r}; {remedy}")

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return next(iter(self._arrays.values())).shape[1]

    @property
    def numbers(self) -> int:
        """Numbers that an example gets."""
        return sum(array.shape[1] for array in self._arrays.values())

    def __contains__(self, i: int) -> bool:
        return bool(self._rows[i] >= 0)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """float32 [f] under each of the names in a batch, of the source's example i; a text's is that of the main caption."""
        row = self._rows[i]
        if row < 0:  # it was unreadable when the rows were matched, and is readable now
            raise ConfigError(f"{self.name}: has no row for number {i} of the examples; write it again with `clipjax embed`")
        return {name: np.array(self._arrays[side][row], np.float32) for side, name in self.use.arrays.items()}

    def __getstate__(self) -> tuple:
        return self.use.field, dict(self.use.arrays), self._path, self.name, self._rows

    def __setstate__(self, state: tuple) -> None:
        field, arrays, self._path, self.name, self._rows = state
        self.use = Use(field, arrays)
        self._open()

    def _open(self) -> list[str]:
        """Maps the vectors and reads the keys."""
        remedy = "write it with `clipjax embed RUN --data SPEC --split SPLIT --out FILE.npz`"
        if not self._path.is_file():
            raise ConfigError(f"{self.name}: there is no such file; {remedy}")
        sides = list(self.use.arrays)
        try:
            self._arrays = {side: memory_mapped(self._path, side) for side in sides}
            keys = memory_mapped(self._path, KEY)
        except KeyError as e:
            raise ConfigError(f"{self.name}: must hold arrays {', '.join(sides)} and {KEY}; {remedy}") from e
        except (zipfile.BadZipFile, ValueError, OSError) as e:  # truncated, or of another kind
            raise ConfigError(f"{self.name}: is not an .npz that can be read ({e}); {remedy}") from e
        found = ", ".join(f"{side} {array.dtype} {array.shape}" for side, array in self._arrays.items()) + f", key {keys.dtype}"
        first = self._arrays[sides[0]]
        vectors = all(x.ndim == 2 and x.shape == first.shape and x.dtype.kind == "f" for x in self._arrays.values())
        if not vectors or keys.shape != (len(first),) or keys.dtype.kind != "U":
            raise ConfigError(f"{self.name}: must hold {' and '.join(sides)} float [n, f] and key str [n], not {found}; {remedy}")
        return keys.tolist()


def memory_mapped(path: Path, name: str) -> np.ndarray:
    """An array of an .npz, mapped from the file; np.load would copy it. A compressed array is read into memory.

    Raises KeyError where no array has this name."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # the last 4 of a header's 30 bytes: the lengths of what follows
        file.seek(sum(struct.unpack("<HH", file.read(4))), SEEK_CUR)
        if member.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if not dtype.hasobject and 0 not in shape:
                return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    with np.load(path) as arrays:
        return arrays[name]
