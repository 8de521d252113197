"""What a zero-shot classifier took each image for."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from clipjax.evals.classification import worst_group
from clipjax.evals.ties import expected_hits
from clipjax.files import write_atomic


@dataclass(frozen=True)
class Predictions:
    """The nearest classes of m images, and how many classes are nearer than the right one, or as near."""

    names: tuple[str, ...]  # of the classes
    keys: tuple[str, ...]  # of the images
    labels: Int[np.ndarray, " m"]  # -1: none
    nearest: Int[np.ndarray, "m k"]  # the k <= 5 nearest classes, the nearest first
    cosines: Float[np.ndarray, "m k"]
    greater: Int[np.ndarray, " m"]  # of an image without a label these two mean nothing
    equal: Int[np.ndarray, " m"]
    votes: Float[np.ndarray, " c"]  # how often each class is the prediction, of images with a label; ties share a vote
    groups: Int[np.ndarray, " m"] | None = None  # -1: none; None: the dataset has no groups

    def labelled(self) -> "Predictions":
        """The images that have a label."""
        kept = self.labels >= 0
        keys = tuple(key for key, one in zip(self.keys, kept, strict=True) if one)
        arrays = (self.labels, self.nearest, self.cosines, self.greater, self.equal)
        groups = None if self.groups is None else self.groups[kept]
        return Predictions(self.names, keys, *(x[kept] for x in arrays), votes=self.votes, groups=groups)

    def hits(self, k: int) -> Float[np.ndarray, " m"]:
        """The chance that the right class is among the k nearest, ties in random order; without ties 0 or 1."""
        return np.asarray(expected_hits(self.greater, self.equal, 1, k))

    def worst_groups(self) -> dict[str, float]:
        """The accuracies in the group where each is least; nothing where there are no groups."""
        if self.groups is None or not (of := self.groups >= 0).any():
            return {}
        tops = {"acc_wg": 1} | ({"acc_top5_wg": 5} if len(self.names) >= 5 else {})
        return {name: worst_group(self.hits(k)[of], self.groups[of]) for name, k in tops.items()}

    def called(self, classes: Int[np.ndarray, " m"]) -> Sequence[str]:
        """The names of classes; of -1, the empty string."""
        return [self.names[i] if i >= 0 else "" for i in classes]

    def write(self, path: str | Path) -> None:
        """Writes a csv from the first process: `key`, `label`, and `class1`, `cosine1`, ... of the nearest classes."""
        if jax.process_index() > 0:
            return
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        k = self.nearest.shape[1]
        rows.writerow(["key", "label", *(f"{what}{i}" for i in range(1, k + 1) for what in ("class", "cosine"))])
        for key, label, nearest, cosines in zip(self.keys, self.called(self.labels), self.nearest, self.cosines, strict=True):
            pairs = zip(self.called(nearest), cosines, strict=True)
            rows.writerow([key, label, *(x for name, cosine in pairs for x in (name, f"{cosine:.6f}"))])
        with write_atomic(path) as part:
            part.write_text(text.getvalue(), encoding="utf-8")
