"""What benchmarks/methods.py trains and compares: a small `emoji_clip` and what each method changes in it.

All runs have the data, the batch and the 240 steps of `emoji_clip`, and an eighth of its FLOPs: towers of half its width and
depth, so that all methods and seeds can be trained on two cores.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import method_data
import method_measures
import numpy as np

from clipjax import config as c
from clipjax.config.load import load_config
from clipjax.data.sets.emoji import LANGUAGES

STEPS = 240
SHAPE = dict(width=96, heads=3, mlp_dim=384, embed_dim=96)
TONES = "(medium-light|medium-dark|light|medium|dark) skin tone"
WEAK = dict(crop=0.8, aspect=1.1)  # of `emoji_clip`
STRONG = dict(crop=0.4, aspect=1.3, brightness=0.4, contrast=0.4, jitter=0.8, blur=0.3)  # names tell colours and directions


Fields = dict[str, Any] | None


@dataclass(frozen=True)
class Trained:
    """A run that can be trained."""

    title: str  # a column's
    config: Callable[[Path], c.Run]  # from the folder of all files and workdirs of its seed
    prepare: Callable[[Path], Any] = field(default=lambda files: None)  # makes the files that it reads
    after: tuple[str, ...] = ()  # the runs that it needs, of the same seed
    measure: Callable[[Path], Iterable[dict[str, Any]]] = field(default=lambda files: ())  # further lines of metrics.jsonl


def evals(files: Path, more: tuple[str, ...] = ()) -> tuple[c.TrainingEvaluation, ...]:
    """At the end of every run, and those of `more`: in the search by an image, emoji that differ in skin tone are the same."""
    common = dict(data="emoji", every=STEPS)
    others = dict(
        choice=c.Choice(**common),
        same=c.Instance(data=f"tsv:{files}/bases/test.tsv", every=STEPS),
        knn=c.Probe(**common, methods=("knn",), label_pattern=TONES),
        train=c.Geometry(data="emoji", split="train", every=STEPS),
    )
    plain = c.Retrieval(**common), c.Zeroshot(**common, templates="plain"), c.Geometry(**common)
    return (*plain, *(others[name] for name in more))


def clip(files: Path, *objective: c.Term, more: tuple[str, ...] = (), data: Fields = None, model: Fields = None) -> c.Run:
    """The plain run with another objective and other fields, and the evaluations that tables are made of."""
    run = load_config("emoji_clip")
    towers = dict(image=replace(run.model.image, depth=3, **SHAPE), text=replace(run.model.text, depth=2, **SHAPE), unroll=3)
    return replace(
        run,
        data=replace(run.data, **(data or {})),
        model=replace(run.model, **towers, **(model or {})),
        objective=objective or run.objective,
        optim=replace(run.optim, lr=2e-3),
        train=replace(run.train, steps=STEPS, checkpoint_every=STEPS),
        evals=evals(files, more),
    )


def held(files: Path, *objective: c.Term) -> c.Run:
    """The contrastive gap's setting (2405.18570): the temperature is held at .01."""
    run = clip(files, *objective, more=("train",), model=dict(init_scale=100.0))
    still = c.Rule(pattern="log_scale", lr=0.0)
    return replace(run, optim=replace(run.optim, rules=(still, *run.optim.rules)))


def thinned(files: Path, *objective: c.Term) -> c.Run:
    return clip(files, *objective, data=dict(spec=f"tsv:{files}/thinned/train.tsv", split="train"))


def of_halves(files: Path, *objective: c.Term, **model: Any) -> c.Run:
    spec = f"tsv:{files}/halves/train.tsv"
    return clip(files, *objective, data=dict(spec=spec, split="train", captions=(0, 1)), model=model)


def disrupted(files: Path) -> c.Run:
    data = dict(spec=f"tsv:{files}/disrupted/train.tsv", split="train", captions=(0, 1))
    return clip(files, c.Softmax(negatives="captions"), more=("choice",), data=data)


