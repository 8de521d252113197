"""A run against another on the same queries: how much better it is on every set of their suites, and how sure that is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipjax.config import ConfigError
from clipjax.evals import results
from clipjax.evals.bootstrap import DRAWS, Column, Draws, Interval, draw_means, interval, seed_of
from clipjax.evals.evaluation import Examples
from clipjax.evals.results import MEAN, Row

LESS_IS_BETTER = ("rank", "perplexity", "ece", "nll", "loss")  # words in the names of metrics


@dataclass(frozen=True)
class Difference:
    """Of one set, or of a mean over sets."""

    suite: str
    name: str  # of the set, or of the mean
    metric: str
    a: float | None = None  # the figures over the queries that both runs have
    b: float | None = None
    interval: Interval | None = None  # of b - a
    n: int = 0  # queries that both runs have; of a mean, sets
    note: str = ""  # why there is no interval, or what it leaves out

    def worse(self, margin: float) -> bool:
        """Whether b is worse than a by more than the margin, and the whole interval says so."""
        if self.interval is None:
            return False
        less = any(word in LESS_IS_BETTER for word in self.metric.split("_"))
        return self.interval.low > margin if less else self.interval.high < -margin


class Pair(NamedTuple):
    """The values of one metric at the queries that both runs have, in the same order."""

    a: Column
    b: Column
    lost: int  # queries that are not in both


class Drawn(NamedTuple):
    """The figures of both runs, and b - a in each draw."""

    a: float
    b: float
    delta: Draws


def compare(a: str | Path, b: str | Path, metric: str | None = None, draws: int = DRAWS) -> list[Difference]:
    """Every set that one of two runs has, suite by suite, and their means. `a` and `b`: RUN, or a folder of results.

    `metric`: one metric of all sets that have it; None: the main one of each set. The draws of a mean are the means of each set's
    draws. Raises ConfigError where the runs have no suite in common, and where no set has the metric.
    """
    found = [difference for one, other in _suites(a, b) for difference in _compare_suite(one, other, metric, draws)]
    if not any(difference.interval for difference in found):
        asked = metric or "figures"
        notes = "; ".join(dict.fromkeys(f"{d.name}: {d.note}" for d in found if d.note))
        raise ConfigError(f"compare: {a} and {b} have no set with {asked} of each query in both. {notes}".rstrip())
    return found


def _suites(a: str | Path, b: str | Path) -> list[tuple[Path, Path]]:
    first, second = ({path.name: path for path in results.folders(place)} for place in (a, b))
    if common := sorted(first.keys() & second.keys()):
        return [(first[name], second[name]) for name in common]
    if len(first) == len(second) == 1:  # folders that --out named
        return list(zip(first.values(), second.values(), strict=True))
    raise ConfigError(f"compare: {a} has the suites {', '.join(first)}, {b} has {', '.join(second)}: none is in both")


def _compare_suite(a: Path, b: Path, metric: str | None, draws: int) -> list[Difference]:
    rows_a, rows_b = ({row.name: row for row in results.read(folder)} for folder in (a, b))
    found: list[Difference] = []
    drawn: dict[str, Drawn] = {}
    for name in dict.fromkeys((*rows_a, *rows_b)):
        one, other = rows_a.get(name), rows_b.get(name)
        known = one or other
        if known is None or known.task == MEAN or _foreign(one, other, metric):
            continue
        shown = Difference(a.name, name, metric or known.main_metric)
        if metric is None:
            shown = replace(shown, a=one and one.main, b=other and other.main)
        wanted = [_metrics(row, metric) for row in (one, other)]
        note = _missing(one, other, metric) or ("" if wanted[0] == wanted[1] != () else "not a metric of both")
        pairs = [] if note else _pairs(results.read_examples(a, name), results.read_examples(b, name), wanted[0])
        if pairs:
            drawn[name] = _draw(pairs, draws, seed_of(name))
            found.append(_difference(shown, pairs, drawn[name]))
        else:
            found.append(replace(shown, note=note or "no mean over queries that both runs have"))
    return [*found, *_means(a.name, rows_a, rows_b, metric, drawn)]


def _metrics(row: Row | None, metric: str | None) -> tuple[str, ...]:
    if row is None:
        return ()
    return row.main_of if metric is None else (metric,) * (metric in row.metrics)


def _foreign(a: Row | None, b: Row | None, metric: str | None) -> bool:
    """Whether a set that both runs have is of an evaluation without the metric that the user chose."""
    rows = [row for row in (a, b) if row is not None and not row.absent]
    return metric is not None and len(rows) == 2 and not any(metric in row.metrics for row in rows)


def _missing(a: Row | None, b: Row | None, metric: str | None) -> str:
    """Which run has no figure, and why. Where the user chose a metric, a row without a main figure may have others."""
    for which, row in (("A", a), ("B", b)):
        if row is None or (row.absent and metric not in row.metrics):
            return f"absent in {which}" + (f": {row.absent}" if row else "")
    return ""


def _pairs(a: Sequence[Examples], b: Sequence[Examples], metrics: Sequence[str]) -> list[Pair]:
    """A pair for each metric, or none at all where one of them has none."""
    found = [_pair(_kind(a, metric), _kind(b, metric), metric) for metric in metrics]
    pairs = [pair for pair in found if pair is not None]
    return pairs if len(pairs) == len(found) else []


def _kind(kinds: Sequence[Examples], metric: str) -> Examples | None:
    return next((kind for kind in kinds if metric in kind.values), None)


def _pair(a: Examples | None, b: Examples | None, metric: str) -> Pair | None:
    if a is None or b is None:
        return None
    keys_a, keys_b = np.asarray(a.keys, str), np.asarray(b.keys, str)
    if len(keys_a) == len(keys_b) and (keys_a == keys_b).all():  # the usual case; keys may then occur twice
        at_a = at_b = np.arange(len(keys_a))
    else:
        _, at_a, at_b = np.intersect1d(keys_a, keys_b, return_indices=True)
    of_a, of_b = np.asarray(a.values[metric], float)[at_a], np.asarray(b.values[metric], float)[at_b]
    uncounted = np.isnan(of_a) | np.isnan(of_b)
    if uncounted.all():
        return None
    groups = np.asarray(a.keys if a.groups is None else a.groups, str)[at_a].tolist()
    counted = max(int((~np.isnan(np.asarray(kind.values[metric], float))).sum()) for kind in (a, b))
    lost = counted - int((~uncounted).sum())
    return Pair(Column(np.where(uncounted, np.nan, of_a), groups), Column(np.where(uncounted, np.nan, of_b), groups), lost)


def _draw(pairs: Sequence[Pair], draws: int, seed: int) -> Drawn:
    means = draw_means([*(pair.a for pair in pairs), *(pair.b for pair in pairs)], draws=draws, seed=seed)
    delta = np.mean(means[len(pairs) :], axis=0) - np.mean(means[: len(pairs)], axis=0)
    a, b = (float(np.mean([np.nanmean(column.values) for column in side])) for side in zip(*(p[:2] for p in pairs), strict=True))
    return Drawn(a, b, delta)


def _difference(shown: Difference, pairs: Sequence[Pair], drawn: Drawn) -> Difference:
    n = sum(int((~np.isnan(pair.a.values)).sum()) for pair in pairs)
    lost = sum(pair.lost for pair in pairs)
    note = f"{lost:,} queries are not in both" if lost else ""
    return replace(shown, a=drawn.a, b=drawn.b, interval=interval(drawn.delta), n=n, note=note)


def _means(
    suite: str, a: Mapping[str, Row], b: Mapping[str, Row], metric: str | None, drawn: Mapping[str, Drawn]
) -> Iterator[Difference]:
    """The means that the suite names; of a metric that the user chose, the one over all sets that have it."""
    named = {row.name: (row.main_metric, row.main_of) for row in a.values() if row.task == MEAN and row.name in b}
    if metric is not None:
        named = {f"mean of {len(drawn)} sets": (metric, tuple(drawn))} if len(drawn) > 1 else {}
    for name, (shown, sets) in named.items():
        over = [drawn[one] for one in sets if one in drawn]
        if not over:
            yield Difference(suite, name, shown, note="none of its sets has an interval")
            continue
        lost = len(sets) - len(over)
        note = f"without {lost} of its {len(sets)} sets" if lost else ""
        first, second = float(np.mean([one.a for one in over])), float(np.mean([one.b for one in over]))
        low_high = interval(np.mean([one.delta for one in over], axis=0))
        yield Difference(suite, name, shown, first, second, low_high, len(over), note)


def table(found: Sequence[Difference], margin: float) -> str:
    """The lines that `clipjax eval compare` prints."""
    head = ("suite", "set", "metric", "A", "B", "B - A", "95 % interval", "n", "")
    rows: list[tuple[str, ...]] = [head]
    for d in found:
        low_high = "-" if d.interval is None else "[{:+.4f}, {:+.4f}]".format(*d.interval)
        delta = "-" if d.a is None or d.b is None else f"{d.b - d.a:+.4f}"
        remark = "; ".join(text for text in ("WORSE" * d.worse(margin), d.note) if text)
        figures = ["-" if x is None else f"{x:.4f}" for x in (d.a, d.b)]
        rows.append((d.suite, d.name, d.metric, *figures, delta, low_high, f"{d.n:,}", remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
