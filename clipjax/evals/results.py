"""The results of a suite as files of one folder, which `eval compare` and `report` read.

    results.jsonl      a line for every set, and one for every mean over sets: a `Row`
    results.csv        the same as a table, with a column for every metric
    examples/NAME.npz  what each query of the set NAME gave: `Examples`

The first six keys of a line are CLIP_benchmark's.
"""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from clipjax.config import require
from clipjax.evals.bootstrap import Column, Draws, draw_means, seed_of
from clipjax.evals.evaluation import Examples
from clipjax.files import as_path, strict, write_atomic

LINES, TABLE, EXAMPLES = "results.jsonl", "results.csv", "examples"
SUITES = "suites"  # the folder of a workdir that holds a folder for each suite
MEAN = "mean"  # the task of a row that is a mean over sets


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one set of a suite, or of a mean over sets. JSON has None for what is not defined."""

    dataset: str  # SPEC/SPLIT; of a mean, its name
    model: str  # the run's name
    pretrained: str  # `step N`
    task: str  # MEAN, or the evaluation's
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    language: str = "en"
    name: str  # of the set in its suite: also that of its file of examples
    main_metric: str  # what `main` is
    main: float | None = None  # the figure that means are made of; None: there is none
    main_of: tuple[str, ...] = ()  # the metrics of which `main` is the mean; of a mean, the names of the sets
    ci95: tuple[float, float] | None = None  # of `main`; None: it is no mean over queries
    n: int = 0  # queries that `main` is a mean over, else images; of a mean, sets that have a figure
    unreadable: int = 0  # images that can't be used and are left out
    protocol: str = ""  # where the definition is from, and what of it is not confirmed
    absent: str = ""  # why there is no result; empty: there is one


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Writes results.jsonl and results.csv anew, from the first process. Each appears complete or not at all."""
    if jax.process_index() > 0:
        return
    with write_atomic(folder / LINES) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(strict(dataclasses.asdict(row)), allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    first = ["name", "dataset", "task", "main_metric", "main", "low", "high", "n", "unreadable", "absent", "protocol"]
    with write_atomic(folder / TABLE) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow([*first, *metrics])
        for row in rows:
            known = dataclasses.asdict(row) | dict(zip(("low", "high"), row.ci95 or ("", ""), strict=True))
            table.writerow([*(known[name] for name in first), *(row.metrics.get(name) for name in metrics)])


def read(folder: Path) -> list[Row]:
    """The rows of a folder that `write` wrote. Raises ConfigError for a file that is none of ours."""
    path, rows = folder / LINES, []
    require(path.is_file(), "results", str(path), "there is no such file: `clipjax eval suite` writes it")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            pair = values["ci95"]
            rows.append(Row(**values | {"ci95": pair and tuple(pair), "main_of": tuple(values["main_of"])}))
        except (ValueError, TypeError, KeyError):
            require(False, "results", str(path), f"line {number} is none that `clipjax eval suite` writes")
    return rows


def folders(place: str | Path) -> list[Path]:
    """The folders of results that RUN, a folder of results or its results.jsonl stands for: of a RUN one for each suite."""
    path = as_path(place)
    if path.name == LINES:
        return [path.parent]
    if (path / LINES).is_file():
        return [path]
    within = path / SUITES
    found = sorted(p for p in within.iterdir() if (p / LINES).is_file()) if within.is_dir() else []
    require(bool(found), "results", str(place), f"holds no {LINES}: run `clipjax eval suite` first")
    return found


def write_examples(folder: Path, name: str, examples: Sequence[Examples]) -> None:
    """Writes examples/NAME.npz, from the first process. Its arrays, with k = 0, 1, ... for each kind of query (images, captions):
    `k/keys` str [n], `k/groups` str [n] if they have groups, `k/values/METRIC` [n] and `k/facts/NAME` str [n]."""
    path = folder / EXAMPLES / f"{name}.npz"
    if jax.process_index() > 0 or not (examples or path.exists()):  # of other weights: nothing takes its place
        return
    arrays: dict[str, np.ndarray] = {}
    for k, kind in enumerate(examples):
        arrays[f"{k}/keys"] = np.array(kind.keys, str)
        arrays |= {} if kind.groups is None else {f"{k}/groups": np.array(kind.groups, str)}
        arrays |= {f"{k}/values/{metric}": np.asarray(values) for metric, values in kind.values.items()}
        arrays |= {f"{k}/facts/{fact}": np.array(texts, str) for fact, texts in kind.facts.items()}
    with write_atomic(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]  (no array is named allow_pickle)


def read_examples(folder: Path, name: str) -> list[Examples]:
    """The examples of the set `name`; none where its metrics are no means over queries."""
    path = folder / EXAMPLES / f"{name}.npz"
    if not path.is_file():
        return []
    with path.open("rb") as file, np.load(file) as arrays:
        stored = {key: arrays[key] for key in arrays}
    kinds = []
    while f"{len(kinds)}/keys" in stored:
        k = f"{len(kinds)}/"
        values = _under(f"{k}values/", stored)
        facts = {fact: texts.tolist() for fact, texts in _under(f"{k}facts/", stored).items()}
        groups = stored[f"{k}groups"].tolist() if f"{k}groups" in stored else None
        kinds.append(Examples(stored[f"{k}keys"].tolist(), values, groups, facts))
    return kinds


def _under(prefix: str, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in stored.items() if key.startswith(prefix)}


def draws_of(examples: Sequence[Examples], metrics: Sequence[str], name: str) -> Draws | None:
    """The mean of some metrics in each bootstrap draw of a set's queries. `name`: the set's, by which the draws of all runs are
    alike. None where one of the metrics is no mean over queries."""
    kinds = [next((kind for kind in examples if metric in kind.values), None) for metric in metrics]
    columns = [
        Column(np.asarray(kind.values[metric], np.float64), kind.keys if kind.groups is None else kind.groups)
        for kind, metric in zip(kinds, metrics, strict=True)
        if kind is not None
    ]
    if len(columns) < len(metrics) or any(np.isnan(column.values).all() for column in columns):
        return None
    return np.mean(draw_means(columns, seed=seed_of(name)), axis=0)
