"""Every kind of image against what Pillow's own conversions, or a count by hand, say that a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clipjax.config import Augment, Data
from clipjax.data.images.image import decode, evaluation, training
from tests.data.test_image import encoded

DEEP = np.array([[0, 100 * 256 + 7, 255, 65535]], np.uint16)
LEVELS = [0, 100, 0, 255]  # the upper 8 bits, as Pillow takes of colours of 16 bits
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def grays(stored):
    image = decode(stored)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


def png(bits, colour, rows, *chunks, width, height=1):
    """A PNG of raw rows. `colour`: 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = [chunk(b"IHDR", header), *[chunk(*c) for c in chunks], chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(values, **tags):
    """An uncompressed little-endian TIFF of one gray row. `tags` by number, as t258=12."""
    data = values if isinstance(values, bytes) else values.tobytes()
    width = tags.pop("width", None) or values.shape[1]
    entries = {256: width, 257: 1, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + directory + bytes(4)


def test_transparency_becomes_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    got = np.asarray(decode(encoded(rgba)))
    assert got[0, :3].tolist() == [[255, 0, 0], [127, 127, 127], [255, 255, 255]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for form in ("png", "gif"):
        assert np.asarray(decode(encoded(palette, form, transparency=0))).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    half = np.asarray(decode(encoded(palette, transparency=bytes([255, 128]))))
    assert half.tolist() == [[[10, 20, 30], [147, 152, 157]]]


@pytest.mark.parametrize(("mode", "form"), [("LA", "png"), ("LA", "tiff"), ("RGBA", "webp"), ("RGBA", "tiff"), ("PA", "tiff")])
def test_alpha_channels_are_laid_on_white(mode, form):
    rgba = Image.fromarray(np.dstack([COLOURS, np.arange(30, dtype=np.uint8).reshape(6, 5) * 8]))
    image = rgba.convert(mode)
    shown = image.convert("RGBA")
    expected = Image.new("RGB", shown.size, "white")
    expected.paste(shown, mask=shown.getchannel("A"))
    got = np.asarray(decode(encoded(image, form, **({"lossless": True, "exact": True} if form == "webp" else {}))), int)
    assert np.abs(got - np.asarray(expected, int)).max() <= 1


def test_a_transparent_colour_is_white():
    gray = Image.fromarray(np.array([[3, 4]], np.uint8))
    assert grays(encoded(gray, transparency=3)) == [255, 4]
    colour = Image.fromarray(np.array([[[1, 2, 3], [3, 2, 1]]], np.uint8))
    assert np.asarray(decode(encoded(colour, transparency=(1, 2, 3)))).tolist() == [[[255, 255, 255], [3, 2, 1]]]
    key = (b"tRNS", struct.pack(">H", 3))
    assert grays(png(4, 0, b"\0\x3f", key, width=2)) == [255, 255]  # of 4 bits: 3 of 15, and white
    assert grays(png(4, 0, b"\0\x35", width=2)) == [51, 85]
    assert grays(png(2, 0, b"\0\x1b", (b"tRNS", struct.pack(">H", 1)), width=4)) == [0, 255, 170, 255]
    # Of 16 bits: this very value, not all values with its upper 8 bits.
    rows = b"\0" + struct.pack(">3H", 770, 771, 65535)
    assert grays(png(16, 0, rows, (b"tRNS", struct.pack(">H", 770)), width=3)) == [255, 3, 255]
    with pytest.raises(ValueError, match="one of its colours of 16 bits is transparent"):
        decode(png(16, 2, b"\0" + struct.pack(">6H", 770, 0, 0, 771, 0, 0), (b"tRNS", struct.pack(">3H", 770, 0, 0)), width=2))


def test_deep_images_are_scaled():
    big = DEEP.astype(">u2")
    gray = Image.fromarray(DEEP)
    assert gray.mode == "I;16"
    for stored in (
        encoded(gray), encoded(gray, "tiff"), encoded(gray, "tiff", compression="tiff_lzw"), encoded(gray, "ppm"),
        encoded(gray, "jpeg2000", irreversible=False), tiff(DEEP), b"P5 4 1 65535\n" + big.tobytes(),
    ):  # fmt: skip
        assert grays(stored) == LEVELS
    assert grays(tiff(DEEP, t262=0)) == [255 - level for level in LEVELS]  # white is zero
    assert grays(b"P5 3 1 1023\n" + np.array([[0, 512, 1023]], ">u2").tobytes()) == [0, 128, 255]
    rgb = np.repeat(big[..., None], 3, 2)
    assert grays(png(16, 2, b"\0" + rgb.tobytes(), width=4)) == LEVELS
    opaque, clear = (np.dstack([rgb, np.full((1, 4), alpha)]).astype(">u2").tobytes() for alpha in (65535, 0))
    assert grays(png(16, 6, b"\0" + opaque, width=4)) == LEVELS
    assert grays(png(16, 6, b"\0" + clear, width=4)) == [255] * 4
    assert grays(png(16, 4, b"\0" + np.dstack([big, np.full((1, 4), 65535)]).astype(">u2").tobytes(), width=4)) == LEVELS


def test_grays_of_12_bits_are_scaled_to_their_own_white():
    """Pillow keeps them as numbers below 4,096 in mode I;16: as 16 bits they would be nearly black."""
    assert grays(tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF6, 0x40]), width=4, t258=12)) == [0, 128, 255, 100]


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32, np.float32])
def test_numbers_without_a_known_range_are_refused(kind):
    formats = {np.int16: (16, 2), np.int32: (32, 2), np.uint32: (32, 1), np.float32: (32, 3)}
    bits, sample_format = formats[kind]
    stored = tiff(np.array([[0, 1, 200]], kind), t258=bits, t339=sample_format)
    with Image.open(io.BytesIO(stored)) as image:
        assert image.mode in ("I", "F")
    for read in (decode, lambda s: evaluation(s, 4, Data(spec="emoji"))):
        with pytest.raises(ValueError, match="numbers without a known range"):
            read(stored)


