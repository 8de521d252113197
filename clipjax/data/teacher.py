"""A teacher's embeddings of the training examples, from a file that `clipjax embed RUN --data SPEC --out FILE.npz` wrote."""

import struct
import zipfile
from os import SEEK_CUR
from pathlib import Path

import numpy as np

from clipjax.config import ConfigError
from clipjax.data import reading
from clipjax.data.faults import shown
from clipjax.data.source import Source
from clipjax.files import local_path

ARRAYS = ("image", "text", "key")


class Teacher:
    """The teacher's vectors of every example of a source, matched by key. Of several rows with the same key the first counts.

    The vectors stay in the file and are memory-mapped, so that workers share them. It can be pickled."""

    def __init__(self, path: str, source: Source, quiet: bool = False) -> None:
        """Reads the key of every record, with a progress line unless `quiet`. Decodes only the images of examples without a row:
        one that can't be read needs no row, because another example replaces it.

        Raises ConfigError where the file or an array of it is missing, or is not what `clipjax embed` writes, and where examples
        have no row."""
        self._path, self._name = local_path("data.teacher", path).expanduser(), f"data.teacher = {path!r}"
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
            raise ConfigError(f"{self._name}: {what}, the first with key {source.text(missing).key!r}; {remedy}")

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self._image.shape[1]

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`teacher_image` and `teacher_text` (of the main caption) float32 [f] of the source's example i."""
        row = self._rows[i]
        if row < 0:  # it was unreadable when the rows were matched, and is readable now
            raise ConfigError(f"{self._name}: has no row for number {i} of the examples; write it again with `clipjax embed`")
        return {"teacher_image": np.array(self._image[row], np.float32), "teacher_text": np.array(self._text[row], np.float32)}

    def __getstate__(self) -> tuple:
        return self._path, self._name, self._rows

    def __setstate__(self, state: tuple) -> None:
        self._path, self._name, self._rows = state
        self._open()

    def _open(self) -> list[str]:
        """Maps the vectors and reads the keys."""
        remedy = "write it with `clipjax embed RUN --data SPEC --split SPLIT --out FILE.npz`"
        if not self._path.is_file():
            raise ConfigError(f"{self._name}: there is no such file; {remedy}")
        try:
            self._image, self._text, keys = (memory_mapped(self._path, name) for name in ARRAYS)
        except KeyError as e:
            raise ConfigError(f"{self._name}: must hold arrays image, text and key; {remedy}") from e
        except (zipfile.BadZipFile, ValueError, OSError) as e:  # truncated, or of another kind
            raise ConfigError(f"{self._name}: is not an .npz that can be read ({e}); {remedy}") from e
        shapes = f"image {self._image.dtype} {self._image.shape}, text {self._text.dtype} {self._text.shape}, key {keys.dtype}"
        vectors = self._image.ndim == 2 and self._image.shape == self._text.shape and keys.shape == (len(self._image),)
        if not vectors or {self._image.dtype.kind, self._text.dtype.kind} != {"f"} or keys.dtype.kind != "U":
            raise ConfigError(f"{self._name}: must hold image and text float [n, f] and key str [n], not {shapes}; {remedy}")
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
