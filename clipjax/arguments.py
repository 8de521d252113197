"""Types of command-line arguments. A wrong value raises ArgumentTypeError, before any work begins."""

import argparse
import os
from pathlib import Path

from clipjax import files
from clipjax.config import ConfigError


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be positive")
    return number


def nonnegative(text: str) -> float:
    """A number of 0 or more."""
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{number:g} must not be negative")
    return number


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(text.split(","))


def step_range(text: str) -> range:
    """`FROM:TO`, two numbers of finished steps."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r} must be FROM:TO with whole numbers, 0 <= FROM < TO, as 100:110")
    return range(int(first), int(end))


def writable_file(text: str) -> Path:
    """A file that can be written, local or on gs:// or s3://. Checked before hours of work, not after; creates nothing."""
    path = place(text)
    if files.scheme(path) is None and path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    writable_folder(str(path.parent))
    return path


def writable_folder(text: str) -> Path:
    """A folder to write into, local or on gs:// or s3://, that exists or can be made."""
    path = place(text)
    if files.scheme(path) is None:
        return local_folder(text)
    try:
        files.check_writable(path)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def place(text: str) -> Path:
    """A path, local or on gs:// or s3://."""
    try:
        return files.as_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local(text: str) -> Path:
    """A file or folder of this machine."""
    if files.scheme(place(text)):
        raise argparse.ArgumentTypeError(f"{text} is remote: copy it to this machine, and name that")
    return Path(text)


def local_folder(text: str) -> Path:
    """A folder of this machine to write into, that exists or can be made."""
    if files.scheme(place(text)):
        raise argparse.ArgumentTypeError(f"{text} is remote: name a folder of this machine, and copy that")
    path = Path(text).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))  # Path.exists raises where a parent is not readable
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is a file: name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{nearest} can't be written to: name another folder")
    return Path(text)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help
