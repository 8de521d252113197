"""A configuration from a Python file."""

import contextlib
import importlib.util
import sys
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from clipjax.config import ConfigError, Run, Suite, require
from clipjax.config.packaged import config_path, suite_path
from clipjax.config.unions import loading

_neighbours: set[str] = set()  # names of the modules that the latest config file imported from its own folder


def load_config(path: str) -> Run:
    """What the `config()` of a Python file returns. `path` may also be the NAME of a packaged config.

    The file can import its neighbours: its folder is first on sys.path while it is loaded. Raises ConfigError if there is no such
    file, or if it raises.
    """
    file = config_path(path).absolute()  # as tracebacks name it
    require(file.is_file(), "CONFIG.py", path, "is not a file; `clipjax configs` lists those that come with clipjax")
    run = _called(file, path, "config", "CONFIG.py", Run)
    require(type(run) is Run, f"config() of {path}", type(run).__name__, "must return a clipjax.config.Run")
    return run


def load_suite(path: str) -> Suite:
    """What the `suite()` of a Python file returns, which is read as a config file. `path` may also be the NAME of a suite."""
    file = suite_path(path).absolute()
    require(file.is_file(), "SUITE", path, "is not a file")
    suite = _called(file, path, "suite", "SUITE", Suite)
    require(type(suite) is Suite, f"suite() of {path}", type(suite).__name__, "must return a clipjax.config.Suite")
    return suite


def _called(file: Path, path: str, function: str, what: str, kind: type) -> Any:
    """What a function of a file returns. Raises ConfigError for whatever the file raises, with its line."""
    try:
        with _neighbours_of(file), loading(str(file)):
            module = _execute(file)
            has = hasattr(module, function)
            require(has, what, path, f"has no function {function}() that returns a clipjax.config.{kind.__name__}")
            return getattr(module, function)()
    except Exception as error:  # the file can raise anything
        numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            numbers.append(error.lineno)
        where = f"{path}, line {numbers[-1]}" if numbers else path
        if isinstance(error, ConfigError):  # of the file's own values, or of the file as such
            raise (ConfigError(f"{where}: {error}") if numbers else error) from error
        raise ConfigError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}") from error


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
