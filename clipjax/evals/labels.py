"""The classes of a dataset's examples, of several splits under the same numbers: what classifiers learn and are tested on."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Int

from clipjax import config
from clipjax.config import ConfigError
from clipjax.data import reading
from clipjax.data.source import Record, Source
from clipjax.data.sources import open_source
from clipjax.evals.embed import Vectors, by_index
from clipjax.evals.encoder import CachedBatches, Encoder
from clipjax.models.clip import Params

SHARED = 0.1  # of a test split: datasets do hold duplicates


@dataclass(frozen=True)
class Labelled:
    """The examples of a split, and which of the classes each is of."""

    keys: tuple[str, ...]
    captions: tuple[str, ...]  # the main caption; empty where there is none
    labels: Int[np.ndarray, " n"]  # int32, -1: of none


@dataclass(frozen=True)
class LabelledImages:
    """The images of a split that have a class."""

    encoder: Encoder
    batches: CachedBatches
    examples: Labelled

    def embed(self, params: Params) -> tuple[Vectors, Int[np.ndarray, " m"], Bool[np.ndarray, " n"]]:
        """The vectors and labels of those that can be read, in the dataset's order; and which of all n examples they are."""
        z, found = by_index(self.encoder, params, self.batches, len(self.examples.keys))
        found &= self.examples.labels >= 0
        return z[found], self.examples.labels[found], found


def open_splits(data: config.Data, train: str) -> tuple[tuple[Source, config.Data], tuple[Source, config.Data]]:
    """The split `train` of a dataset, and that of `data`, each with how it is read."""
    learned = dataclasses.replace(data, split=train)
    return (open_source(learned), learned), (open_source(data), data)


def shared_classes(sources: Sequence[Source], pattern: str | None) -> tuple[int, list[Labelled]]:
    """How many classes there are, and the examples of each source. The first source is the one that is learned from.

    A class is an example's label. With `pattern`, it is what this regular expression finds in the main caption, its first group
    where it has one; an example has none where the pattern finds nothing, or two different things. Of sources that name their
    classes differently, those of equal names are one. Raises ConfigError where a source has no example of the first's classes,
    and where the others have examples of the first.
    """
    records = [list(reading.texts(source, quiet=jax.process_index() > 0)) for source in sources]
    for source, split in zip(sources[1:], records[1:], strict=True):
        _check_apart(sources[0], records[0], source, split)
    if pattern is None and all(source.classnames == sources[0].classnames for source in sources):
        classes = [[record.label if record.label >= 0 else None for record in split] for split in records]
        names = range(1 + max((c for split in classes for c in split if c is not None), default=-1))
    else:
        found = _found_in(pattern) if pattern is not None else None
        classes = [[found(r) if found else name_of(r.label, s) for r in split] for s, split in zip(sources, records, strict=True)]
        names = sorted({c for split in classes for c in split if c is not None})
    number = {name: i for i, name in enumerate(names)}
    labels = [np.array([-1 if c is None else number[c] for c in split], np.int32) for split in classes]
    for source, split in zip(sources, labels, strict=True):
        if not np.isin(split[split >= 0], labels[0]).any():
            which = "a label" if split is labels[0] else f"a class that occurs in {sources[0].name}"
            remedy = f"no example has {which}: name the field of the labels (label_field; --label-field), or take the classes"
            raise ConfigError(f"data.spec = {source.name!r}: {remedy} from the captions (label_pattern; --label-pattern)")
    splits = zip(records, labels, strict=True)
    return len(names), [Labelled(tuple(r.key for r in s), tuple("".join(r.captions[:1]) for r in s), own) for s, own in splits]


def _check_apart(train: Source, learned: Sequence[Record], test: Source, tested: Sequence[Record]) -> None:
    """Raises ConfigError where more than SHARED of the tested examples are learned from. Only of the same files: keys that count
    the examples of a split say nothing."""
    if len({re.sub(r"#\d+-\d+$", "", source.version) for source in (train, test)}) > 1:
        return
    known = {(r.key, r.captions[:1], r.label) for r in learned}
    twice = sum((r.key, r.captions[:1], r.label) in known for r in tested)
    remedy = f"{twice:,} of the {len(tested):,} examples of {test.name} are among them, and classifiers would be tested on what"
    remedy += " they learn from: name two splits, or shares, as train#0-80 and train#80-100"
    config.require(twice <= SHARED * len(tested), "train", train.name, remedy)


def name_of(label: int, source: Source) -> str | None:
    """What a source calls a class: its number where it has no name for it. None: of no class."""
    if label < 0:
        return None
    names = source.classnames or ()
    return names[label] if label < len(names) else str(label)


def _found_in(pattern: str) -> Callable[[Record], str | None]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"label_pattern = {pattern!r}: is no regular expression: {error}") from error

    def found(record: Record) -> str | None:
        matches = compiled.finditer(record.captions[0]) if record.captions else ()
        values = {match[1] if compiled.groups else match[0] for match in matches}
        return values.pop() if len(values) == 1 else None

    return found
