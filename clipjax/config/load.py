"""A configuration from a Python file and the options of a command line."""

import contextlib
import difflib
import importlib.util
import io
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipjax.config import ConfigError, Run, lines, require


def load_config(path: str) -> Run:
    """What the `config()` of a Python file returns. Raises ConfigError where there is no such thing, or the file fails."""
    require(Path(path).is_file(), "CONFIG.py", path, "is not a file; those of clipjax are in configs/")
    spec = importlib.util.spec_from_file_location("clipjax_config", path)
    require(spec is not None and spec.loader is not None, "CONFIG.py", path, "is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(hasattr(module, "config"), "CONFIG.py", path, "has no function config() that returns a clipjax.config.Run")
        run = module.config()
    except ConfigError:
        raise
    except Exception as error:  # whatever the file may raise
        numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        if isinstance(error, SyntaxError) and error.filename == spec.origin:
            numbers.append(error.lineno)
        where = f"{path}, line {numbers[-1]}" if numbers else path
        raise ConfigError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}") from error
    require(isinstance(run, Run), f"config() of {path}", type(run).__name__, "must return a clipjax.config.Run")
    return run


def override(run: Run, args: Sequence[str], prog: str) -> Run:
    """`run` with `--any.field VALUE ...`; rules by parameter name are set in the file only.

    Raises ConfigError for an unknown field, naming the nearest, and for an impossible value; an ill-typed one exits with 2.
    """
    import tyro

    rules = run.optim.rules
    run = replace(run, optim=replace(run.optim, rules=()))  # tyro makes no option of what is empty
    fields = [name for name, _, value in (line.partition(" = ") for line in lines(run)) if value != "()"]
    for option in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        name = option.removeprefix("--").replace("-", "_")
        require(not name.startswith("optim.rules"), "optim.rules", option, "rules are set in CONFIG.py, not here")
        if name not in (*fields, "help"):
            nearest = difflib.get_close_matches(name, fields, 1, cutoff=0)[0]
            raise ConfigError(f"{option}: there is no such field; the nearest is --{nearest} (`{prog} --help` lists all)")
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            run = tyro.cli(Run, default=run, args=list(args), prog=prog, config=options)
    except SystemExit as stop:
        if refusal := _refusal(stop):
            raise refusal from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise
    return replace(run, optim=replace(run.optim, rules=rules))


def _refusal(stop: BaseException | None) -> ConfigError | None:
    """The ConfigError of a __post_init__ that led to `stop`; tyro says it in a box, broken over lines, and with another name."""
    while stop is not None and not isinstance(stop, ConfigError):
        stop = stop.__context__
    return stop
