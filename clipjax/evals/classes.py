"""The classes of a dataset: their names, and which of them each example is of."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Int

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data import reading
from clipjax.data.source import Source
from clipjax.evals.names.sets import ClassSet, class_sets, identified, no_word, suggestion
from clipjax.evals.prompts import classnames

SUBSETS = {"tfds:imagenet_a": "imagenet-a", "tfds:imagenet_r": "imagenet-r"}  # which TFDS labels among all 1,000 classes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """The names of a dataset's classes, and which of them each example is of."""

    names: tuple[str, ...]
    labels: Int[np.ndarray, " n"]  # of all examples, int32; -1: none
    keys: tuple[str, ...]  # of all examples
    source: str = ""  # where the names come from: a set, a file, or the dataset, for messages
    positive: Bool[np.ndarray, "n c"] | None = None  # of examples with several labels: which these are; None: they have one
    groups: Int[np.ndarray, " n"] | None = None  # of all examples; -1: none; None: the dataset has no groups


@dataclass(frozen=True)
class Naming:
    """What the labels of a dataset are called."""

    names: tuple[str, ...]
    classes: Int[np.ndarray, " stored"]  # the class of each stored label, int32; -1: it is left out
    source: str  # where the names come from, for messages


def classes_of(source: Source, wanted: str | None) -> Classes:
    """The classes of a dataset, named by a set of `names.sets`, by the lines of a file, or by the dataset itself.

    Names that are the ids of a known set, as ImageNet's wnids, become its words; TFDS's ImageNet-A and -R have the 200 classes
    that occur there. In a dataset without labels, an example's class is the one whose name is its main caption. Examples
    without a label are counted in a warning. Raises ConfigError where there are no names, where they are numbers, paths or ids,
    where there are fewer than the dataset has, and where no example has a label.
    """
    naming = _naming(source, wanted)
    if source.multilabel:
        return _several(source, naming, wanted)
    records = [(r.label, r.captions[:1], r.key, r.group) for r in reading.texts(source, quiet=jax.process_index() > 0)]
    keys = tuple(key for *_, key, _ in records)
    stored = np.array([label for label, *_ in records], np.int32)
    groups = np.array([-1 if group is None else group for *_, group in records], np.int64)
    highest = stored.max(initial=-1)
    if highest < 0 and source.classnames is None:
        captions = [main[0] if main else None for _, main, *_ in records]
        return Classes(naming.names, _by_caption(source, naming, captions), keys, naming.source)
    _require_names(source, naming, wanted, highest)
    labels = np.where(stored < 0, np.int32(-1), naming.classes[stored])
    _tell_missing(source, naming, stored, labels)
    return Classes(naming.names, labels, keys, naming.source, groups=groups if (groups >= 0).any() else None)


def _several(source: Source, naming: Naming, wanted: str | None) -> Classes:
    """The classes of a dataset with several labels an example. One without any is of no class."""
    records = [(r.key, r.labels) for r in reading.texts(source, quiet=jax.process_index() > 0)]
    pairs = np.array([(i, label) for i, (_, labels) in enumerate(records) for label in labels], np.int32).reshape(-1, 2)
    _require_names(source, naming, wanted, pairs[:, 1].max(initial=-1))
    classes = naming.classes[pairs[:, 1]]
    remedy = "no example has a label: use a split with labels, or name their field (label_field; --label-field)"
    config.require(bool((classes >= 0).any()), "data.spec", source.name, remedy)
    positive = np.zeros((len(records), len(naming.names)), bool)
    positive[pairs[classes >= 0, 0], classes[classes >= 0]] = True
    none, keys = np.full(len(records), -1, np.int32), tuple(key for key, _ in records)
    return Classes(naming.names, none, keys, naming.source, positive)


def _require_names(source: Source, naming: Naming, wanted: str | None, highest: int) -> None:
    remedy = f"names {len(naming.classes)} classes, but {source.name} has labels up to {highest}: write one name a line"
    config.require(highest < len(naming.classes), "classnames", wanted, remedy)


