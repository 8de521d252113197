"""Which examples training leaves out because they are not wanted: data.filter. They are no faults, and are counted apart."""

from dataclasses import replace

from clipjax.config import Filter
from clipjax.data.source import Record


class Filtered(Exception):
    """data.filter leaves this example out."""


def check_text(wanted: Filter, record: Record) -> Record:
    """The record with the captions that are wanted. Raises Filtered where none is left, and for its number."""
    if wanted.at_least is not None and not (record.number is not None and record.number >= wanted.at_least):
        raise Filtered(f"{wanted.number} is {record.number}, less than {wanted.at_least}")
    most = wanted.max_characters
    if wanted.min_characters == 0 and most is None:
        return record
    kept = [i for i, c in enumerate(record.captions) if len(c) >= wanted.min_characters and (most is None or len(c) <= most)]
    if not kept:
        raise Filtered("no caption of a wanted length")
    chances = None if record.chances is None else tuple(record.chances[i] for i in kept)
    return replace(record, captions=tuple(record.captions[i] for i in kept), chances=chances)


def check_size(wanted: Filter, width: int, height: int) -> None:
    """Raises Filtered for an image with a side, in pixels, or a ratio of sides that is not wanted."""
    short, long = sorted((width, height))
    if short < wanted.min_side or (wanted.max_aspect is not None and long > wanted.max_aspect * short):
        raise Filtered(f"{width} x {height} pixels")
