"""Rows of an .npz for the training examples, found by key: embeddings that `clipjax embed` wrote, a teacher's or those of a tower
that is not trained and need not run; and labels, which `clipjax cluster` wrote, or the dataset's own."""

import struct
import zipfile
from collections.abc import Mapping
from os import SEEK_CUR
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from clipjax.config import ConfigError
from clipjax.data import reading
from clipjax.data.faults import shown
from clipjax.data.source import Source
from clipjax.files import local_path

KEY = "key"
WRITTEN = "`clipjax embed RUN --data SPEC --split SPLIT --out FILE.npz`"
CLUSTERED = "`clipjax cluster EMB.npz --classes C --out FILE.npz`"


class Use(NamedTuple):
    """What the rows of a file are for."""

    field: str  # that names the file
    arrays: Mapping[str, str]  # those of the file that are read, and their names in a batch
    dtype: str = "float32"  # in a batch
    by: str = WRITTEN  # the command that writes it


TEACHER = Use("data.teacher", {"image": "teacher_image", "text": "teacher_text"})
EMBEDDED = {side: Use("data.embeddings", {side: "embedded"}) for side in ("image", "text")}
LABELS = Use("data.labels", {"label": "label"}, "int32", CLUSTERED)
OWN = "own"  # in the place of a file of labels: those of the dataset itself


class Vectors:
    """The vectors, or labels, of every example of a source, matched by key. Of several rows with the same key the first counts.

    They stay in the file and are memory-mapped, so that workers share them. It can be pickled."""

    def __init__(self, path: str, source: Source, quiet: bool = False, use: Use = TEACHER) -> None:
        """Reads the key of every record, with a progress line unless `quiet`. Decodes only the images of examples without a row:
        one that can't be read needs no row, because another example replaces it.

        Raises ConfigError where the file or an array of it is missing, or is not what `use.by` writes, and where examples have no
        row. The labels OWN are of the records themselves; it raises ConfigError where no example has any."""
        self.use, self.name = use, f"{use.field} = {path!r}"
        if use is LABELS and path == OWN:
            self._path, self._rows, self._arrays = None, range(len(source)), {"label": self._own(source, quiet)}
            return
        self._path = local_path(use.field, path).expanduser()
        self._arrays, keys = keyed_arrays(self._path, self.name, use)
        row_of: dict[str, int] = {}
        for row, key in enumerate(keys.tolist()):
            row_of.setdefault(key, row)
        self._rows = np.fromiter((row_of.get(record.key, -1) for record in reading.texts(source, quiet)), np.int32, len(source))
        absent = np.flatnonzero(self._rows < 0).tolist()
        missing = next((x.number for x in shown(source, absent) if x.record.captions), None)
        if missing is not None:
            what = f"has no row for {len(absent):,} of the {len(source):,} examples of {source.name}"
            remedy = f"write it from the same dataset and split with {use.by}"
            raise ConfigError(f"{self.name}: {what}, the first with key {source.text(missing).key!r}; {remedy}")
        if use is LABELS and not -1 <= self._arrays["label"].min() <= self.highest < 2**31:
            raise ConfigError(f"{self.name}: must hold classes from 0 to 2^31 - 1, and -1 for none; write it with {use.by}")

    @property
    def width(self) -> int:
        """Numbers of a vector, or labels of an example."""
        return next(iter(self._arrays.values())).shape[1]

    @property
    def highest(self) -> int:
        """The highest label."""
        return int(self._arrays["label"].max())

    @property
    def numbers(self) -> int:
        """Numbers that an example gets."""
        return sum(array.shape[1] for array in self._arrays.values())

    def __contains__(self, i: int) -> bool:
        return bool(self._rows[i] >= 0)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """float32 [f], or labels int32 [l], under each of the names in a batch, of the source's example i; a text's vector is of
        the main caption."""
        row = self._rows[i]
        if row < 0:  # it was unreadable when the rows were matched, and is readable now
            raise ConfigError(f"{self.name}: has no row for number {i} of the examples; write it again with {self.use.by}")
        return {name: np.array(self._arrays[side][row], self.use.dtype) for side, name in self.use.arrays.items()}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | ({"_arrays": None} if self._path else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._path is not None:
            self._arrays = keyed_arrays(self._path, self.name, self.use)[0]

    def _own(self, source: Source, quiet: bool) -> Int[np.ndarray, "n l"]:
        """The classes of each example; of one that has fewer than others, -1 in the further places."""
        found = [record.labels or (record.label,) for record in reading.texts(source, quiet)]
        table = np.full((len(found), max(map(len, found), default=1)), -1, np.int32)
        for row, labels in zip(table, found, strict=True):
            row[: len(labels)] = labels
        if not (table >= 0).any():
            raise ConfigError(f"{self.name}: {source.name} has no class label; name its field with data.label_field")
        return table


def keyed_arrays(path: Path, name: str, use: Use) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of an .npz, [n, f] each, mapped, and its keys, str [n]. Raises ConfigError, and names it `name`."""
    wanted, remedy = list(use.arrays), f"write it with {use.by}"
    if not path.is_file():
        raise ConfigError(f"{name}: there is no such file; {remedy}")
    try:
        arrays, keys = {side: memory_mapped(path, side) for side in wanted}, memory_mapped(path, KEY)
    except KeyError as e:
        raise ConfigError(f"{name}: must hold arrays {', '.join(wanted)} and {KEY}; {remedy}") from e
    except (zipfile.BadZipFile, ValueError, OSError) as e:  # truncated, or of another kind
        raise ConfigError(f"{name}: is not an .npz that can be read ({e}); {remedy}") from e
    found = ", ".join(f"{side} {array.dtype} {array.shape}" for side, array in arrays.items()) + f", key {keys.dtype}"
    kind, first = use.dtype.rstrip("32"), arrays[wanted[0]]
    fits = all(x.ndim == 2 and x.size and x.shape == first.shape and x.dtype.kind == kind[0] for x in arrays.values())
    if not fits or keys.shape != (len(first),) or keys.dtype.kind != "U":
        raise ConfigError(f"{name}: must hold {' and '.join(wanted)} {kind} [n, f] and key str [n], not {found}; {remedy}")
    return arrays, keys


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
