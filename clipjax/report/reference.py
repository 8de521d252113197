"""Published figures of many models beside one's own: the tables of LAION's studies of scaling (2212.07143, 2506.04598).

A table is a csv or parquet file with a row for each model and dataset. Its columns are those of the tables in
github.com/LAION-AI/scaling-laws-openclip (zeroshot_results.csv) and scaling-laws-for-comparison (results.parquet).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipjax.config import ConfigError, require
from clipjax.evals import results
from clipjax.files import as_path
from clipjax.report.curves import Panel
from clipjax.report.drawing import colour, svg
from clipjax.report.folders import Folder
from clipjax.report.scores import suite_folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATASET = "downstream_dataset"
SEEN = ("total_samples_seen", "samples_seen")  # one of them
TRAINED_ON = ("pretrain_dataset", "upstream_dataset")  # one of them
GREYS = ("#9a9a9a", "#c2b280", "#8fa8c8", "#b59ab5")  # of datasets that models were trained on

Points = list[tuple[float, float]]  # examples seen, figure


@dataclass(frozen=True)
class Reference:
    """The rows of a table, and what its columns are called."""

    rows: list[Mapping[str, Any]]
    seen: str
    trained_on: str

    def series(self, dataset: str, metric: str) -> dict[str, Points]:
        """Of the models that were evaluated on a dataset, by what they were trained on."""
        found: dict[str, Points] = {}
        for row in self.rows:
            x, y = row[self.seen], row.get(metric)
            if _plain(str(row[DATASET])) == _plain(dataset) and x and isinstance(y, int | float):
                found.setdefault(str(row[self.trained_on]), []).append((float(x), float(y)))
        return found


def read_reference(name: str) -> Reference:
    """Raises ConfigError for a file that is no such table."""
    path = as_path(name)
    require(path.is_file(), "--reference", name, "is not a file")
    require(path.suffix in (".csv", ".parquet"), "--reference", name, "must be a .csv or .parquet")
    import pyarrow
    from pyarrow import csv, parquet

    try:
        with path.open("rb") as file:
            table = csv.read_csv(file) if path.suffix == ".csv" else parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"--reference = {name!r}: {error}") from error
    has = set(table.column_names)
    seen, trained_on = (next((c for c in names if c in has), "") for names in (SEEN, TRAINED_ON))
    complete = DATASET in has and bool(seen and trained_on)
    remedy = f"needs the columns {DATASET}, {' or '.join(SEEN)}, {' or '.join(TRAINED_ON)}, and one for each metric"
    require(complete, "--reference", name, remedy)
    return Reference(table.to_pylist(), seen, trained_on)


def reference_panels(folders: Sequence[Folder], reference: Reference) -> list[Panel]:
    """A figure for each metric that a suite of the runs and the table have of the same dataset; names may differ in marks."""
    own: dict[tuple[str, str], list[Points]] = {}
    for number, folder in enumerate(folders):
        for path in suite_folders(folder).values():
            for row in results.read(path):
                step = int(row.pretrained.removeprefix("step "))
                for metric, value in row.metrics.items():
                    points = own.setdefault((row.name, metric), [[] for _ in folders])
                    points[number] += [(step * folder.batch, value)] if isinstance(value, int | float) else []
    panels = [(name, metric, points, reference.series(name, metric)) for (name, metric), points in own.items()]
    return [_panel(name, metric, points, series, folders) for name, metric, points, series in panels if series]


def _panel(name: str, metric: str, own: list[Points], series: Mapping[str, Points], folders: Sequence[Folder]) -> Panel:
    def draw(axes: "Axes") -> None:
        for number, (trained_on, points) in enumerate(sorted(series.items())):
            grey = GREYS[number % len(GREYS)]
            axes.scatter(*zip(*points, strict=True), s=9, color=grey, label=trained_on, linewidths=0)
        for number, points in enumerate(own):
            if points:
                axes.scatter(*zip(*points, strict=True), s=36, color=colour(number), marker="D", zorder=3)
        axes.set(xscale="log", xlabel="examples seen", ylabel=metric)
        axes.legend(fontsize=7, frameon=False)

    last = [f"{folder.name} {points[-1][1]:.4g}" for folder, points in zip(folders, own, strict=True) if points]
    return Panel(f"{metric}, {name}", svg(draw, 4.4, 2.8), f"{metric} on {name}: {', '.join(last)}; others in grey")


def _plain(name: str) -> str:
    """`wds/imagenet-1k`, `imagenet1k` and `ImageNet_1k` are the same dataset."""
    return re.sub("[^a-z0-9+]", "", name.lower().removeprefix("wds/"))
