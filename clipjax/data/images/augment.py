"""Random changes of training images: a crop before, and flip, colours and blur after an image is resized."""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from clipjax.config import Augment
from clipjax.data.images.resize import Box

SIGMA = (0.1, 2.0)  # least and largest standard deviation of a blur, in pixels


def draw_crop(width: int, height: int, augment: Augment, rng: np.random.Generator) -> Box:
    """A crop, as torchvision's RandomResizedCrop, but with fractions of a pixel.

    Its share of the area is uniform in [crop, 1]. Its ratio of sides is log-uniform in [1/aspect, aspect]. If none of ten draws
    fits into the image, it is the largest centre crop of the nearest ratio. All of this is of the image with its border: where it
    has one, the crop may go beyond the image."""
    x, y = width * augment.border, height * augment.border
    left, top, right, bottom = _draw(width + 2 * x, height + 2 * y, augment, rng)
    return left - x, top - y, right - x, bottom - y


def bordered(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """An RGB image with white where the box lies outside of it, and the box in that."""
    left, top, right, bottom = box
    outside = (-left, -top, right - image.width, bottom - image.height)
    white = tuple(max(0, math.ceil(beyond)) for beyond in outside)
    return ImageOps.expand(image, white, "white"), (left + white[0], top + white[1], right + white[0], bottom + white[1])


def _draw(width: float, height: float, augment: Augment, rng: np.random.Generator) -> Box:
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


def recolour(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """An RGB image, perhaps flipped, its colours changed as by torchvision, and blurred by Pillow, as MoCo v2 does (2003.04297).

    The four changes of ColorJitter come in the order of `augment`'s fields, not in a random one."""
    if augment.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if augment.jitter == 1 or rng.random() < augment.jitter:
        image = _jitter(image, augment, rng)
    if augment.gray and rng.random() < augment.gray:
        image = ImageOps.grayscale(image).convert("RGB")
    if augment.blur and rng.random() < augment.blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*SIGMA)))
    return image


def _jitter(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """An RGB image with its brightness, contrast, saturation and hue changed."""
    for amount, enhance in (
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
    ):
        if amount > 0:
            image = enhance(image).enhance(rng.uniform(1 - amount, 1 + amount))
    if augment.hue > 0:
        turn = int(rng.uniform(-augment.hue, augment.hue) * 255)  # in 256ths of the circle, truncated: torchvision's number
        hue, saturation, value = image.convert("HSV").split()
        image = Image.merge("HSV", (hue.point([(i + turn) % 256 for i in range(256)]), saturation, value)).convert("RGB")
    return image
