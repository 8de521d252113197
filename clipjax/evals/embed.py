"""Embeddings of a dataset as a file, for use outside of clipjax."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float

from clipjax import config
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Encoder, to_host
from clipjax.evals.inputs import caption_batches, image_batches
from clipjax.files import write_whole
from clipjax.models.clip import Params


def embed(encoder: Encoder, params: Params, tokenizer: Tokenizer, data: config.Data) -> dict[str, np.ndarray]:
    """`image` and `text` (of the main caption) float32 [n, e], unit vectors, and `key` str [n], in the dataset's order.

    Examples whose picture can't be read are left out. Raises ConfigError as `open_source` does.
    """
    source = open_source(data)
    keys, captions = zip(*((r.key, r.captions) for r in map(source.record, range(len(source)))), strict=True)
    owner = [i for i, several in enumerate(captions) if several]
    texts = caption_batches(encoder, tokenizer, [captions[i][0] for i in owner], owner, source.name)
    text, named = by_index(encoder, params, texts, len(source))
    image, seen = by_index(encoder, params, image_batches(encoder, source, data), len(source))
    there = seen & named
    return {"image": image[there], "text": text[there], "key": np.array(keys)[there]}


def by_index(
    encoder: Encoder, params: Params, batches: CachedBatches, n: int
) -> tuple[Float[np.ndarray, "n e"], Bool[np.ndarray, " n"]]:
    """On every host, the vector of each example, and whether it has one."""
    z, there = np.zeros((n, encoder.model.embed_dim), np.float32), np.zeros(n, bool)
    for rows, rest in encoder.stream(params, batches):
        index = to_host(rest["index"])
        z[index[index >= 0]] = to_host(rows)[index >= 0]
        there[index[index >= 0]] = True
    return z, there


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes whole or not at all, from the first process, under exactly this name."""
    if jax.process_index() == 0:
        with write_whole(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
