"""Pictures: bytes to RGB, and RGB to squares of uint8 for training (augmented) and evaluation (never)."""

import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clipjax.config import Augment

BICUBIC = Image.Resampling.BICUBIC


def decode(source: bytes | Path, least: int | None = None) -> Image.Image:
    """A stored picture as RGB. Raises whatever the decoder does if it can't be read.

    With `least`, a JPEG may be decoded at a half, a quarter or an eighth of its size, while both sides keep `least` pixels."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, 8 bits a channel; what is transparent becomes white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode.startswith("I;16"):  # whose conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(picture: Image.Image, size: int, resize: Literal["squash", "crop"]) -> np.ndarray:
    """uint8 [size, size, 3]: squashed by both sides, or its centre after resizing the shorter side.

    Bicubic and antialiased, with the sizes and offsets of torchvision's Resize and CenterCrop on PIL images."""
    if resize == "squash":
        return np.asarray(picture.resize((size, size), BICUBIC))
    width, height = picture.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(picture.resize((width, height), BICUBIC).crop((left, top, left + size, top + size)))


def least_side(size: int, augment: Augment) -> int:
    """How small a picture's sides may be decoded for training: twice what the smallest crop needs to give `size` pixels."""
    return math.ceil(2 * size * (math.sqrt(augment.aspect / augment.crop) if augment.crop < 1 else 1))


def transform(
    picture: Image.Image, size: int, resize: Literal["squash", "crop"], augment: Augment, rng: np.random.Generator
) -> np.ndarray:
    """uint8 [size, size, 3] for training: random resized crop, mirror image, brightness, contrast and saturation."""
    if augment.crop < 1:
        picture = picture.resize((size, size), BICUBIC, box=_crop(*picture.size, augment, rng))
    else:
        picture = Image.fromarray(fit(picture, size, resize))
    if augment.flip and rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    for amount, enhance in (
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
    ):
        if amount > 0:
            picture = enhance(picture).enhance(rng.uniform(1 - amount, 1 + amount))
    return np.asarray(picture)


def _crop(width: int, height: int, augment: Augment, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a crop whose share of the area is uniform in [crop, 1] and whose ratio of sides is
    log-uniform in [1/aspect, aspect]; what does not fit after ten draws is the largest centre crop of the nearest ratio.
    As torchvision's RandomResizedCrop, with fractions of a pixel."""
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
