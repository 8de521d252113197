"""Pictures that a file of questions names: which examples of a dataset they are, and parts of them as a source of their own."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import jax

from clipjax.config import ConfigError, require
from clipjax.data import reading
from clipjax.data.images import image
from clipjax.data.source import Record, Source
from clipjax.files import as_path

Box = tuple[float, ...]  # left, top, width and height in pixels


class Picture(NamedTuple):
    """A picture, or a part of one, as a file names it."""

    name: str
    box: Box | None = None


def picture(value: Any) -> Picture:
    """That of NAME or [NAME, [left, top, width, height]]. Raises ValueError for what is neither."""
    match value:
        case str() | int():
            return Picture(str(value))
        case [str() | int() as name, [_, _, _, _] as box]:
            return Picture(str(name), tuple(map(float, box)))
    raise ValueError(f"has {value!r}, which must be the name of a picture or [NAME, [left, top, width, height]]")


def keys_of(source: Source) -> list[str]:
    """The key of each example, with a bar of progress in the first process."""
    return [record.key for record in reading.texts(source, quiet=jax.process_index() > 0)]


def entries(file: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file, by their keys or by their places in its list, or of a .jsonl file, by their lines from 0.

    Raises ConfigError for a file that can't be read, and for one that holds no objects."""
    try:
        text = as_path(file).read_text(encoding="utf-8-sig")
        lines = file.endswith(".jsonl")
        content = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"is no JSON: {error}"
        raise ConfigError(f"questions = {file!r}: {reason}; name a JSON file, or one JSON object a line as .jsonl") from error
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [(str(key), entry) for key, entry in pairs if isinstance(entry, dict)]
    require(bool(found) and len(found) == len(content), "questions", file, "must hold objects: one a question")
    return found


class Names:
    """The examples of a dataset by the names that a file may give them: key, path or file name, with its suffix or without."""

    def __init__(self, keys: Sequence[str], dataset: str) -> None:
        self._dataset = dataset
        self._exact: dict[str, list[int]] = {}
        self._short: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            self._exact.setdefault(key, []).append(i)
            self._short.setdefault(PurePosixPath(key).stem, []).append(i)

    def number(self, name: str) -> int:
        """The example's number. Raises ConfigError for a name of none or of several."""
        path = PurePosixPath(name)
        found = self._exact.get(name) or self._exact.get(str(path.parent / path.stem)) or self._short.get(path.stem, [])
        what = f"names {len(found) or 'no'} example{'s' * (len(found) > 1)} of {self._dataset}"
        require(len(found) == 1, "questions", name, f"{what}: its keys are {', '.join(list(self._exact)[:3])}, ...")
        return found[0]


class Parts(Source):
    """Parts of the images of a source, without captions."""

    captioned = False

    def __init__(self, source: Source, parts: Sequence[tuple[int, Box | None]]) -> None:
        """`parts`: of which example, and which part; None is all of it."""
        super().__init__()
        self._source, self._parts = source, parts
        self.name, self.fields = source.name, source.fields
        self.version = f"{source.version} {blake2b(repr(parts).encode(), digest_size=8).hexdigest()}"

    def __len__(self) -> int:
        return len(self._parts)

    def _record(self, i: int) -> Record:
        number, box = self._parts[i]
        record = replace(self._source.read(number), captions=())
        if box is None:
            return record
        left, top, width, height = box
        stored = io.BytesIO()
        image.decode(record.image).crop((left, top, left + width, top + height)).save(stored, "png")
        return replace(record, image=stored.getvalue(), key=f"{record.key} {list(box)}")

    def text(self, i: int) -> Record:
        number, box = self._parts[i]
        record = self._source.text(number)
        return replace(record, captions=(), key=record.key if box is None else f"{record.key} {list(box)}")


def located(source: Source, keys: Sequence[str], pictures: Sequence[Picture]) -> tuple[Source, list[int]]:
    """The source whose images are to be embedded, and the number in it of each of the pictures.

    It is `source` itself, whose examples have these `keys`, unless parts of images are named."""
    names = Names(keys, source.name)
    wanted = [(names.number(name), box) for name, box in pictures]
    if all(box is None for _, box in wanted):
        return source, [number for number, _ in wanted]
    parts = list(dict.fromkeys(wanted))
    place = {part: i for i, part in enumerate(parts)}
    return Parts(source, parts), [place[part] for part in wanted]
