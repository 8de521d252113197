"""The objective's part of a configuration: weighted terms that add up. Their equations are in clipjax.losses.

A new term is its class here, its equation in clipjax.losses and a row of the table in clipjax.losses.terms. A config file can
bring a term of its own: `clipjax.register`.
"""

from dataclasses import dataclass
from typing import Literal

from clipjax.config.data import Data
from clipjax.config.fields import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, SHARE, bounded, require
from clipjax.config.model import Model
from clipjax.config.pairs import Barlow, MannWhitney, Mixup, MultiSimilarity, MultiView, Repulsion, Siamese, Swap, Symile
from clipjax.config.term import UNUSED, Nested, Pairs, Prefixes, Products, Remembering, Term


@dataclass(frozen=True, kw_only=True)
class Softmax(Nested):
    """CLIP's symmetric softmax loss over the global batch (2103.00020)."""

    kind: Literal["softmax"] = "softmax"
    image_weight: float = bounded(SHARE, 0.5)  # share of the direction image -> text (ConVIRT, 2010.00747: 0.75)
    label_smoothing: float = bounded(BELOW_ONE, 0.0)  # share of the target that is spread evenly over a row
    reduction: Literal["mean", "sum"] = "mean"  # of the two directions; ALIGN (2102.05918) takes the sum, and smooths by 0.1
    dtype: Products = "float32"  # of the operands of its products, whose sums are float32
    # An image's negatives. others: the captions of all others; same: of those that share one of data.labels with it (2402.11816);
    # captions: of all others, and every caption but the first of each image, which is wrong on purpose (2210.01936).
    negatives: Literal["others", "same", "captions"] = "others"
    prefixes: Prefixes = None  # widths whose losses add up (Matryoshka, 2205.13147); None: the full embedding alone

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        remedy = f"must be 0.5: {name}.sides has pairs without an image and a text"
        require(self.sides == "image-text" or self.image_weight == 0.5, f"{name}.image_weight", self.image_weight, remedy)
        if self.negatives == "others":
            return
        remedy = f"must be 0: it counts all others, and {name}.negatives = {self.negatives!r}"
        require(self.label_smoothing == 0, f"{name}.label_smoothing", self.label_smoothing, remedy)
        if self.negatives == "same":
            require(data.labels is not None, "data.labels", None, f"{name}.negatives = 'same' needs labels")
            require(data.ids is None, "data.ids", data.ids, f"{name}.negatives = 'same' does not look at ids: leave it out")
            return
        remedy = "must be 'image-text': negatives = 'captions' are an image's"
        require(self.sides == "image-text", f"{name}.sides", self.sides, remedy)
        remedy = f"{name}.negatives = 'captions' needs two captions or more: see data.text_augment, captions, captions_per_image"
        require(len(self.pairs(1, data.texts_per_image)) > 1, f"{name}.texts", self.texts, remedy)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Nested):
    """SigLIP's pairwise sigmoid loss over the global batch (2303.15343)."""

    kind: Literal["sigmoid"] = "sigmoid"
    dtype: Products = "float32"  # of the operands of its products, whose sums are float32
    prefixes: Prefixes = None  # widths whose losses add up (Matryoshka, 2205.13147); None: the full embedding alone

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        require(model.init_bias is not None, "model.init_bias", None, f"{name} is a sigmoid loss: set it, for example to -10")


@dataclass(frozen=True, kw_only=True)
class Decoupled(Nested):
    """DCL, the softmax loss without the own pair in its denominator, and weighted by it DCLW (2110.06848)."""

    kind: Literal["decoupled"] = "decoupled"
    sigma: float | None = bounded(POSITIVE, None)  # temperature of the own pairs' weights (0.5 in the paper); None: no weights
    stop_gradient: bool = False  # the weights count as constants
    prefixes: Prefixes = None  # widths whose losses add up (Matryoshka, 2205.13147); None: the full embedding alone


@dataclass(frozen=True, kw_only=True)
class HardNegative(Nested):
    """HN-NCE: negatives weighted by their hardness (2301.02280)."""

    kind: Literal["hard_negative"] = "hard_negative"
    alpha: float = bounded(NOT_NEGATIVE, 1.0)  # weight of the own pair in the denominator; 0: decoupled
    beta: float = bounded(NOT_NEGATIVE, 0.25)  # sharpness of the weights; 0: all equal
    stop_gradient: bool = False  # the weights count as constants
    prefixes: Prefixes = None  # widths whose losses add up (Matryoshka, 2205.13147); None: the full embedding alone


