"""Embeddings of a dataset on the host: every image with its main caption. `clipjax embed` writes them to a file."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from clipjax import config
from clipjax.data import reading
from clipjax.data.source import Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Encoder, to_host
from clipjax.evals.inputs import caption_batches, image_batches, require_captions
from clipjax.files import write_atomic
from clipjax.models.clip import Params

Vectors = Float[np.ndarray, "n e"]


class Pairs(NamedTuple):
    """Unit vectors, float32, of images and of their main captions, and the number of each pair's example, ascending."""

    image: Vectors
    text: Vectors
    number: Int[np.ndarray, " n"]

    def at(self, number: Int[np.ndarray, " m"]) -> "Pairs":
        """Those of some of these examples."""
        rows = np.searchsorted(self.number, number)
        return Pairs(self.image[rows], self.text[rows], number)


class MainPairs:
    """The pairs of a dataset: each image with its main caption, which is its first."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, source: Source | None = None) -> None:
        """Reads all captions, and no image yet. `source`: that of `data`, if it is open. Raises ConfigError as `open_source`
        does, and where there are no captions."""
        source = source or open_source(data)
        require_captions(source, "this evaluation")
        records = [(record.key, record.captions[:1]) for record in reading.texts(source, quiet=jax.process_index() > 0)]
        captioned = [i for i, (_, main) in enumerate(records) if main]
        require_captions(source, "this evaluation", bool(captioned))
        self.name = source.name
        self.captioned = len(captioned)  # how many examples have a caption
        self.keys = [key for key, _ in records]  # of all examples
        self._encoder = encoder
        self._images = image_batches(encoder, source, data)
        self._captions = caption_batches(encoder, tokenizer, [records[i][1][0] for i in captioned], captioned, source.name)

    def embed(self, params: Params) -> Pairs:
        """In the dataset's order, on every process. An example without a caption, or whose image can't be read, is left out."""
        text, has_text = self.embed_text(params)
        image, has_image = by_index(self._encoder, params, self._images, len(self.keys))
        index = np.flatnonzero(has_image & has_text)
        return Pairs(image[index], text[index], index)

    def embed_text(self, params: Params) -> tuple[Vectors, Bool[np.ndarray, " n"]]:
        """The vector of each example's main caption, and whether it has one, on every process. No image is read."""
        return by_index(self._encoder, params, self._captions, len(self.keys))


def by_index(encoder: Encoder, params: Params, batches: CachedBatches, n: int) -> tuple[Vectors, Bool[np.ndarray, " n"]]:
    """The vector of each of n examples, and whether it has one, on every process."""
    z, found = np.zeros((n, 0), np.float32), np.zeros(n, bool)
    for rows, rest in encoder.stream(params, batches):
        index = to_host(rest["index"])
        real = index >= 0
        z = z if z.size else np.zeros((n, rows.shape[-1]), np.float32)  # of the width that the encoder's features have
        z[index[real]] = to_host(rows)[real]
        found[index[real]] = True
    return z, found


def embed(encoder: Encoder, params: Params, tokenizer: Tokenizer | None, data: config.Data) -> dict[str, np.ndarray]:
    """`image` and `text` (of the main caption) float32 [n, e], unit vectors, and `key` str [n], in the dataset's order. Of a
    source of images alone `image` and `key` only, and of a model of one tower what it has. `tokenizer`, None: of an image tower.

    Examples whose image can't be read are left out. Raises ConfigError as `open_source` does.
    """
    source, towers = open_source(data), encoder.model.towers
    if towers != "image" and (source.captioned or towers == "text"):
        assert tokenizer is not None
        pairs = MainPairs(encoder, tokenizer, data, source)
        if towers == "text":
            text, found = pairs.embed_text(params)
            return {"text": text[found], "key": np.array(pairs.keys)[found]}
        image, text, index = pairs.embed(params)
        return {"image": image, "text": text, "key": np.array(pairs.keys)[index]}
    image, found = by_index(encoder, params, image_batches(encoder, source, data), len(source))
    return {"image": image[found], "key": np.array([record.key for record in source.texts()])[found]}


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the complete file or nothing, from the first process, under exactly this name."""
    if jax.process_index() == 0:
        with write_atomic(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  (no array is named allow_pickle)
