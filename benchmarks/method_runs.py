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

from clipjax import config as c
from clipjax.config.load import load_config

STEPS = 240
SHAPE = dict(width=96, heads=3, mlp_dim=384, embed_dim=96)
TONES = "(medium-light|medium-dark|light|medium|dark) skin tone"
WEAK = dict(crop=0.8, aspect=1.1)  # of `emoji_clip`
STRONG = dict(crop=0.4, aspect=1.3, brightness=0.4, contrast=0.4, jitter=0.8, blur=0.3)  # names tell colours and directions


@dataclass(frozen=True)
class Trained:
    """A run that can be trained."""

    title: str  # a column's
    config: Callable[[Path], c.Run]  # from the folder of all files and workdirs of its seed
    prepare: Callable[[Path], Any] = field(default=lambda files: None)  # makes the files that it reads
    after: tuple[str, ...] = ()  # the runs that it needs, of the same seed
    measure: Callable[[Path], Iterable[dict[str, Any]]] = field(default=lambda files: ())  # further lines of metrics.jsonl


def evals(files: Path) -> tuple[c.TrainingEvaluation, ...]:
    """At the end of every run. Equal names of emoji without skin tone are the same thing in the search by an image."""
    common = dict(data="emoji", every=STEPS)
    return (
        c.Retrieval(**common),
        c.Zeroshot(**common, templates="plain"),
        c.Geometry(**common),
        c.Choice(**common),
        c.Instance(data=f"tsv:{files}/bases/test.tsv", every=STEPS),
        c.Probe(**common, methods=("knn",), label_pattern=TONES),
    )


def clip(files: Path, *objective: c.Term, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> c.Run:
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
        evals=evals(files),
    )


def held(files: Path, *objective: c.Term) -> c.Run:
    """The contrastive gap's setting (2405.18570): the temperature is held at .01."""
    run = clip(files, *objective, model=dict(init_scale=100.0))
    still = c.Rule("log_scale", lr=0.0)
    more = (*run.evals, c.Geometry(data="emoji", split="train", every=STEPS))
    return replace(run, optim=replace(run.optim, rules=(still, *run.optim.rules)), evals=more)


def thinned(files: Path, *objective: c.Term) -> c.Run:
    return clip(files, *objective, data=dict(spec=f"tsv:{files}/thinned/train.tsv", split="train"))


def of_halves(files: Path, *objective: c.Term, **model: Any) -> c.Run:
    spec = f"tsv:{files}/halves/train.tsv"
    return clip(files, *objective, data=dict(spec=spec, split="train", captions=(0, 1)), model=model)


def disrupted(files: Path) -> c.Run:
    data = dict(spec=f"tsv:{files}/disrupted/train.tsv", split="train", captions=(0, 1))
    return clip(files, c.Softmax(negatives="captions"), data=data)


def views(files: Path, *terms: c.Term, heads: tuple[Any, ...] = (), strong: int = 1) -> c.Run:
    """clip-rocket's recipe with one strong view and one changed caption, in place of two and two."""
    seen = (c.View(**WEAK, name="weak"), *(c.View(**STRONG, name="strong") for _ in range(strong)))
    data = dict(augment=c.Augment(), views=seen, text_augment=c.TextAugment(delete=0.2, swap=0.1, count=strong))
    return clip(files, *terms, data=data, model=dict(heads=heads))


def rocket(files: Path, *more: c.Term, predictor: bool = False) -> c.Run:
    plain = c.Softmax(weight=1 / 3, images=(0,), texts=(0,))
    local = c.Softmax(weight=2 / 3, head="local", label_smoothing=0.1, images=(1,), texts=(1,))
    head = c.Head(name="local", depth=3, hidden=512, width=128, scale=10.0, predictor=predictor)
    return views(files, plain, local, *more, heads=(head,))


def embed_and_cluster(files: Path, classes: int, nearest: int) -> None:
    """Clusters of the plain run's pictures."""
    out = files / f"clusters{classes}.npz"
    if not out.exists():
        words = ["embed", files / "clip", "--data", "emoji", "--split", "train", "--out", files / "clip.npz"]
        _clipjax(*words)
        _clipjax("cluster", files / "clip.npz", "--classes", classes, "--nearest", nearest, "--out", out)


def _clipjax(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "clipjax.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


RUNS = {
    "clip": Trained("CLIP", clip),
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
    "mixup": Trained("CLIP + M3Co", lambda files: clip(files, c.Softmax(), c.Mixup(weight=0.1))),
    "negative_captions": Trained("negative captions", disrupted, lambda files: method_data.write_disrupted(files / "disrupted")),
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
}
