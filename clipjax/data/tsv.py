"""Tab-separated files as sources, as open_clip reads them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.source import Record, Source
from clipjax.files import local_path

QUOTED = re.compile(r'"(?:[^"]|"")*"')


class Tsv(Source):
    """A tab-separated file with a header: column `filepath` (relative to the file's folder) and `title`, as open_clip reads.

    A line is a row, in UTF-8. If a field is in quotes, with quotes inside it doubled, as pandas writes it, the quotes are
    removed; any other quote is a character. Rows with the same path are one example with several captions, at the position of
    the first. There are no splits and no labels: `split` may be `train` or `test`, the defaults of training and evaluation,
    and both are the whole file."""

    def __init__(self, data: config.Data, path: Path) -> None:
        super().__init__()
        self.name = data.spec
        if not path.is_file():
            raise ConfigError(f"data.spec = {data.spec!r}: there is no file {path}; give the path of a .tsv file")
        config.require(data.split in ("train", "test"), "data.split", data.split, f"{data.spec} has no splits; leave it out")
        self.folder = path.parent
        captions: dict[str, list[str]] = {}
        rows = _rows(path)
        _, columns = next(rows, (0, []))
        image = _choose("data.image_field", data.image_field or "filepath", columns, f"columns of {path.name}")
        text = _choose("data.text_field", data.text_field or "title", columns, f"columns of {path.name}")
        for number, fields in rows:
            if len(fields) != len(columns):
                remedy = f"has {len(fields)} fields, the header {len(columns)}: fields hold no tabs and no line ends"
                raise ConfigError(f"{path}, line {number}: {remedy}")
            row = dict(zip(columns, fields, strict=True))
            if not row[image] or not row[text]:
                raise ConfigError(f"{path}, line {number}: {image} or {text} is empty; fill it in or drop the line")
            local_path(f"{path}, line {number}: {image}", row[image])
            captions.setdefault(row[image], []).append(row[text])
        if not captions:
            raise ConfigError(f"data.spec = {data.spec!r}: {path.name} has a header but no rows")
        self.fields = dict.fromkeys(columns, "text")
        self._paths, self._captions = list(captions), [tuple(texts) for texts in captions.values()]

    def __len__(self) -> int:
        return len(self._paths)

    def _record(self, i: int) -> Record:
        path = self._paths[i]
        return Record(self.folder / path, self._captions[i], path)

    def captions(self, texts: Iterable[Record] | None = None) -> Iterator[str]:
        return (text for texts in self._captions for text in texts)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that has any, with its number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                raise ConfigError(f"{path}, line {number}: is not UTF-8 text ({e.reason} at byte {e.start}); convert it") from e
            if text:
                yield number, [f[1:-1].replace('""', '"') if QUOTED.fullmatch(f) else f for f in text.split("\t")]


def _choose(name: str, value: str, known: list[str], what: str) -> str:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: is not among the {what}; there are {', '.join(known) or 'none'}")
    return value
