"""Kinds of arguments of the command line. What is wrong with one is an ArgumentTypeError, told before anything is done."""

import argparse
import os
from pathlib import Path

from clipjax import files
from clipjax.config import ConfigError


def positive(text: str) -> int:
    """A number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be positive")
    return number


def writable_file(text: str) -> Path:
    """A file that can be written, local or on gs:// or s3://. Said before hours of work, not after; nothing stays behind."""
    path = _place(text)
    if files.scheme(path) is None and path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    writable_folder(str(path.parent))
    return path


def writable_folder(text: str) -> Path:
    """A folder that is there or can be made, local or on gs:// or s3://, to write into."""
    path = _place(text)
    if files.scheme(path) is None:
        return local_folder(text)
    try:
        files.check_writable(path)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def _place(text: str) -> Path:
    try:
        return files.as_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_folder(text: str) -> Path:
    """A folder of this machine that is there or can be made, to write into."""
    if files.scheme(_place(text)):
        raise argparse.ArgumentTypeError(f"{text} is remote: name a folder of this machine, and copy that")
    path = Path(text).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))  # unlike Path.exists, also where nobody may look
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is a file: name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{nearest} can't be written to: name another folder")
    return Path(text)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are told where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help
