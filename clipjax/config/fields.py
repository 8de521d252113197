"""What every part of a configuration shares: refusal with a remedy, free and bounded fields, checked names and types."""

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from clipjax.config.values import Unfit, fitted


class ConfigError(ValueError):
    """What the user asked for can't be done: the message names the field, the value and the remedy."""


def free(default: Any) -> Any:
    """A field that may differ between a checkpoint and the run that resumes from it."""
    return field(default=default, metadata={"free": True})


class Range(NamedTuple):
    """The numbers from `low` on that are less than `high`."""

    low: float
    high: float
    remedy: str  # the message for other numbers

    def require(self, name: str, value: float | None) -> None:
        """Raises ConfigError for a number outside. None passes."""
        require(value is None or self.low <= value < self.high, name, value, self.remedy)


NOT_NEGATIVE = Range(0.0, math.inf, "must not be negative, nor infinite")
POSITIVE = Range(math.ulp(0.0), math.inf, "must be positive and finite")
COUNT = Range(1, math.inf, "must be positive")
SHARE = Range(0.0, math.nextafter(1.0, 2.0), "must lie in [0, 1]")
POSITIVE_SHARE = Range(math.ulp(0.0), math.nextafter(1.0, 2.0), "must lie in (0, 1]")
BELOW_ONE = Range(0.0, 1.0, "must lie in [0, 1)")


def bounded(bounds: Range, default: Any = dataclasses.MISSING) -> Any:
    """A field for a number within bounds, or None. `check_bounds` checks it."""
    return field(default=default, metadata={"bounds": bounds})


def check_bounds(config: Any, name: str) -> None:
    """Raises ConfigError for a bounded field out of its bounds. `name`: the place of the dataclass in the run."""
    for f in dataclasses.fields(config):
        if "bounds" in f.metadata:
            f.metadata["bounds"].require(f"{name}.{f.name}", getattr(config, f.name))


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raises ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} = {value!r}: {remedy}")


class Tagged:
    """For `Annotated[A | B, TAGGED]`: in config.json, `kind` says which member of a closed union it is, and must be there."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        import pydantic  # here, not above: the step benchmark runs where pydantic is not installed

        return handler(Annotated[source, pydantic.Field(discriminator="kind")])


TAGGED = Tagged()


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of the `known` names, which must not be empty, that is most like `name`."""
    return difflib.get_close_matches(name, list(known), 1, cutoff=0)[0]


class Checked(type):
    """The type of all configuration classes: it checks names and types before an object is made.

    Here and not in `__post_init__`, which a class of a user's own may have without calling that of its base. Reading config.json,
    copying and pickling do not come this way: pydantic checks the first, and the others copy what was checked.
    """

    if not TYPE_CHECKING:  # to type checkers a class takes what its fields say

        def __call__(cls, *args: Any, **given: Any) -> Any:
            own = {f.name: f for f in dataclasses.fields(cls) if f.init}
            positional = [name for name, f in own.items() if not f.kw_only]
            if len(args) > len(positional):
                return super().__call__(*args, **given)  # Python's own TypeError
            given = _complete(cls, own, dict(zip(positional, args, strict=False)) | given)
            hints = _hints(cls)
            return super().__call__(**{name: _fitted(value, hints[name], cls.named(name)) for name, value in given.items()})


def _complete(cls: "type[Strict]", own: dict[str, dataclasses.Field], given: dict[str, Any]) -> dict[str, Any]:
    """The given values and the defaults of the other fields. Raises ConfigError for a field that is unknown or missing."""
    for name in given.keys() - own.keys():
        remedy = (
            f"{cls.__name__} has no such field; the nearest is {nearest(name, own)}" if own else f"{cls.__name__} has no fields"
        )
        raise ConfigError(f"{cls.named(name)} = {given[name]!r}: {remedy}")
    for name, f in own.items():
        if name in given:
            continue
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed:
            raise ConfigError(f"{cls.named(name)}: is missing: {cls.__name__}({name}=...)")
        given[name] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return given


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fitted(value: Any, hint: Any, name: str) -> Any:
    try:
        return fitted(value, hint, name)
    except Unfit as error:
        raise ConfigError(str(error)) from None


class Strict(metaclass=Checked):
    """The base of every configuration class. Unknown keys, in Python or in config.json, are an error, not a silent default.

    `class Data(Strict, prefix="data")` says where its objects stand in a run: messages name the fields by that.
    """

    __pydantic_config__ = {"extra": "forbid"}
    prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str | None = None, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        cls.prefix = cls.__name__ if prefix is None else prefix

    @classmethod
    def named(cls, field: str) -> str:
        """The place of a field in a run, as `optim.lr`."""
        return f"{cls.prefix}.{field}".lstrip(".")

    @classmethod
    def admits(cls, value: object) -> bool:
        """Whether `value` may stand in a field of this type. Of a derived class it may not: config.json would lose the class."""
        return type(value) is cls

    @classmethod
    def admitted(cls) -> tuple[str, ...]:
        """The names of the classes that `admits` lets in, for messages."""
        return (cls.__name__,)
