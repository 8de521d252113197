"""How often a run's data had to be repaired, over all processes, and when that is too often."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipjax import sharding
from clipjax.data.faults import FAULTS
from clipjax.data.source import Source
from clipjax.status import CertainFailure

NONE = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Interval:
    """The bad examples between two log lines, of all processes."""

    examples: int  # without those that data.filter left out
    kinds: tuple[int, ...]  # how many of each of FAULTS
    first: int  # the number, in the source, of the first; -1: there is none
    first_kind: int  # in FAULTS


class DataCounts:
    """Counts examples that were replaced and captions that were truncated.

    The sum over the processes is a program on the devices, which runs behind the newest step. Nobody waits for it: like a step's
    metrics, it is fetched one log interval late.
    """

    COUNTED: tuple[str, ...] = ("replaced", "filtered", "truncated")  # keys of a batch, each bool [b] or [b, K] for K captions

    def __init__(self, mesh: Mesh, bad: "BadExamples | None" = None) -> None:
        """`bad` gets each interval that is fetched."""
        self._mesh, self._bad = mesh, bad
        self._width = len(self.COUNTED) + len(FAULTS)
        self._since = self._nothing()  # of this process, since the last read; in the first row
        self._batches = 0  # since the last read
        self._total = dict.fromkeys(self.COUNTED, 0)  # of all processes, as far as it was fetched
        self._running: deque[tuple[dict[str, jax.Array], jax.Array]] = deque()  # results of `_add` that are not in the total
        add = jax.jit(self._add, out_shardings=sharding.replicated(mesh))
        self._add_up = add.lower(self._put()).compile()  # now: else the first log line would wait for it

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """One more batch of this process: `fault` int8 [b], 0 or 1 + the kind, `fault_index` int32 [b], and COUNTED."""
        row, fault = self._since[0], batch["fault"]
        kinds = np.bincount(fault, minlength=1 + len(FAULTS))[1:]
        row[: self._width + 1] += [*(batch[name].sum() for name in self.COUNTED), *kinds, len(fault)]
        bad = np.flatnonzero(fault)
        if len(bad) and row[-3] == NONE:
            row[-3:] = [self._batches, batch["fault_index"][bad[0]], fault[bad[0]] - 1]
        self._batches += 1

    def read(self) -> dict[str, jax.Array]:
        """The counts since the last read, int32 [], and float32 [] `filtered_share`, the share of the examples that data.filter
        left out, and `bad_share`, the share of the others that was bad.

        The devices may still compute them. All processes must call this at the same step.
        """
        line, bad = self._add_up(self._put())
        self._running.append((line, bad))
        self._since, self._batches = self._nothing(), 0
        self.fetch(unread=1)
        return line

    @property
    def total(self) -> dict[str, int]:
        """The counts up to the last read. Waits for the devices."""
        self.fetch()
        return dict(self._total)

    def fetch(self, unread: int = 0) -> None:
        """Adds all but the newest `unread` results to the total."""
        while len(self._running) > unread:
            line, bad = self._running.popleft()
            self._total = {name: n + int(line[name]) for name, n in self._total.items()}
            if self._bad is not None:
                self._bad.add(_interval(bad))

    def so_far(self) -> Interval:
        """The interval that is not read yet. Waits for the devices. All processes must call this at the same step."""
        return _interval(self._add_up(self._put())[1])

    def _nothing(self) -> np.ndarray:
        """A row for each of this process's parts of the batch: COUNTED, FAULTS, and the number of examples; and of the first bad
        example the batch, counted since the last read, its number in the source and its kind."""
        rows = np.zeros((sharding.batch_devices(self._mesh) // jax.process_count(), self._width + 4), np.int32)
        rows[:, -3:] = NONE, -1, -1
        return rows

    def _put(self) -> jax.Array:
        return sharding.to_global({"counts": self._since}, self._mesh)["counts"]

    def _add(self, rows: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """What becomes a part of the line; and int32 [len(FAULTS) + 3], the fields of an Interval."""
        n, sums = len(self.COUNTED), rows[:, : self._width + 1].sum(0)
        is_first = jnp.arange(len(rows)) == rows[:, -3].argmin()
        first = jnp.where(is_first[:, None], rows[:, -2:], 0).sum(0)
        counts, examples = dict(zip(self.COUNTED, sums[:n], strict=True)), sums[-1]
        wanted = examples - counts["filtered"]
        shares = {"bad_share": counts["replaced"] / jnp.maximum(wanted, 1)}
        shares["filtered_share"] = counts["filtered"] / jnp.maximum(examples, 1)
        return counts | shares, jnp.concatenate([sums[n:-1], wanted[None], first])


def _interval(values: jax.Array) -> Interval:
    *kinds, examples, first, first_kind = np.asarray(values).tolist()
    return Interval(examples, tuple(kinds), first, first_kind)


class TooManyBadError(CertainFailure):
    """More examples are bad than `data.max_bad` allows."""


class BadExamples:
    """The bad ones of the newest examples, and whether they are more than `data.max_bad` allows."""

    WINDOW = 10_000  # examples that are looked back at; in whole log intervals, so it may be up to one more
    LEAST = 64  # bad examples since the run was started; with fewer, a share says little

    def __init__(self, max_bad: float) -> None:
        self._max_bad = max_bad
        self._newest: deque[Interval] = deque()
        self._all = 0
        self._first: Interval | None = None  # the interval with the first bad example

    def add(self, interval: Interval) -> None:
        """The next interval."""
        self._newest.append(interval)
        while sum(each.examples for each in self._newest) - self._newest[0].examples >= self.WINDOW:
            self._newest.popleft()
        self._all += sum(interval.kinds)
        if self._first is None and interval.first >= 0:
            self._first = interval

    def check(self, source: Source | None, unfinished: Interval | None = None) -> None:
        """Raises TooManyBadError if more than `data.max_bad` of the newest examples are bad. `source`: where they are from.
        `unfinished`: those after the last interval, of which this is no whole one."""
        newest = [*self._newest, *([] if unfinished is None else [unfinished])]
        kinds = [sum(each.kinds[kind] for each in newest) for kind in range(len(FAULTS))]
        examples, bad = sum(each.examples for each in newest), sum(kinds)
        before = self._all - sum(sum(each.kinds) for each in self._newest)
        if before + bad < self.LEAST or bad <= self._max_bad * examples:
            return
        named = "; ".join(f"{name}: {count:,}" for count, name in zip(kinds, FAULTS, strict=True) if count)
        what = f"data.max_bad = {self._max_bad}: {bad:,} of the last {examples:,} examples are bad ({named})"
        first = self._first or next(each for each in newest if each.first >= 0)
        raise TooManyBadError(f"{what}; the first is {_named(first, source)}")


def _named(interval: Interval, source: Source | None) -> str:
    """The first bad example of an interval, for a person to find."""
    number, fault = interval.first, FAULTS[interval.first_kind]
    if source is None:
        return f"number {number}, which {fault}"
    record = source.record(number)
    named = source.sources[source.part_of(number)[0]].name if source.sources else source.name
    return f"{record.image if isinstance(record.image, Path) else record.key} of {named}, which {fault}"
