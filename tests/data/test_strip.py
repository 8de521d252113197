"""Long, narrow images: the pixels of resizing first, without its cost."""

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Augment, Data
from clipjax.data.images import strip
from clipjax.data.images.image import evaluation, training
from clipjax.data.images.resize import LONG, check_size, fit
from tests.data.test_image import encoded

BICUBIC = Image.Resampling.BICUBIC


def resized_first(image, size):
    """As torchvision: the shorter side to `size`, then the centre."""
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.resize((width, height), BICUBIC).crop((left, top, left + size, top + size)))


def test_bit_for_bit_what_resizing_first_gives():
    rng = np.random.default_rng(0)
    for _ in range(300):
        short = int(rng.integers(1, 150))
        long = short * LONG + int(rng.integers(1, 500))
        shape = (short, long) if rng.random() < 0.5 else (long, short)
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        size = int(rng.choice([8, 16, 31, 57, short]))
        np.testing.assert_array_equal(fit(image, size, "crop"), resized_first(image, size), err_msg=f"{shape} to {size}")


def test_either_order_of_an_older_or_newer_pillow(monkeypatch):
    """Pillow 13 resizes the height of a tall image first, others its width."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 60, 3), dtype=np.uint8))
    whole = {True: image.resize((60, 80), BICUBIC).resize((16, 80), BICUBIC)}
    whole[False] = image.resize((16, 300), BICUBIC).resize((16, 80), BICUBIC)
    for height_first, expected in whole.items():
        monkeypatch.setattr(strip, "_height_first", lambda first=height_first: first)
        np.testing.assert_array_equal(strip.middle(image, (16, 80), 0, 32, 16), np.asarray(expected)[32:48])


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(2, 65_000), (65_000, 2), (1, 65_000), (65_000, 1)])
def test_a_strip_is_an_image_like_any_other(shape, resize, monkeypatch):
    """It took 65,000 x 224 x 112 pixels: the largest image that is made on the way is small."""
    made = []
    new = Image.Image._new
    monkeypatch.setattr(Image.Image, "_new", lambda self, core: made.append(core.size) or new(self, core))
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    stored, data = encoded(Image.fromarray(pixels)), Data(spec="emoji", resize=resize)
    made.clear()
    shown = evaluation(stored, 224, data)
    assert shown.shape == (224, 224, 3)
    assert np.ptp(shown) > 15
    assert max((width * height for width, height in made), default=0) <= max(224 * 224, pixels.size // 3)
    for augment in (Augment(), Augment(crop=0.5)):
        for resizer in ("pillow", "fast") if pytest.importorskip("cykooz_resizer") else ():
            own = Data(spec="emoji", resize=resize, augment=augment, resizer=resizer)
            assert training(stored, 224, own, np.random.default_rng(0)).shape == (224, 224, 3)


def test_a_side_that_is_too_long_is_refused():
    check_size(65_535, 1, 224, 178_956_970)
    with pytest.raises(ValueError, match=r"800,000 x 1 pixels: too long to be resized to 224; at most 798,915 are possible"):
        check_size(800_000, 1, 224, 178_956_970)
    check_size(900_000, 1, 224, 10**9)