@dataclass(frozen=True, kw_only=True)
class MultiPositive(Term):
    """Softmax loss with several positives: all texts (images) of the same id. They are an image's captions, or equal captions."""

    kind: Literal["multi_positive"] = "multi_positive"

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        several = data.texts_per_image > 1 or data.ids is not None
        remedy = f"{name} needs several captions an image: set it to 2 or more, or data.ids to caption"
        require(several, "data.captions_per_image", data.captions_per_image, remedy)


@dataclass(frozen=True, kw_only=True)
class Cwcl(Term):
    """CWCL: targets by the similarities within the frozen tower (2309.14580). Freeze that tower by optim.rules."""

    kind: Literal["cwcl"] = "cwcl"
    frozen: Literal["image", "text"] = "image"  # the tower whose similarities are the targets


@dataclass(frozen=True, kw_only=True)
class Cyclip(Term):
    """CyCLIP's consistency of the cosines within and across the modalities (2205.14459), each B times a mean square."""

    kind: Literal["cyclip"] = "cyclip"
    in_modal: float = bounded(NOT_NEGATIVE, 0.25)  # factor on the part within the modalities
    cross_modal: float = bounded(NOT_NEGATIVE, 0.25)  # factor on the part across them


@dataclass(frozen=True, kw_only=True)
class Distillation(Term):
    """Soft targets: from a teacher's embeddings of the same data, which data.teacher names, or from data.labels (2405.20462)."""

    kind: Literal["distillation"] = "distillation"
    targets: Literal["teacher", "labels"] = "teacher"  # labels: the cosines of two examples' sets of labels
    classes: int | None = bounded(COUNT, None)  # with targets = "labels": labels are less than this number
    teacher_scale: float = bounded(POSITIVE, 100.0)  # the teacher's own logit scale; 10 is sharp for labels

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        if self.targets == "labels":
            require(data.labels is not None, "data.labels", None, f"{name}.targets = 'labels' needs labels")
            require(self.classes is not None, f"{name}.classes", None, "set the number of labels: targets = 'labels'")
            return
        remedy = f"{name} needs an .npz that `clipjax embed` wrote of these examples"
        require(data.teacher is not None, "data.teacher", None, remedy)


@dataclass(frozen=True, kw_only=True)
class Preserve(Term):
    """Holds the embeddings near those of the start, which data.teacher names: an .npz that `clipjax embed START` wrote.

    The start sees each image without augmentation, and its main caption.
    """

    kind: Literal["preserve"] = "preserve"
    mse: float = bounded(NOT_NEGATIVE, 0.0)  # factor on the mean squared difference, over the batch and the coordinates
    cosine: float = bounded(NOT_NEGATIVE, 1.0)  # factor on 1 - cosine, mean over the batch

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        require(self.mse + self.cosine > 0, f"{name}.cosine", self.cosine, "mse or cosine must be positive")
        remedy = f"{name} needs an .npz that `clipjax embed` wrote of these examples, with the weights of the start"
        require(data.teacher is not None, "data.teacher", None, remedy)


@dataclass(frozen=True, kw_only=True)
class Sogclr(Remembering):
    """SogCLR: stores a moving average over the negatives of every example (2202.12387). The scale counts as constant."""

    kind: Literal["sogclr"] = "sogclr"
    examples: int = bounded(COUNT)  # number of training examples, each of which is remembered
    gamma: float = bounded(POSITIVE_SHARE, 0.9)  # share of the present batch in the average; 1: no memory


@dataclass(frozen=True, kw_only=True)
class Isogclr(Remembering):
    """iSogCLR: SogCLR where every image and every text also learns a temperature of its own (2305.11965)."""

    kind: Literal["isogclr"] = "isogclr"
    examples: int = bounded(COUNT)  # number of training examples, each of which is remembered
    gamma: float = bounded(POSITIVE_SHARE, 0.8)  # share of the present batch in the average; 1: no memory
    rho: float = bounded(NOT_NEGATIVE, 6.0)  # how much a high temperature adds to the loss
    temperature: float = 0.01  # of every example at the start
    temperature_lr: float = bounded(NOT_NEGATIVE, 0.03)  # learning rate of the temperatures
    temperature_momentum: float = bounded(BELOW_ONE, 0.9)  # momentum of their updates
    min_temperature: float = bounded(POSITIVE, 0.005)  # they are clamped to at least this
    max_temperature: float = bounded(POSITIVE, 0.05)  # and to at most this

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        inside = self.min_temperature <= self.temperature <= self.max_temperature
        remedy = f"must lie between min_temperature = {self.min_temperature} and max_temperature = {self.max_temperature}"
        require(inside, f"{name}.temperature", self.temperature, remedy)


@dataclass(frozen=True, kw_only=True)
class Uniformity(Term):
    """Mean of the uniformity of the images and that of the texts (2005.10242)."""

    kind: Literal["uniformity"] = "uniformity"
    t: float = bounded(POSITIVE, 2.0)  # log of the mean of exp(-t distance^2)


