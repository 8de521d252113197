"""Zero-shot classification: class embeddings from ensembled prompts; accuracies, mean-per-class recall, F1 and worst group, and
mean average precision where an image has several labels."""

import itertools
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.classes import Classes, classes_of
from clipjax.evals.classification import macro_f1, mean_per_class_recall, precision_per_class, votes
from clipjax.evals.embed import by_index
from clipjax.evals.encoder import CachedBatches, Encoder, to_host
from clipjax.evals.evaluation import Evaluation, Examples, Results
from clipjax.evals.inputs import image_batches, prompt_batches
from clipjax.evals.predictions import Predictions
from clipjax.evals.prompts import fill, templates
from clipjax.evals.ties import TIE, nearer
from clipjax.models.clip import Params
from clipjax.models.layers import unit
from clipjax.sharding import BATCH, replicated
from clipjax.train.report import say

NEAREST = 5  # classes of an image that are kept

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroshotResults(Results):
    """The metrics, and what each image was taken for."""

    predictions: Predictions = field(kw_only=True)


class ZeroshotEvaluation(Evaluation):
    """The images of a dataset, each assigned to the class with the nearest embedding."""

    def __init__(self, encoder: Encoder, images: CachedBatches, prompts: CachedBatches, classes: Classes) -> None:
        """`images` have `index` and `label`. `prompts` has the same number of prompts for each class, see `prompt_batches`."""
        self.encoder, self.images, self.prompts, self.classes = encoder, images, prompts, classes
        self.dataset = images.name
        self._add = jax.jit(_add, out_shardings=replicated(encoder.mesh), donate_argnums=0)
        self._unit = jax.jit(unit)
        self._vote = jax.jit(_vote, out_shardings=replicated(encoder.mesh), donate_argnums=0)
        rows = P(BATCH)  # by shard_map, because XLA gathers all rows of a top_k
        self._compare = jax.jit(jax.shard_map(_compare, mesh=encoder.mesh, in_specs=(P(), rows, rows), out_specs=rows))

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Zeroshot) -> Self:
        """Templates are as in `prompts.templates` or the dataset's own, classes as in `classes.classes_of`. Needs no captions.

        Prints the first prompt, and warns of classes whose prompts are equal: no model can tell them apart."""
        source = open_source(data)
        own = source.templates if cfg.templates is None else None
        classes, wordings = classes_of(source, cfg.classnames), own or templates(cfg.templates or "simple")
        first = [fill(wordings[0], name) for name in classes.names]
        what = f"{len(classes.names):,} classes, named by {classes.source}, in {len(wordings)} templates"
        say(f"{source.name}: {what}; the first prompt is {first[0]!r}")
        _tell_equal(source.name, classes.names, tokenizer.encode(first)[0])
        prompts = prompt_batches(encoder, tokenizer, classes.names, wordings)
        images = image_batches(encoder, source, data, labels=classes.labels, captioned=False)
        return cls(encoder, images, prompts, classes)

    def class_embeddings(self, params: Params) -> Float[Array, "c e"]:
        """unit(mean over templates of unit(text)) of every class (2103.00020, section 3.1.4), float32, replicated."""
        total = None
        for z, rest in self.encoder.stream(params, self.prompts):
            if total is None:
                shape = len(self.classes.names), z.shape[-1]
                total = jnp.zeros(shape, jnp.float32, device=replicated(self.encoder.mesh))
            total = self._add(total, z, rest["label"])
        return self._unit(total)  # a sum and not a mean: its length does not matter

    def predictions(self, params: Params) -> Predictions:
        """The nearest classes of every image that can be read, on every process."""
        weights, batches = self.class_embeddings(params), []
        votes = jnp.zeros(len(self.classes.names), jnp.float32, device=replicated(self.encoder.mesh))
        for z, rest in self.encoder.stream(params, self.images):
            batches.append((rest["index"], rest["label"], *self._compare(weights, z, rest["label"])))
            votes = self._vote(votes, weights, z, rest["label"])
        index, *arrays = (np.concatenate([to_host(x) for x in column]) for column in zip(*batches, strict=True))
        real = index >= 0
        groups = None if self.classes.groups is None else self.classes.groups[index[real]]
        keys = tuple(self.classes.keys[i] for i in index[real])
        kept = (x[real] for x in arrays)
        return Predictions(self.classes.names, keys, *kept, votes=to_host(votes).astype(np.float64), groups=groups)

    def run(self, params: Params) -> ZeroshotResults:
        """`acc1`, `acc5` (None with fewer than 5 classes), and `mean_per_class_recall` and `macro_f1` (over the classes that
        occur), in [0, 1]; of a dataset with groups also the accuracies in the worst one, `acc_wg` and `acc_top5_wg`. Where an
        image has several labels, `mean_average_precision` over all classes instead, and examples are classes.

        An image counts the chance that its class is among the k nearest when ties are in random order (`ties.expected_hits`).
        """
        if self.classes.positive is not None:
            return self._ranked(params, self.classes.positive)
        predictions = self.predictions(params)
        rated = predictions.labelled()
        if not rated.keys:
            raise ConfigError(f"data.spec: {self.images.name}: no image that can be read has a label; use a split with labels")
        seen = np.bincount(rated.labels, minlength=len(rated.names))
        share = len(rated.labels) / (seen[rated.labels] * np.count_nonzero(seen))  # a mean over images becomes one over classes
        values = {"acc1": rated.hits(1), "acc5": rated.hits(5), "mean_per_class_recall": rated.hits(1) * share}
        metrics = {
            "acc1": float(values["acc1"].sum() / seen.sum()),
            "acc5": float(values["acc5"].sum() / seen.sum()) if len(rated.names) >= 5 else None,
            "mean_per_class_recall": mean_per_class_recall(values["acc1"], rated.labels),
        }
        values = {name: value for name, value in values.items() if metrics[name] is not None}
        metrics |= {"macro_f1": macro_f1(rated.hits(1), rated.labels, rated.votes), **rated.worst_groups()}
        facts = {"class": rated.called(rated.labels), "predicted": rated.called(rated.nearest[:, 0])}
        return ZeroshotResults(metrics, examples=[Examples(rated.keys, values, facts=facts)], predictions=predictions)

    def _ranked(self, params: Params, positive: Bool[np.ndarray, "n c"]) -> ZeroshotResults:
        """The images of every class ranked, and the nearest classes of every image, on the host."""
        z, found = by_index(self.encoder, params, self.images, len(positive))
        cosines = z[found] @ to_host(self.class_embeddings(params)).T
        precision = precision_per_class(cosines, positive[found])
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST].astype(np.int32)
        best, none = np.take_along_axis(cosines, nearest, axis=1), np.zeros(len(cosines), np.int32)
        keys = tuple(itertools.compress(self.classes.keys, found))
        predictions = Predictions(self.classes.names, keys, none - 1, nearest, best, none, none, votes(cosines).sum(0))
        name = "mean_average_precision"
        examples = [Examples(self.classes.names, {name: precision})]
        return ZeroshotResults({name: float(precision.mean())}, examples=examples, predictions=predictions)


