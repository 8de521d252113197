"""RGB images to squares: bicubic and antialiased, by Pillow or, for training, by SIMD (the package cykooz.resizer)."""

import math
import threading
from typing import Any, Literal

import numpy as np
from PIL import Image

from clipjax.config import ConfigError, Data
from clipjax.data.images import strip

BICUBIC = Image.Resampling.BICUBIC
LONG = 3  # ratio of sides from which on only the middle is resized; below, Pillow's resize of all of it takes less time

Box = tuple[float, float, float, float]  # left, top, right and bottom, in pixels, with fractions
Resize = Literal["squash", "crop"]
Resizer = Literal["pillow", "fast"]

_of_thread = threading.local()


def fit(image: Image.Image, size: int, resize: Resize) -> np.ndarray:
    """uint8 [size, size, 3]: both sides resized (squash), or the shorter side resized and the centre taken (crop).

    Bicubic and antialiased, with the sizes and offsets of torchvision's Resize and CenterCrop on PIL images."""
    if resize == "squash":
        return np.asarray(image.resize((size, size), BICUBIC))
    width, height, left, top = _centre(*image.size, size)
    if max(image.size) > LONG * min(image.size):
        return strip.middle(image, (width, height), left, top, size)
    return np.asarray(image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size)))


def fit_box(width: int, height: int, size: int, resize: Resize) -> Box:
    """The part of an image of this size that `fit` shows."""
    if resize == "squash":
        return 0, 0, width, height
    w, h, left, top = _centre(width, height, size)
    x, y = width / w, height / h
    return left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)


def _centre(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Width and height of the resized image, left and top of its central square."""
    short = min(width, height)
    width, height = size * width // short, size * height // short
    return width, height, round((width - size) / 2), round((height - size) / 2)


def resize_box(image: Image.Image, size: int, box: Box, resizer: Resizer) -> Image.Image:
    """The box of an RGB image, resized to a square of `size` pixels."""
    width, height = image.size
    left, top, right, bottom = box
    box = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if resizer == "pillow":
        return image.resize((size, size), BICUBIC, box=box)
    return _fast(image, size, box)


def check_size(width: int, height: int, size: int, max_pixels: int) -> None:
    """Raises ValueError for an image that takes too much memory to decode or, being a strip, to resize to `size`."""
    if width * height > max_pixels:
        raise ValueError(f"{width:,} x {height:,} pixels are more than data.max_pixels = {max_pixels:,}")
    longest = max(max_pixels, Data.max_pixels) // size  # a side of 1 pixel becomes `size` before the long side is resized
    if max(width, height) > longest:
        raise ValueError(f"{width:,} x {height:,} pixels: too long to be resized to {size}; at most {longest:,} are possible")


def check_resizer(resizer: Resizer) -> None:
    """Raises ConfigError if the package of `fast` is missing."""
    if resizer == "pillow":
        return
    try:
        import cykooz_resizer  # noqa: F401
    except ImportError as e:
        raise ConfigError(f"data.resizer = 'fast': can't import cykooz_resizer ({e}): pip install 'clipjax[fast]'") from e


def _fast(image: Image.Image, size: int, box: Box) -> Image.Image:
    import cykooz_resizer as fast

    if not hasattr(_of_thread, "resizer"):  # one for each thread: it has buffers
        _of_thread.resizer = fast.Resizer()
    resizer: Any = _of_thread.resizer
    left, top, right, bottom = box
    if not (math.isfinite(sum(box)) and left < right and top < bottom):
        raise ValueError(f"a crop of {box}")
    bicubic = fast.ResizeAlg.convolution(fast.FilterType.catmull_rom)
    crop = fast.CropBox(left, top, right - left, bottom - top)
    resized = Image.new("RGB", (size, size))
    resizer.resize_pil(image, resized, fast.ResizeOptions(bicubic, crop_box=crop))
    return resized
