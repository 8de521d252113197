"""A sample of a tar: which of its members are the image, the captions and the label, and what stands in them."""

import io
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.captions import kept
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field
from clipjax.data.formats.spans import key_text, last_suffix
from clipjax.data.formats.tar import Member, TarError, Window, members, split_name
from clipjax.data.source import Record, bucket

IMAGES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "jp2", "j2k", "avif", "heic", "heif"),
    *("ppm", "pgm", "pbm", "pnm", "tga", "qoi", "img", "image"),
}
TEXTS = ("txt", "text", "caption", "captions", "cap")  # suffixes of captions, the likeliest first
LABEL = "cls"
ROW = "npy"  # numbers
CAPTIONS = "retrieval"  # CLIP_benchmark's kind of set whose .txt has a caption a line
MULTILABEL = "multilabel"  # that whose .npy has a 1 for each class of an image, and a 0 for each other
LONGEST = 4 << 20  # bytes of a member that is no image
LONGEST_ROW = 4096  # bytes of an .npy that may hold a group: others hold vectors


class Stale(ValueError):
    """A tar has changed since it was indexed."""


@dataclass(frozen=True)
class Fields:
    """Where the parts of an example stand."""

    images: tuple[str, ...]  # suffixes; a sample's image is the first that it has
    texts: tuple[Field, ...]  # none: images alone
    label: Field | None
    number: Field | None
    labels: Field | None = None  # a 1 for each class, of an example that may have several
    grouped: bool = False  # the first number of .npy is a group
    lines: bool = False  # each line of a text is a caption
    classes: dict[str, int] = field(default_factory=dict)  # number of each class name; without any, a name is no label
    guessed: bool = False  # whether .json has captions is not known


def choose_fields(data: config.Data, suffixes: Collection[str], kind: str | None = None) -> Fields:
    """The fields that the settings name, else the usual ones. `suffixes`: that the set has, the most frequent first; `kind`: of
    the set, as CLIP_benchmark calls it.

    Raises ConfigError, which names the suffixes, where a field is unknown, there is no image, or several could be meant."""
    what = f"suffixes of {data.spec}"
    if data.image_field:
        image = columns.locate(data.image_field, "data.image_field", suffixes, what)
        remedy = f"an image is a whole member of a sample; use {image.column}"
        config.require(not image.path, "data.image_field", data.image_field, remedy)
        images = (image.column,)
    else:
        images = _usual(suffixes, IMAGES, "data.image_field", what)
        remedy = f"none of the {what} is one of an image ({', '.join(suffixes)}); name it"
        config.require(bool(images), "data.image_field", data.image_field, remedy)
    guessed = False
    if data.text_field:
        texts = columns.locate_texts(data.text_field, "data.text_field", suffixes, what)
    elif usual := _usual(suffixes, TEXTS, "data.text_field", what):
        texts = (Field(min(usual, key=lambda suffix: TEXTS.index(last_suffix(suffix)))),)
    else:
        guessed = "json" in suffixes
        texts = (Field("json", ("caption",)),) if guessed else ()
    label = columns.locate_any(data.label_field or (LABEL if LABEL in suffixes else None), "data.label_field", suffixes, what)
    number = columns.locate_any(data.filter.number, "data.filter.number", suffixes, what)
    rows = Field(ROW) if ROW in suffixes else None
    several = rows if kind == MULTILABEL and label is None else None
    grouped = kind is not None and rows is not None and LABEL in suffixes
    return Fields(images, texts, label, number, several, grouped, lines=kind == CAPTIONS, guessed=guessed)


def parse(window: Window, span: tuple[int, int], stored_bucket: int, fields: Fields, *, with_image: bool = True) -> Record:
    """The example in a span of a tar. Raises Stale if the span holds no sample with such a key, and ValueError for values that
    are none."""
    key, found = _members(window, span)
    if bucket(key) != stored_bucket:
        raise Stale(f"has changed since it was indexed: another sample, {key}, stands where this one was")

    def value(wanted: Field) -> object:
        member = found.get(wanted.column)
        if member is None:
            return None
        if member.size > LONGEST:
            raise ValueError(f".{wanted.column} has {member.size:,} bytes; at most {LONGEST:,} are read")
        content = window(member.data, member.size)
        if wanted.column == ROW:
            return columns.value_at(np.load(io.BytesIO(content), allow_pickle=False).tolist(), wanted.path)
        if wanted.path:
            return columns.value_at(content, wanted.path)
        return content.decode("utf-8-sig").rstrip("\r\n")  # with which text files end

    image = next((found[suffix] for suffix in fields.images if suffix in found), None) if with_image else None

    def texts(wanted: Field) -> tuple[str, ...]:
        found = columns.texts(value(wanted))
        return tuple(line.replace(r"\n", "\n") for text in found for line in text.split("\n")) if fields.lines else found

    captions, chances = columns.gather((kept(texts(text)), text.chance) for text in fields.texts)
    number = None if fields.number is None else columns.number(value(fields.number))
    label = -1 if fields.label is None else _label(value(fields.label), fields.classes)
    labels = () if fields.labels is None else _labels(value(fields.labels))
    group = _group(window, found.get(ROW)) if fields.grouped else None
    content = b"" if image is None else window(image.data, image.size)
    return Record(content, captions, key, label, chances, number, labels, group)


def _members(window: Window, span: tuple[int, int]) -> tuple[str, dict[str, Member]]:
    """The key of the sample in a span, and its members by their suffixes."""
    keys, found, end = set(), {}, span[0]
    try:
        for member in members(window, span=span):
            end = member.end
            if (names := split_name(member.name)) and not member.name.endswith(b"/"):
                keys.add(names[0])
                found |= {names[1]: member} if member.plain else {}
    except TarError as error:
        raise Stale("has changed since it was indexed: no sample stands where this one was") from error
    if len(keys) != 1 or end != span[1]:
        raise Stale("has changed since it was indexed: no sample stands where this one was")
    return key_text(keys.pop()), found


def _usual(suffixes: Collection[str], usual: Collection[str], name: str, what: str) -> tuple[str, ...]:
    """Those of the suffixes that are usual ones; else those whose last part is, if it is one alone."""
    if simple := tuple(suffix for suffix in suffixes if suffix in usual):
        return simple
    ending = tuple(suffix for suffix in suffixes if last_suffix(suffix) in usual)
    if len(ending) > 1:
        raise ConfigError(f"{name} = None: several of the {what} could be meant: {', '.join(ending[: columns.SHOWN])}; name one")
    return ending


def _labels(value: object) -> tuple[int, ...]:
    """The classes that have a 1 in a row of 0 and 1; none: there is no row."""
    return tuple(i for i, holds in enumerate(value) if holds) if isinstance(value, list) else ()


def _group(window: Window, row: Member | None) -> int | None:
    """The first of the few integers of a member; None for anything else, as it may be of no interest here."""
    if row is None or row.size > LONGEST_ROW:
        return None
    try:
        numbers = np.load(io.BytesIO(window(row.data, row.size)), allow_pickle=False)
    except (ValueError, EOFError):
        return None
    return int(numbers.flat[0]) if numbers.size and numbers.dtype.kind in "iu" else None


def _label(value: object, classes: dict[str, int]) -> int:
    name = value.strip() if isinstance(value, str) else ""
    if name and not name.lstrip("+-").isdecimal():
        return columns.label(name, classes) if classes else -1
    return columns.label(value)
