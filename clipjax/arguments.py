"""Kinds of arguments of the command line. What is wrong with one is an ArgumentTypeError, told before anything is done."""

import argparse
import os
from pathlib import Path


def positive(text: str) -> int:
    """A number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be positive")
    return number


def writable_file(text: str) -> Path:
    """A file that can be written. Said before hours of work, not after; nothing is made."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    writable_folder(str(Path(text).parent))
    return Path(text)


def writable_folder(text: str) -> Path:
    """A folder that is there or can be made, to write into."""
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
