"""The search for the largest batch that fits.

To learn that a batch does not fit takes the compiler seconds; to learn that it fits takes up to minutes. So the search asks for
sizes that are probably too large first.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LARGEST = 2**30  # pairs a step: more than anybody trains with


@dataclass(frozen=True)
class Try:
    """One batch size, compiled."""

    batch_size: int
    fits: bool | None  # None: the compiler failed for a reason other than memory
    needed: int | None  # bytes a device
    seconds: float
    failure: str | None = None


def sizes(unit: int) -> list[int]:
    """The powers of two that are multiples of `unit`; if `unit` has an odd factor, powers of two times that factor."""
    odd = unit // (unit & -unit)
    return [odd * 2**n for n in range(LARGEST.bit_length()) if odd * 2**n % unit == 0 and odd * 2**n <= LARGEST]


def search(first: Try, attempt: Callable[[int], Try], unit: int, capacity: int, fixed: int) -> Iterator[Try]:
    """Tries sizes until the largest that fits and the smallest that does not fit are neighbours, or the compiler fails.

    `first`: a result that is known already, for any batch. `capacity`: bytes a device has. `fixed`: bytes a device needs for
    any batch. From `fixed` and the bytes of each try the limit is predicted, and the size just above the prediction is tried
    first: if it is out of memory, as expected, only the size below is left to compile.
    """
    candidates = sizes(unit)
    known = [first]
    while True:
        fitting = [n for n, size in enumerate(candidates) if any(t.fits and t.batch_size >= size for t in known)]
        failing = [n for n, size in enumerate(candidates) if any(t.fits is False and t.batch_size <= size for t in known)]
        low, high = max(fitting, default=-1), min(failing, default=len(candidates))
        if high - low <= 1:
            return
        limit = _predict(known, capacity, fixed)
        guess = max((n for n, size in enumerate(candidates) if size <= limit), default=-1)  # the largest that should fit
        if guess + 1 < high:
            chosen = max(low + 1, guess + 1)
        else:
            chosen = high - 1 if guess >= high - 1 else max(low + 1, guess)
        result = attempt(candidates[chosen])
        yield result
        if result.fits is None:
            return
        known.append(result)


def _predict(known: list[Try], capacity: int, fixed: int) -> float:
    """The batch that just fits, from the try whose bytes are nearest to the capacity."""
    measured = [(t.batch_size, t.needed) for t in known if t.needed is not None and t.needed > fixed]
    if not measured:
        return math.inf if known[-1].fits else 0
    size, needed = min(measured, key=lambda pair: abs(math.log(pair[1] / capacity)))
    return size * (capacity - fixed) / (needed - fixed)


def largest(tries: list[Try], unit: int) -> int | None:
    """The largest of `sizes` that is known to fit; None: even the smallest does not fit."""
    fitting = [t.batch_size for t in tries if t.fits]
    return max((size for size in sizes(unit) if fitting and size <= max(fitting)), default=None)
