"""What benchmarks/methods.py trains and compares: `emoji_clip` and what each method changes in it.

All runs have the towers, the 240 steps of 256 examples and the learning rates of `emoji_clip`, unless they say otherwise.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipjax import config as c
from clipjax.config.load import load_config

STEPS = 240
EVALS = (
    c.Retrieval(every=STEPS),
    c.Zeroshot(every=STEPS, templates="plain"),
    c.Geometry(every=STEPS),
    c.Geometry(every=STEPS, split="train"),
)


@dataclass(frozen=True)
class Figure:
    """A row of a table: a metric of metrics.jsonl at the end."""

    title: str
    task: str | None  # None: of the training step
    metric: str
    dataset: str | None = None  # None: any
    form: str = ".3f"


@dataclass(frozen=True)
class Trained:
    """A run that can be trained."""

    title: str  # a column's
    config: Callable[[str], c.Run]  # from its workdir
    after: tuple[str, ...] = ()  # the runs that it starts from, of the same seed
    prepare: Callable[[Path, int], Any] = field(default=lambda runs, seed: None)  # makes the files that it reads
    measure: Callable[[Path], Iterable[dict[str, Any]]] = field(default=lambda workdir: ())  # further lines of metrics.jsonl


@dataclass(frozen=True)
class Experiment:
    """What a table compares."""

    question: str
    runs: tuple[str, ...]
    figures: tuple[Figure, ...]


TO_IMAGE = Figure("text to image, R@1", "zeroshot_retrieval", "image_retrieval_recall@1")
TO_TEXT = Figure("image to text, R@1", "zeroshot_retrieval", "text_retrieval_recall@1")
AUC = Figure("AUC of own against other pairs", "zeroshot_retrieval", "pair_auc", form=".4f")
ACC1 = Figure("zero-shot acc1 among 3,789 names", "zeroshot_classification", "acc1")
ACC5 = Figure("zero-shot acc5", "zeroshot_classification", "acc5")
RANKME = Figure("RankMe of the images, held-out", "geometry", "rankme_image", "emoji/test", ".1f")
UNIFORMITY = Figure("uniformity of the images, held-out", "geometry", "uniformity_image", "emoji/test", ".2f")
ALIGNMENT = Figure("alignment, held-out", "geometry", "alignment", "emoji/test")
SEPARABLE = Figure("linear separability, held-out pairs", "geometry", "linear_separability", "emoji/test")
SEPARABLE_TRAIN = replace(SEPARABLE, title="linear separability, training pairs", dataset="emoji/train")
CENTROID = Figure("centroid distance, held-out pairs", "geometry", "centroid_distance", "emoji/test")
CENTROID_TRAIN = replace(CENTROID, title="centroid distance, training pairs", dataset="emoji/train")
USUAL = (TO_IMAGE, TO_TEXT, AUC, ACC1)


def clip(*objective: c.Term) -> c.Run:
    """`emoji_clip` with another objective, and the evaluations that tables are made of."""
    run = load_config("emoji_clip")
    return replace(run, objective=objective or run.objective, evals=EVALS)


def held(*objective: c.Term) -> c.Run:
    """The contrastive gap's setting (2405.18570): the temperature is held at .01."""
    run = clip(*objective)
    still = c.Rule("log_scale", lr=0.0)
    return replace(run, model=replace(run.model, init_scale=100.0), optim=replace(run.optim, rules=(still, *run.optim.rules)))


def trained(title: str, *objective: c.Term, make: Callable[..., c.Run] = clip) -> Trained:
    return Trained(title, lambda workdir: make(*objective))


RUNS = {
    "clip": trained("CLIP"),
    "gap_clip": trained("CLIP", make=held),
    "gap_cua": trained("CUA", *c.CUA, make=held),
    "gap_cuaxu": trained("CUAXU", *c.CUAXU, make=held),
}

EXPERIMENTS = {
    "baseline": Experiment("the plain run", ("clip",), (*USUAL, ACC5, UNIFORMITY, ALIGNMENT, RANKME)),
    "gap": Experiment(
        "do CUA and CUAXU close the gap at a temperature of .01?",
        ("gap_clip", "gap_cua", "gap_cuaxu"),
        (SEPARABLE_TRAIN, SEPARABLE, CENTROID_TRAIN, CENTROID, UNIFORMITY, RANKME, TO_IMAGE, TO_TEXT, ACC1, ACC5),
    ),
}
