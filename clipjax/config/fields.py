"""What every part of a configuration shares: refusal with a remedy, free and bounded fields, strict JSON."""

import dataclasses
import math
from dataclasses import field
from typing import Annotated, Any, NamedTuple


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


class Strict:
    """Unknown keys in config.json are an error, not a silent default."""

    __pydantic_config__ = {"extra": "forbid"}
