"""What metrics.jsonl holds, as curves over the examples seen: runs with other batch sizes stay comparable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipjax.report.drawing import POINTS, colour, svg
from clipjax.report.folders import Folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING = (  # the keys of a training line that say how a run went; docs/metrics.md explains all
    *("loss", "image_to_text_accuracy", "text_to_image_accuracy", "positive_cosine", "hardest_negative_cosine"),
    *("scale", "lr", "grad_norm", "examples_per_second", "mfu"),
)
FEW = 10  # points that are marked, each for itself
EVALUATED = 4  # metrics of an evaluation that have a curve, where MAIN names none
MAIN = {  # by the task: its metrics that have a curve
    "zeroshot_classification": ("acc1", "mean_per_class_recall"),
    "zeroshot_retrieval": ("image_retrieval_recall@1", "text_retrieval_recall@1"),
    "geometry": ("relative_modality_gap", "centroid_distance", "rankme_image", "rankme_text"),
    "captioning": ("exact_match", "perplexity", "cider"),
}

Points = list[tuple[float, float]]  # examples seen, value


@dataclass(frozen=True)
class Panel:
    """A figure of one metric, with a line for each run that has it."""

    title: str
    figure: str  # its address
    text: str  # the last values, for who can't see it


def training_panels(folders: Sequence[Folder]) -> list[Panel]:
    """Of the metrics of training that some run has."""
    found = [(key, [thinned(folder.training, key, folder.batch) for folder in folders]) for key in TRAINING]
    return [_panel(key, lines, folders) for key, lines in found if any(lines)]


def evaluation_panels(folders: Sequence[Folder]) -> list[Panel]:
    """Of the main metrics of each evaluation during training."""
    names = dict.fromkeys((line["task"], line["dataset"]) for folder in folders for line in folder.evaluations)
    panels = []
    for task, dataset in names:
        per_run = [[line for line in f.evaluations if (line["task"], line["dataset"]) == (task, dataset)] for f in folders]
        there = dict.fromkeys(metric for lines in per_run for line in lines for metric in line["metrics"])
        for metric in MAIN.get(task) or list(there)[:EVALUATED]:
            lines = [
                thinned([line | line["metrics"] for line in lines], metric, folder.batch)
                for lines, folder in zip(per_run, folders, strict=True)
            ]
            if any(lines):
                panels.append(_panel(f"{called(task, metric)}, {dataset}", lines, folders))
    return panels


def called(task: str, metric: str) -> str:
    """A metric with its task, unless it is one of the four in MAIN: `acc1` may also be of the task `transfer`."""
    return metric if task in MAIN else f"{task} {metric}"


def thinned(lines: Sequence[dict], key: str, batch: int) -> Points:
    """Without steps whose value is null. Thinned to what a panel can show; the first and the last point stay."""
    points = [(line["step"] * batch, line[key]) for line in lines if isinstance(line.get(key), int | float)]
    every = -(-len(points) // POINTS) or 1
    return points[::every] + points[-1:] * ((len(points) - 1) % every > 0)


def _panel(title: str, lines: Sequence[Points], folders: Sequence[Folder]) -> Panel:
    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import EngFormatter

        for number, points in enumerate(lines):
            if points:
                mark = "o" if len(points) <= FEW else None
                axes.plot(*zip(*points, strict=True), color=colour(number), marker=mark, markersize=4)
        axes.set_xlabel("examples seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(axis="x", nbins=5)

    last = [f"{folder.name} {points[-1][1]:.4g}" for folder, points in zip(folders, lines, strict=True) if points]
    return Panel(title, svg(draw), f"{title} at the end: {', '.join(last)}")
