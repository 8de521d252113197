"""The index of a set of tars: which samples there are and where. It is a folder with

- `index.json`: its format, the spec, and of every shard its name, size and tag, how many samples are usable, how many are left
  out and why, how many have each suffix, and a digest;
- `spans.npy` uint32 [n, 2]: first block of 512 bytes and number of blocks of each sample, those of all shards in a row;
- `buckets.npy` uint8 [n]: crc32 of each key mod 100.

The arrays are mapped into memory, not read. The folder is beside the shards, or in the user's cache, or where `data.index` says.
"""

import hashlib
import json
import os
import posixpath
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipjax.config import ConfigError
from clipjax.data.formats.locations import SPLITS
from clipjax.data.storage.ranges import Stored, read, scheme_of
from clipjax.data.storage.remote import alone
from clipjax.data.storage.store import find
from clipjax.files import local_path, write_atomic

FORMAT = 1
NAME = "clipjax-index"  # of the folder beside the shards
ARRAYS = ("spans", "buckets")
COPIED = 16 << 20  # bytes of a remote index that are copied at a time
SMALL = 1_000_000_000  # bytes of a remote set that training reads by itself
COMPRESSED = {".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.zst": "unzstd", ".tar.xz": "unxz", ".tar.bz2": "bunzip2"}
ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)  # S3 forbids what is not there, where one may not list


