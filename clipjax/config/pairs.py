"""Terms of pairs: metric learning, mixtures, several views, no contrast. Their equations: clipjax.losses.metric and views."""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

from clipjax.config.data import Data
from clipjax.config.fields import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, bounded, require
from clipjax.config.model import Model
from clipjax.config.term import UNUSED, Pairs


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


@dataclass(frozen=True, kw_only=True)
class Symile(Pairs):
    """Symile: products of three modalities or more (2411.01053), which are views and captions: see data.captions."""

    kind: Literal["symile"] = "symile"

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        count = len({*itertools.chain(*self.pairs(data.views_per_image, data.texts_per_image))})
        require(count > 2, f"{name}.texts", self.texts, "Symile takes three views and captions or more: see data.captions")
        free = self.temperature is not None or model.max_scale is None
        remedy = f"{name} has products of {count} unit vectors, which are small: set None, and init_scale to 100 or more"
        require(free, "model.max_scale", model.max_scale, remedy)


@dataclass(frozen=True, kw_only=True)
class MultiView(Pairs):
    """MV-InfoNCE and MV-DHEL (2507.06979): one loss of all views and captions of an example."""

    kind: Literal["multi_view"] = "multi_view"
    form: Literal["infonce", "dhel"] = "dhel"  # dhel contrasts each view and caption with its own place in other examples alone
    temperature: float = bounded(POSITIVE, 0.2)  # fixed: with a learned one dhel has no minimum


@dataclass(frozen=True, kw_only=True)
class Barlow(Pairs):
    """Barlow Twins (2103.03230) of images and texts, BarLIP (2305.08675): correlations of coordinates over the global batch."""

    kind: Literal["barlow"] = "barlow"
    temperature: float | None = bounded(UNUSED, None)  # must be None
    off: float = bounded(NOT_NEGATIVE, 5e-3)  # factor on the squares off the diagonal
    scale: float = bounded(POSITIVE, 0.025)  # factor on all


@dataclass(frozen=True, kw_only=True)
class Siamese(Pairs):
    """SimSiam (2011.10566) of images and texts, SiamLIP (2305.08675): a head's predictions towards the other side, held."""

    kind: Literal["siamese"] = "siamese"
    temperature: float | None = bounded(UNUSED, None)  # must be None

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        able = {head.name for head in model.heads if head.predictor}
        require({*self.heads} <= able, f"{name}.head", self.head, "must name a head of model.heads with predictor = True")


@dataclass(frozen=True, kw_only=True)
class Swap(Pairs):
    """SwALIP (2305.08675): towards balanced assignments of another pair of views; with prototypes SwAV (2006.09882)."""

    kind: Literal["swap"] = "swap"
    epsilon: float = bounded(POSITIVE, 0.05)  # temperature of the assignments
    rounds: int = bounded(COUNT, 3)  # of Sinkhorn's algorithm
    prototypes: bool = False  # assign both to the vectors of model.classes, not each to the batch's other side

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        if self.prototypes:
            widths = {head.name: head.width for head in model.heads}
            taken = {widths.get(head or "", model.embed_dim) for head in self.heads}
            fits = model.class_shape is not None and taken == {model.class_shape[1]}
            remedy = f"{name} takes them as prototypes: set them, as wide as its vectors"
            return require(fits, "model.classes", model.classes, remedy)
        require(self.sides == "image-text", f"{name}.sides", self.sides, "must be image-text, but for prototypes = True")
        several = len(self.pairs(data.views_per_image, data.texts_per_image)) > 1
        require(several, f"{name}.images", self.images, "the targets are another pair's: give two views or captions")
