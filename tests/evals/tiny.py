"""A tiny model with random weights, and fake sources of pictures and prompts."""

import jax
import numpy as np

from clipjax import config
from clipjax.evals.embed import Batches
from clipjax.sharding import make_mesh

SIZE, LENGTH, VOCAB = 8, 6, 50
TOWER = dict(width=16, depth=1, heads=2, mlp_dim=32, embed_dim=8)
MODEL = config.Model(
    image=config.ImageTower(image_size=SIZE, patch_size=4, **TOWER),
    text=config.TextTower(length=LENGTH, vocab_size=VOCAB, **TOWER),
    dtype="float32",
)
MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "2x2x2": (2, 2, 2)}


def mesh_of(name):
    data, fsdp, tensor = MESHES[name]
    return make_mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def tokenize(texts):
    """Tokens that depend on every letter; as a tokenizer's, the end token is the highest and ends the text."""
    rows = [[1, *(2 + sum(map(ord, t)) * (i + 1) % (VOCAB - 3) for i in range(len(t) % 3 + 2)), VOCAB - 1] for t in texts]
    return np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)


def image_batches(images, encoder, **columns):
    """Batches of the encoder's size, the last padded with black pictures."""
    size = encoder.batch_size

    def read():
        for start in range(0, len(images), size):
            pad = size - len(images[start : start + size])
            batch = {"image": np.pad(images[start : start + size], ((0, pad), (0, 0), (0, 0), (0, 0)))}
            yield batch | {k: np.pad(v[start : start + size], (0, pad), constant_values=-1) for k, v in columns.items()}

    return Batches(read, -(-len(images) // size), "pictures")
