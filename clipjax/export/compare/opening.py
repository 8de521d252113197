"""How the pixels differ where another library opens the images itself.

open_clip and transformers convert an opened image to RGB. They do not turn it by its EXIF orientation or lay transparent pixels
on white, and grays of 16 bits above 255 are white to them.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipjax.data.images.facts import facts_of
from clipjax.data.images.image import decode
from clipjax.data.images.resize import Resize, fit

KINDS = {"rotated": "rotated by EXIF", "transparent": "transparent", "deep": "of more than 8 bits a channel"}


def notes(stored: Sequence[bytes | Path], size: int, resize: Resize) -> list[str]:
    """For each kind of image that looks different there: how many there are, and how much their squares of `size` pixels differ.

    All images must be such that `image.decode` can read them."""
    differences: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for image in stored:
        for kind in set(facts_of(image).kinds) & KINDS.keys():
            differences[kind].append(_difference(image, size, resize))
    opened = "opened without clipjax, their pixels differ by"
    return [
        f"{len(found)} of {len(stored)} images are {KINDS[kind]}; {opened} {np.mean(found):.0f} of 255 on average "
        f"(at most {np.max(found):.0f} in one image)"
        for kind, found in differences.items()
        if found and max(found) > 0
    ]


def _difference(stored: bytes | Path, size: int, resize: Resize) -> float:
    """The mean distance of two values."""
    with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
        opened = image.convert("RGB")
    ours, theirs = (fit(image, size, resize).astype(float) for image in (decode(stored), opened))
    return float(np.abs(ours - theirs).mean())
