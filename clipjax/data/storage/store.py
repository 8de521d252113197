"""Files of a dataset wherever they lie: on this machine, gs://, s3://, https:// or hf://. They are found by folders, patterns
and braces here, and read by ranges in ranges.py. `clipjax.files` is for what a run writes.
"""

import functools
import glob
import os
import posixpath
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from clipjax.config import ConfigError
from clipjax.data.storage.ranges import Stored, attempt, open_file, read, scheme_of, system
from clipjax.files import CREDENTIALS

__all__ = ["Stored", "expand", "find", "open_file", "read", "scheme_of"]
REMEDIES = CREDENTIALS | {"hf": "`hf auth login`, or HF_TOKEN"}
AT_ONCE = 32  # files of a web server that are asked for at once
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
TAGS = ("etag", "ETag", "blob_id", "md5Hash", "mtime", "updated", "LastModified", "created")  # what stores call a file's version


def find(name: str, patterns: str, suffixes: tuple[str, ...], given: str | None = None) -> list[Stored]:
    """The files that `patterns` name: in the order of the patterns, those of each sorted.

    Several patterns are joined by `::`. Each is a file, a folder (of which files with one of the suffixes are taken, in its
    sub-folders too), or has braces (`{00000..01242}`, `{a,b}`) or wildcards (`*`, `?`, `[`). Braces name files that must exist;
    folders and wildcards take those that are there. Web servers list no folders, so there braces alone are possible.

    `name`: what the user calls it; `given`: what the user wrote, if that is more than the patterns. Raises ConfigError for what
    does not exist, may not be read or is named twice, and OSError where a store can't be reached."""
    found: dict[str, Stored] = {}
    for pattern in patterns.split("::"):
        called = f"{name} = {given or patterns!r}"
        files = _find(called, pattern, suffixes)
        if twice := next((file.url for file in files if file.url in found), None):
            raise ConfigError(f"{called}: names {twice} twice; name each file once (data.sources can repeat or weight a dataset)")
        found |= {file.url: file for file in sorted(files)}
    return list(found.values())


def expand(pattern: str) -> list[str]:
    """All names that a pattern with braces stands for, as a shell's: {08..11} is 08 09 10 11, {a,b} is a b."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        first, last = sorted(map(int, bounds.groups()))
        padded = any(text != "0" and text.startswith("0") for text in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        choices = [f"{n:0{width}}" for n in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    names = (expand(pattern[: found.start()] + choice + pattern[found.end() :]) for choice in choices)
    return list(dict.fromkeys(chain.from_iterable(names)))  # of braces in braces, some come twice


def _find(called: str, pattern: str, suffixes: tuple[str, ...]) -> list[Stored]:
    """The files of one pattern. `called`: how messages begin."""
    if not pattern:
        raise ConfigError(f"{called}: one of the names is empty; name files, folders or patterns, joined by ::")
    kind = scheme_of(pattern)
    names = expand(pattern if kind else os.path.expanduser(pattern))
    listing = _listed_here if kind is None else _listed_on_web if kind in ("http", "https") else _listed_in_store
    try:
        missing, found, others = listing(names, suffixes)
    except PermissionError as error:
        raise ConfigError(
            f"{called}: may not be read ({error}); credentials: {REMEDIES.get(kind or '', 'none are needed')}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{called}: {error}") from error
    if missing:
        remedy = "check the path; a folder, or a pattern with *, takes those that are there"
        more = f", one of {len(missing):,} such names" if len(missing) > 1 else ""
        raise ConfigError(f"{called}: {missing[0]} does not exist{more}; {remedy}")
    if not found:
        seen = f"; there are {len(others):,} others, such as {others[0]}" if others else ""
        raise ConfigError(f"{called}: {pattern} has no file that ends in {' or '.join(suffixes)}{seen}")
    return found


_Listing = tuple[list[str], list[Stored], list[str]]  # names that are missing, files that are found, files of another suffix


def _listed_here(names: list[str], suffixes: tuple[str, ...]) -> _Listing:
    missing, found, others = [], [], []
    for name in names:
        paths, wanted = [name], ("",)
        if os.path.isdir(name):
            paths, wanted = _walk(name, ()), suffixes
        elif _has_wildcards(name) and not os.path.exists(name):
            paths, wanted = filter(os.path.isfile, glob.iglob(name, recursive=True)), _wanted(name, suffixes)
        elif not os.path.exists(name):
            missing.append(name)
            continue
        for path in paths:
            if path.lower().endswith(wanted):
                stat = os.stat(path)
                found.append(Stored(path, stat.st_size, str(stat.st_mtime_ns)))
            else:
                others.append(path)
    return missing, found, others


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """All files below a folder but hidden ones. Links are followed, but for those that lead back."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, (*above, real))
        elif entry.is_file():
            yield entry.path


