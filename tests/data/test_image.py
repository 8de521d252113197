import io

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Augment
from clipjax.data.image import _crop, decode, fit, min_decoded_side, transform


def noise(height, width, channels=3):
    """Smooth enough that bicubic overshoot is clipped in few places only."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=None))


def encoded(image: Image.Image, form: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def resize_reference(x, size, axis):
    """Antialiased bicubic with a = -1/2 in float64, as in `Resize(..., BICUBIC, antialias=True)`: Keys 1981, stretched by the
    scale where the image shrinks."""
    n = x.shape[axis]
    scale = n / size
    stretch = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    t = np.abs((np.arange(n) + 0.5 - centers[:, None]) / stretch)
    weights = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, np.moveaxis(x, axis, 0), 1), 0, axis)


def reference(pixels, height, width):
    x = np.clip(np.round(resize_reference(pixels.astype(np.float64), width, 1)), 0, 255)
    return np.clip(resize_reference(x, height, 0), 0, 255)


@pytest.mark.parametrize(("height", "width"), [(128, 136), (50, 31), (64, 64), (300, 200)])
def test_squash(height, width):
    pixels = noise(height, width)
    got = fit(Image.fromarray(pixels), 64, "squash")
    assert got.shape == (64, 64, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - reference(pixels, 64, 64)).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "resized", "offset"),
    [
        (128, 136, (64, 68), (0, 2)),
        (50, 31, (103, 64), (20, 0)),  # (103 - 64) / 2 = 19.5 goes to the even 20, as Python and torchvision round
        (300, 201, (95, 64), (16, 0)),  # 95.5 is cut to 95, 15.5 goes to 16
        (64, 64, (64, 64), (0, 0)),
    ],
)
def test_crop_is_resize_and_center_crop(height, width, resized, offset):
    """Sizes and offsets as torchvision computes them: int(size * long / short), int(round((long - size) / 2))."""
    pixels = noise(height, width)
    top, left = offset
    expected = reference(pixels, *resized)[top : top + 64, left : left + 64]
    assert np.abs(fit(Image.fromarray(pixels), 64, "crop") - expected).max() <= 1


def test_transparency_becomes_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    got = np.asarray(decode(encoded(rgba)))
    assert got[0, :3].tolist() == [[255, 0, 0], [127, 127, 127], [255, 255, 255]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(palette, transparency=0))).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_modes_become_rgb():
    gray = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert np.asarray(decode(encoded(gray))).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    deep = Image.fromarray(np.array([[0, 100 * 256 + 7, 65535]], np.uint16))
    assert np.asarray(decode(encoded(deep))).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    cmyk = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"))
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk, int)[0, 0] - [255, 0, 0]).max() <= 3


def test_decode_from_a_path(tmp_path):
    pixels = noise(5, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), pixels)


def test_broken_images_raise(tmp_path):
    whole = encoded(Image.fromarray(noise(40, 40)))
    for data in (b"", b"no image", whole[: len(whole) // 2], tmp_path / "none.png"):
        with pytest.raises(Exception, match=r"cannot identify|truncated|No such file"):
            decode(data)


def test_jpeg_is_decoded_no_smaller_than_needed():
    data = encoded(Image.fromarray(noise(600, 800)), "jpeg")
    assert [decode(data, least).size for least in (None, 601, 300, 299, 151, 150, 75, 10)] == [
        *[(800, 600)] * 2, *[(400, 300)] * 3, (200, 150), *[(100, 75)] * 2,
    ]  # fmt: skip
    png = encoded(Image.fromarray(noise(60, 80)))
    assert decode(png, 10).size == (80, 60)


def test_smallest_crop_still_has_the_pixels():
    augment = Augment(crop=0.2, aspect=2.0)
    least = min_decoded_side(64, augment)
    boxes = [_crop(least, least, augment, np.random.default_rng(i)) for i in range(500)]
    assert min(min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes) >= 2 * 64 - 1
    assert min_decoded_side(64, Augment()) == 128


def test_crops_are_what_the_configuration_says():
    augment, width, height = Augment(crop=0.3, aspect=1.5), 120, 100
    boxes = np.array([_crop(width, height, augment, np.random.default_rng(i)) for i in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = w * h / (width * height), w / h
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert share.min() >= 0.3 - 1e-9
    assert share.min() < 0.32
    assert share.max() > 0.9
    assert ratio.min() >= 1 / 1.5 - 1e-9
    assert ratio.max() <= 1.5 + 1e-9
    assert boxes[:, 0].max() > 0.3 * width


def test_crop_of_a_narrow_image():
    x0, y0, x1, y1 = _crop(1000, 10, Augment(crop=0.9, aspect=4 / 3), np.random.default_rng(0))
    assert (y0, y1) == (0, 10)
    np.testing.assert_allclose([x0, x1], [500 - 20 / 3, 500 + 20 / 3])


def test_without_augmentation_training_sees_what_evaluation_sees():
    image = Image.fromarray(noise(50, 70))
    for resize in ("squash", "crop"):
        got = transform(image, 32, resize, Augment(), np.random.default_rng(0))
        np.testing.assert_array_equal(got, fit(image, 32, resize))


def test_transform_is_a_function_of_its_generator():
    image = Image.fromarray(noise(50, 70))
    augment = Augment(crop=0.5, flip=True, brightness=0.3, contrast=0.3, saturation=0.3)
    one, same, other = (transform(image, 32, "squash", augment, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_flip_is_one_of_two():
    image = Image.fromarray(noise(32, 32))
    got = [transform(image, 32, "squash", Augment(flip=True), np.random.default_rng(i)) for i in range(200)]
    mirrored = sum(np.array_equal(x, np.asarray(image)[:, ::-1]) for x in got)
    straight = sum(np.array_equal(x, np.asarray(image)) for x in got)
    assert mirrored + straight == 200
    assert 70 < mirrored < 130


def test_colour_jitter_changes_what_it_says():
    image = Image.fromarray(noise(32, 32) // 2 + 32)
    pixels = np.asarray(image, float)

    def jittered(**changes):
        rng = np.random.default_rng(3)
        return transform(image, 32, "squash", Augment(**changes), rng).astype(float)

    factor = np.random.default_rng(3).uniform(0.5, 1.5)
    np.testing.assert_allclose(jittered(brightness=0.5), np.clip(pixels * factor, 0, 255), atol=1)
    gray = np.asarray(image.convert("L"), float)
    mean = round(gray.mean())
    np.testing.assert_allclose(jittered(contrast=0.5), np.clip(mean + (pixels - mean) * factor, 0, 255), atol=1)
    saturated = np.clip(gray[..., None] + (pixels - gray[..., None]) * factor, 0, 255)
    np.testing.assert_allclose(jittered(saturation=0.5), saturated, atol=1)
