"""Compare and swap: replaces a small file, local or on gs:// or s3://, only if nobody else has changed it since it was read.

Of several programs that try at the same time, exactly one succeeds. No two contents may ever be equal, so put something unique
into each.

- gs://: the condition is the object's generation.
- s3://: the condition is the object's ETag (If-Match, If-None-Match). A store that ignores it, or refuses it, has no such thing:
  `is_exclusive` finds out.
- Local, network file systems and macOS included: no operation replaces a file on a condition, but making a new one fails where
  it exists. So the new content becomes the file `.NAME.HASH`, with the hash of the content that it replaces, and then takes the
  place of NAME. If a program dies in between, `.NAME.HASH` counts as the file's content.
"""

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clipjax.files import scheme, store

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # a file system without hard links
CHANGED, NOT_IMPLEMENTED = (409, 412), 501  # HTTP statuses of S3


class Version(NamedTuple):
    """What a file contained when it was read or written."""

    content: bytes
    tag: str = ""  # of a store: what it calls this version


def read(path: Path) -> Version | None:
    """The file's newest version; None where there is no file."""
    match scheme(path):
        case "gs":
            return _read_gs(path)
        case "s3":
            return _read_s3(path)
    versions = _chain(path)
    return Version(versions[-1][1]) if versions else None


def swap(path: Path, before: Version | None, content: bytes) -> Version | None:
    """Writes `content` if the file still is as `before`; None: if there is none. Returns the new version, or None if it is not.

    Makes the folder of a local path.
    """
    write = {"gs": _swap_gs, "s3": _swap_s3}.get(scheme(path) or "", _swap_local)
    if written := write(path, before, content):
        return written
    now = read(path)  # a library that got no answer asks again, and then meets its own first write
    return now if now and now.content == content else None


def remove(path: Path) -> None:
    """Deletes the file, if there is one."""
    if scheme(path) is None:
        for file, _ in reversed(_chain(path)):
            file.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        store(path).rm_file(os.fspath(path))


def is_exclusive(path: Path, now: Version) -> bool:
    """Whether the file's store heeds conditions: it must refuse to make a file that exists, here of version `now`."""
    if scheme(path) != "s3":
        return True
    return _swap_s3(path, None, now.content) is None


def _chain(path: Path) -> list[tuple[Path, bytes]]:
    """A local file, and the files that replace it and are not yet in its place, each with its content; the last one counts."""
    found: dict[Path, bytes] = {}
    file = path
    with contextlib.suppress(FileNotFoundError):
        while file not in found:  # a content that replaces its equal would be its own successor
            found[file] = file.read_bytes()
            file = _successor(path, found[file])
    return list(found.items())


def _successor(path: Path, content: bytes) -> Path:
    return path.with_name(f".{path.name}.{hashlib.sha256(content).hexdigest()[:16]}")


def _swap_local(path: Path, before: Version | None, content: bytes) -> Version | None:
    target = path if before is None else _successor(path, before.content)
    if not _create(target, content):
        return None
    versions = _chain(path)
    if not versions or versions[-1][1] != content:  # `before` was not the newest version, so nobody looks at this file
        target.unlink(missing_ok=True)
        return None
    if before is not None:
        with _temporary(path, content) as part:
            os.replace(part, path)
        for file, _ in versions[1:]:
            file.unlink(missing_ok=True)
    return Version(content)


def _create(target: Path, content: bytes) -> bool:
    """Makes a local file, which is complete as soon as it is there. Returns False where it exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target, content) as part:
        try:
            os.link(part, target)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    with contextlib.suppress(FileExistsError), target.open("xb") as file:
        file.write(content)
        return True
    return False


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """For `with`: another file with the content, beside `path`."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(content)
        yield part
    finally:
        part.unlink(missing_ok=True)


def _read_gs(path: Path) -> Version | None:
    files = store(path)
    try:
        headers, content = files.call("GET", files.url(os.fspath(path)))
    except FileNotFoundError:
        return None
    return Version(content, headers["x-goog-generation"])


def _swap_gs(path: Path, before: Version | None, content: bytes) -> Version | None:
    files = store(path)
    bucket, name, _ = files.split_path(os.fspath(path))
    url = f"{files._location}/upload/storage/v1/b/{bucket}/o"
    condition = {"ifGenerationMatch": before.tag if before else "0"}
    try:
        made = files.call("POST", url, uploadType="media", name=name, data=content, json_out=True, **condition)
    except FileExistsError:  # status 412
        return None
    return Version(content, made["generation"])


def _read_s3(path: Path) -> Version | None:
    from fsspec.asyn import sync

    files = store(path)
    bucket, key, _ = files.split_path(os.fspath(path))

    async def get() -> Version:
        got = await files._call_s3("get_object", Bucket=bucket, Key=key)
        async with got["Body"] as body:
            return Version(await body.read(), got["ETag"])

    try:
        return sync(files.loop, get)
    except FileNotFoundError:
        return None


def _swap_s3(path: Path, before: Version | None, content: bytes) -> Version | None:
    files = store(path)
    bucket, key, _ = files.split_path(os.fspath(path))
    condition = {"IfMatch": before.tag} if before else {"IfNoneMatch": "*"}
    for more in (condition, {}):  # without a condition only where the store knows none
        try:
            made = files.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **more)
            return Version(content, made["ETag"])
        except FileNotFoundError:  # for IfMatch
            return None
        except OSError as error:
            status = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in CHANGED:
                return None
            if not more or status != NOT_IMPLEMENTED:
                raise
    return None
