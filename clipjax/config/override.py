"""The options of a command line that set fields of a configuration."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from clipjax.config import ConfigError, Init, Run, Tokenizer, lines, require
from clipjax.config.fields import nearest
from clipjax.config.train import Schedule
from clipjax.config.unions import OpenUnion

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo, StructConstructorSpec, StructTypeInfo

# The closed unions, by the field that holds their objects: kind -> class.
KINDS = {
    field: {member.kind: member for member in typing.get_args(typing.get_args(union)[0])}
    for field, union in {"tokenizer": Tokenizer, "optim.schedule": Schedule}.items()
}


def override(run: Run, args: Sequence[str], prog: str, known: Sequence[str] = ()) -> Run:
    """`run` with the options `--any.field VALUE ...`. Rules by parameter name can be set in the file only.

    `--FIELD.kind KIND` changes the kind of a schedule or a tokenizer, and keeps what both kinds have; `--evals none` leaves out
    all evaluations. `known`: options of the command itself, which a misspelt one may mean. Raises ConfigError for an unknown
    field, with the nearest one, and for a value that is impossible or of another type.
    """
    import tyro

    rules = run.optim.rules
    run = _unchecked(run, optim=_unchecked(run.optim, rules=()))  # tyro makes no options of an empty tuple
    args, run = _without_evals(list(args), run)
    run = _with_init(_with_kinds(run, args), args)
    fields = [name for name in (line.partition(" = ")[0] for line in lines(run)) if name not in ("optim.rules", "evals", "init")]
    fields += [f"init.{f.name}" for f in dataclasses.fields(Init)]
    _check_names(args, {name: f"--{name}" for name in fields} | {_field(option): option for option in known}, prog)
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            run = tyro.cli(Run, default=run, args=args, prog=prog, config=options, registry=_registry())
    except SystemExit as stop:
        if cause := _config_error(stop):
            raise cause from None
        if text := _unboxed(printed.getvalue()):
            raise ConfigError(text) from None
        raise  # after --help
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, rules=rules))


def _field(option: str) -> str:
    """The field that an option names: `--optim.weight-decay=0.1` is `optim.weight_decay`."""
    return option.partition("=")[0].removeprefix("--").replace("-", "_")


def _given(args: Sequence[str]) -> Iterator[tuple[int, str, str, int]]:
    """Of each option: its place among `args`, its field, its first value (empty if it has none), and how many of `args` it is."""
    for place, arg in enumerate(args):
        if not arg.startswith("--"):
            continue
        following = args[place + 1] if place + 1 < len(args) and not args[place + 1].startswith("--") else ""
        joined = "=" in arg
        yield place, _field(arg), arg.partition("=")[2] if joined else following, 1 if joined or not following else 2


def _check_names(args: Sequence[str], known: dict[str, str], prog: str) -> None:
    """Raises ConfigError for an option that is not `known`: field -> option."""
    for place, name, *_ in _given(args):
        option = args[place].partition("=")[0]
        require(not name.startswith("optim.rules"), "optim.rules", option, "rules are set in CONFIG.py, not by options")
        if name not in (*known, "help"):
            meant = known[nearest(name, known)]
            raise ConfigError(f"{option}: there is no such field; the nearest is {meant} (`{prog} --help` lists all)")


def _without_evals(args: list[str], run: Run) -> tuple[list[str], Run]:
    """The arguments without `--evals none`, and the run without evaluations if it was among them."""
    for place, name, value, count in _given(args):
        if name == "evals":
            remedy = "only none is possible; evaluations are chosen in CONFIG.py, and their fields are --evals.0.every and so on"
            require(value.lower() == "none", "--evals", value, remedy)
            return _without_evals(args[:place] + args[place + count :], _unchecked(run, evals=()))
    return args, run


def _with_kinds(run: Run, args: Sequence[str]) -> Run:
    """The run with objects of the kinds that `args` name. They have the old ones' values where both have a field."""
    given = {name: value for _, name, value, _ in _given(args)}
    for field, kinds in KINDS.items():
        kind = given.get(f"{field}.kind", "")
        if not kind:  # tyro asks for a value that is missing
            continue
        remedy = f"must be {', '.join(kinds)}; the nearest is {nearest(kind, kinds)}"
        require(kind in kinds, f"--{field}.kind", kind, remedy)
        *parents, name = field.split(".")
        parent = getattr(run, parents[0]) if parents else run
        old = getattr(parent, name)
        if old.kind != kind:
            changed = _unchecked(parent, **{name: _of_kind(kinds[kind], old, field, given)})
            run = _unchecked(run, **{parents[0]: changed}) if parents else changed
    return run


