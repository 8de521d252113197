"""Reads examples about in order, each once, as evaluations do: chunk by chunk, in place of one small read an example."""

import threading
from concurrent.futures import Future

import numpy as np

from clipjax.data.source import Fetched, Record, Source


class Sequential:
    """Reads a process's share of a source's examples. Several threads may ask.

    A chunk is fetched when its first example is asked for and dropped with its last, so that as many chunks are in memory as the
    threads are working on."""

    def __init__(self, source: Source, numbers: np.ndarray) -> None:
        """`numbers`, int64 [n]: the examples that will be asked for, each once."""
        self._source = source
        self._starts = np.concatenate([[0], np.cumsum(source.chunks())])
        chunks, examples = np.unique(np.searchsorted(self._starts, numbers, side="right") - 1, return_counts=True)
        self._unread = dict(zip(chunks.tolist(), examples.tolist(), strict=True))
        self._fetched: dict[int, Future[Fetched]] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Record:
        """Example `number`. May raise anything."""
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        with self._lock:
            future = self._fetched.get(chunk)
            if first := future is None:
                future = self._fetched[chunk] = Future()
            self._unread[chunk] -= 1
            if not self._unread[chunk]:
                del self._fetched[chunk], self._unread[chunk]
        if first:
            self._fetch(chunk, future)
        return self._source.record_in(future.result(), chunk, number - int(self._starts[chunk]))

    def _fetch(self, chunk: int, future: "Future[Fetched]") -> None:
        """Reads a chunk for all that wait for it. What it raises, they raise."""
        try:
            future.set_result(self._source.fetch(chunk))
        except Exception as e:  # a reader may raise anything
            future.set_exception(e)
