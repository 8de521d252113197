"""What a classifier gets right class by class, and what it takes for what: from the examples that a suite stored."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipjax.evals import results
from clipjax.evals.evaluation import Examples
from clipjax.report.folders import Folder
from clipjax.report.scores import suite_folders

WORST, BEST = 20, 10  # classes that are shown
CONFUSIONS = 12  # of each run
MATRIX = 20  # with at most so many classes there is a matrix, too


@dataclass(frozen=True)
class Bar:
    """A class."""

    name: str
    images: int
    recalls: list[float | None]  # of each run


@dataclass(frozen=True)
class Confusion:
    right: str
    taken_for: str
    count: int
    images: int  # of the right class


@dataclass(frozen=True)
class Matrix:
    """Shares of each class's images, by what they are taken for; the rows add to 1."""

    names: list[str]
    shares: list[list[float]]


@dataclass(frozen=True)
class ClassReport:
    """Of one set."""

    set: str
    total: int  # classes
    worst: list[Bar]  # the worst of the first run, the worst first
    best: list[Bar]
    confusions: list[list[Confusion]]  # of each run, the most frequent first
    matrices: list[Matrix | None]  # of each run


def class_reports(folders: Sequence[Folder]) -> list[ClassReport]:
    """Of every set whose examples say which class an image has and which one it was taken for."""
    found: dict[str, list[Examples | None]] = {}
    for number, folder in enumerate(folders):
        for path in suite_folders(folder).values():
            for row in results.read(path):
                kinds = results.read_examples(path, row.name) if row.metrics else []  # an earlier evaluation's may lie there
                rated = next((kind for kind in kinds if {"class", "predicted"} <= kind.facts.keys()), None)
                if rated is not None:
                    found.setdefault(row.name, [None] * len(folders))[number] = rated
    return [_report(name, runs) for name, runs in found.items()]


def _report(name: str, runs: Sequence[Examples | None]) -> ClassReport:
    recalls = [_recalls(run) if run else {} for run in runs]
    known = next(run for run in runs if run is not None)
    sizes = Counter(known.facts["class"])
    bars = [Bar(c, n, [of_run.get(c) for of_run in recalls]) for c, n in sizes.items()]
    bars.sort(key=lambda bar: next((x for x in bar.recalls if x is not None), 0.0))
    worst = bars[:WORST] if len(bars) > WORST + BEST else bars
    best = bars[len(worst) :][-BEST:]
    confusions = [_confusions(run) if run else [] for run in runs]
    matrices = [_matrix(run) if run and len(sizes) <= MATRIX else None for run in runs]
    return ClassReport(name, len(bars), worst, best, confusions, matrices)


def _recalls(run: Examples) -> dict[str, float]:
    hits = defaultdict(list)
    for name, hit in zip(run.facts["class"], run.values["acc1"], strict=True):
        hits[name].append(hit)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def _confusions(run: Examples) -> list[Confusion]:
    sizes = Counter(run.facts["class"])
    wrong = Counter((a, b) for a, b in zip(run.facts["class"], run.facts["predicted"], strict=True) if a != b)
    return [Confusion(a, b, n, sizes[a]) for (a, b), n in wrong.most_common(CONFUSIONS)]


def _matrix(run: Examples) -> Matrix:
    pairs = Counter(zip(run.facts["class"], run.facts["predicted"], strict=True))
    names = sorted({name for pair in pairs for name in pair})
    sizes = Counter(run.facts["class"])
    return Matrix(names, [[pairs[a, b] / sizes[a] if sizes[a] else 0.0 for b in names] for a in names])
