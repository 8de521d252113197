"""Pictures as parts of a page: SVG of matplotlib, WebP of photographs, both as `data:` addresses, so that nothing is fetched."""

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, for colour-blind readers, without its yellow, which is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and sharp at any size
    "svg.hashsalt": "clipjax",  # the same figure gives the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
}
POINTS = 400  # of a curve: more can't be seen in a panel


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def svg(draw: Callable[["Axes"], None], width: float = 3.6, height: float = 2.3) -> str:
    """The address of a figure with one panel, `width` by `height` inches, that `draw` draws."""
    import matplotlib  # here: it takes a second to import
    from matplotlib.figure import Figure  # not pyplot: it needs no display and keeps no figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _address("image/svg+xml", file.getvalue())


def webp(image: Image.Image, most: int, quality: int = 80) -> str:
    """The address of an image, its longer side at most `most` pixels."""
    small = image.copy()
    small.thumbnail((most, most))
    file = io.BytesIO()
    small.save(file, "webp", quality=quality, method=6)
    return _address("image/webp", file.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
