"""Probes: how well classifiers of a run's image vectors do that are learned from a labelled split."""

from collections.abc import Iterator
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import classifiers
from clipjax.evals.classifiers import expected_right
from clipjax.evals.embed import Vectors
from clipjax.evals.encoder import Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Metrics, Results
from clipjax.evals.inputs import image_batches
from clipjax.evals.labels import LabelledImages, open_splits, shared_classes
from clipjax.models.clip import Params

KS = (10, 20, 100, 200)  # neighbours
SHOTS = (1, 5, 10, 25)  # examples of each class
SEEDS = range(3)  # of the examples that are drawn
LEAST = 10  # images to learn from


class ProbeEvaluation(Evaluation):
    """Classifiers of image vectors, learned from one split and tested on another."""

    reads_text: ClassVar = False

    def __init__(self, train: LabelledImages, test: LabelledImages, classes: int, methods: tuple[str, ...]) -> None:
        self.train, self.test, self.classes, self.methods = train, test, classes, methods
        self.dataset = test.batches.name

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer | None, data: config.Data, cfg: config.Probe) -> Self:
        """Classes are as in `labels.shared_classes`. Needs no captions."""
        splits = open_splits(data, cfg.train)
        classes, examples = shared_classes([source for source, _ in splits], cfg.label_pattern)
        encoder = encoder.giving("tower") if cfg.features == "tower" else encoder
        train, test = (
            LabelledImages(encoder, image_batches(encoder, source, own, captioned=False), labelled)
            for (source, own), labelled in zip(splits, examples, strict=True)
        )
        return cls(train, test, classes, cfg.methods)

    def run(self, params: Params) -> Results:
        """Accuracies in [0, 1]: `linear_acc1` with `linear_c`, `knn_acc1@K`, `fewshot_acc1@SHOTS` (the mean over three draws).

        An image counts the chance that its class has the highest score when equal ones are in random order. An image of a class
        that the training split lacks is wrong. Raises ConfigError for fewer than LEAST images to learn from."""
        x, labels, _ = self.train.embed(params)
        name = self.train.batches.name
        config.require(len(x) >= LEAST, "train", name, f"has {len(x)} labelled images that can be read, and needs {LEAST}")
        queries, wanted, found = self.test.embed(params)
        metrics: Metrics = {"train_images": len(x), "test_images": len(queries), "classes": len(np.unique(labels))}
        right: dict[str, Float[np.ndarray, " m"]] = {}
        if "linear" in self.methods:
            probe = classifiers.linear_probe(x, labels, self.classes, self.train.encoder.mesh)
            right["linear_acc1"] = expected_right(probe.scores(queries), wanted)
            metrics |= {"linear_c": probe.c, "linear_validation_acc1": max(probe.validation)}
            metrics["linear_validation_acc1_by_c"] = list(probe.validation)
        if "knn" in self.methods:
            votes = classifiers.neighbours(x, labels, self.classes, queries, KS, self.train.encoder.mesh)
            right |= {f"knn_acc1@{k}": expected_right(scores, wanted) for k, scores in zip(KS, votes, strict=True)}
        if "fewshot" in self.methods:
            right |= self._few_shot(x, labels, queries, wanted)
        metrics |= {name: float(values.mean()) for name, values in right.items()}
        keys = [self.test.examples.keys[i] for i in np.flatnonzero(found)]
        return Results(metrics, examples=[Examples(keys, right)])

    def _few_shot(
        self, x: Vectors, labels: Int[np.ndarray, " n"], queries: Vectors, wanted: Int[np.ndarray, " m"]
    ) -> Iterator[tuple[str, Float[np.ndarray, " m"]]]:
        for shots in SHOTS:
            draws = [classifiers.few_shots(labels, self.classes, shots, seed) for seed in SEEDS]
            scores = (classifiers.few_shot_scores(x[rows], labels[rows], self.classes, queries) for rows in draws)
            yield f"fewshot_acc1@{shots}", np.mean([expected_right(s, wanted) for s in scores], axis=0)
