"""Metrics of classifications on the host, from scores or from hits: what accuracies do not say.

Ties count as on average over all orders of them, as everywhere (ties.py). On scores without ties these are the figures of
scikit-learn, or of the public code that each names.
"""

from math import comb

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from clipjax.evals.ties import TIE, average_precision

Hits = Float[np.ndarray, " n"]  # of each example the chance of a hit, 0 or 1 without ties


def votes(scores: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """With which chance each class is the prediction: 1 for the best, shared equally where several are."""
    best = scores >= scores.max(1, keepdims=True) - TIE
    return best / best.sum(1, keepdims=True)


def mean_per_class_recall(hit: Hits, labels: Int[np.ndarray, " n"]) -> float:
    """The mean over the classes that occur of their accuracies: scikit-learn's `recall_score(average="macro")`, and its
    `balanced_accuracy_score`."""
    return float(_means(hit, labels)[1].mean())


def macro_f1(hit: Hits, labels: Int[np.ndarray, " n"], predicted: Float[np.ndarray, " c"]) -> float:
    """The mean F1 of the classes that occur. `predicted`: how often each class is the prediction, the sum of `votes`.

    WILDS's `F1-macro_all`: `f1_score(..., average="macro", labels=unique(labels))`, so a class that is predicted and never occurs
    is not in the mean, but what it took counts (wilds/common/metrics/all_metrics.py)."""
    classes, means, counts = _means(hit, labels)
    return float((2 * means * counts / (predicted[classes] + counts)).mean())


def worst_group(hit: Hits, groups: Shaped[np.ndarray, " n"]) -> float:
    """The accuracy in the group where it is least: DataComp's `acc_wg` of GeoDE's regions, `acc_top5_wg` of Dollar Street's
    incomes, of hits at 5, and `acc_worst_region` of FMoW (datacomp/eval_utils).

    The latter means to leave out the region "Other", by name; but the evaluator there has no names of regions, so it does not."""
    return float(_means(hit, groups)[1].min())


def precision_per_class(scores: Float[np.ndarray, "n c"], positive: Bool[np.ndarray, "n c"]) -> Float[np.ndarray, " c"]:
    """The `average_precision` of every class, of several labels an example; 0 for a class without any, as in CLIP_benchmark,
    whose `mean_average_precision` is the mean."""
    return np.nan_to_num([average_precision(*column) for column in zip(scores.T, positive.T, strict=True)])


def jaccard(scores: Float[np.ndarray, " m"], positive: Bool[np.ndarray, " m"]) -> float:
    """How much the best candidates and the positive ones overlap, as many of the first as there are of the second: shared
    h of a each, h / (2 a - h). DataComp's WinoGAViL; NaN without a positive."""
    a = int(positive.sum())
    if not a:
        return float("nan")
    border = np.sort(scores)[-a]
    certain, tied = scores > border + TIE, np.abs(scores - border) <= TIE
    places, e, s = a - int(certain.sum()), int(tied.sum()), int((tied & positive).sum())
    sure = int((certain & positive).sum())
    chances = [comb(s, h) * comb(e - s, places - h) / comb(e, places) for h in range(min(s, places) + 1)]
    return float(sum(chance * (sure + h) / (2 * a - sure - h) for h, chance in enumerate(chances)))


def _means(
    hit: Hits, groups: Shaped[np.ndarray, " n"]
) -> tuple[Shaped[np.ndarray, " g"], Float[np.ndarray, " g"], Int[np.ndarray, " g"]]:
    """The groups that occur, the mean of the hits in each, and how many there are."""
    names, of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return names, np.bincount(of, hit) / counts, counts
