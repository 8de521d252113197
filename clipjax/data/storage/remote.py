"""Prepared datasets on gs:// and s3://: uploaded, and copied once to each machine, because ArrayRecord reads local files."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from clipjax.config import ConfigError
from clipjax.files import local_path, reach, scheme, store

FEATURES = "features.json"  # with this file tfds takes a folder for a prepared dataset
GROUP = 64  # files that are copied at a time, in parallel
SAY_EVERY = 10.0  # seconds between two lines of progress

_Version = tuple[int, str]  # size in bytes, and what the store calls this version of the file


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a complete dataset. Raises ConfigError if its store can't be reached."""
    return reach(folder, (folder / FEATURES).is_file)


def local_copy(folder: Path, split: str, shards: Collection[str]) -> Path:
    """A folder of this machine with the files of one split of a prepared dataset: `folder` itself where that is local.

    `shards`: the names of the split's files. A remote folder is copied to $XDG_CACHE_HOME/clipjax/tfds, which is ~/.cache/... by
    default, unless that has a copy of the same files. One process of a machine copies, and the others wait. The copy appears
    complete or not at all, and then takes the place of copies of earlier versions of the files. One that was interrupted goes on
    with the files that are missing.

    Raises ConfigError where a file is missing or the disk lacks the room, and OSError where the store fails.
    """
    if scheme(folder) is None:
        return folder
    files = _files(folder, shards)
    copies = local_path("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    copies = copies / "clipjax" / "tfds" / os.fspath(folder).replace("://", "/")
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]
    target = copies / f"{split}-{digest}"
    copies.mkdir(parents=True, exist_ok=True)
    with alone(copies / "lock"):
        if not target.exists():
            part = copies / f"incomplete.{target.name}"
            part.mkdir(exist_ok=True)
            _copy(folder, files, part)
            part.rename(target)
            for old in (*copies.glob(f"{split}-*"), *copies.glob(f"incomplete.{split}-*")):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    return target


def upload(source: Path, target: Path) -> None:
    """Copies a prepared dataset of this machine to a remote folder. The file that makes it a dataset goes there last."""
    remote = store(target)
    if (target / FEATURES).is_file():  # else readers would see a mixture of old and new files
        remote.rm_file(os.fspath(target / FEATURES))
    for file in sorted(source.iterdir(), key=lambda file: file.name == FEATURES):
        remote.put_file(str(file), os.fspath(target / file.name))


def _files(folder: Path, shards: Collection[str]) -> dict[str, _Version]:
    """The files of a split, by name: its shards and what the splits share."""
    entries = store(folder).find(os.fspath(folder), maxdepth=1, detail=True)
    listed = {os.path.basename(name): entry for name, entry in entries.items()}
    if missing := sorted(set(shards) - listed.keys()):
        raise ConfigError(f"{folder}: lacks {missing[0]}, one of {len(missing)} files: copy the whole dataset there again")
    of_all = {name for name in listed if "-of-" not in name}  # shards are called ...-00000-of-00001
    versions = {name: (entry["size"], str(entry.get("etag") or entry.get("ETag"))) for name, entry in listed.items()}
    return {name: versions[name] for name in of_all | set(shards)}


def _copy(folder: Path, files: dict[str, _Version], part: Path) -> None:
    """Copies those of the files that are not yet in the folder `part`."""
    there = {file.name: file.stat().st_size for file in part.iterdir()}
    names = [name for name in sorted(files) if there.get(name) != files[name][0]]
    total, copied, said = sum(files[name][0] for name in names), 0, time.monotonic()
    free = shutil.disk_usage(part).free
    if total > free:
        remedy = "set XDG_CACHE_HOME to a folder with room, or mount the bucket (gcsfuse, mount-s3) and set TFDS_DATA_DIR to that"
        raise ConfigError(f"{folder}: {_gb(total)} must be copied, and {part.parent} has room for {_gb(free)}: {remedy}")
    print(f"{folder}: copying {_gb(total)} in {len(names):,} files to {part.parent}", file=sys.stderr, flush=True)
    for start in range(0, len(names), GROUP):
        group = names[start : start + GROUP]
        _get(folder, group, part)
        copied += sum(files[name][0] for name in group)
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            print(f"{folder}: copied {_gb(copied)} of {_gb(total)}", file=sys.stderr, flush=True)


def _get(folder: Path, names: list[str], target: Path) -> None:
    try:
        store(folder).get([os.fspath(folder / name) for name in names], [str(target / name) for name in names])
    except Exception as error:  # each store's library has its own exceptions
        raise OSError(f"{folder}: can't be copied to {target} ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """For `with`: only one process of this machine is inside at a time."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
