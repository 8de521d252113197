"""What decides the vectors of images and of texts, beside the model and its weights: by this they are found again on disk."""

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from clipjax import config
from clipjax.data import fingerprint
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer

LOOKED_AT = 16  # images whose bytes are read: the same keys and captions can be of other images, as emoji of another house
AT_ONCE = 4096  # texts
FIELDS = ("image_field", "text_field", "label_field", "resize", "max_pixels")  # of the data: which images, and how they are read


class Texts(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> str: ...


def of_images(source: Source, data: config.Data) -> dict[str, Any]:
    """The fingerprint of the data, the bytes of some images, and how images become squares."""
    how = {name: getattr(data, name) for name in FIELDS}
    places = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist()
    with ThreadPoolExecutor(LOOKED_AT) as pool:
        images = list(pool.map(lambda i: _crc_of_image(source, i), places))
    return {"data": fingerprint.of(source), "images": images, "how": how}


def _crc_of_image(source: Source, i: int) -> int:
    image = source.record(i).image
    try:
        return zlib.crc32(image if isinstance(image, bytes) else image.read_bytes())
    except OSError:
        return 0  # it is left out


def of_texts(tokenizer: Tokenizer, texts: Texts) -> dict[str, Any]:
    """The tokens of all texts: they are what a tower sees of the texts and of the tokenizer."""
    digest = hashlib.sha256()
    for start in range(0, len(texts), AT_ONCE):
        tokens, _ = tokenizer.encode([texts[i] for i in range(start, min(start + AT_ONCE, len(texts)))])
        digest.update(np.ascontiguousarray(tokens).tobytes())
    return {"tokens": digest.hexdigest(), "length": tokenizer.length}
