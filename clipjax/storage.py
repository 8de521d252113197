"""What the errors of a storage mean for checkpoints: damage, no room, or no answer."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from clipjax.status import CertainFailure

WEIGHTS_ONLY = "weights_only"  # item of a checkpoint that holds weights and no state of training: who made it
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota or the largest size of a file is reached


# TensorStore writes the arrays. _DAMAGE: its messages for files that are missing, truncated or garbled. _NO_ANSWER: its messages
# for a storage that does not answer now but may have the files: such a checkpoint is not damaged.
_DAMAGE = re.compile(r"\b(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE)\b|Encountered error while reading array index")
_NO_ANSWER = re.compile(
    r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED)\b"
)
_ERRNO = re.compile(r"os_error_code='(\d+)'")


class SaveError(OSError):
    """A checkpoint could not be written. The message names the workdir, the last good checkpoint and the remedy."""


class DamagedError(CertainFailure):
    """A checkpoint exists and can't be read: files are missing, truncated or garbled."""


@contextlib.contextmanager
def reading(workdir: Path, step: int) -> Iterator[None]:
    """For `with`: turns an error that means damage into a DamagedError."""
    try:
        checkpoint = workdir / "checkpoints" / str(step)
        training = f"{WEIGHTS_ONLY}/metadata" if (checkpoint / WEIGHTS_ONLY).exists() else "training/_METADATA"
        for item in ("config/metadata", "params/_METADATA", training):  # Orbax would guess if one is missing
            if not (file := checkpoint / item).exists():
                raise FileNotFoundError(f"{file} is missing")
        yield
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        text = "\n".join(map(str, causes))
        damaged = any(isinstance(e, FileNotFoundError | json.JSONDecodeError) for e in causes) or _DAMAGE.search(text)
        if not damaged or _NO_ANSWER.search(text):
            raise
        raise DamagedError(f"{workdir}@{step} can't be read: {str(causes[-1]).splitlines()[0]:.200}") from error


def refusal(error: BaseException) -> str | None:
    """The storage's own message, if it refused to write; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := _ERRNO.search(str(error)):
        return os.strerror(int(found[1]))
    return str(error).splitlines()[0][:200] if _NO_ANSWER.search(str(error)) else None