def _with_init(run: Run, args: Sequence[str]) -> Run:
    """The run with an `init` for tyro to fill, where `args` name fields of it and the run has none; or for help to show."""
    given = {name: value for _, name, value, _ in _given(args)}
    if run.init is None and "help" in given:
        return _unchecked(run, init=Init(run="none"))
    if run.init is not None or not any(f"init.{f.name}" in given for f in dataclasses.fields(Init)):
        return run
    return _unchecked(run, init=_of_kind(Init, None, "init", given))


def _of_kind(kind: type, old: Any, field: str, given: dict[str, str]) -> Any:
    """An object of the class `kind` with what `old` has of its fields, and defaults. Fields without default must be `given`."""
    import tyro

    made = object.__new__(kind)
    for f in dataclasses.fields(kind):
        if f.name != "kind" and hasattr(old, f.name):
            value = getattr(old, f.name)
        else:
            value = tyro.MISSING if f.default is dataclasses.MISSING else f.default
        needed = value is tyro.MISSING and f"{field}.{f.name}" not in given and "help" not in given
        if needed:
            raise ConfigError(f"{field}.{f.name}: is missing: give --{field}.{f.name} too")
        made.__dict__[f.name] = value
    return made


def _unchecked(config: Any, **changes: Any) -> Any:
    """A copy with other values. Nothing is checked: what does not fit yet may fit once all options are applied."""
    made = object.__new__(type(config))
    made.__dict__.update(vars(config) | changes)
    return made


def _registry() -> "ConstructorRegistry":
    """How tyro makes options of an open union's objects: by the classes that they are, registered ones included. And of a closed
    union's `kind`: `_with_kinds` has made an object of that kind already, and help lists the others.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

    registry = ConstructorRegistry()
    kinds = {Literal[kind]: tuple(of_field) for of_field in KINDS.values() for kind in of_field}

    @registry.struct_rule
    def objects(info: "StructTypeInfo") -> "StructConstructorSpec | None":
        if not isinstance(info.default, tuple) or not any(isinstance(x, OpenUnion) for x in info.default):
            return None
        fields = tuple(StructFieldSpec(name=str(i), type=type(x), default=x) for i, x in enumerate(info.default))
        return StructConstructorSpec(instantiate=lambda **kw: tuple(kw.values()), fields=fields)

    @registry.primitive_rule
    def kind(info: "PrimitiveTypeInfo") -> PrimitiveConstructorSpec | None:
        if info.type not in kinds:
            return None
        choices = kinds[info.type]
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(choices) + "}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: value in choices,
            str_from_instance=lambda value: [value],
            choices=choices,
        )

    return registry


def _unboxed(text: str) -> str:
    """The message of tyro in one line, without the box around it, the box's title and the hints below it."""
    rows = (line.strip("│ ") for line in text.splitlines() if line.startswith("│"))
    message = " ".join(row for row in rows if row.strip("─")) or " ".join(text.split())
    return message.partition(" For full helptext")[0].partition(" Argument helptext")[0]


def _config_error(stop: BaseException | None) -> ConfigError | None:
    """The ConfigError of a configuration class that led to `stop`. tyro would print it in a box, with line breaks and another
    name.
    """
    while stop is not None and not isinstance(stop, ConfigError):
        stop = stop.__context__
    return stop
