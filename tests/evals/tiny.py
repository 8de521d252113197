"""A tiny model with random weights, and fake sources of images and prompts."""

import jax
import numpy as np

from clipjax import config
from clipjax.data.source import Fetched, Record, Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.ranks import Ranks
from clipjax.evals.ties import nearer
from clipjax.sharding import make_mesh

SIZE, LENGTH, VOCAB = 8, 24, 300
WORDS = [
    f"{word} number {i * i}"
    for i, word in enumerate(["fox", "fox", "hen", "owl", "ant", "bee", "cow", "cat", "elk", "emu", "yak"])
]
TOKENIZER = Tokenizer.train([f"a photo of the {w}, itap of many art" for w in WORDS], VOCAB, True, LENGTH)


def tokenize(texts):
    return TOKENIZER.encode(texts)[0]


TOWER = dict(width=16, depth=1, heads=2, mlp_dim=32, embed_dim=8)
MODEL = config.Model(
    image=config.ImageTower(image_size=SIZE, patch_size=4, **TOWER),
    text=config.TextTower(length=LENGTH, vocab_size=TOKENIZER.vocab_size, **TOWER),
    dtype="float32",
)
MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "2x2x2": (2, 2, 2)}


def mesh_of(name):
    data, fsdp, tensor = MESHES[name]
    return make_mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def standing(cosines, own):
    """`Ranks` from the full matrix."""
    best = np.where(own, cosines, -np.inf).max(1, keepdims=True)
    greater, equal = nearer(cosines, best)
    return Ranks((greater & ~own).sum(1), (equal & ~own).sum(1), (equal & own).sum(1))


def image_batches(images, encoder, **columns):
    """CachedBatches of the encoder's size, the last padded with black images."""
    size = encoder.batch_size

    def read():
        for start in range(0, len(images), size):
            pad = size - len(images[start : start + size])
            batch = {"image": np.pad(images[start : start + size], ((0, pad), (0, 0), (0, 0), (0, 0)))}
            yield batch | {k: np.pad(v[start : start + size], (0, pad), constant_values=-1) for k, v in columns.items()}

    return CachedBatches(read, -(-len(images) // size), "toy", "images")


class Stored(Source):
    """Records in memory, in chunks of three. It notes what is fetched."""

    def __init__(self, records, captioned=True):
        super().__init__()
        self.name, self.fields, self.captioned = "stored", {"png": "image"}, captioned
        self.records, self.fetched = records, []

    def __len__(self):
        return len(self.records)

    def _record(self, i):
        return self.records[i]

    def chunks(self):
        return np.array([3] * (len(self) // 3) + [len(self) % 3] * bool(len(self) % 3))

    def fetch(self, chunk):
        self.fetched.append(chunk)
        return Fetched(self.records[3 * chunk : 3 * chunk + 3], 1)

    def record_in(self, fetched, chunk, j):
        return fetched.content[j]


def stored(tsv, labels, captions=True):
    """The images of the fixture `tsv`, with labels, and with one caption each or none."""
    paths = [tsv / f"{i}.png" for i in range(10)]
    return Stored([Record(p, ("a",) * captions, p.name, label) for p, label in zip(paths, labels, strict=True)], captions)


class Counting(Encoder):
    """Counts the rows that its towers see."""

    def __init__(self, store, mesh="1", batch_size=4, model=MODEL):
        super().__init__(model, mesh_of(mesh), batch_size, store=store)
        self.rows_seen = 0
        self._towers = {kind: self._counted(tower) for kind, tower in self._towers.items()}

    def _counted(self, tower):
        def counted(params, x):
            self.rows_seen += len(x)
            return tower(params, x)

        return counted
