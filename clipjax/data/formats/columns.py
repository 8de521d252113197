"""Fields of an example: how `data.text_field` and its siblings name them, and what stands in them.

A field is a column of a table, a member of a sample in a tar, or a path into one that holds a struct or JSON: `title`,
`json.caption`, `image.bytes`. Text may come from several fields, each drawn with a probability: `txt=0.7,json.alt=0.3`.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from clipjax.config import ConfigError
from clipjax.config.fields import nearest
from clipjax.data.captions import kept

SHOWN = 40  # names that a message lists at most
INTEGER = re.compile(r"\s*[+-]?\d+(?:\.0*)?\s*")


class Field(NamedTuple):
    """Where a value stands."""

    column: str  # of a table; the suffix of a member of a tar
    path: tuple[str, ...] = ()  # into the struct or JSON that stands there; empty: the value itself
    chance: float = 1.0  # with which this field is drawn, of all those of `data.text_field`


def parse(text: str, name: str) -> tuple[tuple[str, float], ...]:
    """The fields that a text names, each with its probability: `a`, `a,b` (equal ones) or `a=0.7,b=0.3`, which sum to 1.

    `name`: of the setting, for the ConfigError that is raised for anything else."""
    pairs = [part.strip().rpartition("=") if "=" in part else (part.strip(), "", "") for part in text.split(",")]
    fields = [field.strip() for field, _, _ in pairs]
    form = "must be one field, as json.caption, or several with their probabilities, as txt=0.7,json.alt=0.3"
    if not all(fields):
        raise ConfigError(f"{name} = {text!r}: a field has no name; {form}")
    if twice := next((field for field in fields if fields.count(field) > 1), None):
        raise ConfigError(f"{name} = {text!r}: {twice} comes twice; {form}")
    given = [share for _, equals, share in pairs if equals]
    if not given:
        return tuple((field, 1 / len(fields)) for field in fields)
    if len(given) < len(fields):
        raise ConfigError(f"{name} = {text!r}: some fields have a probability and some have none; {form}")
    try:
        chances = [float(share) for share in given]
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: a probability is no number; {form}") from None
    if not all(0 < chance <= 1 for chance in chances) or not math.isclose(math.fsum(chances), 1, abs_tol=1e-6):
        raise ConfigError(f"{name} = {text!r}: probabilities must be positive and sum to 1; here to {math.fsum(chances):g}")
    return tuple((field, chance / math.fsum(chances)) for field, chance in zip(fields, chances, strict=True))


def locate(field: str, name: str, known: Collection[str], what: str) -> Field:
    """The column that a field names, the longest that fits, and the path in it.

    Raises ConfigError with the nearest of the `known` columns if there is none. `what` they are: `columns of a.csv`."""
    parts = field.split(".")
    for end in range(len(parts), 0, -1):
        if (column := ".".join(parts[:end])) in known:
            return Field(column, tuple(parts[end:]))
    there = ", ".join([*map(str, known)][:SHOWN]) + ", ..." * (len(known) > SHOWN)
    hint = f"; the nearest is {nearest(field, known)}" if len(known) > 1 else ""
    raise ConfigError(f"{name} = {field!r}: is not among the {what}; there are {there or 'none'}{hint}")


def locate_any(field: str | None, name: str, known: Collection[str], what: str) -> Field | None:
    """`locate` for a setting that may name no field."""
    return locate(field, name, known, what) if field else None


def locate_texts(text: str, name: str, known: Collection[str], what: str) -> tuple[Field, ...]:
    """The fields that `data.text_field` names, with their probabilities. A column whose name has a comma or = is one, too."""
    if text in known:
        return (Field(text),)
    return tuple(locate(field, name, known, what)._replace(chance=chance) for field, chance in parse(text, name))


def value_at(value: Any, path: Sequence[str]) -> Any:
    """What stands at a path in a dict, or in the JSON of a text or of bytes. None: nothing does.

    In a list, a number is an index, and a name gives the values of all items. Raises ValueError for a text that is no JSON."""
    if not path or value is None:
        return value
    if isinstance(value, str | bytes | bytearray):
        return value_at(json.loads(value) if value.strip() else None, path)
    if isinstance(value, dict):
        if (whole := ".".join(path)) in value:  # a name with dots
            return value[whole]
        return value_at(value.get(path[0]), path[1:])
    if isinstance(value, list | tuple):
        if path[0].isdecimal():
            return value_at(value[int(path[0])], path[1:]) if int(path[0]) < len(value) else None
        return [value_at(item, path) for item in value]
    return None


def texts(value: Any) -> tuple[str, ...]:
    """The texts of a value: one text, in UTF-8 if it is bytes, or a list of them. None and NaN are none.

    Raises ValueError for a number or a struct, which are no texts."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes | bytearray):
        return (value.decode("utf-8-sig"),)
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in texts(item))
    raise ValueError(f"expected a text or a list of texts, there is {_shown(value)}")


def gather(found: Iterable[tuple[Sequence[str], float]]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """All captions with a visible character, and the chance of each; None: equal ones. Takes the texts of each field with its
    probability.

    The captions of a field share its probability equally; the probability of a field without any goes to the others."""
    seen = [(kept(captions), chance) for captions, chance in found]
    filled = [(captions, chance) for captions, chance in seen if captions]
    captions = tuple(caption for several, _ in filled for caption in several)
    if len(filled) < 2:
        return captions, None
    total = math.fsum(chance for _, chance in filled)
    chances = [chance / total / len(several) for several, chance in filled for _ in several]
    return captions, None if max(chances) - min(chances) < 1e-12 else tuple(chances)


def number(value: Any) -> float | None:
    """A number, also one that is written as a text. None: there is none, or it is NaN. A list gives its first one.

    Raises ValueError for anything else."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if value is None or (isinstance(value, str | bytes) and not value.strip()):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number, there is {_shown(value)}") from None
    return None if math.isnan(found) else found


def label(value: Any, classes: dict[str, int] | None = None) -> int:
    """The class that a value names: an integer, or one of the names of `classes`. -1: none.

    Raises ValueError for a name that is not among the classes."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig")
    if classes is not None and isinstance(value, str):
        if not value:
            return -1
        if value in classes:
            return classes[value]
        raise ValueError(f"{_shown(value)} is not among the {len(classes)} classes")
    found = number(value)
    if found is None or found < 0:
        return -1
    if found != int(found):
        raise ValueError(f"expected the number of a class, there is {_shown(value)}")
    return int(found)


def labels(value: Any, classes: dict[str, int] | None = None) -> tuple[int, ...]:
    """The classes that the items of a list name, as `label`, in order and each once."""
    found = {label(item, classes) for item in value or ()}
    return tuple(sorted(found - {-1}))


def class_names(values: Iterable[Any]) -> tuple[str, ...] | None:
    """The classes that the values of a label field name, or the items of its lists, sorted. None: all are integers, or absent.

    pandas writes integers as 3.0 where some are absent."""
    items = (item for value in values for item in (value if isinstance(value, list) else [value]))
    names = {str(item) for item in items if item is not None and item != ""}
    return None if all(INTEGER.fullmatch(name) for name in names) else tuple(sorted(names))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
