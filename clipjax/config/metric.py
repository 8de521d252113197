"""Terms of metric learning and of mixtures, whose equations are in clipjax.losses.metric."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from clipjax.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, Range, bounded
from clipjax.config.term import Pairs

UNUSED = Range(math.inf, -math.inf, "leave it out: this term has no temperature, but scales that are fields of its own")


@dataclass(frozen=True, kw_only=True)
class Repulsion(Pairs):
    """CACR: far positives attract most, and near negatives repel most (2105.03746)."""

    kind: Literal["repulsion"] = "repulsion"
    temperature: float | None = bounded(UNUSED, None)  # must be None
    alpha: float = bounded(NOT_NEGATIVE, 1.0)  # factor on the attraction
    beta: float = bounded(NOT_NEGATIVE, 1.0)  # factor on the repulsion
    tau_positive: float = bounded(NOT_NEGATIVE, 1.0)  # how much more the far ones of an example's positive pairs attract
    tau_negative: float = bounded(POSITIVE, 1.0)  # how much more near negatives repel


@dataclass(frozen=True, kw_only=True)
class MannWhitney(Pairs):
    """The logistic loss of the own pair's cosine less each negative's, a bound of the area over the ROC curve (2510.00137)."""

    kind: Literal["mann_whitney"] = "mann_whitney"
    temperature: float = bounded(POSITIVE, 0.07)  # of the differences; fixed, as a learned one would fall without limit


@dataclass(frozen=True, kw_only=True)
class MultiSimilarity(Pairs):
    """Multi-Similarity (1904.06627), and Metrix's mixtures beside it (2106.04990)."""

    draws: ClassVar[bool] = True
    kind: Literal["multi_similarity"] = "multi_similarity"
    temperature: float | None = bounded(UNUSED, None)  # must be None
    alpha: float = bounded(POSITIVE, 2.0)  # scale of the positives
    beta: float = bounded(POSITIVE, 50.0)  # scale of the negatives
    offset: float = 0.5  # cosine that positives are to exceed, and negatives to stay below
    mix: float = bounded(NOT_NEGATIVE, 0.0)  # weight of the mixtures with the next example; 0.4 in Metrix


@dataclass(frozen=True, kw_only=True)
class Mixup(Pairs):
    """M3CoL: a mixture of two examples is to find both partners, each by its share (2409.17777)."""

    draws: ClassVar[bool] = True
    kind: Literal["mixup"] = "mixup"
    mix: Literal["image", "text", "both"] = "both"  # the side whose vectors are mixed; both: each in turn, and their mean
    concentration: float = bounded(POSITIVE, 0.15)  # of the Beta distribution of the shares; small: most are near 0 or 1
    share: float = bounded(SHARE, 0.5)  # part of the examples that are mixed
    temperature: float | None = bounded(POSITIVE, 0.1)  # fixed; None: the learned one
