"""Open unions: the classes that may stand in one field of a run, to which a config file can add its own (`clipjax.register`).

A union is a base class. Its members are frozen dataclasses that derive from it, each with a `kind` of its own in
config.json. An implementation, as the equation of a loss, is bound to each member: by `bind` for clipjax's own classes, by
`register` for all others. This module knows no JAX: it stores the implementations and does not use them.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union

from clipjax.config.fields import ConfigError, Strict, require

INTERACTIVE = "an interactive session"  # stands for the file of a class that has none
_loading: list[str] = []  # the config files that are being loaded, the innermost last


@dataclass(frozen=True)
class Member:
    """A class of an open union."""

    config: type
    implementation: Any = None  # None: its package has not been imported yet
    source: str | None = None  # the file that registered it; None: it is clipjax's own
    file: str | None = None  # the config file that was being loaded then; `source` if there was none


class OpenUnion(Strict):
    """The base class of all unions. `class Term(OpenUnion, run_field="objective")` declares the union of `Run.objective`."""

    kind: str
    run_field: ClassVar[str]  # the field of Run that holds the union's objects
    members: ClassVar[dict[str, Member]]  # by kind

    def __init_subclass__(cls, run_field: str | None = None, **kw: Any) -> None:
        super().__init_subclass__(prefix=f"{run_field or cls.run_field}.{cls.__name__}", **kw)
        if run_field is not None:
            cls.run_field, cls.members = run_field, {}

    @classmethod
    def admits(cls, value: object) -> bool:
        return isinstance(value, cls)

    @classmethod
    def admitted(cls) -> tuple[str, ...]:
        return tuple(member.config.__name__ for member in cls.members.values())

    @classmethod
    def include(cls, *classes: type[Self]) -> None:
        """Adds clipjax's own classes. `bind` gives them their implementations later."""
        cls.members.update((_kind_of(c), Member(c)) for c in classes)

    @classmethod
    def bind(cls, implementations: Mapping[type, Any]) -> None:
        """Binds clipjax's own classes to their implementations. Raises TypeError if one has none: at import, not in a run."""
        own = {kind: member.config for kind, member in cls.members.items() if member.source is None}
        missing = [c.__name__ for c in own.values() if c not in implementations]
        if missing:
            raise TypeError(f"classes of {cls.__name__} that nothing is bound to: {', '.join(missing)}")
        cls.members.update((kind, Member(c, implementations[c])) for kind, c in own.items())

    @classmethod
    def register(cls, config: type[Self], implementation: Any, source: str) -> None:
        """Adds a class that the file `source` brings, or replaces it where that file is loaded again.

        Raises ConfigError for a class that is no frozen dataclass with a `kind` of its own.
        """
        name = config.__qualname__
        decorated = "__dataclass_fields__" in vars(config)  # as the base is frozen, Python refuses one that is not
        require(decorated, "clipjax.register", name, "must be a dataclass: write @dataclass(frozen=True, kw_only=True) above it")
        kind, source = _kind_of(config), _absolute(source)
        other = cls.members.get(kind)
        if other is not None and other.config is not config:
            again = other.config.__qualname__ == name and other.source in (source, INTERACTIVE)
            owner = f"that of {other.config.__qualname__} of {other.source or 'clipjax'}"
            require(again, f"{name}.kind", kind, f"is {owner} already: choose another")
        cls.members[kind] = Member(config, implementation, source, _loading[-1] if _loading else source)

    @property
    def implementation(self) -> Any:
        """What is bound to this object's class. Looked up by kind: loading a config file again makes new classes."""
        return self.members[self.kind].implementation

    def require_member(self, name: str) -> None:
        """Raises ConfigError where this object's class is not in the union. `name`: its place in the run, as objective.0."""
        remedy = f"call clipjax.register({type(self).__name__}, ...) in the file that defines it, before it is used"
        member = self.members.get(getattr(self, "kind", ""))
        known = member is not None and member.config.__qualname__ == type(self).__qualname__
        require(known, name, type(self).__name__, f"is not registered: {remedy}")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """pydantic's schema: of the base, the union of its present members; of a member, its own."""
        import pydantic  # here, not above: the step benchmark runs where pydantic is not installed

        if "members" not in vars(cls):
            return handler(source)
        union = Union[tuple(member.config for member in cls.members.values())]  # noqa: UP007  (made at run time)
        return handler(typing.Annotated[union, pydantic.Field(discriminator="kind")])


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """For `with`: what `register` gets inside belongs to the config file `path`."""
    _loading.append(_absolute(path))
    try:
        yield
    finally:
        _loading.pop()


def registered(run: Any, unions: tuple[type[OpenUnion], ...]) -> dict[str, dict[str, dict[str, str]]]:
    """The classes of a run that are not clipjax's own: field -> kind -> `class` and the config `file` it came from."""
    used = {union.run_field: {x.kind: union.members[x.kind] for x in getattr(run, union.run_field)} for union in unions}
    foreign = {
        field: {kind: {"class": m.config.__qualname__, "file": m.file or ""} for kind, m in members.items() if m.source}
        for field, members in used.items()
    }
    return {field: members for field, members in foreign.items() if members}


def require_registered(names: Mapping[str, Mapping[str, Mapping[str, str]]], unions: tuple[type[OpenUnion], ...]) -> None:
    """Raises ConfigError where a class that `registered` named is not registered now."""
    for union in unions:
        for kind, name in names.get(union.run_field, {}).items():
            if kind not in union.members:
                config, file = name.get("class", kind), name.get("file", "")
                remedy = f"name that file with --config, or load it first: clipjax.config.load.load_config({file!r})"
                raise ConfigError(f"{union.run_field}: the run uses the class {config} of {file}: {remedy}")


def _kind_of(config: type) -> str:
    """The one value of a class's `kind`. Raises ConfigError where it has none, or several."""
    remedy = 'needs the field `kind: Literal["NAME"] = "NAME"`, by which config.json tells it from others'
    found = {f.name: f for f in dataclasses.fields(config)}
    hint = typing.get_type_hints(config)["kind"] if "kind" in found else None
    match typing.get_args(hint) if typing.get_origin(hint) is Literal else ():
        case (str(kind),) if found["kind"].default == kind:
            return kind
    raise ConfigError(f"clipjax.register = {config.__qualname__!r}: {remedy}")


def _absolute(path: str) -> str:
    """The absolute path of a file. Code that was typed in an interactive session has no file."""
    return str(Path(path).resolve()) if Path(path).is_file() else INTERACTIVE
