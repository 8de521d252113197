"""What the classes of the objective's terms share: a weight, the vectors that a term takes, and what a class is bound to."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clipjax.config.data import Data
from clipjax.config.fields import NOT_NEGATIVE, POSITIVE, Range, bounded, check_bounds, require
from clipjax.config.model import Model
from clipjax.config.unions import OpenUnion

# bfloat16x3: float32 operands in three passes of bfloat16 (TPUs) or TF32 (GPUs); on CPUs it is float32.
Products = Literal["float32", "bfloat16x3", "bfloat16"]
UNUSED = Range(math.inf, -math.inf, "leave it out: this term has no temperature, but scales that are fields of its own, if any")
Prefixes = tuple[int, ...] | None  # widths whose losses add up (Matryoshka, 2205.13147); None: the full embedding alone


@dataclass(frozen=True, kw_only=True)
class Term(OpenUnion, run_field="objective"):
    """A term of the objective. A class that derives from it gives `kind` its value, and adds what its equation needs."""

    draws: ClassVar[bool] = False  # whether a class may take random numbers, from the key of the step
    kind: str
    weight: float = 1.0  # factor on the term in the sum; 0: the term is left out

    def check(self, name: str, model: Model, data: Data) -> None:
        """Raises ConfigError for an impossible value, or where the model or the data can't serve the term.

        `name`: the term's place in the run, as objective.0.
        """
        NOT_NEGATIVE.require(f"{name}.weight", self.weight)  # here, not by a bound: a class may give the weight another default
        check_bounds(self, name)


@dataclass(frozen=True)
class Binding:
    """What a term's class is bound to."""

    function: Callable[..., Any]  # (term, rows, scale, bias, axis) -> TermResult: see clipjax.losses.terms
    flops: Callable[..., float] | None = None  # (term, sizes) -> FLOPs of a step: see clipjax.losses.flops; None: not counted
    check: Callable[[Any, str, Model, Data], None] | None = None  # (term, name, model, data): as Term.check, after it


class Remembering(Term):
    """A term that remembers something of every training example (clipjax.train.memory). An objective can have one of them."""

    examples: int  # a field of each class
    gamma: float


@dataclass(frozen=True, kw_only=True)
class Pairs(Term):
    """A term of two sets of vectors, the mean over all pairs of a view and a caption, of two views, or of two captions."""

    # What it compares: each view with each caption; each two views; each two captions; or each two of all of these.
    sides: Literal["image-text", "image-image", "text-text", "all"] = "image-text"
    images: tuple[int, ...] | None = None  # places, from 0, of the views that take part; None: all
    texts: tuple[int, ...] | None = None  # the same of the captions
    head: str | tuple[str, ...] | None = None  # name of a head whose vectors it takes; of several: their mean; None: the model's
    temperature: float | None = bounded(POSITIVE, None)  # fixed; None: the learned one, of the head if it has its own

    @property
    def heads(self) -> tuple[str | None, ...]:
        """The names of its heads; None stands for the model's own projection."""
        return self.head if isinstance(self.head, tuple) else (self.head,)

    def pairs(self, views: int, captions: int) -> list[tuple[int, int]]:
        """What it takes the mean over, of so many views and captions an example: see `pairs_of`."""
        named = (self.images, views), (self.texts, captions)
        return pairs_of(self.sides, *(count if places is None else len(places) for places, count in named))

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        given = {"images": data.views_per_image, "texts": data.texts_per_image}
        for field, count in given.items():
            places = getattr(self, field)
            fits = places is None or (len(places) > 0 and len({*places}) == len(places) and {*places} <= {*range(count)})
            remedy = f"must be different places, from 0; the data have {count} of them, see data.views, captions and text_augment"
            require(fits, f"{name}.{field}", places, remedy)
        remedy = "takes two or more: see data.views, captions, captions_per_image and text_augment"
        require(len(self.pairs(*given.values())) > 0, f"{name}.sides", self.sides, remedy)
        sides = {"image-image": {"image"}, "text-text": {"text"}}.get(self.sides, {"image", "text"})
        known = {head.name for head in model.heads if sides <= {*head.sides}}
        remedy = f"must name model.heads that have {' and '.join(sorted(sides))}: {', '.join(sorted(known)) or 'there is none'}"
        require(self.head is None or (len(self.heads) > 0 and {*self.heads} <= known), f"{name}.head", self.head, remedy)


def pairs_of(sides: str, views: int, captions: int) -> list[tuple[int, int]]:
    """The pairs that `Pairs.sides` means, of the numbers of all views and then of all captions."""
    images, texts = [*range(views)], [*range(views, views + captions)]
    if sides == "image-text":
        return [*itertools.product(images, texts)]
    return [*itertools.combinations({"image-image": images, "text-text": texts, "all": images + texts}[sides], 2)]


class Nested(Pairs):
    """A term that can be the sum over several prefixes of the embeddings (Matryoshka, 2205.13147)."""

    prefixes: Prefixes  # each class has it as its last field

    def check(self, name: str, model: Model, data: Data) -> None:
        super().check(name, model, data)
        widths = self.prefixes
        if widths is None:
            return
        ascending = len(widths) > 0 and widths[0] > 0 and all(a < b for a, b in itertools.pairwise(widths))
        remedy = f"must be one or more widths in ascending order, the last at most the embedding's {model.embed_dim}"
        require(ascending and max(widths) <= model.embed_dim, f"{name}.prefixes", widths, remedy)
        require(self.head is None, f"{name}.head", self.head, "prefixes are of the model's own embeddings: leave one of them out")
