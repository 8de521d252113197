"""Instance retrieval: the other images of what an image shows, found by the image alone."""

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from clipjax import config
from clipjax.data import reading
from clipjax.data.source import Record, Source
from clipjax.data.sources import open_source
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.embed import Vectors, by_index
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Metrics, Results
from clipjax.evals.inputs import image_batches
from clipjax.evals.labels import name_of
from clipjax.evals.ties import average_precision, expected_hits, nearer
from clipjax.models.clip import Params

KS = (1, 5, 10)
AT_ONCE = 1 << 22  # cosines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """The images of a dataset, and what each shows."""

    batches: CachedBatches
    keys: tuple[str, ...]
    classes: tuple[str | None, ...]  # what the images of one class have in common; None: the image is of none

    @classmethod
    def of(cls, encoder: Encoder, data: config.Data) -> "Shown":
        """A class is the name of the label, or its number, or in a dataset without labels the main caption."""
        source = open_source(data)
        records = [(record.key, _class_of(source, record)) for record in reading.texts(source, jax.process_index() > 0)]
        keys, classes = zip(*records, strict=True) if records else ((), ())
        return cls(image_batches(encoder, source, data, captioned=False), keys, classes)


def _class_of(source: Source, record: Record) -> str | None:
    if record.label >= 0:
        return name_of(record.label, source)
    return record.captions[0] if record.captions and source.classnames is None else None


class InstanceEvaluation(Evaluation):
    """Every image of a dataset against all others of it, or against those of a gallery."""

    reads_text: ClassVar = False

    def __init__(self, encoder: Encoder, queries: Shown, gallery: Shown | None) -> None:
        """`gallery`, None: the queries' own, each without the query itself."""
        self.encoder, self.queries, self.gallery, self.dataset = encoder, queries, gallery, queries.batches.name
        if gallery is not None:
            self.dataset += f"+{gallery.batches.name}"
        classes = (gallery or queries).classes
        number = {name: i for i, name in enumerate(dict.fromkeys(classes)) if name is not None}
        self._query_class = np.array([-1 if name is None else number.get(name, -1) for name in queries.classes], np.int64)
        self._key_class = np.array([-2 if name is None else number[name] for name in classes], np.int64)

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer | None, data: config.Data, cfg: config.Instance) -> Self:
        """Raises ConfigError where no image has another of its class to find."""
        queries, gallery = Shown.of(encoder, data), None
        if cfg.gallery is not None:
            gallery = Shown.of(encoder, replace(data, spec=cfg.gallery, split=cfg.gallery_split or data.split, index=None))
        evaluation = cls(encoder, queries, gallery)
        counted = evaluation.counted()
        remedy = "no image has another of its class to find: name the field of the classes (label_field; --label-field)"
        config.require(counted > 0, "data.spec", evaluation.dataset, f"{remedy}, or another dataset to search (gallery)")
        if counted < len(queries.keys) and jax.process_index() == 0:
            none = "%s: %d of %d images have no other of their class to find, and are no queries"
            log.warning(none, evaluation.dataset, len(queries.keys) - counted, len(queries.keys))
        return evaluation

    def run(self, params: Params) -> Results:
        """`recall@K`: how often an image of the query's class is among the K nearest. `mean_average_precision`: the mean over
        queries of the mean precision at each image of its class. Both are expected under random order of ties (`ties`).

        An image without another of its class that can be read is no query; it is still searched.
        """
        z, readable = self._vectors(params, self.queries)
        y, searched = (z, readable) if self.gallery is None else self._vectors(params, self.gallery)
        rows = np.arange(len(z))
        parts = np.array_split(rows, -(-len(z) * len(y) // AT_ONCE))
        found = np.concatenate([self._measure(part, z, y, searched) for part in parts], axis=1)
        found[:, ~readable] = np.nan
        remedy = "none of its images can be read that has another of its class to find"
        config.require(not np.isnan(found).all(), "data.spec", self.dataset, remedy)
        names = [*(f"recall@{k}" for k in KS), "mean_average_precision"]
        metrics: Metrics = {name: float(np.nanmean(values)) for name, values in zip(names, found, strict=True)}
        return Results(metrics, examples=(Examples(self.queries.keys, dict(zip(names, found, strict=True))),))

    def counted(self) -> int:
        """How many queries there are: images with another of their class to find."""
        of_class = np.bincount(self._key_class[self._key_class >= 0], minlength=1)
        others = of_class[self._query_class] - (self.gallery is None)
        return int(((self._query_class >= 0) & (others > 0)).sum())

    def _vectors(self, params: Params, shown: Shown) -> tuple[Vectors, Bool[np.ndarray, " n"]]:
        return by_index(self.encoder, params, shown.batches, len(shown.keys))

    def _measure(
        self, part: Int[np.ndarray, " q"], z: Vectors, y: Vectors, searched: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "m q"]:
        """The hit at each of KS and the average precision of each query of a part; NaN: it is none."""
        cosines = z[part] @ y.T
        own = self._query_class[part][:, None] == self._key_class
        among = np.broadcast_to(searched, own.shape).copy()
        if self.gallery is None:
            among[np.arange(len(part)), part] = False
        own &= among
        greater, equal = nearer(cosines, np.where(own, cosines, -np.inf).max(1, keepdims=True))
        others = among & ~own
        above, tied, mine = (np.sum(keys, axis=1) for keys in (greater & others, equal & others, equal & own))
        hits = [np.where(mine > 0, expected_hits(above, tied, mine, k), np.nan) for k in KS]
        precision = [average_precision(s[a], o[a]) if o.any() else np.nan for s, o, a in zip(cosines, own, among, strict=True)]
        return np.stack([*hits, np.array(precision)])