@dataclass(frozen=True, kw_only=True)
class CrossUniformity(Pairs):
    """Uniformity between images and others' texts (2405.18570). Alone it drives them apart: use it with the other two."""

    kind: Literal["cross_uniformity"] = "cross_uniformity"
    temperature: float | None = bounded(UNUSED, None)  # must be None
    t: float = bounded(POSITIVE, 2.0)  # log of the mean of exp(-t distance^2)


@dataclass(frozen=True, kw_only=True)
class Alignment(Pairs):
    """Mean squared distance within the pairs (2005.10242)."""

    kind: Literal["alignment"] = "alignment"
    temperature: float | None = bounded(UNUSED, None)  # must be None


@dataclass(frozen=True, kw_only=True)
class Caption(Term):
    """CoCa's captioning loss (2205.01917): -log p of a caption's tokens given the image, mean over the global batch's."""

    kind: Literal["caption"] = "caption"
    weight: float = 2.0  # factor on the term in the sum; 2 beside a Softmax of weight 1, as open_clip has it

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        remedy = f"{name} is a captioning loss: set it, as to Decoder.coca('B')"
        require(model.decoder is not None, "model.decoder", None, remedy)


@dataclass(frozen=True, kw_only=True)
class Classify(Term):
    """Classification into model.classes by data.labels: a softmax (MOFI, 2306.07952), or MLCD's two logarithms (2407.17331)."""

    kind: Literal["classify"] = "classify"
    loss: Literal["softmax", "mlcd"] = "softmax"  # log(1 + sum exp(s_n - s_p)), or log(1 + sum exp s_n) + log(1 + sum exp -s_p)
    scale: float = bounded(POSITIVE, 16.0)  # fixed, of the cosines
    sampled: float = bounded(POSITIVE_SHARE, 1.0)  # share of the classes that are negatives, drawn anew at each step (MLCD: 0.1)
    side: Literal["image", "text"] = "image"  # what is classified: all views, or all captions
    head: str | None = None  # name of a head whose vectors are classified; None: the embeddings

    @property
    def draws(self) -> bool:
        return self.sampled < 1

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        require(data.labels is not None, "data.labels", None, f"{name} needs them: set own, or a file of `clipjax cluster`")
        widths = {None: model.embed_dim} | {head.name: head.width for head in model.heads if self.side in head.sides}
        require(self.head in widths, f"{name}.head", self.head, f"must name one of model.heads that has {self.side}")
        remedy = f"{name} needs them: set it, as to Classes(count=1000, width={widths[self.head]})"
        fits = model.class_shape is not None and model.class_shape[1] == widths[self.head]
        require(fits, "model.classes", model.classes, remedy)


Term.include(
    *(Softmax, Sigmoid, Decoupled, HardNegative, MultiPositive, Cwcl, Cyclip, Distillation, Preserve),
    *(Sogclr, Isogclr, Uniformity, CrossUniformity, Alignment, Caption),
    *(Repulsion, MannWhitney, MultiSimilarity, Mixup, Symile, MultiView, Barlow, Siamese, Swap, Classify),
)

# The contrastive-gap paper's losses (2405.18570). It holds the temperature at 0.01: model.init_scale = 100 and a rule that
# freezes log_scale do that.
CUA = (Softmax(), Uniformity(), Alignment())
CUAXU = (*CUA, CrossUniformity())


def check_objective(terms: tuple[Term, ...], model: Model, data: Data) -> None:
    """Raises ConfigError for an impossible value in a term, and for a term that the model or the data can't serve."""
    require(len(terms) > 0, "objective", terms, "needs at least one term")
    weights = tuple(term.weight for term in terms)
    require(any(weights), "objective", weights, "these are the weights: one at least must not be 0")
    remembering = [i for i, term in enumerate(terms) if isinstance(term, Remembering)]
    require(len(remembering) < 2, "objective", remembering, "several of its terms remember every example: keep one")
    for i, term in enumerate(terms):
        name = f"objective.{i}"
        term.require_member(name)
        term.check(name, model, data)
        if term.implementation is not None and term.implementation.check is not None:
            term.implementation.check(term, name, model, data)


def check_teacher(terms: tuple[Term, ...], model: Model, width: int) -> None:
    """Raises ConfigError where a term compares the embeddings with a teacher's of another width."""
    wanted = any(isinstance(term, Preserve) and term.weight for term in terms)
    remedy = f"its vectors must have the width of the model's, {model.embed_dim}: Preserve compares them number by number"
    require(not wanted or width == model.embed_dim, "data.teacher", width, remedy)
