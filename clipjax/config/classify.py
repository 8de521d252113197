"""Terms that compare embeddings with model.classes. Their equations: clipjax.losses.classify."""

from dataclasses import dataclass
from typing import Literal

from clipjax.config.data import Data
from clipjax.config.fields import POSITIVE, POSITIVE_SHARE, bounded, require
from clipjax.config.model import Model
from clipjax.config.term import Term


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
        require(model.class_shape is not None, "model.classes", None, f"{name} needs them: set it, as to Classes(count=1000)")
        require(data.labels is not None, "data.labels", None, f"{name} needs them: set own, or a file of `clipjax cluster`")
        widths = {None: model.embed_dim} | {head.name: head.width for head in model.heads if self.side in head.sides}
        known = ", ".join(str(head) for head in widths if head) or "there is none"
        require(self.head in widths, f"{name}.head", self.head, f"must name one of model.heads that has {self.side}: {known}")
        width, remedy = widths[self.head], f"{name} compares them with vectors of {widths[self.head]} numbers: set it to that"
        require(model.class_shape is None or model.class_shape[1] == width, "model.classes.width", model.class_shape, remedy)
