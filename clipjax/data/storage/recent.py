"""What was read last, kept up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key. Threads that ask for one that is being made wait for it. A copy, as for another process, begins empty."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of all values. A single one may have more."""
        self._limit = limit
        self._clear()

    def _clear(self) -> None:
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> int:
        return self._limit

    def __setstate__(self, limit: int) -> None:
        self._limit = limit
        self._clear()

    def get(self, key: Hashable, make: Callable[[], tuple[T, int]]) -> T:
        """The value of a key. `make()` gives it, and its bytes, if it is not held. What `make` raises is raised."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key][0]
            try:
                made = make()
            finally:
                with self._lock:
                    self._making.pop(key, None)
            with self._lock:
                self._values[key] = made
                while len(self._values) > 1 and sum(size for _, size in self._values.values()) > self._limit:
                    self._values.popitem(last=False)
            return made[0]
