"""Which columns of a parquet file are the image, the captions, the class and the key, by their names, types and notes.

Hugging Face's `datasets` notes in a file which columns are images, and the names of classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.formats import columns
from clipjax.data.formats.columns import Field

KEYS = ("__key__", "key", "file_name", "filename", "image_id", "id")  # columns that name an example and are no caption
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")  # of several columns of images, the one that is taken
PATHS = ("filepath", "image", "path")  # of columns of text, where there are no images
TEXTS = ("caption", "captions", "text", "title")  # of several columns of text


@dataclass(frozen=True)
class Features:
    """The columns that are used."""

    image: Field  # bytes, a struct of `bytes` and `path`, or a path
    image_is_path: bool
    texts: tuple[Field, ...]  # empty: images alone
    label: Field | None
    label_is_list: bool  # an example has several classes
    number: Field | None
    key: str | None
    label_names: tuple[str, ...] | None  # of classes, by number
    text_names: tuple[str, ...] | None  # if the captions are names of classes

    def fields(self, image: bool = True) -> list[Field]:
        """All that are used, or all but the image."""
        key = Field(self.key) if self.key else None
        return [field for field in (self.image if image else None, *self.texts, self.label, self.number, key) if field]

    def columns(self, schema: Any, image: bool = True) -> list[str]:
        """What to read for them: columns, and members of structs, as parquet names them."""
        return sorted({_member(schema, field) for field in self.fields(image)})


def choose_features(schema: Any, data: config.Data, what: str) -> Features:
    """The columns that `data` names, else those that are the likely ones. `what`: how messages call the files.

    Raises ConfigError where none is there, or several are equally likely."""
    known = _Columns(schema, what)
    images, classes = known.of("image", "bytes"), known.of("class")
    texts = [name for name in known.of("text") if name not in KEYS]
    image = data.image_field or known.likely("image_field", [_first(IMAGES, images), images, _first(PATHS, texts)])
    if image is None:
        there = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
        raise ConfigError(f"data.image_field = None: choose a column of {what}; there are {there or 'none'}")
    others = [name for name in texts if name != image]
    text = data.text_field or known.likely("text_field", [_first(TEXTS, others), others, classes])
    captions = columns.locate_texts(text, "data.text_field", schema.names, f"columns of {what}") if text else ()
    for field in captions:
        _check_path(schema.field(field.column).type, field, f"data.text_field = {text!r}")
    label = known.place(data.label_field or (classes[0] if len(classes) == 1 else None), "label_field")
    place = known.place(image, "image_field")
    assert place is not None
    return Features(
        image=place,
        image_is_path=_kind(_types_to(schema, place)[-1], None) == "text",
        texts=captions,
        label=label,
        label_is_list=label is not None and any(map(_is_list, _types_to(schema, label))),
        number=known.place(data.filter.number, "filter.number"),
        key=next((name for name in KEYS if known.kinds.get(name) in ("text", "integer")), None),
        label_names=known.names(label),
        text_names=known.names(captions[0]) if len(captions) == 1 else None,
    )


def _first(names: Iterable[str], found: list[str]) -> list[str]:
    return [name for name in names if name in found][:1]


class _Columns:
    """The columns of a file."""

    def __init__(self, schema: Any, what: str) -> None:
        self._schema, self._what = schema, what
        self._notes = _notes(schema)
        self.kinds = {name: _kind(schema.field(name).type, self._notes.get(name)) for name in schema.names}

    def of(self, *kinds: str) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind in kinds]

    def place(self, field: str | None, name: str) -> Field | None:
        """Where a field stands. Raises ConfigError for one that is not there. `name`: of the setting."""
        if field is None:
            return None
        found = columns.locate(field, f"data.{name}", self._schema.names, f"columns of {self._what}")
        _check_path(self._schema.field(found.column).type, found, f"data.{name} = {field!r}")
        return found

    def likely(self, name: str, wanted: Iterable[list[str]]) -> str | None:
        """The only column of the first of these lists that has any. Raises ConfigError if it has several."""
        found = next((several for several in wanted if several), [])
        if len(found) > 1:
            there = ", ".join(f"{column} ({self.kinds[column]})" for column in found)
            raise ConfigError(f"data.{name} = None: choose a column of {self._what}; there are {there}")
        return found[0] if found else None

    def names(self, field: Field | None) -> tuple[str, ...] | None:
        """The names of the classes of a field, if it has noted ones."""
        note = self._notes.get(field.column) if field else None
        for step in field.path if field else ():
            note = note.get(step) if isinstance(note, dict) else None
        names = note.get("names") if isinstance(note, dict) else None
        return tuple(name.replace("_", " ") for name in names) if names else None


def _notes(schema: Any) -> dict[str, Any]:
    """What `datasets` noted of each column."""
    try:
        noted = columns.value_at((schema.metadata or {}).get(b"huggingface"), ("info", "features"))
    except ValueError:
        return {}
    return {name: _of_item(note) for name, note in noted.items()} if isinstance(noted, dict) else {}


def _of_item(note: Any) -> Any:
    """What is noted of the items, where it is noted of a list, as `datasets` of several versions writes it."""
    while isinstance(note, list) and note:
        note = note[0]
    inner = note.get("feature") if isinstance(note, dict) else None
    return _of_item(inner) if isinstance(inner, dict | list) else note


def _kind(kind: Any, note: Any) -> str:
    """`image`, `bytes`, `text`, `class`, `integer` or another word for the type."""
    from pyarrow import types

    if isinstance(note, dict) and note.get("names"):
        return "class"
    kind = _item(kind)
    if types.is_struct(kind):
        return "image" if any(kind.field(i).name == "bytes" for i in range(kind.num_fields)) else "struct"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return "bytes"
    return "integer" if types.is_integer(kind) else str(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _item(kind: Any) -> Any:
    """The type of the items of a list, or of a dictionary's values."""
    from pyarrow import types

    while _is_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return kind


def _members(kind: Any) -> dict[str, Any]:
    from pyarrow import types

    kind = _item(kind)
    return {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if types.is_struct(kind) else {}


def _check_path(kind: Any, field: Field, called: str) -> None:
    """Raises ConfigError for a path to what a struct does not have. What JSON has is not known before it is read."""
    for step in field.path:
        if members := _members(kind):
            if step not in members and not step.isdecimal():
                raise ConfigError(f"{called}: {field.column} has no {step}; there are {', '.join(members)}")
            kind = members.get(step, kind)
        elif _kind(kind, None) not in ("text", "bytes"):
            raise ConfigError(f"{called}: {field.column} has no parts: it is {kind}, neither a struct nor JSON")


def _member(schema: Any, field: Field) -> str:
    """The column of a field, or the member of its struct, as parquet names it."""
    from pyarrow import types

    kind, path = schema.field(field.column).type, [field.column]
    for step in field.path:
        if not types.is_struct(kind):
            break
        path.append(step)
        kind = _members(kind)[step]
    return ".".join(path)


def _types_to(schema: Any, field: Field) -> list[Any]:
    """The types of a field's column, and of every step of its path; of one in JSON, that of the JSON. Of a list of which the path
    takes one item, that of the item."""
    kinds = [schema.field(field.column).type]
    for step in field.path:
        if step.isdecimal() and _is_list(kinds[-1]):  # one of its items
            kinds[-1] = kinds[-1].value_type
        else:
            kinds.append(_members(kinds[-1]).get(step, kinds[-1]))
    return kinds