def _naming(source: Source, wanted: str | None) -> Naming:
    own = source.classnames
    if wanted is None:
        if own is None:
            remedy = "give a set's name or a file with one name a line (classnames; --classnames)"
            raise ConfigError(f"classnames = None: {source.name} has none of its own: {remedy}")
        return _own_naming(source, own)
    known = class_sets().get(wanted)
    if known and own and identified(own) and known.ids:
        return _by_id(own, known)
    names = known.names if known else classnames(wanted)
    remedy = f"names {len(names)} classes, but {source.name} has {len(own or ())}: write one name a line, in the dataset's order"
    config.require(own is None or len(names) == len(own), "classnames", wanted, remedy)
    return Naming(names, np.arange(len(names), dtype=np.int32), wanted)


def _own_naming(source: Source, own: tuple[str, ...]) -> Naming:
    """The dataset's own names, or the words for them if they are ids."""
    if known := identified(own):
        spec = source.name.split("/")[0].split(":")
        subset = SUBSETS.get(":".join(spec[:2]))
        words = class_sets()[subset] if subset else _chosen(known, own)
        return _by_id(own, words)
    what = None if source.templates else no_word(own)  # CLIP_benchmark's MNIST: a photo of the number: "7".
    remedy = f"the classes of {source.name} are called {', '.join(own[:3])}, and {what} tells a text tower nothing: "
    remedy += "give a set's name or a file with one name a line (classnames; --classnames)" + suggestion(len(own))
    config.require(what is None, "classnames", None, remedy)
    return Naming(own, np.arange(len(own), dtype=np.int32), source.name)


def _chosen(known: ClassSet, own: tuple[str, ...]) -> ClassSet:
    """The classes of a set that a dataset has, in the dataset's order."""
    word = dict(zip(known.ids, known.names, strict=True))
    return ClassSet(known.name, tuple(word[name] for name in own), own)


def _by_id(own: tuple[str, ...], words: ClassSet) -> Naming:
    label = {name: i for i, name in enumerate(words.ids)}
    return Naming(words.names, np.array([label.get(name, -1) for name in own], np.int32), words.name)


def _tell_missing(source: Source, naming: Naming, stored: np.ndarray, labels: np.ndarray) -> None:
    """Warns of examples that have no class, and raises ConfigError where none has one."""
    n, without, other = len(stored), int((stored < 0).sum()), int(((stored >= 0) & (labels < 0)).sum())
    if without + other == n:
        lacks = f"none of its {n:,} examples has a label" + f" among the {len(naming.names)} of {naming.source}" * (other > 0)
        remedy = "use a split with labels, or name their field (label_field; --label-field)"
        raise ConfigError(f"data.spec = {source.name!r}: {lacks}: {remedy}; there are {', '.join(source.fields) or 'no fields'}")
    if jax.process_index() > 0:
        return
    if without:
        log.warning("%s: %d of %d examples have no label and are left out", source.name, without, n)
    if other:
        of = f"the {len(naming.names)} of {naming.source}"
        log.warning("%s: %d of %d examples are of no class among %s and are left out", source.name, other, n, of)


def _by_caption(source: Source, naming: Naming, captions: Sequence[str | None]) -> Int[np.ndarray, " n"]:
    """The class of each main caption. Raises ConfigError for a caption that is no class name, and where there is none."""
    if not any(captions):
        remedy = "has neither labels nor captions: name the field of the labels (label_field; --label-field)"
        raise ConfigError(f"data.spec = {source.name!r}: {remedy}; there are {', '.join(source.fields) or 'no fields'}")
    labels = {name: i for i, name in enumerate(naming.names)}
    unknown = sorted({caption for caption in captions if caption is not None and caption not in labels})
    remedy = f"{len(unknown)} captions of {source.name} are no class name: add {', '.join(map(repr, unknown[:5]))}"
    config.require(not unknown, "classnames", naming.source, remedy + (", ..." if len(unknown) > 5 else ""))
    return np.array([-1 if caption is None else labels[caption] for caption in captions], np.int32)