def _listed_in_store(names: list[str], suffixes: tuple[str, ...]) -> _Listing:
    """Of gs://, s3:// and hf://. The folders that hold the names are listed: a request for each name would take long."""
    list_files = functools.cache(_files_of)
    missing, found, others = [], [], []
    for name in names:
        if _has_wildcards(name):
            files, wanted = _files_of(name, None, "glob"), _wanted(name, suffixes)
        elif _may_be_file(name) and name in (beside := list_files(posixpath.dirname(name), 1)):
            files, wanted = {name: beside[name]}, ("",)
        else:
            files, wanted = list_files(name.rstrip("/"), None), suffixes
            missing += [] if files else [name]
        for url, info in files.items():
            if url != name and "/." in url[len(posixpath.dirname(name)) :]:
                continue  # hidden
            if url.lower().endswith(wanted):
                found.append(_stored(url, info))
            else:
                others.append(url)
    return missing, found, others


def _may_be_file(url: str) -> bool:
    """Whether a name is not that of a whole bucket, or of a repository of hf://, above which nothing can be listed."""
    return "." in posixpath.basename(url) and url.count("/") >= (5 if scheme_of(url) == "hf" else 3)


def _files_of(folder: str, depth: int | None, method: str = "find") -> dict[str, dict[str, Any]]:
    """fsspec's facts about the files in a folder of a store, or for `glob` of those that a pattern matches, by URL."""
    kind = str(scheme_of(folder))
    fs = system(kind)
    options = {} if depth is None else dict(maxdepth=depth)
    try:
        found = attempt(folder, lambda: getattr(fs, method)(fs._strip_protocol(folder), detail=True, **options))
    except FileNotFoundError:
        return {}
    return {f"{kind}://{path.lstrip('/')}": info for path, info in found.items() if info["type"] == "file"}


def _stored(url: str, info: dict[str, Any]) -> Stored:
    tag = next((info[name] for name in TAGS if info.get(name)), "")
    return Stored(url, int(info["size"]), str(tag).strip('"'))


def _listed_on_web(names: list[str], suffixes: tuple[str, ...]) -> _Listing:
    """Of http:// and https://, which list nothing: each file is asked for its size."""
    for name in names:
        if "*" in name or name.endswith("/"):
            remedy = "name its files, with braces as {00000..01242}"
            raise ConfigError(f"{name} can't be searched, because a web server lists no files: {remedy}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(_ask_web, names))
    missing = [name for name, answer in zip(names, answers, strict=True) if answer is None]
    return missing, [answer for answer in answers if answer is not None], []


def _ask_web(url: str) -> Stored | None:
    """A file of a web server; None if it has none of this name."""
    import fsspec.asyn

    fs = system(str(scheme_of(url)))

    async def first_byte() -> Stored:
        session = await fs.set_session()
        # Not HEAD, for which signed URLs are not valid; and the answer shows whether ranges can be read.
        async with session.get(fs.encode_url(url), headers={"Range": "bytes=0-0"}) as answer:
            size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status != 416:  # which an empty file gives
                answer.raise_for_status()
            if not size.isdecimal():
                remedy = "copy the files to this machine"
                raise ConfigError(f"{url}: this server gives no ranges of files (no Content-Range); {remedy}")
            return _stored(url, {"size": size, "etag": answer.headers.get("ETag") or answer.headers.get("Last-Modified")})

    try:
        return attempt(url, lambda: fsspec.asyn.sync(fs.loop, first_byte, timeout=60))
    except FileNotFoundError:
        return None


def _has_wildcards(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _wanted(pattern: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """The suffixes that count among what a pattern matches: all, if it names one itself."""
    return suffixes if _has_wildcards(posixpath.splitext(pattern)[1] or "*") else ("",)
