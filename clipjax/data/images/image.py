"""Images: stored bytes to squares of uint8, as a viewer shows them, augmented for training and never for evaluation.

An image is upright (EXIF), of 8 bits, on white, and the first frame. See `turn`, `modes`, `resize`, `strip` and `augment`.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipjax.config import Augment, Data
from clipjax.data import filter as filters
from clipjax.data.images import png
from clipjax.data.images.augment import bordered, draw_crop, recolour
from clipjax.data.images.modes import checked, rgb
from clipjax.data.images.resize import Box, check_size, fit, fit_box, resize_box
from clipjax.data.images.turn import Turn, stored_box, turn_of, turned, turned_size

DRAFTED = ("JPEG", "MPO")  # formats that are decoded at a half, a quarter or an eighth of their size for less work
# Pillow warns of metadata that are broken and of large images, each in words of its own. The first do no harm, and
# data.max_pixels judges the second.
QUIET = [
    ("ignore", None, Image.DecompressionBombWarning, None, 0),
    ("ignore", None, UserWarning, re.compile(r"PIL\."), 0),
]


@dataclass(frozen=True)
class Crop:
    """A decoded image of which a part is wanted."""

    pixels: Image.Image  # RGB, as stored: not turned; at 1 / scale of the stored size
    box: Box  # of the part, in pixels of the stored image
    scale: int  # 1, 2, 4 or 8
    turn: Turn | None  # how it is to be turned
    augment: Augment  # what is done to it
    rng: np.random.Generator  # which draws the rest


def training(stored: bytes | Path, size: int, data: Data, rng: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, 3] of a stored image, augmented: a random resized crop, then flip, colours and blur. With several of
    data.views, [V, size, size, 3]: each has draws of its own, whatever the others do, and the first those of a single one.

    Raises Filtered, and what `opened` and the decoder raise."""
    return squares(decoded_crops(stored, size, data, rng), size, data)


def decoded_crops(stored: bytes | Path, size: int, data: Data, rng: np.random.Generator) -> list[Crop]:
    """A stored image, decoded once, and the part of it that each view shows. Raises as `training` does."""
    augments = data.views or (data.augment,)
    draws = [rng, *(generator(rng, i) for i in range(1, len(augments)))]
    with opened(stored, data.max_pixels) as image:
        check(image, size, data)
        filters.check_size(data.filter, *image.size)
        if image.format not in DRAFTED:  # their metadata may stand behind the pixels
            image.load()
            check(image, size, data)
        turn = turn_of(image)
        upright = turned_size(*image.size, turn)
        shown = [
            fit_box(*upright, size, data.resize) if _whole(augment) else draw_crop(*upright, augment, own)
            for augment, own in zip(augments, draws, strict=True)
        ]
        boxes = [stored_box(box, *image.size, turn) for box in shown]
        scale = _draft(image, min(boxes, key=lambda box: min(box[2] - box[0], box[3] - box[1])), size)
        image.load()
        pixels = rgb(image)
        return [Crop(pixels, box, scale, turn, *own) for box, own in zip(boxes, zip(augments, draws, strict=True), strict=True)]


def generator(rng: np.random.Generator, n: int) -> np.random.Generator:
    """The n-th generator beside `rng`, which is left as it is: their draws do not meet. n = 0 would be a copy of it."""
    return np.random.Generator(rng.bit_generator.jumped(n))  # pyright: ignore


def squares(crops: list[Crop], size: int, data: Data) -> np.ndarray:
    """uint8 [size, size, 3], or of several [V, size, size, 3]: the parts, resized, turned, flipped and recoloured."""
    found = [_square(crop, size, data) for crop in crops]
    return found[0] if len(found) == 1 else np.stack(found)


def _whole(augment: Augment) -> bool:
    return augment.crop == 1 and augment.border == 0


def _square(crop: Crop, size: int, data: Data) -> np.ndarray:
    if _whole(crop.augment) and crop.scale == 1 and data.resizer == "pillow":  # what an evaluation shows, bit for bit
        pixels = Image.fromarray(fit(turned(crop.pixels, crop.turn), size, data.resize))
    else:  # turned when it is small
        left, top, right, bottom = crop.box
        box = left / crop.scale, top / crop.scale, right / crop.scale, bottom / crop.scale
        shown, box = bordered(crop.pixels, box) if crop.augment.border > 0 else (crop.pixels, box)
        pixels = turned(resize_box(shown, size, box, data.resizer), crop.turn)
    return np.asarray(recolour(pixels, crop.augment, crop.rng))


def evaluation(stored: bytes | Path, size: int, data: Data) -> np.ndarray:
    """uint8 [size, size, 3] of a stored image, not augmented, resized by Pillow. Raises what `opened` and the decoder raise."""
    with opened(stored, data.max_pixels) as image:
        check(image, size, data)
        image.load()
        check(image, size, data)
        pixels = upright(image)
    return fit(pixels, size, data.resize)


def decode(stored: bytes | Path, max_pixels: int = Data.max_pixels) -> Image.Image:
    """A stored image as RGB, upright. Raises what `opened` and the decoder raise."""
    with opened(stored, max_pixels) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An image as RGB, turned and mirrored as its metadata say."""
    image.load()
    return turned(rgb(image), turn_of(image))


@contextmanager
def opened(stored: bytes | Path, max_pixels: int) -> Iterator[Image.Image]:
    """A stored image, identified but not yet decoded. Raises ValueError for more than `max_pixels`, and what Pillow raises."""
    _limit_pillow(max_pixels)
    try:
        image = _identified(stored)
    except UnidentifiedImageError:
        name = f"{len(stored):,} bytes" if isinstance(stored, bytes) else stored
        raise UnidentifiedImageError(f"cannot identify an image in {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"{e} (data.max_pixels = {max_pixels:,})") from None
    with image:
        check_size(*image.size, 1, max_pixels)
        yield checked(image)


def _identified(stored: bytes | Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored)
    except (UnidentifiedImageError, ValueError):
        stored = stored if isinstance(stored, bytes) else stored.read_bytes()
        if not stored.startswith(png.SIGNATURE):
            raise
        return Image.open(io.BytesIO(png.bare(stored)))


def check(image: Image.Image, size: int, data: Data) -> None:
    """Raises ValueError for an image that is too large to decode, or too long to resize. For some formats, as ICO, its size is
    known only when it is loaded."""
    check_size(*image.size, size, data.max_pixels)


def _limit_pillow(max_pixels: int) -> None:
    """Lets Pillow open what `max_pixels` allows. Its own limit stays for images within images, as in an ICO."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    if list(warnings.filters[: len(QUIET)]) != QUIET:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _draft(image: Image.Image, box: Box, size: int) -> int:
    """Has a JPEG decoded at 1/s of its size, where `box` then still has `size` pixels on each side. Returns s: 1, 2, 4 or 8."""
    width, height = image.size
    shortest = min(box[2] - box[0], box[3] - box[1])
    scale = next((s for s in (8, 4, 2) if shortest >= s * size), 1)
    if image.format not in DRAFTED or scale == 1:
        return 1
    image.draft(None, (width // scale, height // scale))
    return scale if image.size == (-(-width // scale), -(-height // scale)) else 1
