"""The middle of a resized strip, without resizing all of it: what Pillow's bicubic resize gives, bit for bit.

Pillow resizes width and height one after the other, and rounds to 8 bits between them. Its weights are integers of 22 fractional
bits (src/libImaging/Resample.c). Here only the wanted columns or rows are made, from the pixels under their filters.
"""

import functools

import numpy as np
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC
SUPPORT = 2.0  # of the filter, in pixels of the smaller image
FRACTION = 22  # bits


def middle(image: Image.Image, resized: tuple[int, int], left: int, top: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: an RGB image resized to `resized` (width, height; one of them is `size`), and the square at (left,
    top) cut out of it. One side of the image must be more than twice the other."""
    width, height = image.size
    if width > height:
        windows = _windows(width, resized[0], left, size)
        image = image.crop((windows[0][0], 0, windows[-1][1], height))
        columns = _filtered(np.asarray(image).swapaxes(0, 1), windows).swapaxes(0, 1)
        return np.asarray(Image.fromarray(np.ascontiguousarray(columns)).resize((size, size), BICUBIC))
    windows = _windows(height, resized[1], top, size)
    image = image.crop((0, windows[0][0], width, windows[-1][1]))
    if resized[1] < height and (_height_first() or height > 100 * width):
        return np.asarray(Image.fromarray(_filtered(np.asarray(image), windows)).resize((size, size), BICUBIC))
    return _filtered(np.asarray(image.resize((size, image.height), BICUBIC)), windows)


@functools.cache
def _height_first() -> bool:
    """Whether this Pillow resizes the height first if it shrinks by more than twice what the width shrinks, as 13.0 does. Older
    ones resize the width first, unless the height is 100 times the width."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 8, 3), dtype=np.uint8))
    return image.resize((4, 20), BICUBIC) == image.resize((8, 20), BICUBIC).resize((4, 20), BICUBIC)


def _windows(length: int, resized: int, first: int, count: int) -> list[tuple[int, int, np.ndarray]]:
    """For each of `count` pixels of a side of `length` that is resized to `resized`: the pixels [start, end) that it is made of,
    and their weights, int64."""
    scale = length / resized
    stretch = max(scale, 1.0)
    reach, windows = SUPPORT * stretch, []
    for x in range(first, first + count):
        center = (x + 0.5) * scale
        start, end = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), length)
        weights = _bicubic((np.arange(end - start) + start - center + 0.5) * (1.0 / stretch))
        weights = weights / np.cumsum(weights)[-1] * (1 << FRACTION)  # cumsum adds one by one, as C does
        windows.append((start, end, np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)))
    return windows


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = -1/2, in the order of operations of Pillow."""
    a, x = -0.5, np.abs(x)
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _filtered(rows: np.ndarray, windows: list[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """uint8 [len(windows), n, 3] of uint8 [m, n, 3], whose row 0 is where the first window starts. Sums are exact in float64."""
    origin, out = windows[0][0], np.empty((len(windows), *rows.shape[1:]), np.uint8)
    for i, (start, end, weights) in enumerate(windows):
        sums = np.tensordot(weights.astype(np.float64), rows[start - origin : end - origin].astype(np.float64), 1)
        out[i] = np.clip((sums.astype(np.int64) + (1 << (FRACTION - 1))) >> FRACTION, 0, 255)
    return out
