import io

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Augment, ConfigError, Data, Filter
from clipjax.data.filter import Filtered
from clipjax.data.images import image as images
from clipjax.data.images.augment import draw_crop
from clipjax.data.images.image import decode, evaluation, training
from clipjax.data.images.resize import check_resizer, fit, fit_box, resize_box


def noise(height, width, channels=3):
    """Smooth enough that bicubic overshoot is clipped in few places only."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=None))


def encoded(image: Image.Image, form: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def trained(image, size, resize, augment, rng):
    return training(encoded(image), size, Data(spec="emoji", resize=resize, augment=augment), rng)


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


def test_decode_from_a_path(tmp_path):
    pixels = noise(5, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), pixels)


def test_broken_images_raise(tmp_path):
    whole = encoded(Image.fromarray(noise(40, 40)))
    for data in (b"", b"no image", whole[: len(whole) // 2], tmp_path / "none.png"):
        with pytest.raises(Exception, match=r"cannot identify|truncated|No such file"):
            decode(data)


def test_jpeg_is_decoded_at_the_scale_that_the_drawn_crop_allows(monkeypatch):
    """The scale is the smallest with at least 1 pixel of the file for each of the square, whatever other crops could be drawn."""
    scales, draft = [], images._draft
    monkeypatch.setattr(images, "_draft", lambda image, box, size: scales.append((box, draft(image, box, size))) or scales[-1][1])
    data = encoded(Image.fromarray(noise(600, 800)), "jpeg")
    for i in range(60):
        training(data, 64, Data(spec="emoji", augment=Augment(crop=0.01)), np.random.default_rng(i))
    assert {scale for _, scale in scales} == {1, 2, 4, 8}
    for (x0, y0, x1, y1), scale in scales:
        side = min(x1 - x0, y1 - y0)
        assert side / scale >= 64 or scale == 1
        assert side / (2 * scale) < 64 or scale == 8
    training(encoded(Image.fromarray(noise(600, 800))), 64, Data(spec="emoji"), np.random.default_rng(0))
    assert scales[-1] == ((0, 0, 800, 600), 1)  # a PNG


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("augment", [Augment(), Augment(crop=0.5)])
@pytest.mark.parametrize("shape", [(600, 800), (333, 777), (601, 451)])
def test_a_drafted_crop_shows_what_the_whole_image_shows(resize, augment, shape):
    smooth = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(shape[::-1])
    data, stored = Data(spec="emoji", resize=resize, augment=augment), encoded(smooth, "jpeg", quality=95)
    assert min(shape) >= 64 * 4
    got = training(stored, 64, data, np.random.default_rng(0)).astype(int)
    box = draw_crop(*smooth.size, augment, np.random.default_rng(0)) if augment.crop < 1 else fit_box(*smooth.size, 64, resize)
    expected = np.asarray(resize_box(decode(stored), 64, box, "pillow"), int)
    assert np.abs(got - expected).mean() < 1
    assert np.abs(got - expected).max() <= 12


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_fast_differs_by_three_levels_at_most(resize):
    pytest.importorskip("cykooz_resizer")
    for i, shape in enumerate([(128, 136), (50, 31), (500, 375), (40, 400), (224, 224)]):
        image = Image.fromarray(noise(*[side // 3 for side in shape])).resize(shape[::-1], Image.Resampling.BILINEAR)
        box = draw_crop(*image.size, Augment(crop=0.3), np.random.default_rng(i))
        for part in (box, fit_box(*image.size, 64, resize)):
            fast, pillow = (np.asarray(resize_box(image, 64, part, name), int) for name in ("fast", "pillow"))
            assert np.abs(fast - pillow).max() <= 3
    stored, data = encoded(image), Data(spec="emoji", resize=resize, resizer="fast")
    trained = training(stored, 64, data, np.random.default_rng(0)).astype(int)
    np.testing.assert_array_equal(trained, resize_box(image, 64, fit_box(*image.size, 64, resize), "fast"))
    np.testing.assert_array_equal(evaluation(stored, 64, data), fit(image, 64, resize))  # by Pillow


def test_fast_says_how_to_install_it(monkeypatch):
    check_resizer("pillow")
    monkeypatch.setitem(__import__("sys").modules, "cykooz_resizer", None)
    with pytest.raises(ConfigError, match=r"data.resizer = 'fast': .*pip install 'clipjax\[fast\]'"):
        check_resizer("fast")


def test_boxes_that_fit_shows():
    assert fit_box(70, 50, 32, "squash") == (0, 0, 70, 50)
    image = Image.fromarray(noise(100, 210))
    box = fit_box(*image.size, 32, "crop")
    np.testing.assert_allclose(box, (56.42, 0, 156.72, 100), atol=0.01)  # 67 columns of which 18 to 50 are shown
    difference = np.asarray(resize_box(image, 32, box, "pillow"), int) - fit(image, 32, "crop")
    assert np.abs(difference).max() <= 1


def test_filter_looks_at_the_stored_size_before_decoding():
    whole = encoded(Image.fromarray(noise(40, 80)), "jpeg")
    stored = whole[: len(whole) // 2]  # its header is all there
    for wanted in (Filter(min_side=41), Filter(max_aspect=1.9)):
        with pytest.raises(Filtered, match="80 x 40"):
            training(stored, 8, Data(spec="emoji", filter=wanted), np.random.default_rng(0))
    kept = Data(spec="emoji", filter=Filter(min_side=40, max_aspect=2.0))
    assert training(whole, 8, kept, np.random.default_rng(0)).shape == (8, 8, 3)
    assert evaluation(whole, 8, Data(spec="emoji", filter=Filter(min_side=41))).shape == (8, 8, 3)


@pytest.mark.parametrize("read", [evaluation, lambda *given: training(*given, np.random.default_rng(0))])
def test_larger_images_are_refused_before_they_are_decoded(read, monkeypatch):
    stored = encoded(Image.fromarray(noise(30, 40)))
    assert read(stored, 8, Data(spec="emoji", max_pixels=1200)).shape == (8, 8, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(ValueError, match=r"40 x 30 pixels are more than data.max_pixels = 1,199"):
        read(stored, 8, Data(spec="emoji", max_pixels=1199))


@pytest.mark.parametrize(("allowed", "pillows"), [(1200, 1000), (1200, 500), (1200, 1200)])
def test_pillows_own_limit_neither_warns_nor_counts(allowed, pillows, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    stored = encoded(Image.fromarray(noise(30, 40)))
    assert evaluation(stored, 8, Data(spec="emoji", max_pixels=allowed)).shape == (8, 8, 3)
    for larger in ((30, 41), (300, 400)):
        with pytest.raises(ValueError, match=r"pixels.*data.max_pixels = 1,200"):
            evaluation(encoded(Image.fromarray(noise(*larger))), 8, Data(spec="emoji", max_pixels=allowed))


def test_crops_are_what_the_configuration_says():
    augment, width, height = Augment(crop=0.3, aspect=1.5), 120, 100
    boxes = np.array([draw_crop(width, height, augment, np.random.default_rng(i)) for i in range(2000)])
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


def test_crops_of_an_image_with_a_border():
    """They go beyond all four sides, by at most the border, and show up to the whole of it."""
    augment, width, height = Augment(crop=0.6, aspect=1.1, border=0.1), 120, 100
    boxes = np.array([draw_crop(width, height, augment, np.random.default_rng(i)) for i in range(2000)])
    beyond = np.array([-boxes[:, 0] / width, -boxes[:, 1] / height, boxes[:, 2] / width - 1, boxes[:, 3] / height - 1])
    assert (beyond.max(1) <= 0.1 + 1e-9).all()
    assert (beyond.max(1) > 0.09).all()
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (1.2 * width * 1.2 * height)
    assert 0.6 - 1e-9 <= share.min() < 0.62
    assert share.max() > 0.9


@pytest.mark.parametrize("resizer", ["pillow", "fast"])
@pytest.mark.parametrize("form", ["png", "jpeg"])  # the JPEG is drafted
def test_a_border_is_white(form, resizer):
    if resizer == "fast":
        pytest.importorskip("cykooz_resizer")
    smooth = Image.fromarray(noise(6, 8)).resize((400, 300), Image.Resampling.BICUBIC)
    stored, augment = encoded(smooth, form), Augment(crop=0.6, border=0.25)
    white = Image.new("RGB", (600, 450), "white")
    white.paste(decode(stored), (100, 75))
    for i in range(4):
        left, top, right, bottom = draw_crop(400, 300, augment, np.random.default_rng(i))
        expected = np.asarray(resize_box(white, 48, (left + 100, top + 75, right + 100, bottom + 75), "pillow"), int)
        data = Data(spec="emoji", augment=augment, resizer=resizer)
        got = training(stored, 48, data, np.random.default_rng(i)).astype(int)
        assert np.abs(got - expected).mean() < (2 if form == "jpeg" else 1)  # the edge to white is sharp
        assert (got == 255).all(-1).mean() > 0.1


def test_crop_of_a_narrow_image():
    x0, y0, x1, y1 = draw_crop(1000, 10, Augment(crop=0.9, aspect=4 / 3), np.random.default_rng(0))
    assert (y0, y1) == (0, 10)
    np.testing.assert_allclose([x0, x1], [500 - 20 / 3, 500 + 20 / 3])


def test_without_augmentation_training_sees_what_evaluation_sees():
    image = Image.fromarray(noise(50, 70))
    for resize in ("squash", "crop"):
        got = trained(image, 32, resize, Augment(), np.random.default_rng(0))
        np.testing.assert_array_equal(got, fit(image, 32, resize))


def test_transform_is_a_function_of_its_generator():
    image = Image.fromarray(noise(50, 70))
    augment = Augment(crop=0.5, flip=True, brightness=0.3, contrast=0.3, saturation=0.3)
    one, same, other = (trained(image, 32, "squash", augment, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_flip_is_one_of_two():
    image = Image.fromarray(noise(32, 32))
    got = [trained(image, 32, "squash", Augment(flip=True), np.random.default_rng(i)) for i in range(200)]
    mirrored = sum(np.array_equal(x, np.asarray(image)[:, ::-1]) for x in got)
    straight = sum(np.array_equal(x, np.asarray(image)) for x in got)
    assert mirrored + straight == 200
    assert 70 < mirrored < 130


def test_colour_jitter_changes_what_it_says():
    image = Image.fromarray(noise(32, 32) // 2 + 32)
    pixels = np.asarray(image, float)

    def jittered(**changes):
        rng = np.random.default_rng(3)
        return trained(image, 32, "squash", Augment(**changes), rng).astype(float)

    factor = np.random.default_rng(3).uniform(0.5, 1.5)
    np.testing.assert_allclose(jittered(brightness=0.5), np.clip(pixels * factor, 0, 255), atol=1)
    gray = np.asarray(image.convert("L"), float)
    mean = round(gray.mean())
    np.testing.assert_allclose(jittered(contrast=0.5), np.clip(mean + (pixels - mean) * factor, 0, 255), atol=1)
    saturated = np.clip(gray[..., None] + (pixels - gray[..., None]) * factor, 0, 255)
    np.testing.assert_allclose(jittered(saturation=0.5), saturated, atol=1)
