"""Zero-shot classification: class embeddings from ensembled prompts; acc1, acc5 and mean-per-class recall."""

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.evaluation import Evaluation, Results
from clipjax.evals.inputs import classes_of, image_batches, prompt_batches
from clipjax.evals.prompts import templates
from clipjax.evals.retrieval import half_ranks
from clipjax.models.clip import Params
from clipjax.models.layers import unit
from clipjax.sharding import replicated


class ZeroshotEvaluation(Evaluation):
    """The images of a dataset, each assigned to the class with the nearest embedding."""

    def __init__(self, encoder: Encoder, images: CachedBatches, prompts: CachedBatches, classes: int) -> None:
        """`prompts` has the same number of prompts for each class, see `prompt_batches`."""
        self.encoder, self.images, self.prompts, self.classes = encoder, images, prompts, classes
        self.dataset = images.name
        full = replicated(encoder.mesh)
        self._add = jax.jit(_add, out_shardings=full, donate_argnums=0)
        self._unit = jax.jit(unit)
        self._count = jax.jit(_count, out_shardings=full, donate_argnums=0)

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Zeroshot) -> Self:
        """Templates are as in `prompts.templates`, classes as in `inputs.classes_of`. Needs no captions."""
        source = open_source(data)
        classes = classes_of(source, cfg.classnames)
        prompts = prompt_batches(encoder, tokenizer, classes.names, templates(cfg.templates))
        images = image_batches(encoder, source, data, labels=classes.labels, captioned=False)
        return cls(encoder, images, prompts, len(classes.names))

    def class_embeddings(self, params: Params) -> Float[Array, "c e"]:
        """unit(mean over templates of unit(text)) of every class (2103.00020, section 3.1.4), float32, replicated."""
        total = self._zeros(self.encoder.model.embed_dim, jnp.float32)
        for z, rest in self.encoder.stream(params, self.prompts):
            total = self._add(total, z, rest["label"])
        return self._unit(total)  # a sum and not a mean: its length does not matter

    def run(self, params: Params) -> Results:
        """`acc1`, `acc5` (None with fewer than 5 classes) and `mean_per_class_recall` (over the classes that occur), in [0, 1].

        An image is correct at k when the rank of its class is at most k: 1 + #{greater} + #{equal} / 2, as in retrieval.
        """
        weights = self.class_embeddings(params)
        counts = self._zeros(3, jnp.int32)
        for z, rest in self.encoder.stream(params, self.images):
            counts = self._count(counts, weights, z, rest["label"])
        top1, top5, seen = np.asarray(counts).T
        if not seen.any():
            raise ConfigError(f"data.spec: {self.images.name}: none has a label; use a split with labels")
        recalls = top1[seen > 0] / seen[seen > 0]
        metrics = {
            "acc1": float(top1.sum() / seen.sum()),
            "acc5": float(top5.sum() / seen.sum()) if self.classes >= 5 else None,
            "mean_per_class_recall": float(recalls.mean()),
        }
        return Results(metrics)

    def _zeros(self, columns: int, dtype: jnp.dtype) -> Array:
        return jnp.zeros((self.classes, columns), dtype, device=replicated(self.encoder.mesh))


def _add(total: Float[Array, "c e"], z: Float[Array, "b e"], labels: Int[Array, " b"]) -> Float[Array, "c e"]:
    return total.at[_drop_padding(labels, len(total))].add(z, mode="drop")


def _count(
    counts: Int[Array, "c 3"], weights: Float[Array, "c e"], z: Float[Array, "b e"], labels: Int[Array, " b"]
) -> Int[Array, "c 3"]:
    """Adds a batch to each class's counts: images that are correct at 1, that are correct at 5, and all images."""
    cosines = jnp.matmul(z, weights.T, precision=jax.lax.Precision.HIGHEST)
    own = labels[:, None] == jnp.arange(len(weights))[None, :]
    own_cosine = jnp.where(own, cosines, 0).sum(1, keepdims=True)
    halves = jnp.where(own, 0, half_ranks(cosines, own_cosine)).sum(1)
    hits = jnp.stack([*(halves <= 2 * (k - 1) for k in (1, 5)), jnp.ones_like(own[:, 0])], axis=1)
    return counts.at[_drop_padding(labels, len(counts))].add(hits.astype(jnp.int32), mode="drop")


def _drop_padding(labels: Int[Array, " b"], classes: int) -> Int[Array, " b"]:
    """Padding, -1, becomes an index that a scatter drops. A negative index would count from the end."""
    return jnp.where(labels < 0, classes, labels)