def views(files: Path, *terms: c.Term, strong: int, heads: tuple[Any, ...] = ()) -> c.Run:
    """A weak view and strong ones, and as many changed captions as strong views."""
    seen = (c.View(**WEAK, name="weak"), *(c.View(**STRONG, name="strong") for _ in range(strong)))
    data = dict(augment=c.Augment(), views=seen, text_augment=c.TextAugment(delete=0.2, swap=0.1, count=strong))
    return clip(files, *terms, data=data, model=dict(heads=heads))


def rocket(files: Path, more: str | None = None, weight: float = 1.0) -> c.Run:
    """clip-rocket's recipe with one strong view and one changed caption, and one of its baselines beside it."""
    count = 2 if more == "Swap" else 1  # whose targets are another pair's
    of_head = dict(head="local", images=(1, 2)[:count], texts=(1, 2)[:count])
    plain = c.Softmax(weight=1 / 3, images=(0,), texts=(0,))
    terms = plain, c.Softmax(weight=2 / 3, label_smoothing=0.1, **of_head)
    if more is not None:
        terms = *terms, getattr(c, more)(weight=weight, **of_head)
    head = c.Head(name="local", depth=3, hidden=384, width=96, scale=10.0, predictor=more == "Siamese")
    return views(files, *terms, strong=count, heads=(head,))


def embed_and_cluster(files: Path, classes: int, nearest: int) -> None:
    """Clusters of the plain run's pictures."""
    vectors, out = files / "clip.npz", files / f"clusters{classes}.npz"
    if not vectors.exists():
        _clipjax("embed", files / "clip", "--data", "emoji", "--split", "train", "--out", vectors)
    if not out.exists():
        _clipjax("cluster", vectors, "--classes", classes, "--nearest", nearest, "--out", out)


def clustered(files: Path, *objective: c.Term, classes: int, matrix: bool = False) -> c.Run:
    model = dict(classes=c.Classes(count=classes)) if matrix else {}
    labels = dict(labels=f"{files}/clusters{classes}.npz")
    return clip(files, *objective, more=("same", "knn"), data=labels, model=model)


def labels_of(file: Path) -> int:
    with np.load(file) as labels:
        return int(labels["label"].max()) + 1


def of_bases(files: Path) -> c.Run:
    """A class for each emoji without its skin tone."""
    file = files / "bases.npz"
    classes = dict(classes=c.Classes(count=labels_of(file)))
    return clip(files, c.Softmax(), c.Classify(), more=("same", "knn"), data=dict(labels=str(file)), model=classes)


def of_words(files: Path) -> c.Run:
    """Soft targets: how many words of two names are the same."""
    file = files / "words.npz"
    soft = c.Distillation(targets="labels", classes=labels_of(file), teacher_scale=10.0)
    return clip(files, c.Softmax(), soft, more=("same", "knn"), data=dict(labels=str(file)))


def heads(files: Path, names: tuple[str, ...]) -> c.Run:
    made = tuple(c.Head(name=name, hidden=384, width=96, scale=1 / 0.07) for name in names)
    return clip(files, c.Softmax(weight=0.5), c.Softmax(weight=0.5, head=names), model=dict(heads=made))


def languages(files: Path, places: tuple[int, ...]) -> c.Run:
    """English, Japanese and Chinese names, as captions in places, or one of them."""
    run = clip(
        files, c.Softmax(sides="all" if len(places) > 1 else "image-text"), data=dict(text_field="captions", captions=places)
    )
    found = (c.Retrieval(data="emoji", every=STEPS, text_field="captions", languages=LANGUAGES),)
    return replace(run, model=replace(run.model, text=replace(run.model.text, length=24, vocab_size=4000)), evals=found)


