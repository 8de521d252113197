"""Whether the file that data.embeddings names holds what a frozen tower of the run gives."""

from collections.abc import Callable, Iterator

import numpy as np
from jax.sharding import Mesh

from clipjax import config
from clipjax.data.faults import shown
from clipjax.data.images.resize import fit
from clipjax.data.source import Source
from clipjax.data.tokenizer import Tokenizer
from clipjax.data.vectors import Vectors
from clipjax.evals.encoder import Batch, CachedBatches, Encoder, to_host
from clipjax.models.clip import Params
from clipjax.sharding import batch_devices

COMPARED = 8  # examples
# How far apart two unit vectors of the same weights may be, by the tower's dtype; those of other weights are by about 1.
MOST = {"float32": 1e-3, "bfloat16": 0.05}


def agreement(run: config.Run, mesh: Mesh, tokenizer: Tokenizer, source: Source, embedded: Vectors) -> Callable[[Params], None]:
    """A function of the run's weights that raises ConfigError where the tower gives some examples other vectors than the file.
    Every process must call it."""
    numbers = [i for i in np.unique(np.linspace(0, len(source) - 1, COMPARED).astype(int)).tolist() if i in embedded]
    side, size = run.embedded or "image", run.model.image.image_size
    found = [x for x in shown(source, numbers) if x.record.captions]
    if side == "image":
        rows = np.stack([fit(x.image, size, run.data.resize) for x in found]) if found else np.zeros((0, size, size, 3), np.uint8)
    else:
        rows = tokenizer.encode([x.record.captions[0] for x in found])[0]
    encoder = Encoder(run.model, mesh, COMPARED * batch_devices(mesh))
    want = np.array([embedded[x.number]["embedded"] for x in found])

    def read() -> Iterator[Batch]:
        return ({side: rows[numbers]} for numbers, _ in encoder.rows(len(rows)))

    def check(params: Params) -> None:
        batches = CachedBatches(read, encoder.batch_count(len(rows)), "embeddings", f"{side}s")
        got = np.concatenate([to_host(z) for z, _ in encoder.stream(params, batches)])[: len(rows)]
        apart = float(np.linalg.norm(got - want, axis=1).max(initial=0.0))
        remedy = f"its vectors are {apart:.2g} of their norm from what the {side} tower of this run gives: write it with "
        remedy += "`clipjax embed` from the run that this one starts from, with the same dtype, preprocessing and tokenizer"
        config.require(apart <= MOST[run.model.dtype], "data.embeddings", run.data.embeddings, remedy)

    return check
