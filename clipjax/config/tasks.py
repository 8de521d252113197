"""The evaluations beyond zero-shot classification, retrieval, geometry and captions. Each is a task of configs and of suites."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from clipjax.config.evals import TrainingEvaluation
from clipjax.config.fields import free, require

ProbeMethod = Literal["linear", "knn", "fewshot"]


@dataclass(frozen=True, kw_only=True)
class Probe(TrainingEvaluation):
    """Classifiers of image vectors, learned from the split `train` and tested on `split`."""

    task: ClassVar = "probe"
    metrics: ClassVar = ("linear_acc1", *(f"knn_acc1@{k}" for k in (10, 20, 100, 200)))
    kind: Literal["probe"] = "probe"
    train: str = free("train")  # the part of the dataset that classifiers learn from, as `data.split`
    methods: tuple[ProbeMethod, ...] = free(get_args(ProbeMethod))  # a linear probe, nearest neighbours, ridge from few examples
    features: Literal["embedding", "tower"] = free("embedding")  # `tower`: of the image tower before its projection
    label_pattern: str | None = free(None)  # a regular expression; the class is what it finds in the main caption

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.methods and set(self.methods) <= set(get_args(ProbeMethod))
        require(bool(known), self.named("methods"), self.methods, f"name some of {', '.join(get_args(ProbeMethod))}")


TrainingEvaluation.include()  # a class that evals/table.py has no row for is not named here yet
