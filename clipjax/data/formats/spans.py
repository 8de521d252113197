"""The usable samples of one tar: where each stands, in blocks of 512 bytes, and the bucket of its key."""

import hashlib
import io
import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clipjax.data.formats.tar import BLOCK, TarError, Window, members, runs
from clipjax.data.storage.ranges import Stored, read, scheme_of

HOP = 4096  # bytes of a read of this machine: a header, and mostly the small members behind it
STREAM = 16 << 20  # bytes of a read from a store
LARGEST = 128 << 20  # bytes of a usable sample
SUFFIXES = 100  # kinds of suffixes that are counted by name
# Suffixes of what is no image. A sample with nothing else is not usable; what is unknown may be an image.
NO_IMAGE = {
    *("txt", "text", "caption", "captions", "cap", "json", "jsonl", "cls", "cls2", "label", "id", "index", "count", "url"),
    *("csv", "tsv", "html", "xml", "yaml", "yml", "md", "npy", "npz", "pth", "pt", "pkl", "pickle", "pyd", "sha256", "md5"),
    *("mp3", "wav", "flac", "ogg", "mp4", "avi", "mov", "mkv", "webm"),
}


@dataclass(frozen=True)
class Scanned:
    """What a tar holds."""

    spans: np.ndarray  # uint32 [n, 2]: first block and number of blocks of each usable sample
    buckets: np.ndarray  # uint8 [n]: crc32 of each key mod 100
    suffixes: dict[str, int]  # how many usable samples have each
    dropped: dict[str, int]  # how many samples are not usable, by reason
    digest: str  # of spans and keys

    def to_bytes(self) -> bytes:
        out = io.BytesIO()
        facts = json.dumps([self.suffixes, self.dropped, self.digest]).encode()
        np.savez(out, spans=self.spans, buckets=self.buckets, facts=np.frombuffer(facts, np.uint8))
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Scanned":
        with np.load(io.BytesIO(content)) as stored:
            return cls(stored["spans"], stored["buckets"], *json.loads(stored["facts"].tobytes()))


def scan(stored: Stored, progress: Callable[[int], None] = lambda _: None) -> Scanned:
    """Reads the headers of a tar: here by small reads that leave out what images hold, from a store by large ones in a row.

    `progress`: told how many more bytes were read or left out. Raises TarError for what is no whole tar, and OSError."""
    at = 0

    def advance(position: int, length: int) -> None:
        nonlocal at
        progress(max(position + length - at, 0))
        at = max(position + length, at)

    if scheme_of(stored.url) is not None:

        def fetch(position: int, length: int) -> bytes:
            advance(position, length)
            return read(stored.url, position, length)

        return _collect(Window(fetch, stored.size, STREAM), advance)
    file = os.open(stored.url, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # else what is left out would be read, too
        return _collect(Window(lambda position, length: os.pread(file, length, position), stored.size, HOP), advance)
    finally:
        os.close(file)


def _collect(window: Window, advance: Callable[[int, int], None]) -> Scanned:
    starts, blocks, hashes, kinds = array("Q"), array("Q"), array("I"), array("I")
    sets: dict[tuple[str, ...], int] = {}  # the suffixes that samples have, numbered
    seen: dict[bytes, int] = {}  # the last sample of each key
    scattered: set[int] = set()  # samples whose members stand in several places
    for number, run in enumerate(runs(members(window))):
        suffixes = tuple(run.suffixes)
        starts.append(run.start // BLOCK)
        blocks.append((run.end - run.start) // BLOCK)
        hashes.append(zlib.crc32(key_text(run.key).encode()))
        kinds.append(sets.setdefault(suffixes, len(sets)))
        earlier = seen.get(run.key)
        if earlier is not None and not set(suffixes) & set(list(sets)[kinds[earlier]]):
            scattered |= {earlier, number}
        seen[run.key] = number
        advance(run.start, 0)
    advance(window.size, 0)
    if 2 * len(scattered) > len(starts):
        remedy = "the members of a sample do not stand together: pack it again, with tar --sort=name"
        raise TarError(f"has {len(scattered):,} runs of members, of {len(starts):,}, whose key comes again with others: {remedy}")
    together = np.ones(len(starts), bool)
    together[list(scattered)] = False
    spans = np.array([starts, blocks], np.int64).T
    return _usable(spans, np.array(hashes, np.uint32), np.array(kinds, np.intp), list(sets), together)


def _usable(
    spans: np.ndarray, hashes: np.ndarray, kinds: np.ndarray, sets: list[tuple[str, ...]], together: np.ndarray
) -> Scanned:
    """Leaves out, and counts, what can't be an example. `spans` [m, 2] and the other arrays [m] are of all samples; `kinds`:
    which of the sets of suffixes each has."""
    may_have_image = np.array([not set(map(last_suffix, suffixes)) <= NO_IMAGE for suffixes in sets], bool)
    small = spans[:, 1] <= LARGEST // BLOCK
    pictured = may_have_image[kinds]
    kept = together & small & pictured
    reasons = {"apart": ~together, f"above {LARGEST >> 20} MiB": together & ~small, "no image": together & small & ~pictured}
    suffixes: Counter[str] = Counter()
    for names, count in zip(sets, np.bincount(kinds[kept], minlength=len(sets)), strict=True):
        suffixes.update(dict.fromkeys(names, int(count)))
    if len(suffixes) > SUFFIXES:
        suffixes = Counter(dict(suffixes.most_common(SUFFIXES)))
    spans, hashes = spans[kept].astype(np.uint32), hashes[kept]
    digest = hashlib.blake2b(spans.tobytes() + hashes.tobytes(), digest_size=8).hexdigest()
    dropped = {reason: int(lost.sum()) for reason, lost in reasons.items() if lost.any()}
    return Scanned(spans, (hashes % 100).astype(np.uint8), {name: n for name, n in suffixes.items() if n}, dropped, digest)


def key_text(key: bytes) -> str:
    """The key of a sample as it stands in a Record."""
    return key.decode("utf-8", "replace")


def last_suffix(suffix: str) -> str:
    """`png` of `seg.png`."""
    return suffix.rpartition(".")[2]
