"""No remote path goes through pathlib: pathlib.Path("s3://bucket/run") is the local folder s3:/bucket/run. `watch` makes that an
error where clipjax does it; `python tests/guard.py ARGUMENTS` is `clipjax ARGUMENTS` under watch."""

import os
import pathlib
import re
import sys
from collections.abc import Callable

CLIPJAX = str(pathlib.Path(__file__).parents[1] / "clipjax")


def watch() -> Callable[[], None]:
    """Starts; returns what ends it."""
    new = pathlib.Path.__new__

    def watched(cls: type, *args: object, **kwargs: object) -> pathlib.Path:
        remote = any(re.match("(gs|s3):/", os.fspath(x)) for x in args if isinstance(x, str | os.PathLike))
        if remote and sys._getframe(1).f_code.co_filename.startswith(CLIPJAX):
            raise AssertionError(f"pathlib is given {args}")
        return new(cls, *args, **kwargs)

    pathlib.Path.__new__ = watched

    def unwatch() -> None:
        pathlib.Path.__new__ = new

    return unwatch


if __name__ == "__main__":
    watch()
    from clipjax import cli

    sys.exit(cli.main(sys.argv[1:]))
