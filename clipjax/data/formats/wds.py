"""Tars of samples, as webdataset and img2dataset write them: read by their index, one sample or a run of them at a time."""

import copy
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np

from clipjax import config
from clipjax.data.formats import clip_benchmark, columns
from clipjax.data.formats.index import open_index
from clipjax.data.formats.sample import IMAGES, LABEL, TEXTS, Stale, choose_fields, parse
from clipjax.data.formats.spans import HOP, last_suffix
from clipjax.data.formats.tar import BLOCK, Window
from clipjax.data.reading import texts
from clipjax.data.source import Fetched, Record, Source
from clipjax.data.storage.ranges import read, scheme_of

# What a chunk is decides the order by windows: another rule, and runs go on with other batches.
CHUNK = 256  # samples of a chunk at most, and half of that at least where the shard has as many
CHUNK_BYTES = 16 << 20  # bytes of a chunk on average, where samples are large
GAP = 1 << 20  # bytes of samples that are left out, which are not fetched with a chunk
PROBED = 8  # samples of which one must have a caption in .json, else the set is one of images alone
NAMED = 1_000_000  # samples of which all class names are collected, where classnames.txt is not there
AHEAD = 16  # chunks whose captions are read ahead


class Wds(Source):
    """The samples of `wds:SHARDS`. A folder in CLIP_benchmark's layout (clip_benchmark.py) has splits. Else there are none:
    `train` and `test`, the defaults of training and evaluation, are all of them.

    The image is the member that `data.image_field` names, else the one with a suffix of images. Captions are those of
    `data.text_field`, else of .txt, else `caption` in .json. The label is that of `data.label_field`, else of .cls: a number, or
    a name in classnames.txt beside the shards; without that file, the names in `data.label_field`, sorted, are the classes.
    CLIP_benchmark's sets of several labels have them in .npy; beside .cls it holds numbers, of which the first is the group."""

    def __init__(self, data: config.Data, patterns: str) -> None:
        super().__init__()
        self.name = data.name
        of_split = clip_benchmark.shards_of_split(patterns, data.split)
        whole = of_split is not None or data.split in ("train", "test")
        config.require(whole, "data.split", data.split, f"{data.spec} has no splits; leave it out, or take a share: train#0-95")
        patterns = of_split or patterns
        self.index = open_index(f"wds:{patterns}", patterns, data.index)
        self.version = self.index.version
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.index.dropped.items())
        config.require(len(self.index) > 0, "data.spec", data.spec, f"has no sample with an image (left out: {lost or 'none'})")
        self.fields = {suffix: _kind(suffix) for suffix in self.index.suffixes}
        facts = clip_benchmark.facts_of(self.index.urls[0], data.split)
        self._fields = choose_fields(data, self.index.suffixes, facts.kind)
        self.multilabel = self._fields.labels is not None
        self._starts: list[int] = self.index.starts.tolist()
        counts = np.diff(self.index.starts)
        least = np.maximum(-(-counts // CHUNK), -(-self.index.sizes // CHUNK_BYTES))
        self._chunks_of = np.minimum(least, counts)  # int64 [shards]: the number of chunks of each
        self._first_chunk: list[int] = [0, *np.cumsum(self._chunks_of).tolist()]
        if self.multilabel or self._fields.label is not None:
            self.templates = facts.templates
            self.classnames = facts.classnames or (self._names_of_labels() if data.label_field else None)
            self._fields = replace(self._fields, classes={name: i for i, name in enumerate(self.classnames or ())})
        if self._fields.guessed and not any(self.text(i).captions for i in range(min(len(self), PROBED))):
            self._fields = replace(self._fields, texts=())
        self.captioned = bool(self._fields.texts)

    def __len__(self) -> int:
        return self._starts[-1]

    def _record(self, i: int) -> Record:
        start, end = self._spans(i, i + 1)[0]
        content = read(self._shard(i), start, end - start)
        return self._parse(Window.over(content), (0, end - start), i, with_image=True)

    def text(self, i: int) -> Record:
        url = self._shard(i)
        if scheme_of(url) is not None:
            return super().text(i)
        return next(self._hop(url, i, i + 1))

    def texts(self) -> Iterator[Record]:
        waiting: deque[Future[list[Record]]] = deque()
        pool = ThreadPoolExecutor(AHEAD // 2)
        try:
            for chunk in range(self._first_chunk[-1]):
                waiting.append(pool.submit(self._texts_in, chunk))
                if len(waiting) > AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def buckets(self) -> np.ndarray:
        return self.index.buckets

    def chunks(self) -> np.ndarray:
        """Runs of 128 to 256 samples of one shard, or of fewer large ones."""
        counts, parts = np.diff(self.index.starts), self._chunks_of
        part = np.arange(self._first_chunk[-1]) - np.repeat(self._first_chunk[:-1], parts)
        n, k = np.repeat(counts, parts), np.repeat(parts, parts)
        return (part + 1) * n // k - part * n // k

    def fetch(self, chunk: int) -> Fetched:
        """One read, but for gaps of samples that are left out. The content: pieces of the shard, by their first bytes."""
        url, first, end = self._range(chunk)
        spans = self._spans(first, end)
        after_gap = [0, *(i for i in range(1, len(spans)) if spans[i][0] - spans[i - 1][1] > GAP), len(spans)]
        pieces = [(spans[a][0], spans[b - 1][1]) for a, b in pairwise(after_gap)]
        content = {start: read(url, start, stop - start) for start, stop in pieces}
        return Fetched(content, sum(map(len, content.values())))

    def record_in(self, fetched: Fetched, chunk: int, j: int) -> Record:
        return self._parse_in(fetched, self._range(chunk)[1] + j, with_image=True)

    def _names_of_labels(self) -> tuple[str, ...] | None:
        """The class names in the label field, sorted; None if it has numbers, or there are too many samples to look at all."""
        probed = [self.text(i) for i in range(min(len(self), PROBED))]
        if len(self) > NAMED or any(record.label >= 0 for record in probed):
            return None
        label = self._fields.label
        as_caption = copy.copy(self)
        as_caption._fields = replace(self._fields, label=None, texts=() if label is None else (label,), number=None)
        return columns.class_names(name.strip() for record in texts(as_caption) for name in record.captions[:1]) or None

    def _parse_in(self, fetched: Fetched, i: int, *, with_image: bool) -> Record:
        start, end = self._spans(i, i + 1)[0]
        base = max(first for first in fetched.content if first <= start)
        window, span = Window.over(fetched.content[base]), (start - base, end - base)
        return self._parse(window, span, i, with_image=with_image)

    def _range(self, chunk: int) -> tuple[str, int, int]:
        """The shard of a chunk, and the first and the end of its samples."""
        shard = bisect_right(self._first_chunk, chunk) - 1
        part, parts = chunk - self._first_chunk[shard], int(self._chunks_of[shard])
        first, n = self._starts[shard], self._starts[shard + 1] - self._starts[shard]
        return self.index.urls[shard], first + part * n // parts, first + (part + 1) * n // parts

    def _spans(self, first: int, end: int) -> list[tuple[int, int]]:
        """First byte and end of each of these samples in its shard."""
        return [(BLOCK * start, BLOCK * (start + blocks)) for start, blocks in self.index.spans[first:end].tolist()]

    def _texts_in(self, chunk: int) -> list[Record]:
        url, first, end = self._range(chunk)
        if scheme_of(url) is None:
            return list(self._hop(url, first, end))
        try:
            fetched = self.fetch(chunk)
        except Exception as error:
            return [self.unreadable(error, f"number {i}") for i in range(first, end)]
        return [self.guarded(lambda i=i: self._parse_in(fetched, i, with_image=False), f"number {i}") for i in range(first, end)]

    def _hop(self, path: str, first: int, end: int) -> Iterator[Record]:
        """Samples without their images, of a shard of this machine: only headers and what is asked for are read."""
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            yield from (self.unreadable(error, f"number {i}") for i in range(first, end))
            return
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            window = Window(lambda position, length: os.pread(file, length, position), os.fstat(file).st_size, HOP)
            for i, span in enumerate(self._spans(first, end), first):
                yield self.guarded(lambda i=i, span=span: self._parse(window, span, i, with_image=False), f"number {i}")
        finally:
            os.close(file)

    def _parse(self, window: Window, span: tuple[int, int], i: int, *, with_image: bool) -> Record:
        try:
            return parse(window, span, self.index.buckets[i], self._fields, with_image=with_image)
        except Stale as error:
            raise Stale(f"{self._shard(i)} {error}") from error

    def _shard(self, i: int) -> str:
        return self.index.urls[bisect_right(self._starts, i) - 1]


def _kind(suffix: str) -> str:
    last = last_suffix(suffix)
    kinds = {"image": IMAGES, "text": TEXTS, "label": (LABEL,), "json": ("json",)}
    return next((kind for kind, suffixes in kinds.items() if last in suffixes), "other")
