"""Shares of a source by its keys, for sources of every kind: `train#0-95` are the examples with crc32(key) mod 100 in [0, 95)."""

import itertools
import re
from collections.abc import Iterator

import numpy as np

from clipjax.config import ConfigError
from clipjax.data.source import Fetched, Record, Source

WORD = 64  # bits of a word, of which each says whether an example is chosen
PIECE = 1 << 22  # examples that are looked at at once, a multiple of WORD


def parse_split(split: str) -> tuple[str, tuple[int, int] | None]:
    """The split that the source knows, and the range of crc32(key) mod 100, if `data.split` has one.

    Raises ConfigError for anything but `NAME` and `NAME#A-B` with 0 <= A < B <= 100."""
    base, hash_sign, text = split.partition("#")
    if not hash_sign:
        return split, None
    bounds = re.fullmatch(r"(\d{1,3})-(\d{1,3})", text)
    if not base or not bounds or not 0 <= int(bounds[1]) < int(bounds[2]) <= 100:
        form = "must be NAME or NAME#A-B with 0 <= A < B <= 100"
        raise ConfigError(f"data.split = {split!r}: {form}: train#0-95 are 95 % of the examples, train#95-100 the others")
    return base, (int(bounds[1]), int(bounds[2]))


class Share(Source):
    """The examples of a source with crc32(key) mod 100 in [first, last), in its order. Disjoint ranges share no key.

    Chunks are those of the source, with fewer examples each. Memory: a quarter of a byte for each example of the source."""

    def __init__(self, source: Source, first: int, last: int, name: str) -> None:
        super().__init__()
        self.name, self.fields, self.captioned = name, source.fields, source.captioned
        self.classnames, self.templates, self.multilabel = source.classnames, source.templates, source.multilabel
        self.version = f"{source.version}#{first}-{last}"
        self._source, self._range = source, (first, last)
        buckets = source.buckets()
        pieces = (buckets[start : start + PIECE] for start in range(0, len(buckets), PIECE))
        packed = b"".join(np.packbits((piece >= first) & (piece < last), bitorder="little").tobytes() for piece in pieces)
        self._words = np.frombuffer(packed + bytes(-len(packed) % 8 + 8), "<u8")  # the last one is empty
        counts = np.cumsum(np.bitwise_count(self._words), dtype=np.int64)
        self._before = np.concatenate([[0], counts])  # how many are chosen before each word
        if not len(self):
            raise ConfigError(f"data.split = {name.rpartition('/')[2]!r}: no example of {source.name} is in this range; widen it")
        self._sizes, self._starts, self._numbers = self._divided(source.chunks())

    def __len__(self) -> int:
        return int(self._before[-1])

    def _number(self, i: int) -> int:
        """The number, in the source, of example i."""
        word = int(np.searchsorted(self._before, i, side="right")) - 1
        bits = int(self._words[word])
        for _ in range(i - int(self._before[word])):
            bits &= bits - 1  # without the lowest bit that is set
        return word * WORD + (bits & -bits).bit_length() - 1

    def _rank(self, numbers: np.ndarray) -> np.ndarray:
        """int64: how many chosen examples come before each of these numbers of the source."""
        words, bits = np.divmod(numbers, WORD)
        below = (np.uint64(1) << bits.astype(np.uint64)) - np.uint64(1)
        return self._before[words] + np.bitwise_count(self._words[words] & below)

    def _divided(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each chunk with chosen examples, int64: how many they are, its first number in the source, and its own number."""
        ends = np.cumsum(sizes)
        chosen = np.diff(self._rank(np.concatenate([[0], ends])))
        numbers = np.flatnonzero(chosen)
        return chosen[numbers], (ends - sizes)[numbers], numbers

    def _record(self, i: int) -> Record:
        return self._source.read(self._number(i))

    def text(self, i: int) -> Record:
        return self._source.text(self._number(i))

    def texts(self) -> Iterator[Record]:
        pieces = (self._words[at : at + PIECE // WORD] for at in range(0, len(self._words), PIECE // WORD))
        chosen = (bit for piece in pieces for bit in np.unpackbits(piece.view(np.uint8), bitorder="little").tolist())
        return itertools.compress(self._source.texts(), chosen)

    def buckets(self) -> np.ndarray:
        first, last = self._range
        buckets = self._source.buckets()
        return buckets[(buckets >= first) & (buckets < last)]

    def chunks(self) -> np.ndarray:
        return self._sizes

    def fetch(self, chunk: int) -> Fetched:
        return self._source.fetch(int(self._numbers[chunk]))

    def record_in(self, fetched: Fetched, chunk: int, j: int) -> Record:
        first = int(self._starts[chunk])
        before = int(self._rank(np.array([first]))[0])
        return self._source.record_in(fetched, int(self._numbers[chunk]), self._number(before + j) - first)
