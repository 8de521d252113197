"""Images and captions that every comparison with PyTorch draws beside the run's own: those that programs treat differently."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipjax.data.tokenizer import Tokenizer

ORIENTATION, SIDEWAYS = 274, 6  # an EXIF tag and its value
CAPTIONS = {
    "a caption with entities": "salt &amp; pepper, caf&eacute; &#8211; &lt;3",
    "a caption with curly quotes": "“it’s” a ‘photo’ of a cat",
    "a caption that ends in a full stop": "a photo of a cat.",
}


class Drawn(NamedTuple):
    """An image file."""

    what: str
    stored: bytes  # a PNG
    reason: str | None = None  # why another program sees other pixels

    def opened(self) -> Image.Image:
        """RGB, as open_clip and transformers open it."""
        with Image.open(io.BytesIO(self.stored)) as image:
            return image.convert("RGB")


def images(size: int) -> list[Drawn]:
    """For a tower of `size` pixels. The margins that a crop cuts from the second are odd, and half of them is to be rounded."""
    side, margin = 2 * size, size // 8
    turned = Image.Exif()
    turned[ORIENTATION] = SIDEWAYS
    clear = _colours(side, side, 4)
    return [
        Drawn("an image that needs a crop", _png(_colours(side, side + 8 * margin, 3))),
        Drawn("an image whose crop has an odd margin", _png(_colours(side + 8 * margin + 6, side, 3))),
        Drawn("a transparent image", _png(clear), "clipjax lays transparent pixels on white"),
        Drawn("a sideways image", _png(_colours(side, side, 3), turned), "clipjax turns an image by its EXIF orientation"),
    ]


def captions(words: Tokenizer) -> dict[str, str]:
    """As many as `images`, by what they are."""
    return CAPTIONS | {"a caption that is too long": "a long walk with the dog, " * words.length}


def _colours(width: int, height: int, channels: int) -> np.ndarray:
    """Smooth, [height, width, channels]."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 4, channels), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _png(pixels: np.ndarray, exif: Image.Exif | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **({} if exif is None else dict(exif=exif)))
    return file.getvalue()
