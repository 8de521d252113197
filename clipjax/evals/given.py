"""Images and texts that the user of a loaded run gives. What is neither is refused before anything is computed.

An error names the argument and what was expected, in one line. It never shows the data, which may be large or private.
"""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from clipjax.config import ConfigError
from clipjax.data.images.image import decode, fit, upright
from clipjax.files import local_path

ImageLike = Image.Image | np.ndarray | str | Path  # an array is uint8 [h, w, 3]
EXPECTED = "a PIL image, a file name or a uint8 array [h, w, 3]"


def pixels(images: Iterable[ImageLike], size: int, resize: Literal["squash", "crop"]) -> np.ndarray:
    """uint8 [n, size, size, 3], as the model sees the images.

    Raises TypeError for what is no list of images, ValueError for an array or an image without 8-bit colours, and ConfigError for
    a file that can't be read.
    """
    if isinstance(images, np.ndarray) and images.ndim != 4 and images.dtype != object:
        raise ValueError(f"images: is one array of shape {list(images.shape)}; expected a list, or uint8 [n, h, w, 3]")
    fitted = [fit(_open(f"images[{n}]", image), size, resize) for n, image in enumerate(_items("images", images))]
    return np.reshape(fitted, (len(fitted), size, size, 3)).astype(np.uint8, copy=False)  # an empty list is float64


def texts(values: Iterable[str]) -> list[str]:
    """The texts as a list. Raises TypeError for what is no list of strings, ValueError for a string that is no Unicode text."""
    items = _items("texts", values)
    for n, text in enumerate(items):
        if not isinstance(text, str):
            raise TypeError(f"texts[{n}]: is of type {type(text).__name__}; expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"has a lone surrogate at position {error.start}, which is no character; expected Unicode text"
            raise ValueError(f"texts[{n}]: {what}") from None
    return items


def _items(name: str, values: Any) -> list[Any]:
    """`values` as a list. A string is not taken letter by letter, and what has no order is refused."""
    if isinstance(values, str | bytes | Path):
        raise TypeError(f"{name}: is one {type(values).__name__}; expected a list")
    if not isinstance(values, Iterable) or isinstance(values, Mapping | Set) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name}: is of type {type(values).__name__}; expected a list")
    return list(values)


def _open(name: str, image: Any) -> Image.Image:
    """The image as RGB. `name`: its place in the argument."""
    match image:
        case np.ndarray():
            _check_array(name, image)
            return Image.fromarray(image)
        case Image.Image():
            return _checked_rgb(name, image)
        case str() | Path():
            return _read(name, image)
    raise TypeError(f"{name}: is of type {type(image).__name__}; expected {EXPECTED}")


def _check_array(name: str, image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        remedy = "; from numbers in [0, 1]: (255 * x).round().astype(np.uint8)" if image.dtype.kind == "f" else ""
        raise ValueError(f"{name}: is {image.dtype} {list(image.shape)}; expected {EXPECTED}{remedy}")


def _checked_rgb(name: str, image: Image.Image) -> Image.Image:
    if not all(image.size):
        raise ValueError(f"{name}: has no pixels; expected {EXPECTED}")
    try:
        return upright(image)
    except Exception as error:  # a decoder may raise anything, and PIL decodes late
        raise ValueError(f"{name}: is no image that can be read: {error}") from error


def _read(name: str, path: str | Path) -> Image.Image:
    file = local_path(name, str(path))
    try:
        return decode(file)
    except Exception as error:  # a decoder may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"is no image that can be read: {error}"
        raise ConfigError(f"{name} = {str(path)!r}: {reason}") from error