def _clipjax(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "clipjax.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


RUNS = {
    "clip": Trained("CLIP", lambda files: clip(files, more=("choice", "same", "knn"))),
    "gap_clip": Trained("CLIP", held),
    "gap_cua": Trained("CUA", lambda files: held(files, *c.CUA)),
    "gap_cuaxu": Trained("CUAXU", lambda files: held(files, *c.CUAXU)),
    "cacr": Trained("CACR", lambda files: clip(files, c.Repulsion())),
    "thin_clip": Trained("CLIP, thinned", thinned, lambda files: method_data.write_thinned(files / "thinned")),
    "thin_cacr": Trained(
        "CACR, thinned",
        lambda files: thinned(files, c.Repulsion()),
        lambda files: method_data.write_thinned(files / "thinned"),
    ),
    "mann_whitney": Trained("Mann-Whitney", lambda files: clip(files, c.MannWhitney())),
    "mixup": Trained("CLIP + M3CoL", lambda files: clip(files, c.Softmax(), c.Mixup(weight=0.1))),
    "negative_captions": Trained("negative captions", disrupted, lambda files: method_data.write_disrupted(files / "disrupted")),
    "rocket": Trained("recipe", rocket),
    "rocket_barlow": Trained("recipe + Barlow", lambda files: rocket(files, "Barlow")),
    "rocket_siamese": Trained("recipe + Siamese", lambda files: rocket(files, "Siamese")),
    "rocket_swap": Trained("recipe + Swap", lambda files: rocket(files, "Swap", 0.2)),
    "pairs_halves": Trained(
        "sum over pairs",
        lambda files: of_halves(files, c.Softmax(sides="all")),
        lambda files: method_data.write_halves(files / "halves"),
        measure=lambda files: method_measures.of_halves(files / "pairs_halves"),
    ),
    "symile_halves": Trained(
        "Symile",
        lambda files: of_halves(files, c.Symile(), init_scale=300.0, max_scale=None),
        lambda files: method_data.write_halves(files / "halves"),
        measure=lambda files: method_measures.of_halves(files / "symile_halves"),
    ),
    "mcl": Trained(
        "second stage",
        lambda files: clustered(files, c.Softmax(negatives="same"), classes=10),
        lambda files: embed_and_cluster(files, 10, 1),
        after=("clip",),
        measure=lambda files: method_measures.of_stages(files / "clip", files / "mcl", files / "clusters10.npz"),
    ),
    "mlcd": Trained(
        "MLCD, images alone",
        lambda files: clustered(files, c.Classify(loss="mlcd"), classes=256, matrix=True),
        lambda files: embed_and_cluster(files, 256, 4),
        after=("clip",),
    ),
    "mofi": Trained("CLIP + entities", of_bases, lambda files: method_data.write_base_labels(files / "bases.npz")),
    "soft_labels": Trained("CLIP + soft labels", of_words, lambda files: method_data.write_word_labels(files / "words.npz")),
    "multi_similarity": Trained("Multi-Similarity", lambda files: clip(files, c.MultiSimilarity())),
    "metrix": Trained("with mixtures", lambda files: clip(files, c.MultiSimilarity(mix=0.4))),
    "pairs_views": Trained("sum over pairs", lambda files: views(files, c.Softmax(sides="all"), strong=1)),
    "mv_infonce": Trained("MV-InfoNCE", lambda files: views(files, c.MultiView(form="infonce", sides="all"), strong=1)),
    "mv_dhel": Trained("MV-DHEL", lambda files: views(files, c.MultiView(sides="all"), strong=1)),
    "prototypes": Trained(
        "CLIP + SwAV",
        lambda files: clip(
            files, c.Softmax(), c.Swap(prototypes=True, temperature=0.1), model=dict(classes=c.Classes(count=256))
        ),
    ),
    "head": Trained(
        "a head alone",
        lambda files: clip(files, c.Softmax(head="top"), model=dict(heads=(c.Head(name="top", hidden=384, width=96),))),
        measure=lambda files: method_measures.of_features(files / "head", "top"),
    ),
    "one_head": Trained("one head", lambda files: heads(files, ("a",))),
    "three_heads": Trained("three heads", lambda files: heads(files, ("a", "b", "c"))),
    "en": Trained("English", lambda files: languages(files, (0,))),
    "ja": Trained("Japanese", lambda files: languages(files, (2,))),
    "zh": Trained("Chinese", lambda files: languages(files, (10,))),
    "en_ja_zh": Trained("all pairs", lambda files: languages(files, (0, 2, 10))),
}
