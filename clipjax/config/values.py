"""Whether a value fits the type of its field, and what the field then stores."""

import difflib
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union


class Unfit(ValueError):
    """A value that its field can't store. The message names the field, the value and what is allowed."""


def fitted(value: Any, hint: Any, name: str, ending: str = "") -> Any:
    """`value` as a field of the type `hint` stores it: a list as a tuple, NumPy's numbers and whole numbers as Python's own.

    So it comes back from config.json as it is. Raises Unfit for all else. `ending` goes behind what is allowed, as " or None".
    Types that clipjax itself has no fields of, as a dict, are checked no deeper than their class.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, parts, name)
    if origin is Literal:
        return _choice(value, parts, name, ending)
    if origin is tuple:
        return _tuple(value, parts, name, ending)
    if hint in _PLAIN:
        return _PLAIN[hint](value, name, ending)
    if isinstance(origin or hint, type):
        return _object(value, origin or hint, name, ending)
    return value


def _refuse(name: str, value: object, remedy: str) -> typing.NoReturn:
    shown = f"{type(value).__name__}(...)" if hasattr(type(value), "admits") else reprlib.repr(value)
    shown = value.__name__ if isinstance(value, type) else shown
    raise Unfit(f"{name} = {shown}: {remedy}")


def _whole_number(value: Any, name: str, ending: str) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        whole = isinstance(value, float) and value.is_integer()
        _refuse(name, value, f"must be a whole number{ending}" + (f": write {int(value)}" if whole else ""))
    return int(value)


def _number(value: Any, name: str, ending: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        _refuse(name, value, f"must be a number{ending}" + (", without quotes" if isinstance(value, str) else ""))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(name, value, f"must be a finite number{ending}")
    return number


def _truth(value: Any, name: str, ending: str) -> bool:
    if not isinstance(value, bool):
        _refuse(name, value, f"must be True or False{ending}")
    return value


def _text(value: Any, name: str, ending: str) -> str:
    if not isinstance(value, str):
        _refuse(name, value, f"must be text in quotes{ending}")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(name, value, "must be Unicode text, which half of a surrogate pair is not")
    return str.__str__(value)


_PLAIN: dict[Any, Callable[[Any, str, str], Any]] = {int: _whole_number, float: _number, bool: _truth, str: _text}


def _choice(value: Any, choices: Sequence[Any], name: str, ending: str) -> Any:
    for choice in choices:
        if isinstance(value, str | numbers.Number) and (type(value) is bool) == (type(choice) is bool) and value == choice:
            return choice
    allowed = [repr(choice) for choice in choices]
    remedy = f"must be {_alternatives(allowed)}{ending}"
    if isinstance(value, str) and len(choices) > 1:
        remedy += f"; the nearest is {difflib.get_close_matches(repr(value), allowed, 1, cutoff=0)[0]}"
    return _refuse(name, value, remedy)


def _tuple(value: Any, parts: Sequence[Any], name: str, ending: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        _refuse(name, value, f"must be a tuple{ending}, as (x,) for one value and () for none")
    several = len(parts) == 2 and parts[1] is Ellipsis
    if not several and len(value) != len(parts):
        _refuse(name, value, f"must have {len(parts)} values{ending}")
    hints = [parts[0]] * len(value) if several else parts
    return tuple(fitted(part, hint, f"{name}.{i}") for i, (part, hint) in enumerate(zip(value, hints, strict=True)))


def _object(value: Any, hint: type, name: str, ending: str) -> Any:
    admits = getattr(hint, "admits", lambda value: isinstance(value, hint))
    if admits(value):
        return value
    allowed = [f"{of}(...)" for of in hint.admitted()] if hasattr(hint, "admitted") else [hint.__name__]  # pyright: ignore
    remedy = f"must be {_alternatives(allowed)}{ending}"
    if isinstance(value, type) and value.__name__ + "(...)" in allowed:
        remedy = f"is the class: write {value.__name__}()"
    return _refuse(name, value, remedy)


def _one_of(value: Any, parts: Sequence[Any], name: str) -> Any:
    if value is None and types.NoneType in parts:
        return None
    hints = [part for part in parts if part is not types.NoneType]
    ending = " or None" if types.NoneType in parts else ""
    if len(hints) == 1:
        return fitted(value, hints[0], name, ending)
    allowed = []
    for hint in hints:
        try:
            return fitted(value, hint, name)
        except Unfit as error:
            allowed.append(str(error).rpartition(": must be ")[2])
    return _refuse(name, value, f"must be {_alternatives(allowed)}{ending}")


def _alternatives(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
