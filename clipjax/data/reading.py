"""Reading the captions of a dataset, with progress on stderr once that takes longer than some seconds."""

from collections.abc import Iterator

from clipjax.data.bar import bar
from clipjax.data.source import Record, Source


def texts(source: Source, quiet: bool = False) -> Iterator[Record]:
    """Every example of a source in order, without its image, with a bar of progress unless `quiet`: one process shows it."""
    with bar(source.name, len(source), "captions", quiet=quiet) as shown:
        for record in source.texts():
            yield record
            shown.update()
