"""What every part of a configuration shares: refusal with a remedy, free fields, strict JSON."""

from dataclasses import field
from typing import Annotated, Any


class ConfigError(ValueError):
    """What the user asked for can't be done: the message names the field, the value and the remedy."""


def free(default: Any) -> Any:
    """A field that may differ between a checkpoint and the run that resumes from it."""
    return field(default=default, metadata={"free": True})


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raises ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} = {value!r}: {remedy}")


class Tagged:
    """In `Annotated[A | B, TAGGED]`: config.json tells the members of a union by their `kind`, and must hold it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        import pydantic  # here, not above: the step benchmark runs where pydantic is not installed

        return handler(Annotated[source, pydantic.Field(discriminator="kind")])


TAGGED = Tagged()


class Strict:
    """Unknown keys in config.json are an error, not a silent default."""

    __pydantic_config__ = {"extra": "forbid"}
