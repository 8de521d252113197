"""Examples that can't be used: what is wrong with them, and how the others are read."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from clipjax.data.images import image
from clipjax.data.source import Record, Source

UNREAD, NO_IMAGE, NO_CAPTION, BAD_IMAGE = "can't be read", "has no image", "has no caption", "has an image that can't be used"
FAULTS = (UNREAD, NO_IMAGE, NO_CAPTION, BAD_IMAGE)  # the `fault` of a batch is 0, or 1 + an index here


class Bad(Exception):
    """An example that can't be used."""

    def __init__(self, fault: str, key: str, reason: Exception | None = None) -> None:
        super().__init__(fault if reason is None else f"{fault}: {type(reason).__name__}: {reason}")
        self.fault, self.key = fault, key


def undecodable(key: str, error: Exception) -> Bad:
    """What is wrong with an example whose image could not be made into pixels: `error` may also say that its file is missing."""
    return Bad(UNREAD if isinstance(error, OSError) and error.errno is not None else BAD_IMAGE, key, error)


def usable(read: Callable[[], Record], number: int, captioned: bool = True, imaged: bool = True) -> Record:
    """What `read()` returns of example `number`. Raises Bad where that fails, or the record lacks its image where `imaged`, or a
    caption where `captioned`."""
    try:
        record = read()
    except Exception as e:  # a reader may raise anything
        raise Bad(UNREAD, f"number {number}", e) from e
    if imaged and not record.image:
        raise Bad(NO_IMAGE, record.key)
    if captioned and not record.captions:
        raise Bad(NO_CAPTION, record.key)
    return record


@dataclass(frozen=True)
class Shown:
    """An example to look at."""

    number: int  # of the source
    image: Image.Image  # RGB
    record: Record


def shown(source: Source, numbers: Iterable[int]) -> Iterator[Shown]:
    """Those of the examples that can be read, with their images decoded; the others are logged."""
    for number in numbers:
        record = source.record(number)
        try:
            yield Shown(number, image.decode(record.image), record)
        except Exception as e:  # a decoder may raise anything
            source.warn(record.key, f"is left out: {type(e).__name__}: {e}")
