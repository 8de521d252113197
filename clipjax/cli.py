"""The command line: `clipjax COMMAND --help` lists each command's options, units and defaults.

Exit status: 0 success; 1 failure (a full disk, a verification that does not hold, an error); 2 wrong use; 3 failed, and the
same command will fail again (a loss that is not finite, too many bad examples). `train` also has 75: it was asked
to stop and has saved its state, and the same command resumes, or, under a launcher that starts it again, another job trains in
the workdir; and 130, the same as the first after Ctrl-C. 141: the program that read the output has ended.
"""

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import clipjax
from clipjax import commands, config, environment, preemption
from clipjax.arguments import Help
from clipjax.config.fields import nearest
from clipjax.config.packaged import packaged_configs
from clipjax.declared import Argument, Command
from clipjax.options import COMMANDS, GROUPS
from clipjax.status import BROKEN_PIPE_STATUS, CERTAIN_STATUS, INTERRUPTED_STATUS, WRONG_USE_STATUS, CertainFailure

# What the user can mend, as a file's name shows. Any other error of a file (EIO, ESTALE of a network disk) may pass.
OF_A_NAME = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
STATUSES = (
    "Exit status: 0 success; 1 failed; 2 wrong use; 3 failed, and the same command will fail again; 75 preempted, start again; "
    "130 interrupted."
)
OUT_OF_MEMORY = "lower train.batch_size or raise train.micro_batches; `clipjax plan` says what fits"


def program() -> None:
    """The entry point. Replaces itself once by a program with the environment variables that libraries read at start, then runs
    `main`.
    """
    if sys.platform == "linux" and not environment.MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, environment.wanted() | os.environ)
    try:
        try:
            status = main()
        except SystemExit as end:  # of argparse, as after --help
            status = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        status = BROKEN_PIPE_STATUS
    if status == BROKEN_PIPE_STATUS:  # or Python would complain again at its end, when it flushes these
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[_ToStderr()])
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is intended, as of a folder that is only read
    args, expected, message = None, True, None
    try:
        args = _parse(argv)
        status = args.run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        status, message, expected = _outcome(error, resumes=args is not None and args.run is commands.train)
        if not expected and not _distributed():
            raise
    if joined := _distributed():  # processes of one run end together, and one of them prints the message
        message = joined.leave(status, message, not expected)
    if message is not None and status != BROKEN_PIPE_STATUS:
        print(f"clipjax: {message}", file=sys.stderr)
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. `rest` holds those that this parser does not know: for a command with `fields`, fields of the config."""
    words, found = _config_first(sys.argv[1:] if argv is None else list(argv))
    args, args.rest = make_parser().parse_known_args(words)
    if args.fields and not found:
        args.config = None  # argparse took the value of an option that it does not know
    if args.rest and not args.fields:
        options = [word for word in args.rest if word.startswith("--")]
        near = f"; the nearest of {options[0]} is {nearest(options[0], args.own_options)}" if options and args.own_options else ""
        args.parser.error(f"unrecognized arguments: {' '.join(args.rest)}{near}")
    return args


def _config_first(words: list[str]) -> tuple[list[str], bool]:
    """The words of a command line, with CONFIG.py|NAME before the options; and whether there is one.

    argparse knows no field of a config, so it cannot tell their values from it. What follows an option is its value.
    """
    command = next((c for c in COMMANDS if c.fields and words[: len(c.name.split())] == c.name.split()), None)
    if command is None:
        return words, False
    start = len(command.name.split())
    flags = {"-h", "--help", *(a.name for a in _own(command) if a.keywords.get("action") == "store_true")}
    pairs = list(zip(words[start - 1 :], words[start:], strict=False))
    free = [
        place
        for place, (before, word) in enumerate(pairs, start)
        if not word.startswith("-") and (not before.startswith("--") or "=" in before or before in flags)
    ]
    names = packaged_configs()
    config_like = [place for place in free if words[place].endswith(".py") or "/" in words[place] or words[place] in names]
    if not free:
        return words, False
    place = (config_like or free)[0]
    return [*words[:start], words[place], *words[start:place], *words[place + 1 :]], True


def _outcome(error: BaseException, resumes: bool) -> tuple[int, str, bool]:
    """Exit status and message of a command that ended with `error`, and whether the error is one that users may meet.

    `resumes`: whether the same command, started again, goes on where it stopped.
    """
    match error:
        case config.ConfigError() | argparse.ArgumentTypeError():
            return WRONG_USE_STATUS, str(error), True
        case CertainFailure() | FloatingPointError():
            return CERTAIN_STATUS, str(error), True
        case BrokenPipeError(filename=None):
            return BROKEN_PIPE_STATUS, "the program that read its output has ended", True
        case OSError(filename=name) if name:
            return WRONG_USE_STATUS if error.errno in OF_A_NAME else 1, f"{name}: {error.strerror}", True
        case OSError():
            return 1, str(error), True
        case RuntimeError() if str(error).startswith("RESOURCE_EXHAUSTED"):  # of JAX
            # What does not fit when it is compiled never will. Memory that is missing later may be another process's that ends.
            status = CERTAIN_STATUS if "compile permanent error" in str(error) else 1
            return status, f"{str(error).splitlines()[0]} Remedy: {OUT_OF_MEMORY}", True
        case preemption.Preempted() | preemption.OwnedError():
            return error.status, str(error), True
        case KeyboardInterrupt():
            return INTERRUPTED_STATUS, "interrupted" + "; the same command resumes from the newest checkpoint" * resumes, True
    return 1, "".join(traceback.format_exception(error)), False


def _distributed() -> ModuleType | None:
    """clipjax.distributed, where the command has joined this process to others."""
    if "jax" not in sys.modules:  # the command needed no devices
        return None
    from clipjax import distributed

    return distributed if distributed.joined() else None


class _ToStderr(logging.Handler):
    """Prints to the sys.stderr of the moment, which the progress line replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Its result holds `run`, the command's function, `parser`, the command's own, and `fields`."""
    parser = argparse.ArgumentParser(prog="clipjax", description=clipjax.__doc__, epilog=STATUSES)
    parser.add_argument("--version", action="version", version=f"clipjax {clipjax.__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            of_group = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = of_group.add_subparsers(required=True, metavar="WHAT")
        _add(groups[group], name, command)
    return parser


def _own(command: Command) -> list[Argument]:
    """A command's arguments, those that exclude each other included."""
    return [a for entry in command.arguments for a in ([entry] if isinstance(entry, Argument) else entry)]


def _add(under: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, command: Command) -> None:
    parser = under.add_parser(
        name,
        help=command.help,
        description=command.help,
        formatter_class=Help,
        allow_abbrev=False,
        add_help=not command.fields,
    )
    own = [argument.name for argument in _own(command) if argument.name.startswith("--")]
    parser.set_defaults(run=command.run, parser=parser, fields=command.fields, own_options=own)
    if command.fields:
        what = "a Python file with config() -> clipjax.config.Run, or a name that `clipjax configs` lists"
        parser.add_argument("config", nargs="?", metavar="CONFIG.py|NAME", help=what)
        what = "show this; after CONFIG.py|NAME all its fields, each of which is an option"
        parser.add_argument("-h", "--help", action="store_true", help=what)
    for entry in command.arguments:
        if isinstance(entry, Argument):
            parser.add_argument(entry.name, **entry.keywords)
        else:
            group = parser.add_mutually_exclusive_group()
            for argument in entry:
                group.add_argument(argument.name, **argument.keywords)


if __name__ == "__main__":
    program()
