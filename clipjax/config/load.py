"""A configuration from a Python file and the options of a command line."""

import contextlib
import difflib
import importlib.util
import io
import sys
import traceback
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from clipjax.config import ConfigError, Run, lines, require
from clipjax.config.packaged import config_path
from clipjax.config.unions import OpenUnion, loading

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

_neighbours: set[str] = set()  # names of the modules that the latest config file imported from its own folder


def load_config(path: str) -> Run:
    """What the `config()` of a Python file returns. `path` may also be the NAME of a packaged config.

    The file can import its neighbours: its folder is first on sys.path while it is loaded. Raises ConfigError if there is no such
    file, or if it raises.
    """
    file = config_path(path).absolute()  # as tracebacks name it
    require(file.is_file(), "CONFIG.py", path, "is not a file; `clipjax configs` lists those that come with clipjax")
    try:
        with _neighbours_of(file), loading(str(file)):
            module = _execute(file)
            require(hasattr(module, "config"), "CONFIG.py", path, "has no function config() that returns a clipjax.config.Run")
            run = module.config()
    except ConfigError:
        raise
    except Exception as error:  # the file can raise anything
        numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            numbers.append(error.lineno)
        where = f"{path}, line {numbers[-1]}" if numbers else path
        raise ConfigError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}") from error
    require(isinstance(run, Run), f"config() of {path}", type(run).__name__, "must return a clipjax.config.Run")
    return run


def _execute(file: Path) -> ModuleType:
    """The module of a config file. It stays in sys.modules, where pydantic and `inspect` look up a class that it defines."""
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"CONFIG.py = {str(file)!r}: is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module_name(file: Path) -> str:
    """One name a file, also where two files in two folders are called the same."""
    return f"config_{file.stem}_{zlib.crc32(bytes(file.resolve())):08x}"


@contextlib.contextmanager
def _neighbours_of(file: Path) -> Iterator[None]:
    """Lets a config file import the modules of its folder.

    The next config file starts without these modules: its own folder may hold others of the same names.
    """
    for name in _neighbours:
        sys.modules.pop(name, None)
    _neighbours.clear()
    folder, before = file.resolve().parent, {*sys.modules, _module_name(file)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # Python's list of the folder may be older than a neighbour
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        new = {name: module for name, module in sys.modules.items() if name.partition(".")[0] not in before}
        local = {name for name, module in new.items() if "." not in name and _belongs_to(module, folder)}
        _neighbours.update(name for name in new if name.partition(".")[0] in local)


def _belongs_to(module: ModuleType, folder: Path) -> bool:
    """Whether a top-level module is a file or a package of `folder`."""
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    return any(Path(place).parent == folder for place in places if place)


def override(run: Run, args: Sequence[str], prog: str) -> Run:
    """`run` with the options `--any.field VALUE ...`. Rules by parameter name can be set in the file only.

    Raises ConfigError for an unknown field, with the nearest one, and for an impossible value. Exits with 2 for a wrong type.
    """
    import tyro

    rules = run.optim.rules
    run = replace(run, optim=replace(run.optim, rules=()))  # tyro makes no options of an empty tuple
    values = dict(line.split(" = ", 1) for line in lines(run))
    fields = [name for name, value in values.items() if value != "()" or name == "train.skip"]
    for option in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        name = option.removeprefix("--").replace("-", "_")
        require(not name.startswith("optim.rules"), "optim.rules", option, "rules are set in CONFIG.py, not by options")
        if name not in (*fields, "help"):
            nearest = difflib.get_close_matches(name, fields, 1, cutoff=0)[0]
            raise ConfigError(f"{option}: there is no such field; the nearest is --{nearest} (`{prog} --help` lists all)")
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            run = tyro.cli(Run, default=run, args=list(args), prog=prog, config=options, registry=_registry())
    except SystemExit as stop:
        if cause := _config_error(stop):
            raise cause from None
        print(printed.getvalue(), end="", file=sys.stderr)
        raise
    return replace(run, optim=replace(run.optim, rules=rules))


def _registry() -> "ConstructorRegistry":
    """How tyro makes options of an open union's objects: by the classes that they are, registered ones included."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def objects(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not isinstance(info.default, tuple) or not any(isinstance(x, OpenUnion) for x in info.default):
            return None
        fields = tuple(StructFieldSpec(name=str(i), type=type(x), default=x) for i, x in enumerate(info.default))
        return StructConstructorSpec(instantiate=lambda **kw: tuple(kw.values()), fields=fields)

    return registry


def _config_error(stop: BaseException | None) -> ConfigError | None:
    """The ConfigError of a __post_init__ that led to `stop`. tyro would print it in a box, with line breaks and another name."""
    while stop is not None and not isinstance(stop, ConfigError):
        stop = stop.__context__
    return stop