@dataclass
class Index:
    """An opened index. It can be pickled: the arrays are opened again."""

    folder: Path  # of this machine
    urls: list[str]  # of the shards
    starts: np.ndarray  # int64 [shards + 1]: number of the first sample of each; the last is the number of all samples
    sizes: np.ndarray  # int64 [shards]: bytes of each
    suffixes: dict[str, int]
    dropped: dict[str, int]
    version: str  # a digest of all spans and keys
    spans: np.ndarray = field(init=False)
    buckets: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        # As plain arrays: an item of a memmap is an object that takes long to make.
        self.spans, self.buckets = (np.load(self.folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def __len__(self) -> int:
        return int(self.starts[-1])


def shards_of(patterns: str) -> list[Stored]:
    """The tars that a spec names. Raises ConfigError as `find` does, for compressed ones, and for a folder of several splits."""
    shards = find("data.spec", patterns, (".tar", *COMPRESSED))
    within = {posixpath.dirname(short_name(shard.url, patterns.rstrip("/"))).partition("/")[0] for shard in shards}
    if len(splits := sorted(within & SPLITS)) > 1:
        example = posixpath.join(patterns, splits[-1])
        raise ConfigError(f"data.spec = {patterns!r}: has the splits {' and '.join(splits)}; name one of them: wds:{example}")
    for shard in shards:
        if tool := next((tool for suffix, tool in COMPRESSED.items() if shard.url.endswith(suffix)), None):
            remedy = f"unpack it with {tool} first: samples of a compressed tar can't be read one by one"
            raise ConfigError(f"data.spec = {patterns!r}: {shard.url} is compressed; {remedy}")
    return shards


def open_index(spec: str, patterns: str, folder: str | None) -> Index:
    """The index of the tars that `patterns` names, in `folder` or else in one of the usual places. `spec`: with its kind.

    Of tars on this machine, or of a small remote set, it is made first if there is none. Raises ConfigError, with the command,
    for a large one, and for an index of which shards are missing or have changed."""
    shards = shards_of(patterns)
    stale = []
    for place in places(patterns, folder):
        if (stored := load(place)) is None:
            continue
        if differs := difference(stored, shards, shard_folder(patterns)):
            stale.append(
                f"data.spec = {spec!r}: its index in {place} is stale: {differs}; {command(spec, folder)} reads those again"
            )
            continue
        return opened(place, stored, [shard.url for shard in shards])
    if stale:
        raise ConfigError(stale[0])
    remote = any(scheme_of(shard.url) for shard in shards)
    size = sum(shard.size for shard in shards)
    if remote and size > SMALL:
        remedy = f"{command(spec, folder)} reads it once, on one host or several at a time"
        raise ConfigError(
            f"data.spec = {spec!r}: has no index, and {size / 1e9:,.1f} GB in {len(shards):,} shards are remote; {remedy}"
        )
    from clipjax.data.formats.indexing import build, writable_place

    place = folder or (cache_place(patterns) if remote else writable_place(patterns))
    build(spec, shards, shard_folder(patterns), place)
    return opened(place, load(place) or {}, [shard.url for shard in shards])


def command(spec: str, folder: str | None) -> str:
    return f"`clipjax data index '{spec}'{f' --out {folder}' if folder else ''}`"


def places(patterns: str, folder: str | None) -> list[str]:
    """Where an index is looked for, first place first."""
    return [folder] if folder else [beside(patterns), cache_place(patterns)]


def shard_folder(patterns: str) -> str:
    """The folder in which all of the first pattern's shards lie."""
    pattern = os.path.expanduser(patterns.partition("::")[0])
    fixed = next((pattern[:i] for i, sign in enumerate(pattern) if sign in "*?[{"), None)
    if fixed is not None:
        return posixpath.dirname(fixed)
    return posixpath.dirname(pattern) if pattern.endswith((".tar", *COMPRESSED)) else pattern.rstrip("/")


def beside(patterns: str) -> str:
    """The folder of the index beside the shards. Each set of patterns has its own; that of a whole folder has the plain name."""
    root = shard_folder(patterns)
    rest = "::".join(short_name(os.path.expanduser(pattern).rstrip("/"), root) for pattern in patterns.split("::"))
    return posixpath.join(root, f"{NAME}-{_digest(rest)[:8]}" if rest else NAME)


def cache_place(patterns: str) -> str:
    """The folder of the index in the user's cache."""
    absolute = [p if scheme_of(p) else os.path.abspath(os.path.expanduser(p)) for p in patterns.split("::")]
    return str(_cache() / _digest("::".join(absolute)))


def short_name(url: str, root: str) -> str:
    """What an index calls a shard: by its path below the root, so that a set may be moved with its index."""
    return url[len(root) :].lstrip("/") if root and (url + "/").startswith(root + "/") else url


def difference(stored: dict[str, Any], shards: list[Stored], root: str) -> str:
    """In which shards an index differs from what is there; empty if in none."""
    known = {row["name"]: (row["size"], row["tag"]) for row in stored["shards"]}
    present = {short_name(shard.url, root): (shard.size, shard.tag) for shard in shards}
    both = [name for name in known if name in present]
    renewed = [name for name in both if known[name] != present[name] and known[name][0] == present[name][0]]
    found = []
    for names, what in (
        ([name for name in both if known[name][0] != present[name][0]], "{} has changed since"),
        (renewed, "{} has the same size, but another time or ETag (cp -p and rsync -t keep times)"),
        ([name for name in known if name not in present], "{} is missing: bring it back, or index without it"),
        ([name for name in present if name not in known], "{} is new"),
    ):
        more = f" (and {len(names) - 1:,} others)" if len(names) > 1 else ""
        found += [what.format(names[0] + more)] if names else []
    return ", ".join(found) or ("" if list(known) == list(present) else "the order of its shards is another")


def load(place: str) -> dict[str, Any] | None:
    """index.json of a folder; None if there is none."""
    try:
        stored = json.loads(read(posixpath.join(place, "index.json")))
        known = stored["format"]
    except ABSENT:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{place}/index.json: is no index ({error}); remove it, and index the data again") from error
    if known != FORMAT:
        raise ConfigError(
            f"{place}/index.json: is of format {known}, this clipjax reads {FORMAT}; remove it, and index the data again"
        )
    return stored


def opened(place: str, stored: dict[str, Any], urls: list[str]) -> Index:
    folder = Path(place) if scheme_of(place) is None else _copy(place, stored)
    rows = stored["shards"]
    starts = np.cumsum([0, *(row["samples"] for row in rows)], dtype=np.int64)
    suffixes, dropped = Counter[str](), Counter[str]()
    for row in rows:
        suffixes.update(row["suffixes"])
        dropped.update(row["dropped"])
    sizes = np.array([row["size"] for row in rows], np.int64)
    try:
        index = Index(folder, urls, starts, sizes, dict(suffixes.most_common()), dict(dropped), stored["digest"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place}: is no whole index ({error}); remove it, and index the data again") from error
    if not len(index) == len(index.spans) == len(index.buckets):
        raise ConfigError(f"{place}: is no whole index; remove it, and index the data again")
    return index


def _copy(place: str, stored: dict[str, Any]) -> Path:
    """A remote index on this machine, in the user's cache."""
    folder = _cache() / f"copy-{stored['digest']}-{_digest(place)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock"):  # one process of a machine copies, and the others wait
        for name in ARRAYS:
            if not (folder / f"{name}.npy").exists():
                _fetch(posixpath.join(place, f"{name}.npy"), stored["bytes"][name], folder / f"{name}.npy")
    return folder


def _fetch(url: str, size: int, path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        sizes = f"{size / 1e9:,.1f} GB must be copied, and {path.parent} has room for {free / 1e9:,.1f}"
        raise ConfigError(f"{url}: {sizes}: set XDG_CACHE_HOME to a folder with room")
    with write_atomic(path) as part, part.open("wb") as file:
        for start in range(0, size, COPIED):
            file.write(read(url, start, min(COPIED, size - start)))


def _cache() -> Path:
    cache = local_path("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "clipjax" / "index"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
