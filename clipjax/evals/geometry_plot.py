"""The plot of a run's geometry: both clouds in the plane in which they vary most, and both spectra."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clipjax.evals.geometry import GeometryResults, Rows, singular_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 1500  # of a cloud that are drawn; more would overlap
LINES = 40  # pairs that are joined
FLOOR = 1e-6  # of the axis of a spectrum, whose largest value is at most 1: below is float32's rounding
# Blue and orange (vermilion) of Okabe and Ito's palette, for colour-blind readers. In grey print, marks and dashes differ.
STYLES = {"image": ("#0072B2", "o", "-"), "text": ("#D55E00", "^", "--")}
HEADINGS = {
    "centroid distance": "centroid_distance",
    "linear separability": "linear_separability",
    "relative gap": "relative_modality_gap",
}


def plot(found: GeometryResults, title: str) -> Image.Image:
    """1440 x 768 pixels."""
    from matplotlib.figure import Figure  # not pyplot: it needs no display and keeps no figure

    figure = Figure(figsize=(12, 6.4), dpi=120, layout="constrained")
    figure.suptitle(f"{title}: {len(found.image):,} pairs")
    panels = figure.subplot_mosaic([["clouds", "spectra"], ["clouds", "explained"]], width_ratios=[1.35, 1])
    _clouds(panels["clouds"], found)
    _spectra(panels["spectra"], found)
    _explained(panels["explained"], found)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def plane(x: Rows, y: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both clouds [n, 2] along the first two principal components of both together, and these components' shares of the
    variance [2]. The texts' centroid is never left of nor below the images', so that two plots of a run can be compared.
    """
    both = np.concatenate([x, y])
    variance, axes = np.linalg.eigh(np.cov(both.T))
    first = axes[:, :-3:-1]
    first *= np.where((y.mean(0) - x.mean(0)) @ first < 0, -1, 1)
    centre = both.mean(0)
    return (x - centre) @ first, (y - centre) @ first, variance[:-3:-1] / max(variance.sum(), np.finfo(float).tiny)


def _clouds(axes: "Axes", found: GeometryResults) -> None:
    *clouds, shares = plane(found.image, found.text)
    n = len(found.image)
    shown = np.random.default_rng(0).permutation(n)[:POINTS]
    for (name, (colour, mark, _)), z in zip(STYLES.items(), clouds, strict=True):
        dots = dict(s=14, alpha=0.45, linewidths=0, zorder=2)
        axes.scatter(*z[shown].T, color=colour, marker=mark, label=name, **dots)
        axes.scatter(*z.mean(0), s=170, color=colour, marker=mark, edgecolors="black", linewidths=1.5, zorder=4)
    image, text = clouds
    ends = np.stack([image, text])[:, shown[:LINES]]
    joined = axes.plot(*np.moveaxis(ends, 2, 0), color="#444444", linewidth=0.6, alpha=0.6, zorder=3)
    joined[0].set_label("a pair")
    axes.plot(*np.stack([image.mean(0), text.mean(0)], 1), color="black", linewidth=2, zorder=3.5, label="centroids")
    axes.set(xlabel=f"component 1 of both ({shares[0]:.0%} of the variance)", ylabel=f"component 2 ({shares[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title("   ".join(_metric(found, name, key) for name, key in HEADINGS.items()), fontsize=10)
    axes.legend(loc="best")


def _metric(found: GeometryResults, name: str, key: str) -> str:
    value = found.metrics[key]
    return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} -"


def _spectra(axes: "Axes", found: GeometryResults) -> None:
    """Draws the singular values of both clouds. Means are not removed: a cloud with an offset has a very large first value."""
    for (name, (colour, mark, dashes)), z in zip(STYLES.items(), (found.image, found.text), strict=True):
        values = singular_values(z)
        rank = found.metrics[f"rankme_{name}"]
        style = _line(colour, mark, dashes)
        axes.plot(np.arange(1, len(values) + 1), values / len(z) ** 0.5, label=f"{name}, RankMe {rank:.1f}", **style)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))
    axes.set(xlabel="number of the singular value", ylabel="singular value / $\\sqrt{n}$")
    axes.grid(alpha=0.3)
    axes.legend()


def _explained(axes: "Axes", found: GeometryResults) -> None:
    for name, (colour, mark, dashes) in STYLES.items():
        curve = found.metrics[f"explained_variance_{name}"]
        if not isinstance(curve, list):  # all vectors are equal
            continue
        axes.plot(np.arange(1, len(curve) + 1), curve, label=name, **_line(colour, mark, dashes))
    axes.set(xlabel="principal components", ylabel="variance explained", ylim=(0, 1.03), xscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")


def _line(colour: str, mark: str, dashes: str) -> dict[str, Any]:
    return dict(color=colour, marker=mark, linestyle=dashes, markevery=0.1, markersize=4)
