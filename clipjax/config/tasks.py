"""The evaluations beyond zero-shot classification, retrieval, geometry and captions. Each is a task of configs and of suites."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar, Literal, get_args

from clipjax.config.data import Data, check_spec, dataset_name
from clipjax.config.evals import TrainingEvaluation
from clipjax.config.fields import NOT_NEGATIVE, free, require

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


@dataclass(frozen=True, kw_only=True)
class Transfer(TrainingEvaluation):
    """Classifiers that are learned from captions of the split `train` and tested on the images of `split`."""

    task: ClassVar = "transfer"
    metrics: ClassVar = ("acc1", "acc1_without_noise", "acc1_from_images")
    kind: Literal["transfer"] = "transfer"
    train: str = free("train")  # the part of the dataset whose captions are learned from, as `data.split`
    label_pattern: str | None = free(None)  # a regular expression; the class is what it finds in the main caption
    noise: float = free(1.0)  # the length of the noise that is added to captions' unit vectors

    def __post_init__(self) -> None:
        super().__post_init__()
        NOT_NEGATIVE.require(self.named("noise"), self.noise)


@dataclass(frozen=True, kw_only=True)
class Calibration(TrainingEvaluation):
    """Whether the probabilities of zero-shot classification are right as often as they say."""

    task: ClassVar = "calibration"
    kind: Literal["calibration"] = "calibration"
    templates: str | None = free(None)  # as of Zeroshot
    classnames: str | None = free(None)  # as of Zeroshot


@dataclass(frozen=True, kw_only=True)
class Choice(TrainingEvaluation):
    """Which caption is whose picture's: Winoground, SugarCrepe, ARO, WinoGAViL, or captions against disrupted copies."""

    task: ClassVar = "choice"
    metrics: ClassVar = ("text_score", "image_score", "group_score", "jaccard")
    kind: Literal["choice"] = "choice"
    questions: str | None = free(None)  # a file of questions on pictures of `data`; None: main captions against disrupted copies

    def dataset(self, own: Data) -> str:
        return with_questions(super().dataset(own), self.questions)


@dataclass(frozen=True, kw_only=True)
class Composed(TrainingEvaluation):
    """Retrieval of a picture by another picture and a text that says what changes."""

    task: ClassVar = "composed"
    metrics: ClassVar = tuple(f"recall@{k}" for k in (1, 2, 3, 5, 10))
    kind: Literal["composed"] = "composed"
    questions: str | None = free(None)  # a file of questions on pictures of `data`; None, for emoji: pictures without skin tone
    weight: float = free(0.5)  # of the text, whose vector is added to the picture's

    def __post_init__(self) -> None:
        super().__post_init__()
        NOT_NEGATIVE.require(self.named("weight"), self.weight)

    def dataset(self, own: Data) -> str:
        return with_questions(super().dataset(own), self.questions)


@dataclass(frozen=True, kw_only=True)
class Instance(TrainingEvaluation):
    """Retrieval of the other images of what an image shows. Those of one class show the same: the label, or the main caption."""

    task: ClassVar = "instance_retrieval"
    metrics: ClassVar = (*(f"recall@{k}" for k in (1, 5, 10)), "mean_average_precision")
    kind: Literal["instance"] = "instance"
    gallery: str | None = free(None)  # the SPEC of the images that are searched, read as `data`; None: the other images of `data`
    gallery_split: str | None = free(None)  # part of the gallery; None: as `split`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gallery is not None:
            check_spec(self.gallery, self.named("gallery"))

    def dataset(self, own: Data) -> str:
        name = super().dataset(own)
        return name if self.gallery is None else f"{name}+{dataset_name(self.gallery, self.gallery_split or self.split)}"


@dataclass(frozen=True, kw_only=True)
class RunSuite(TrainingEvaluation):
    """All sets of a suite, of which each gives its main figure. The suite says what it is evaluated on, and how."""

    task: ClassVar = "suite"
    kind: Literal["suite"] = "suite"
    suite: str = free("quick")  # the name of a suite, or a SUITE.py
    root: str | None = free(None)  # the folder of its sets; None: where the suite says

    def dataset(self, own: Data) -> str:
        return PurePath(self.suite).stem

    def check_data(self, own: Data, name: str) -> None:
        remedy = "leave it out: the suite names its sets"
        require(self.data is None, f"{name}.data", self.data, remedy)


def with_questions(dataset: str, questions: str | None) -> str:
    """The name of a dataset in results, with that of the file of questions on it: there may be several on one dataset."""
    return dataset if questions is None else f"{dataset}+{PurePath(questions).stem}"


TrainingEvaluation.include(Probe, Choice, Composed, Instance, Transfer, Calibration, RunSuite)
