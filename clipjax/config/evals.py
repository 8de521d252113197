"""The evaluations of a run during training."""

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from clipjax.config.data import Clean, Data, check_spec, dataset_name, has_splits
from clipjax.config.fields import ConfigError, free, require
from clipjax.config.unions import OpenUnion


@dataclass(frozen=True, kw_only=True)
class TrainingEvaluation(OpenUnion, run_field="evals"):
    """An evaluation that runs every `every` steps and at the end of training."""

    task: ClassVar[str]  # its name in metrics.jsonl
    metrics: ClassVar[tuple[str, ...]] = ()  # the metrics that train.best can name: of these, more is better

    data: str | None = free(None)  # a SPEC, as on the command line; None: the run's own data.spec, which must have splits
    split: str = free("test")  # part of the dataset, as `data.split`
    image_field: str | None = free(None)  # as `data.image_field`; None: the run's own, if it trains on this dataset
    text_field: str | None = free(None)  # as `data.text_field`; None: the run's own, if it trains on this dataset
    label_field: str | None = free(None)  # as `data.label_field`; None: the run's own, if it trains on this dataset
    clean: Clean | None = free(None)  # what is done to its texts, prompts too, as `tokenizer.clean`; None: as in training
    every: int = free(1000)  # steps between two evaluations

    def __post_init__(self) -> None:
        require(self.every > 0, self.named("every"), self.every, "must be positive")

    def spec(self, own: Data) -> str:
        """The SPEC of its dataset, in a run whose data is `own`."""
        return own.spec if self.data is None else self.data

    def dataset(self, own: Data) -> str:
        """What its dataset is called in results, in a run whose data is `own`."""
        return dataset_name(self.spec(own), self.split)

    def check_data(self, own: Data, name: str) -> None:
        """Raises ConfigError where it can't be on its dataset in a run whose data is `own`. `name`: its place, as evals.0."""
        of_run = self.data is None
        remedy = "the run trains on a mixture: name the examples to evaluate on"
        require(not of_run or not own.sources, f"{name}.data", None, remedy)
        check_spec(self.spec(own), f"{name}.data")
        remedy = f"the run's own {own.spec} has no splits: name other examples, as tsv:held_out.tsv, set data.split = train#0-95"
        remedy += f" and {name}.split = train#95-100, or leave the evaluation out (--evals none)"
        require(not of_run or has_splits(own.spec, self.split), f"{name}.data", None, remedy)

    @classmethod
    def register(cls, config: type[Self], implementation: Any, source: str) -> None:
        """As `OpenUnion.register`. Raises ConfigError also for a class without a task, and for one that is no evaluation."""
        name = config.__qualname__
        require(hasattr(config, "task"), "clipjax.register", name, 'needs `task: ClassVar = "NAME"`, its name in metrics.jsonl')
        works = all(callable(getattr(implementation, method, None)) for method in ("prepare", "run"))
        remedy = f"its class must derive from clipjax.evals.evaluation.Evaluation, and {implementation!r} has no prepare and run"
        require(works, "clipjax.register", name, remedy)
        super().register(config, implementation, source)


@dataclass(frozen=True, kw_only=True)
class Zeroshot(TrainingEvaluation):
    """Zero-shot classification."""

    task: ClassVar = "zeroshot_classification"
    metrics: ClassVar = (
        *("acc1", "acc5", "mean_per_class_recall", "macro_f1"),
        *("mean_average_precision", "acc_wg", "acc_top5_wg"),  # of sets with several labels an image, and with groups
    )
    kind: Literal["zeroshot"] = "zeroshot"
    templates: str | None = free(None)  # `simple`, `imagenet`, `plain`, a set's (`cars`), or a file; None: its own, or simple
    classnames: str | None = free(None)  # a set's as `imagenet-a`, or a file, one a line; None: the dataset's own, wnids as words


@dataclass(frozen=True, kw_only=True)
class Retrieval(TrainingEvaluation):
    """Image-text retrieval in both directions."""

    task: ClassVar = "zeroshot_retrieval"
    metrics: ClassVar = (*(f"{found}_retrieval_recall@{k}" for found in ("image", "text") for k in (1, 5, 10)), "pair_auc")
    kind: Literal["retrieval"] = "retrieval"
    languages: tuple[str, ...] = free(())  # of each image's captions, in order, which get recalls of their own; (): none named

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct = len(set(self.languages)) == len(self.languages) and all(self.languages)
        require(distinct, self.named("languages"), self.languages, "must name each once, as en,ja")


@dataclass(frozen=True, kw_only=True)
class Geometry(TrainingEvaluation):
    """The contrastive gap and related measures of the embeddings, with a plot each time."""

    task: ClassVar = "geometry"
    metrics: ClassVar = ("rankme_image", "rankme_text")  # of the other measures, more is not better
    kind: Literal["geometry"] = "geometry"


@dataclass(frozen=True, kw_only=True)
class Captioning(TrainingEvaluation):
    """The quality of generated captions, for a model with a decoder. Some images and their captions are shown each time."""

    task: ClassVar = "captioning"
    metrics: ClassVar = ("exact_match", "bleu", "chrf", "cider")  # not perplexity, of which less is better
    kind: Literal["captioning"] = "captioning"
    samples: int = free(8)  # images that are shown with their captions: in the log, as a PNG and in TensorBoard

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples >= 0, self.named("samples"), self.samples, "must not be negative; 0 shows none")


TrainingEvaluation.include(Zeroshot, Retrieval, Geometry, Captioning)


def check_best(best: str | None, evals: tuple[TrainingEvaluation, ...], data: Data) -> None:
    """Raises ConfigError unless exactly one evaluation gives the metric `best`. `data`: the run's own.

    `best` is `task/metric` or `task/dataset/metric`. The dataset is named as in metrics.jsonl (`dataset_name`).
    """
    given = Counter()
    for e in evals:
        given.update(f"{prefix}/{metric}" for prefix in (e.task, f"{e.task}/{e.dataset(data)}") for metric in e.metrics)
    if best is None or given[best] == 1:
        return
    wrong = "several evaluations give it" if given[best] else "no evaluation of this run gives it"
    nearest = difflib.get_close_matches(best, [name for name, n in given.items() if n == 1], 1, cutoff=0)
    remedy = f"the nearest is {nearest[0]}" if nearest else "evals needs one, on data and split of its own"
    raise ConfigError(f"train.best = {best!r}: {wrong}; {remedy}")
