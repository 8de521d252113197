"""The objective's part of a configuration: weighted terms that add up. Their equations are in clipjax.losses."""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from clipjax.config.data import Data
from clipjax.config.fields import TAGGED, Strict, require
from clipjax.config.model import Model

Prefixes = tuple[int, ...] | None  # widths whose losses add up (Matryoshka, 2205.13147); None: the whole embedding alone


@dataclass(frozen=True, kw_only=True)
class Softmax(Strict):
    """CLIP's symmetric softmax loss over the global batch (2103.00020)."""

    kind: Literal["softmax"] = "softmax"
    weight: float = 1.0
    image_weight: float = 0.5  # share of the direction picture -> text (ConVIRT, 2010.00747: 0.75)
    label_smoothing: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"  # of the two directions; ALIGN (2102.05918) takes the sum, and smooths by 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the operands of its products, whose sums are float32
    prefixes: Prefixes = None


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Strict):
    """SigLIP's pairwise sigmoid loss over the global batch (2303.15343)."""

    kind: Literal["sigmoid"] = "sigmoid"
    weight: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the operands of its products, whose sums are float32
    prefixes: Prefixes = None


@dataclass(frozen=True, kw_only=True)
class Decoupled(Strict):
    """DCL, the softmax loss without the own pair in its denominator, and weighted by it DCLW (2110.06848)."""

    kind: Literal["decoupled"] = "decoupled"
    weight: float = 1.0
    sigma: float | None = None  # temperature of the own pairs' weights (0.5 in the paper); None: no weights
    stop_gradient: bool = False  # to those weights
    prefixes: Prefixes = None


@dataclass(frozen=True, kw_only=True)
class HardNegative(Strict):
    """HN-NCE: negatives weighted by their hardness (2301.02280)."""

    kind: Literal["hard_negative"] = "hard_negative"
    weight: float = 1.0
    alpha: float = 1.0  # of the own pair in the denominator; 0: decoupled
    beta: float = 0.25  # sharpness of the weights; 0: all alike
    stop_gradient: bool = False  # to the weights
    prefixes: Prefixes = None


@dataclass(frozen=True, kw_only=True)
class MultiPositive(Strict):
    """Softmax loss towards all texts (pictures) of the same id alike: several captions a picture, or equal ones in a batch."""

    kind: Literal["multi_positive"] = "multi_positive"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cwcl(Strict):
    """CWCL: targets by the similarities within the frozen tower (2309.14580). Freeze that tower by optim.rules."""

    kind: Literal["cwcl"] = "cwcl"
    weight: float = 1.0
    frozen: Literal["image", "text"] = "image"


@dataclass(frozen=True, kw_only=True)
class Cyclip(Strict):
    """CyCLIP's consistency of the cosines within and across the modalities (2205.14459), each B times a mean square."""

    kind: Literal["cyclip"] = "cyclip"
    weight: float = 1.0
    in_modal: float = 0.25
    cross_modal: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Distillation(Strict):
    """Soft targets from a teacher's embeddings of the same data, which data.teacher names."""

    kind: Literal["distillation"] = "distillation"
    weight: float = 1.0
    teacher_scale: float = 100.0  # the teacher's own logit scale


@dataclass(frozen=True, kw_only=True)
class Sogclr(Strict):
    """SogCLR: every example remembers a moving average over its negatives (2202.12387), at the model's scale, held constant."""

    kind: Literal["sogclr"] = "sogclr"
    weight: float = 1.0
    examples: int  # in the training data: how many are remembered
    gamma: float = 0.9  # share of the present batch in the average; 1: no memory


@dataclass(frozen=True, kw_only=True)
class Isogclr(Strict):
    """iSogCLR: SogCLR where every picture and every text also learns a temperature of its own (2305.11965)."""

    kind: Literal["isogclr"] = "isogclr"
    weight: float = 1.0
    examples: int  # in the training data: how many are remembered
    gamma: float = 0.8
    rho: float = 6.0  # price of a high temperature
    temperature: float = 0.01  # at the start
    temperature_lr: float = 0.03
    temperature_momentum: float = 0.9
    min_temperature: float = 0.005
    max_temperature: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Uniformity(Strict):
    """Mean of the uniformity of the pictures and that of the texts (2005.10242)."""

    kind: Literal["uniformity"] = "uniformity"
    weight: float = 1.0
    t: float = 2.0  # log of the mean of exp(-t distance^2)


