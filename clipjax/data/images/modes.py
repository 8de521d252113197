"""Every mode of Pillow as RGB of 8 bits, as a viewer shows it: deep values scaled to their range, transparent pixels on white."""

import numpy as np
from PIL import Image

# Of TIFF (tags of the standard, revision 6.0).
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
SAMPLE_FORMAT, SIGNED = 339, 2
SIXTEEN = ("PPM", "PNG")  # formats of which mode I holds 16 bits; of others, as TIFF's, it holds 32 bits, or signed numbers
GRAY_STEPS = {"L;2": 85, "L;4": 17}  # between two grays of 2 and of 4 bits, as Pillow scales them


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not yet loaded stores more than 8 bits a channel."""
    return image.mode.startswith("I") or image.mode == "F" or any(";16" in raw for raw in raw_modes(image))


def raw_modes(image: Image.Image) -> list[str]:
    """How an image that is not yet loaded stores its pixels, in Pillow's words."""
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    return [str(a[0] if isinstance(a, tuple) and a else a) for a in arguments]


def checked(image: Image.Image) -> Image.Image:
    """An image that is not yet loaded, where Pillow reads it right; the transparent gray of a PNG in the steps of its pixels.

    Raises ValueError for what Pillow takes for something else: colours of 16 bits of which one is transparent (others with its
    upper half would be, too), planes of 16 bits, which it reads as of 8, and signed numbers; and for PostScript."""
    if image.format == "EPS":  # Pillow would start Ghostscript
        raise ValueError("a program in PostScript, which is not run; expected pixels")
    raw, key, tags = raw_modes(image), image.info.get("transparency"), getattr(image, "tag_v2", {})
    if image.format == "PNG" and image.mode == "RGB" and key is not None and "RGB;16B" in raw:
        raise ValueError("one of its colours of 16 bits is transparent; expected an alpha channel")
    if max(tags.get(BITS_PER_SAMPLE, (1,))) > 8 and any(len(mode) == 1 for mode in raw) and image.mode != "F":
        raise ValueError("planes of more than 8 bits, one after the other; expected colours pixel by pixel")
    if SIGNED in tags.get(SAMPLE_FORMAT, ()) and not image.mode.startswith("I"):
        raise ValueError("signed numbers; expected colours from 0 on")
    if image.format == "PNG" and image.mode == "L" and isinstance(key, int) and raw:
        image.info["transparency"] = key * GRAY_STEPS.get(raw[0], 1)
    return image


def rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, 8 bits a channel. Transparent pixels become white.

    Raises ValueError for numbers that have no known range (modes F and I): which of them is white?"""
    layer = layered(image)
    return layer if layer.mode == "RGB" else Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def layered(image: Image.Image) -> Image.Image:
    """An image as RGB or, where pixels may be transparent, as RGBA. Raises ValueError as `rgb`."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _gray(image)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image.convert("LA") if image.mode == "La" else image
    return image if image.mode == mode else image.convert(mode)


def _gray(image: Image.Image) -> Image.Image:
    """Grays of 12 or 16 bits as 8 bits (L or LA): the upper 8 of them, as Pillow takes of colours."""
    if image.format == "FITS" or (not image.mode.startswith("I;16") and (image.mode == "F" or image.format not in SIXTEEN)):
        raise ValueError(f"mode {image.mode}: numbers without a known range; expected colours of 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    values, bits = np.asarray(image), next(iter(tags.get(BITS_PER_SAMPLE, (16,))))
    gray = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    gray = Image.fromarray(255 - gray if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else gray)
    key = image.info.get("transparency")
    if key is not None:
        gray.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return gray
