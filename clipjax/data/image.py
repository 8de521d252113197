"""Images: bytes to RGB, and RGB to squares of uint8, augmented for training and never for evaluation."""

import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clipjax.config import Augment, Data
from clipjax.data.filter import check_size

BICUBIC = Image.Resampling.BICUBIC


def decode(source: bytes | Path, min_side: int | None = None) -> Image.Image:
    """A stored image as RGB. Raises what the decoder raises if it can't be read.

    With `min_side`, a JPEG may be decoded at a half, a quarter or an eighth of its size, if both sides keep `min_side` pixels."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, 8 bits a channel. Transparent pixels become white.

    Raises ValueError for numbers that have no known range (modes F and I): which of them is white?
    """
    if image.mode in ("F", "I"):
        raise ValueError(f"mode {image.mode}: numbers of 32 bits; expected colours of 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode.startswith("I;16"):  # whose conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, size: int, resize: Literal["squash", "crop"]) -> np.ndarray:
    """uint8 [size, size, 3]: both sides resized (squash), or the shorter side resized and the centre taken (crop).

    Bicubic and antialiased, with the sizes and offsets of torchvision's Resize and CenterCrop on PIL images."""
    if resize == "squash":
        return np.asarray(image.resize((size, size), BICUBIC))
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size)))


def training(stored: bytes | Path, size: int, data: Data, rng: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, 3] of a stored image, augmented. Raises Filtered, and what decoding raises."""
    image = decode(stored, min_decoded_side(size, data.augment))
    check_size(data.filter, *image.size)
    return transform(image, size, data.resize, data.augment, rng)


def evaluation(stored: bytes | Path, size: int, data: Data) -> np.ndarray:
    """uint8 [size, size, 3] of a stored image, not augmented. Raises what decoding raises."""
    return fit(decode(stored), size, data.resize)


def min_decoded_side(size: int, augment: Augment) -> int:
    """The `min_side` of `decode` for training, in pixels: twice what the smallest crop needs to give `size` pixels."""
    return math.ceil(2 * size * (math.sqrt(augment.aspect / augment.crop) if augment.crop < 1 else 1))


def transform(
    image: Image.Image, size: int, resize: Literal["squash", "crop"], augment: Augment, rng: np.random.Generator
) -> np.ndarray:
    """uint8 [size, size, 3] for training: a random resized crop, then flip, brightness, contrast and saturation."""
    if augment.crop < 1:
        image = image.resize((size, size), BICUBIC, box=_crop(*image.size, augment, rng))
    else:
        image = Image.fromarray(fit(image, size, resize))
    if augment.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for amount, enhance in (
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
    ):
        if amount > 0:
            image = enhance(image).enhance(rng.uniform(1 - amount, 1 + amount))
    return np.asarray(image)


def _crop(width: int, height: int, augment: Augment, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop, as torchvision's RandomResizedCrop, but with fractions of a pixel.

    Its share of the area is uniform in [crop, 1]. Its ratio of sides is log-uniform in [1/aspect, aspect]. If none of ten draws
    fits into the image, it is the largest centre crop of the nearest ratio."""
    log_aspect = math.log(augment.aspect)
    for _ in range(10):
        area = width * height * rng.uniform(augment.crop, 1)
        ratio = math.exp(rng.uniform(-log_aspect, log_aspect))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    w = min(width, height * augment.aspect)
    h = min(height, width * augment.aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2