def _tell_equal(dataset: str, names: tuple[str, ...], tokens: Int[np.ndarray, "c t"]) -> None:
    """Warns, in the first process, of classes whose first prompts have the same tokens."""
    alike: dict[bytes, list[int]] = defaultdict(list)
    for i, row in enumerate(tokens):
        alike[row.tobytes()].append(i)
    groups = [group for group in alike.values() if len(group) > 1]
    if groups and jax.process_index() == 0:
        shown = "; ".join(" = ".join(f"{names[i]} ({i})" for i in group) for group in groups[:3]) + "; ..." * (len(groups) > 3)
        what = "%s: the first prompts of %d of %d classes have the same tokens as another's: %s"
        log.warning(what, dataset, sum(map(len, groups)), len(names), shown)


def _add(total: Float[Array, "c e"], z: Float[Array, "b e"], labels: Int[Array, " b"]) -> Float[Array, "c e"]:
    padding = jnp.where(labels < 0, len(total), labels)  # a scatter drops it; a negative index would count from the end
    return total.at[padding].add(z, mode="drop")


def _vote(total: Float[Array, " c"], weights: Float[Array, "c e"], z: Float[Array, "b e"], labels: Int[Array, " b"]) -> Array:
    """`total` and how often each class is the prediction, of images with a label; several that are nearest share a vote."""
    cosines = jnp.matmul(z, weights.T, precision=jax.lax.Precision.HIGHEST)
    best = cosines >= cosines.max(1, keepdims=True) - TIE
    return total + jnp.where(labels[:, None] >= 0, best / best.sum(1, keepdims=True), 0).sum(0)


def _compare(
    weights: Float[Array, "c e"], z: Float[Array, "b e"], labels: Int[Array, " b"]
) -> tuple[Int[Array, "b k"], Float[Array, "b k"], Int[Array, " b"], Int[Array, " b"]]:
    """The nearest classes of each image and their cosines; how many classes are nearer than its own, and as near."""
    cosines = jnp.matmul(z, weights.T, precision=jax.lax.Precision.HIGHEST)
    own = labels[:, None] == jnp.arange(len(weights))[None, :]
    greater, equal = nearer(cosines, jnp.where(own, cosines, 0).sum(1, keepdims=True))
    best, nearest = jax.lax.top_k(cosines, min(NEAREST, len(weights)))
    return nearest, best, (greater & ~own).sum(1), (equal & ~own).sum(1)
