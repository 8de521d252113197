"""The tables that benchmarks/methods.py prints: which runs an experiment compares, by which figures."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from method_runs import RUNS

RESULTS = Path(__file__).parent / "results" / "methods"


@dataclass(frozen=True)
class Figure:
    """A row of a table: a metric of metrics.jsonl at the end."""

    title: str
    task: str | None  # None: of the training step
    metric: str
    dataset: str | None = None  # None: any
    form: str = ".3f"


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
RANKME = Figure("RankMe of the images", "geometry", "rankme_image", "emoji/test", ".0f")
UNIFORMITY = Figure("uniformity of the images", "geometry", "uniformity_image", "emoji/test", ".2f")
ALIGNMENT = Figure("alignment", "geometry", "alignment", "emoji/test")
SEPARABLE = Figure("linear separability, held-out pairs", "geometry", "linear_separability", "emoji/test")
SEPARABLE_TRAIN = replace(SEPARABLE, title="linear separability, training pairs", dataset="emoji/train")
CENTROID = Figure("centroid distance, held-out pairs", "geometry", "centroid_distance", "emoji/test")
CENTROID_TRAIN = replace(CENTROID, title="centroid distance, training pairs", dataset="emoji/train")
SAME = Figure("mAP of the same emoji in other skin tones", "instance_retrieval", "mean_average_precision")
KNN = Figure("kNN of skin tones, k = 20", "probe", "knn_acc1@20")
DISRUPTIONS = ("shuffle_all_words", "shuffle_within_trigrams", "shuffle_trigrams", "replace_word")
USUAL = (TO_IMAGE, TO_TEXT, AUC, ACC1)
STAGES = tuple(
    Figure(f"text to image, R@1{where}, {stage}", "stages", f"recall@1{infix}_{stage}")
    for where, infix in (("", ""), (" within clusters", "_within_clusters"))
    for stage in ("first", "second", "both")
)
LANGUAGES = tuple(
    replace(one, title=f"{one.title}, {name}", metric=f"{one.metric}_{short}")
    for short, name in (("en", "English"), ("ja", "Japanese"), ("zh", "Chinese"))
    for one in (TO_IMAGE, TO_TEXT)
)

EXPERIMENTS = {
    "baseline": Experiment("the plain run", ("clip",), (*USUAL, ACC5, UNIFORMITY, ALIGNMENT, RANKME, SAME, KNN)),
    "gap": Experiment(
        "do CUA and CUAXU close the gap at a temperature of .01?",
        ("gap_clip", "gap_cua", "gap_cuaxu"),
        (SEPARABLE_TRAIN, SEPARABLE, CENTROID_TRAIN, CENTROID, UNIFORMITY, RANKME, TO_IMAGE, TO_TEXT, ACC1, ACC5),
    ),
    "cacr": Experiment(
        "does CACR train, and does it lose less where skin tones are thinned to one in eight?",
        ("clip", "cacr", "thin_clip", "thin_cacr"),
        (*USUAL, UNIFORMITY, ALIGNMENT, RANKME, SEPARABLE),
    ),
    "mann_whitney": Experiment("a higher AUC?", ("clip", "mann_whitney"), (*USUAL, UNIFORMITY, ALIGNMENT)),
    "mixup": Experiment("more of held-out combinations?", ("clip", "mixup"), (*USUAL, ALIGNMENT)),
    "negative_captions": Experiment(
        "does the model heed the order of words?",
        ("clip", "negative_captions"),
        (*USUAL, *(Figure(f"right against `{kind}`", "choice", f"text_score_{kind}") for kind in DISRUPTIONS)),
    ),
    "symile": Experiment(
        "a picture by the two halves of its name?",
        ("pairs_halves", "symile_halves"),
        tuple(Figure(f"R@1 by the {how}", "halves", f"recall@1_of_{how}") for how in ("noun", "sum", "product")),
    ),
    "rocket": Experiment(
        "is the recipe better, and do its baselines add to it?",
        ("clip", "rocket", "rocket_barlow", "rocket_siamese", "rocket_swap"),
        (*USUAL, RANKME),
    ),
    "mcl": Experiment("what does a second stage within ten clusters learn?", ("mcl",), (*STAGES, SAME, KNN)),
    "pairs": Experiment("are languages better together?", ("en", "ja", "zh", "en_ja_zh"), LANGUAGES),
    "multi_view": Experiment(
        "more dimensions than by a sum over pairs?",
        ("pairs_views", "mv_infonce", "mv_dhel"),
        (*USUAL, UNIFORMITY, ALIGNMENT, RANKME),
    ),
    "multi_similarity": Experiment(
        "a thresholded loss, and mixtures?", ("clip", "multi_similarity", "metrix"), (*USUAL, ALIGNMENT)
    ),
    "soft_labels": Experiment("words of the names as soft targets?", ("clip", "soft_labels"), (*USUAL, SAME, KNN)),
    "mlcd": Experiment("image vectors from clusters of a plain run?", ("clip", "mlcd"), (SAME, KNN, RANKME)),
    "mofi": Experiment("entities beside names?", ("clip", "mofi"), (*USUAL, SAME, KNN)),
    "prototypes": Experiment("balanced assignments to prototypes?", ("clip", "prototypes"), (*USUAL, RANKME)),
    "features": Experiment(
        "are features better before a head?",
        ("head",),
        tuple(
            Figure(f"{title} {where} the head", "features", f"{metric}_{where}", form=form)
            for title, metric, form in (
                ("kNN of skin tones, k = 20,", "knn_acc1@20", ".3f"),
                ("RankMe of the images", "rankme", ".0f"),
            )
            for where in ("before", "after")
        ),
    ),
    "amcl": Experiment("three heads or one?", ("clip", "one_head", "three_heads"), (*USUAL, RANKME)),
}


def found(figure: Figure, name: str, seed: int) -> float | None:
    """A figure of the end of a run; None where it has none."""
    value = None
    for line in (RESULTS / name / str(seed) / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if figure.task is None:
            value = entry.get(figure.metric, value)
        elif entry.get("task") == figure.task and figure.dataset in (None, entry["dataset"]):
            value = entry["metrics"].get(figure.metric, value)
    return value


def table(name: str) -> str:
    """Markdown: a row a figure, a column a run that is there, and in a cell its seeds in order."""
    experiment = EXPERIMENTS[name]
    kept = {run: sorted(int(path.name) for path in (RESULTS / run).glob("*")) for run in experiment.runs}
    seeds = {run: some for run, some in kept.items() if some}
    rows = ["| | " + " | ".join(RUNS[run].title for run in seeds) + " |", "| --- " * (len(seeds) + 1) + "|"]
    for figure in experiment.figures:
        values = [[found(figure, run, seed) for seed in some] for run, some in seeds.items()]
        cells = [", ".join("–" if value is None else f"{value:{figure.form}}" for value in one) for one in values]
        rows.append(f"| {figure.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
