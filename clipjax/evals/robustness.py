"""Effective robustness (2007.00644): how much more accurate a run is under a shift than models of its accuracy without it are."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

from clipjax.config import ConfigError, require
from clipjax.evals import results
from clipjax.evals.results import MEAN
from clipjax.files import as_path

FEWEST = 3  # models that a line is fitted to


@dataclass(frozen=True)
class Robustness:
    """What the reference models make one expect of a set, and what the run has."""

    name: str  # of the set
    accuracy: float  # the run's
    expected: float  # of a model with the run's accuracy on the set without the shift
    effective: float  # accuracy - expected
    slope: float  # of the line through logit(accuracy) of the reference models
    intercept: float
    r2: float  # the share of the variance that the line explains
    models: int  # that it was fitted to


def robustness(place: str | Path, reference: str, on: str) -> list[Robustness]:
    """For each set of a run's suites that the reference has too, but for `on`, the set without the shift.

    `place`: RUN, or a folder of results; of a set the main metric counts. `reference`: a CSV with a row a model: its name, and
    under each set's name an accuracy between 0 and 1, or nothing. Raises ConfigError where these have no sets in common."""
    table = read_reference(reference)
    rows = [row for folder in results.folders(place) for row in results.read(folder) if row.task != MEAN]
    found = {row.name: row.main for row in rows if row.main is not None}
    for names, where in ((found, str(place)), (table, reference)):
        require(on in names, "on", on, f"{where} has no such set; it has {', '.join(names) or 'none'}")
    common = [name for name in table if name in found and name != on]
    require(bool(common), "reference", reference, f"it has no other set of {place}, which has {', '.join(found)}")
    require(0 < found[on] < 1, "on", on, f"the run's accuracy there is {found[on]}, whose logit is not finite")
    return [fitted(name, found[on], found[name], table[on], table[name]) for name in common]


def fitted(name: str, standard: float, shifted: float, x: Sequence[float], y: Sequence[float]) -> Robustness:
    """Of a run with accuracy `standard` without and `shifted` with the shift. `x`, `y`: those of reference models; NaN: unknown.

    The line is the least-squares fit of logit(y) on logit(x). Raises ConfigError for fewer than three models."""
    both = np.array([x, y])
    both = both[:, ~np.isnan(both).any(0)]
    remedy = f"{both.shape[1]} models of the reference have both accuracies, and a line needs {FEWEST} that differ"
    require(both.shape[1] >= FEWEST and bool(np.ptp(both[0]) > 0), "reference", name, remedy)
    u, v = logit(both)
    slope, intercept = np.polyfit(u, v, 1).tolist()
    left, total = np.sum((v - slope * u - intercept) ** 2), np.sum((v - v.mean()) ** 2)
    expected = float(expit(slope * logit(standard) + intercept))
    return Robustness(
        name, shifted, expected, shifted - expected, slope, intercept, float(1 - left / total) if total else 1.0, both.shape[1]
    )


def read_reference(file: str) -> Mapping[str, list[float]]:
    """The accuracies of the models of a CSV, by set. NaN: there is none. Raises ConfigError for what is no such table."""
    try:
        rows = list(csv.DictReader(as_path(file).read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reference = {file!r}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from error
    require(bool(rows), "reference", file, "must be a CSV whose first row names the sets, with a row a model")
    longer = next((number for number, row in enumerate(rows, 1) if None in row), None)
    require(longer is None, "reference", file, f"row {longer} below the first has more fields than the first")
    return {name: [_accuracy(file, name, row[name]) for row in rows] for name in list(rows[0])[1:]}


def _accuracy(file: str, name: str, text: str | None) -> float:
    if not (text or "").strip():
        return math.nan
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    remedy = f"{name} must have accuracies between 0 and 1, both excluded, or nothing; divide percent by 100"
    require(0 < value < 1, "reference", file, f"{text!r}: {remedy}")
    return value


def table(found: Sequence[Robustness]) -> str:
    """The figures as text, a set a line, and their mean."""
    width = max(len(r.name) for r in found)
    lines = [f"{'set':{width}}  accuracy  expected  effective      r2  models"]
    for r in found:
        lines.append(f"{r.name:{width}}  {r.accuracy:8.4f}  {r.expected:8.4f}  {r.effective:+9.4f}  {r.r2:6.3f}  {r.models:6}")
    return "\n".join([*lines, f"{'mean':{width}}  {'':8}  {'':8}  {np.mean([r.effective for r in found]):+9.4f}"])
