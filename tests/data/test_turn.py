"""Orientation by EXIF, against Pillow's own exif_transpose."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipjax.config import Augment, Data
from clipjax.data.images.augment import draw_crop
from clipjax.data.images.image import decode, evaluation, training
from clipjax.data.images.resize import resize_box
from clipjax.data.images.turn import TURNS, stored_box, turned_size
from clipjax.evals.given import pixels
from tests.data.test_image import encoded, noise

FORMATS = {
    "jpeg": {"quality": 95}, "mpo": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tiff": {}, "avif": {},
}  # fmt: skip
LIFELESS = {  # EXIF blocks that say nothing: cut, foreign, empty, pointing outside, with too many or ill-typed entries
    "cut": b"MM\0*\0\0\0\x08\0\x05\x01\x12",
    "foreign": bytes(range(50)),
    "empty": b"",
    "outside": b"II*\0\xff\xff\xff\x7f",
    "many": b"II*\0\x08\0\0\0\xff\xff" + bytes(40),
    "text": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    "ratio": b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\0\0\0\0\0\0\0\0",
}


def oriented(pixels, form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(Image.fromarray(pixels), form, exif=exif, **FORMATS[form])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_images_are_upright(form, orientation):
    stored = oriented(noise(20, 31), form, orientation)
    with Image.open(io.BytesIO(stored)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert (expected.size == (20, 31)) == (5 <= orientation <= 8)
    np.testing.assert_array_equal(decode(stored), expected)
    square = np.asarray(expected.resize((16, 16), Image.Resampling.BICUBIC))
    data = Data(spec="emoji")
    np.testing.assert_array_equal(evaluation(stored, 16, data), square)
    np.testing.assert_array_equal(training(stored, 16, data, np.random.default_rng(0)), square)


@pytest.mark.parametrize("resizer", ["pillow", "fast"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_of_the_upright_image(orientation, resizer):
    if resizer == "fast":
        pytest.importorskip("cykooz_resizer")
    smooth = np.asarray(Image.fromarray(noise(8, 10)).resize((300, 400), Image.Resampling.BICUBIC))
    augment = Augment(crop=0.2, flip=True)
    for form in ("jpeg", "png"):  # the JPEG is drafted
        stored = oriented(smooth, form, orientation)
        upright = decode(stored)
        box = draw_crop(*upright.size, augment, np.random.default_rng(3))
        expected = np.asarray(resize_box(upright, 48, box, "pillow"), int)
        data = Data(spec="emoji", augment=Augment(crop=0.2), resizer=resizer)
        got = training(stored, 48, data, np.random.default_rng(3)).astype(int)
        assert np.abs(got - expected).max() <= (8 if form == "jpeg" else 3)
        assert np.abs(got - expected).mean() < 1


@pytest.mark.parametrize("turn", [None, *TURNS.values()])
def test_boxes_in_the_stored_image(turn):
    pixels = noise(7, 9)
    image = Image.fromarray(pixels)
    upright = image if turn is None else image.transpose(turn)
    assert upright.size == turned_size(9, 7, turn)
    box = (1, 2, 4, 6)
    part = image.crop(stored_box(box, 9, 7, turn))
    np.testing.assert_array_equal(part if turn is None else part.transpose(turn), upright.crop(box))


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("kind", LIFELESS)
def test_broken_metadata_do_no_harm(form, kind):
    image, data = Image.fromarray(noise(20, 30)), Data(spec="emoji")
    stored, bare = encoded(image, form, exif=b"Exif\0\0" + LIFELESS[kind]), encoded(image, form)
    np.testing.assert_array_equal(decode(stored), decode(bare))
    np.testing.assert_array_equal(evaluation(stored, 8, data), evaluation(bare, 8, data))
    np.testing.assert_array_equal(*(training(s, 8, data, np.random.default_rng(0)) for s in (stored, bare)))


def test_orientation_behind_the_pixels_and_in_xmp():
    pixels, exif = noise(20, 31), Image.Exif()
    exif[274] = 6
    upright = np.rot90(pixels, -1)
    block = exif.tobytes()[6:]
    whole, chunk = encoded(Image.fromarray(pixels)), struct.pack(">I", len(block)) + b"eXIf" + block
    stored = whole[:-12] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + whole[-12:]
    np.testing.assert_array_equal(decode(stored), upright)
    crops = [training(s, 8, Data(spec="emoji"), np.random.default_rng(0)) for s in (stored, encoded(Image.fromarray(upright)))]
    np.testing.assert_array_equal(*crops)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    whole = encoded(Image.fromarray(pixels), "jpeg")
    stored = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + whole[2:]
    np.testing.assert_array_equal(decode(stored), np.rot90(decode(whole), -1))


@pytest.mark.parametrize(
    "chunks",
    [
        {b"eXIf": None},  # None: its checksum is wrong
        {b"tEXt": None},
        {b"zTXt": b"a\0\0" + zlib.compress(bytes(2 * 10**6))},  # more text than Pillow takes
        {b"pHYs": b"\0"},
        {b"acTL": b"\0\0\0\2"},
    ],
    ids=lambda chunks: next(iter(chunks)).decode(),
)
def test_a_png_with_broken_metadata_shows_its_pixels(chunks, tmp_path):
    def chunk(name, data):
        checksum = zlib.crc32(name + data) if chunks.get(name, b"") is not None else 0
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    whole, exif = encoded(Image.fromarray(noise(20, 30))), Image.Exif()
    exif[274] = 6
    orientation = {b"eXIf": exif.tobytes()[6:]}
    extra = b"".join(chunk(name, data or b"text") for name, data in (orientation | chunks).items())
    stored = whole[:33] + extra + whole[33:]
    with pytest.raises((ValueError, OSError)), Image.open(io.BytesIO(stored)) as image:
        image.load()
    expected = decode(whole) if b"eXIf" in chunks else decode(whole).transpose(Image.Transpose.ROTATE_270)
    (tmp_path / "a.png").write_bytes(stored)
    np.testing.assert_array_equal(decode(stored), expected)
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), expected)
    with pytest.raises(OSError):
        decode(stored[:-60])  # its pixels are cut


def test_an_opened_image_given_by_hand_is_upright_too(tmp_path):
    (tmp_path / "a.jpg").write_bytes(oriented(noise(20, 31), "jpeg", 6))
    with Image.open(tmp_path / "a.jpg") as image:
        opened, path = pixels([image, tmp_path / "a.jpg"], 16, "squash")
    np.testing.assert_array_equal(opened, path)