def test_postscript_is_not_run(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with pytest.raises(ValueError, match="a program in PostScript"):
        decode(encoded(Image.fromarray(COLOURS), "eps"))


def test_signed_grays_are_refused():
    with pytest.raises(ValueError, match="signed numbers"):
        decode(tiff(np.array([[0, 1, 200]], np.uint8), t258=8, t339=2))
    assert grays(tiff(np.array([[0, 1, 200]], np.uint8), t258=8, t339=1)) == [0, 1, 200]


def test_planes_of_16_bits_are_refused():
    """Pillow reads them as of 8 bits, if they lie one after the other and are not compressed."""
    planes = np.arange(6, dtype=np.uint16).reshape(3, 1, 2) * 10_000
    lists = {258: (3, [16] * 3), 273: (4, [38, 42, 46]), 279: (4, [4] * 3)}  # of shorts and longs, from byte 8 on
    body = struct.pack("<3H3I3I", *(value for _, values in lists.values() for value in values)) + planes.tobytes()
    entries = {256: 2, 257: 1, 259: 1, 262: 2, 277: 3, 278: 1, 284: 2}
    entries = {tag: (4, 1, value) for tag, value in entries.items()}
    entries |= {258: (3, 3, 8), 273: (4, 3, 14), 279: (4, 3, 26)}
    directory = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    stored = b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + directory + bytes(4)
    with Image.open(io.BytesIO(stored)) as image:
        assert np.asarray(image)[0].tolist() != (planes >> 8)[:, 0].T.tolist()
    with pytest.raises(ValueError, match="planes of more than 8 bits"):
        decode(stored)


@pytest.mark.parametrize(("mode", "form"), [
    ("1", "png"), ("L", "png"), ("P", "png"), ("P", "gif"), ("RGB", "bmp"), ("CMYK", "tiff"), ("LAB", "tiff"), ("YCbCr", "tiff"),
    ("CMYK", "jpeg"), ("L", "jpeg"), ("RGB", "webp"), ("1", "tiff"), ("RGB", "avif"), ("RGB", "ico"), ("RGB", "tga"),
])  # fmt: skip
def test_other_modes_are_what_pillow_makes_of_them(mode, form):
    image = Image.fromarray(COLOURS).resize((16, 16))
    image = image if mode == "LAB" else image.convert(mode)
    stored = encoded(Image.merge("LAB", image.split()) if mode == "LAB" else image, form)
    with Image.open(io.BytesIO(stored)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(decode(stored), expected)
    assert evaluation(stored, 16, Data(spec="emoji")).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "LAB", "La", "RGBa", "RGBX", "CMYK", "PA", "I;16B"])
def test_images_in_memory(mode):
    from clipjax.data.images.modes import rgb

    got = rgb(Image.new(mode, (3, 2)))
    assert got.mode == "RGB"
    assert got.size == (3, 2)


def frames(count):
    return [Image.new("RGB", (8, 8), (40 * i + 20, 0, 0)) for i in range(count)]


@pytest.mark.parametrize("form", ["gif", "webp", "png", "tiff", "avif"])
def test_the_first_frame_counts(form):
    first, *others = frames(3)
    options = {"lossless": True} if form == "webp" else {"quality": 100} if form == "avif" else {}
    stored = encoded(first, form, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(stored)) as image:
        assert image.n_frames == 3
    data = Data(spec="emoji", augment=Augment(crop=0.5))
    for got in (decode(stored), evaluation(stored, 4, data), training(stored, 4, data, np.random.default_rng(0))):
        assert np.abs(np.asarray(got, int) - [20, 0, 0]).max() <= 2
