"""A suite: sets to evaluate runs on, each with its main figure, and means over them.

A suite's file has one function `suite() -> Suite`, as a config's has `config() -> Run`.
"""

import re
from collections import Counter
from dataclasses import dataclass

from clipjax.config.evals import TrainingEvaluation
from clipjax.config.fields import Strict, require
from clipjax.config.tasks import RunSuite

ROOT = "{root}"  # in a SPEC or the name of a file: the folder of the suite's sets


@dataclass(frozen=True, kw_only=True)
class SuiteSet(Strict, prefix="sets"):
    """An evaluation of a dataset, and the figure of it that counts."""

    name: str  # in results, and of the file of its examples
    evaluation: TrainingEvaluation  # `data` must be given; `{root}` in a text is the suite's root
    main: tuple[str, ...]  # the metric that is the main figure, or those that it is the mean of
    main_name: str | None = None  # what that mean is called; None: the metrics' names
    protocol: str = ""  # where this is defined, and what of it is not confirmed

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"[\w-][\w.-]*", self.name, re.ASCII)
        require(plain is not None, "sets.name", self.name, "must be of letters, digits, - _ and . alone")
        nested = isinstance(self.evaluation, RunSuite)
        require(not nested, "sets.evaluation", self.name, "is a suite itself: name the sets of that")
        require(self.evaluation.data is not None, "sets.evaluation.data", None, f"name the dataset of {self.name}")
        require(bool(self.main), "sets.main", self.main, f"name the metric of {self.name} that counts")


@dataclass(frozen=True, kw_only=True)
class SuiteMean(Strict, prefix="means"):
    """The plain mean over the main figures of some sets."""

    name: str
    of: tuple[str, ...]  # names of sets
    protocol: str = ""


@dataclass(frozen=True, kw_only=True)
class Suite(Strict, prefix=""):
    """Sets and means over them."""

    sets: tuple[SuiteSet, ...]
    means: tuple[SuiteMean, ...] = ()
    root: str = ""  # the folder that `{root}` stands for, where --root does not name another

    def __post_init__(self) -> None:
        require(bool(self.sets), "sets", self.sets, "a suite has one set at least")
        names = Counter(one.name for one in (*self.sets, *self.means))
        twice = [name for name, count in names.items() if count > 1]
        require(not twice, "sets.name", twice[0] if twice else "", "is used twice: each set and mean needs its own")
        known = {one.name for one in self.sets}
        for mean in self.means:
            unknown = [name for name in mean.of if name not in known]
            require(bool(mean.of) and not unknown, "means.of", unknown or mean.of, f"must be names of sets: mean {mean.name}")
