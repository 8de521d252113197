"""What an image is like, for those who look at a dataset: its size, and what may surprise."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from clipjax.config import Data
from clipjax.data.images.image import opened
from clipjax.data.images.modes import is_deep, layered, rgb
from clipjax.data.images.turn import turn_of, turned_size

TINY = 32  # pixels of the shorter side; smaller ones are tiny
HUGE = 2**24  # pixels; larger images are huge

KINDS = {
    "rotated": "turned or mirrored by their EXIF orientation, as viewers do; other libraries leave them as stored",
    "transparent": "have transparent pixels, which become white",
    "animated": "have several frames or pages; the first one counts",
    "deep": "have more than 8 bits a channel, and are scaled to 8",
    "one_coloured": "have one colour",
    "tiny": f"have a side of less than {TINY} pixels",
    "huge": f"have more than {HUGE // 10**6} million pixels",
    "repeated": "have the pixels of another example",
}


@dataclass(frozen=True)
class Facts:
    width: int  # of the upright image
    height: int
    kinds: tuple[str, ...]  # of KINDS, but for `repeated`
    digest: bytes  # of the pixels as they are trained on


def facts_of(stored: bytes | Path, max_pixels: int = Data.max_pixels) -> Facts:
    """Raises what the decoder raises, as `image.decode`."""
    with opened(stored, max_pixels) as image:
        deep = is_deep(image)
        turn_of_tiff = turn_of(image) if image.format == "TIFF" else None  # which Pillow turns when it is loaded
        image.load()
        turn = turn_of(image)
        width, height = turned_size(*image.size, turn)
        layer, pixels = layered(image), rgb(image)
        found = {
            "rotated": turn is not None or turn_of_tiff is not None,
            "transparent": layer.mode == "RGBA" and layer.getchannel("A").histogram()[255] < layer.width * layer.height,
            # An MPO has one view; what follows is made of it: a thumbnail, or how bright its parts can be.
            "animated": image.format != "MPO" and getattr(image, "is_animated", False),
            "deep": deep,
            "one_coloured": pixels.getcolors(1) is not None,
            "tiny": min(width, height) < TINY,
            "huge": width * height > HUGE,
        }
    digest = hashlib.blake2b(f"{width} {height} {turn}".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return Facts(width, height, tuple(kind for kind, is_so in found.items() if is_so), digest.digest())