@dataclass(frozen=True, kw_only=True)
class CrossUniformity(Strict):
    """Uniformity between pictures and others' texts (2405.18570). Alone it drives the towers apart: use it beside the others."""

    kind: Literal["cross_uniformity"] = "cross_uniformity"
    weight: float = 1.0
    t: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Alignment(Strict):
    """Mean squared distance within the pairs (2005.10242)."""

    kind: Literal["alignment"] = "alignment"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Caption(Strict):
    """CoCa's captioning loss (2205.01917): -log p of a caption's tokens given the picture, mean over the global batch's."""

    kind: Literal["caption"] = "caption"
    weight: float = 2.0  # beside a Softmax of weight 1, as open_clip has it


Term = Annotated[
    Softmax | Sigmoid | Decoupled | HardNegative | MultiPositive | Cwcl | Cyclip | Distillation
    | Sogclr | Isogclr | Uniformity | CrossUniformity | Alignment | Caption,
    TAGGED,
]  # fmt: skip

# The contrastive-gap paper's losses (2405.18570). It holds the temperature at 0.01: model.init_scale = 100 and a rule that
# freezes log_scale do that.
CUA = (Softmax(), Uniformity(), Alignment())
CUAXU = (*CUA, CrossUniformity())

_NOT_NEGATIVE = (0.0, math.inf, "must not be negative, nor infinite")
_POSITIVE = (math.ulp(0.0), math.inf, "must be positive and finite")
_RANGES = {  # field -> from, up to but without, and how that is said
    **dict.fromkeys(("weight", "alpha", "beta", "in_modal", "cross_modal", "rho", "temperature_lr"), _NOT_NEGATIVE),
    **dict.fromkeys(("sigma", "t", "teacher_scale", "min_temperature", "max_temperature"), _POSITIVE),
    "examples": (1, math.inf, "must be positive"),
    "gamma": (math.ulp(0.0), math.nextafter(1.0, 2.0), "must lie in (0, 1]"),
    "temperature_momentum": (0.0, 1.0, "must lie in [0, 1)"),
    "image_weight": (0.0, math.nextafter(1.0, 2.0), "must lie in [0, 1]"),
    "label_smoothing": (0.0, 1.0, "must lie in [0, 1)"),
}


def check_objective(terms: tuple[Term, ...], model: Model, data: Data) -> None:
    """Raises ConfigError for an impossible value in a term, and for a term that the model or the data can't serve."""
    require(len(terms) > 0, "objective", terms, "needs at least one term")
    weights = tuple(term.weight for term in terms)
    require(any(weights), "objective", weights, "these are the weights: one at least must not be 0")
    remembering = [i for i, term in enumerate(terms) if isinstance(term, Sogclr | Isogclr)]
    require(len(remembering) < 2, "objective", remembering, "several of its terms remember every example: keep one")
    for i, term in enumerate(terms):
        for name, (low, high, remedy) in _RANGES.items():
            value = getattr(term, name, None)
            require(value is None or low <= value < high, f"objective.{i}.{name}", value, remedy)
        if isinstance(term, Isogclr):
            inside = term.min_temperature <= term.temperature <= term.max_temperature
            remedy = f"must lie between min_temperature = {term.min_temperature} and max_temperature = {term.max_temperature}"
            require(inside, f"objective.{i}.temperature", term.temperature, remedy)
        widths = getattr(term, "prefixes", None)
        if widths is not None:
            nested = len(widths) > 0 and widths[0] > 0 and all(a < b for a, b in itertools.pairwise(widths))
            fit = nested and widths[-1] <= model.embed_dim
            remedy = f"must be one or more widths in ascending order, the last at most the embedding's {model.embed_dim}"
            require(fit, f"objective.{i}.prefixes", widths, remedy)
        biased = not isinstance(term, Sigmoid) or model.init_bias is not None
        require(biased, "model.init_bias", None, f"objective.{i} is a sigmoid loss: set it, for example to -10")
        several = not isinstance(term, MultiPositive) or data.captions_per_image > 1 or data.ids is not None
        remedy = f"objective.{i} needs several captions a picture: set it to 2 or more, or data.ids to caption"
        require(several, "data.captions_per_image", data.captions_per_image, remedy)
        writes = not isinstance(term, Caption) or model.decoder is not None
        require(writes, "model.decoder", None, f"objective.{i} is a captioning loss: set it, as to Decoder.coca('B')")
        taught = not isinstance(term, Distillation) or data.teacher is not None
        require(taught, "data.teacher", None, f"objective.{i} needs an .npz that `clipjax embed` wrote of these examples")
