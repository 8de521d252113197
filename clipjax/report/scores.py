"""The table of a report: every set's main figure with its interval, and mean and spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipjax.config import ConfigError
from clipjax.evals import results
from clipjax.evals.comparison import Difference, compare
from clipjax.evals.results import MEAN, Row
from clipjax.report.curves import called
from clipjax.report.folders import Folder


@dataclass(frozen=True)
class Cell:
    text: str
    low_high: str = ""  # the interval
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Score:
    """A row of the table: one figure of every run."""

    set: str
    metric: str
    cells: list[Cell]
    seeds: list[Cell]  # of each group of runs that differ in the seed alone
    mean: bool  # whether it is a mean over sets
    n: int
    protocol: str


@dataclass(frozen=True)
class Suite:
    name: str
    scores: list[Score]


def suite_folders(folder: Folder) -> dict[str, Path]:
    """By the name of the suite: where its results are. Empty for a run that no suite has evaluated."""
    try:
        return {path.name: path for path in results.folders(folder.path)}
    except ConfigError:
        return {}


def suites(folders: Sequence[Folder], groups: Sequence[Sequence[int]]) -> list[Suite]:
    """What `clipjax eval suite` wrote into the workdirs. `groups`: `same_but_for_seed`."""
    per_run = [suite_folders(folder) for folder in folders]
    found = []
    for name in dict.fromkeys(name for of_run in per_run for name in of_run):
        rows = [{row.name: row for row in results.read(of_run[name])} if name in of_run else {} for of_run in per_run]
        sets = dict.fromkeys(one for of_run in rows for one in of_run)
        found.append(Suite(name, [_score([of_run.get(one) for of_run in rows], groups) for one in sets]))
    return found


def _score(rows: Sequence[Row | None], groups: Sequence[Sequence[int]]) -> Score:
    known = next(row for row in rows if row is not None)
    figures = [row.main if row else None for row in rows]
    best = max((x for x in figures if x is not None), default=None)
    cells = []
    for row, figure in zip(rows, figures, strict=True):
        low_high = f"[{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]" if row and row.ci95 else ""
        note = (row.absent if row else "not evaluated") if figure is None else ""
        cells.append(Cell(_text(figure), low_high, figure is not None and figure == best, note))
    spreads = [spread([figures[i] for i in group]) for group in groups]
    mean = known.task == MEAN
    return Score(known.name, known.main_metric, cells, spreads, mean, max(row.n if row else 0 for row in rows), known.protocol)


def last_evaluations(folders: Sequence[Folder], groups: Sequence[Sequence[int]]) -> list[Score]:
    """The newest figures of the evaluations during training, which have no intervals."""
    newest: list[dict[tuple[str, str], float]] = []
    for folder in folders:
        flat = {}
        for line in folder.evaluations:
            flat |= {(line["dataset"], called(line["task"], metric)): value for metric, value in line["metrics"].items()}
        newest.append(flat)
    scores = []
    for dataset, metric in dict.fromkeys(key for flat in newest for key in flat):
        figures = [flat.get((dataset, metric)) for flat in newest]
        spreads = [spread([figures[i] for i in group]) for group in groups]
        scores.append(Score(dataset, metric, [Cell(_text(x)) for x in figures], spreads, False, 0, ""))
    return scores


def spread(figures: Sequence[float | None]) -> Cell:
    """The mean and the standard deviation of a sample of seeds."""
    known = [x for x in figures if x is not None]
    if len(known) < 2:
        return Cell("–")
    return Cell(f"{np.mean(known):.4f}", f"± {np.std(known, ddof=1):.4f}")


def _text(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4f}"


def comparisons(folders: Sequence[Folder]) -> list[tuple[Folder, list[Difference], str]]:
    """Each further run against the first; or why there is no comparison."""
    found = []
    for other in folders[1:]:
        try:
            found.append((other, compare(folders[0].path, other.path), ""))
        except ConfigError as error:
            found.append((other, [], str(error)))
    return found
