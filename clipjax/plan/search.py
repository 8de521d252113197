"""The largest batch that fits: an answer "out of memory" costs seconds, "fits" up to minutes, so the search asks from above."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MOST = 2**30  # pairs a step; nobody trains with more


@dataclass(frozen=True)
class Try:
    """One batch size, compiled."""

    batch_size: int
    fits: bool | None  # None: the compiler failed, which tells nothing about memory
    needed: int | None  # bytes a device
    seconds: float
    failure: str | None = None


def sizes(unit: int) -> list[int]:
    """Powers of two that are multiples of `unit`; where that has an odd factor, powers of two times it."""
    odd = unit // (unit & -unit)
    return [odd * 2**n for n in range(MOST.bit_length()) if odd * 2**n % unit == 0 and odd * 2**n <= MOST]


def search(first: Try, attempt: Callable[[int], Try], unit: int, capacity: int, held: int) -> Iterator[Try]:
    """Tries sizes until the largest that fits and the smallest that doesn't are neighbours, or the compiler fails.

    `first`: what is known already, of any batch. `held`: bytes a device holds whatever the batch, which with what each try needed
    predicts where the limit lies. The size above it is asked first: where that is out of memory, as it should be, only the size
    below is left to compile.
    """
    candidates = sizes(unit)
    known = [first]
    while True:
        fitting = [n for n, size in enumerate(candidates) if any(t.fits and t.batch_size >= size for t in known)]
        failing = [n for n, size in enumerate(candidates) if any(t.fits is False and t.batch_size <= size for t in known)]
        low, high = max(fitting, default=-1), min(failing, default=len(candidates))
        if high - low <= 1:
            return
        limit = _predict(known, capacity, held)
        guess = max((n for n, size in enumerate(candidates) if size <= limit), default=-1)  # the largest that should fit
        if guess + 1 < high:
            chosen = max(low + 1, guess + 1)
        else:
            chosen = high - 1 if guess >= high - 1 else max(low + 1, guess)
        made = attempt(candidates[chosen])
        yield made
        if made.fits is None:
            return
        known.append(made)


def _predict(known: list[Try], capacity: int, held: int) -> float:
    """The batch that would just fit, by the try that came nearest to it."""
    told = [t for t in known if t.needed is not None and t.needed > held]
    if not told:
        return math.inf if known[-1].fits else 0
    nearest = min(told, key=lambda t: abs(math.log(t.needed / capacity)))
    return nearest.batch_size * (capacity - held) / (nearest.needed - held)


def largest(tries: list[Try], unit: int) -> int | None:
    """The largest of `sizes` that is known to fit; None: not even the smallest does."""
    fitting = [t.batch_size for t in tries if t.fits]
    return max((size for size in sizes(unit) if fitting and size <= max(fitting)), default=None)
