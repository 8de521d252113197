"""Writes pictures with captions as others read them: webdataset shards, and parquet files in the layout of the Hugging Face hub.

The same rows give the same shards, byte for byte: they hold no times and no owners.
"""

import io
import itertools
import json
import math
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipjax.data.bar import bar

SHARD = 1000  # examples of a tar
FILE = 2500  # examples of a parquet file
GROUP = 128  # examples of a row group, which is the least that is read


@dataclass(frozen=True)
class Row:
    """An example to write."""

    key: str  # without a dot
    png: Path
    captions: tuple[str, ...]  # the first is the main one
    more: Mapping[str, Any]  # text, or a list of texts, by name; the same names in every row


def write_tars(folder: Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """`SPLIT-00000.tar`, ...: of each example KEY.png, KEY.txt (its main caption) and KEY.json (`captions` and all of `more`)."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        for shard, part in enumerate(_pieces(rows, SHARD, f"{split}, tars")):
            with tarfile.open(folder / f"{split}-{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in part:
                    _add(tar, f"{row.key}.png", row.png.read_bytes())
                    _add(tar, f"{row.key}.txt", row.captions[0].encode())
                    _add(tar, f"{row.key}.json", json.dumps({"captions": row.captions, **row.more}, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_parquet(folder: Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """`SPLIT-00000-of-00003.parquet`, ...: columns `image` (a struct of `bytes` and `path`), `caption`, `captions`, `key` and
    those of `more`."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for split, rows in splits.items():
        schema = _schema(rows)
        files = math.ceil(len(rows) / FILE)
        for number, part in enumerate(_pieces(rows, FILE, f"{split}, parquet")):
            path = folder / f"{split}-{number:05}-of-{files:05}.parquet"
            with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
                for group in _groups(part):
                    writer.write_table(pa.Table.from_pylist([_columns(row) for row in group], schema))


def _columns(row: Row) -> dict[str, Any]:
    image = {"bytes": row.png.read_bytes(), "path": f"{row.key}.png"}
    return {"image": image, "caption": row.captions[0], "captions": list(row.captions), "key": row.key, **row.more}


def _schema(rows: Sequence[Row]) -> Any:
    """The columns, also in the words of Hugging Face's `datasets`, which shows `image` as a picture by them."""
    import pyarrow as pa

    texts = {"caption": "", "captions": [], "key": "", **(rows[0].more if rows else {})}
    text = {"dtype": "string", "_type": "Value"}
    features = {n: {"feature": text, "_type": "Sequence"} if isinstance(v, list) else text for n, v in texts.items()}
    info = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
    kinds = {n: pa.list_(pa.string()) if isinstance(v, list) else pa.string() for n, v in texts.items()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema([("image", image), *kinds.items()], {"huggingface": json.dumps(info)})


def _pieces(rows: Sequence[Row], size: int, name: str) -> Iterator[Iterator[Row]]:
    """Runs of `size` rows, with one bar of progress over all of them."""
    with bar(name, len(rows), "pictures") as shown:

        def seen() -> Iterator[Row]:
            for row in rows:
                yield row
                shown.update()

        left = seen()
        for _ in range(0, len(rows), size):
            yield itertools.islice(left, size)


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group
