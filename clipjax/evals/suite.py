"""A suite's sets, one after the other, and means over their main figures. A set that is not there is a row that says so."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np

from clipjax import config, distributed
from clipjax.config import ConfigError
from clipjax.config.load import load_suite
from clipjax.config.suite import ROOT
from clipjax.data.formats.index import ABSENT
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import results
from clipjax.evals.bootstrap import Draws, interval
from clipjax.evals.encoder import Encoder
from clipjax.evals.evaluation import Evaluation, Examples, Results
from clipjax.evals.results import MEAN, Row
from clipjax.files import strict
from clipjax.models.clip import Params
from clipjax.status import CertainFailure

Prepare = Callable[[config.TrainingEvaluation], Evaluation]  # raises ConfigError for what can't be evaluated

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Whose figures they are, as CLIP_benchmark's files say it."""

    model: str  # the run's name
    pretrained: str  # `step N`
    params: Params


@dataclass(frozen=True)
class Measured:
    """A set's row, and what each query gave."""

    row: Row
    examples: Sequence[Examples] = ()
    draws: Draws | None = None  # of the main figure


class SetOfSuite:
    """A set with its dataset open; or why it is absent, as `absent` says."""

    def __init__(self, wanted: config.SuiteSet, root: str, prepare: Prepare) -> None:
        self.wanted, self.absent = wanted, ""
        asked, self._evaluation = wanted.evaluation, None
        texts = {f.name: text for f in dataclasses.fields(asked) if isinstance(text := getattr(asked, f.name), str)}
        filled = {name: text.replace(ROOT, root.rstrip("/")) for name, text in texts.items() if ROOT in text}
        self._spec = filled.get("data", str(asked.data))
        try:
            config.require(bool(root) or not filled, "--root", root, f"name the folder that holds {asked.data}")
            self._evaluation = prepare(dataclasses.replace(asked, **filled))
        except (ConfigError, *ABSENT) as error:  # not where a store does not answer: the suite ends, and can go on later
            self.absent = str(error)
        if distributed.total(int(bool(self.absent))) and not self.absent:
            self.absent = "another process can't open it"

    def measure(self, encoder: Encoder, weights: Weights, draw: bool = True) -> Measured:
        """The set's row with these weights. It is absent, too, where its images or labels turn out to be of no use, and where the
        evaluation does not give what the main figure is made of.

        `draw`: with an interval."""
        encoder.usable.clear()
        evaluation, absent = self._evaluation, self.absent
        if evaluation is None or absent:
            return Measured(self._row(weights, self._spec, absent=absent))
        try:
            found = evaluation.run(weights.params)
        except (ConfigError, CertainFailure) as error:  # alike on every process
            return Measured(self._row(weights, evaluation.dataset, absent=str(error)))
        main = self.wanted.main
        drawn = results.draws_of(found.examples, main, self.wanted.name) if draw else None
        images, left_out = np.sum([*encoder.usable.values(), (0, 0)], axis=0).tolist()
        known = strict({name: value for name, value in found.metrics.items() if not isinstance(value, list)})  # without curves
        defined = [name for name, value in known.items() if value is not None]
        undefined = [metric for metric in main if metric not in defined]
        row = self._row(
            weights,
            evaluation.dataset,
            metrics=known,
            main=None if undefined else _mean([known[metric] for metric in main]),
            absent=f"{undefined[0]} is not among its figures: {', '.join(defined)}" if undefined else "",
            ci95=None if drawn is None else interval(drawn),
            n=_queries(found.examples, main) or images,
            unreadable=left_out,
        )
        return Measured(row, found.examples, drawn)

    def _row(self, weights: Weights, dataset: str, **more: Any) -> Row:
        wanted = self.wanted
        return Row(
            name=wanted.name,
            dataset=dataset,
            model=weights.model,
            pretrained=weights.pretrained,
            task=wanted.evaluation.task,
            main_metric=wanted.main_name or " + ".join(wanted.main),
            main_of=wanted.main,
            protocol=wanted.protocol,
            **more,
        )


def measure(suite: config.Suite, root: str | None, prepare: Prepare, encoder: Encoder, weights: Weights) -> Iterator[Measured]:
    """Every set of the suite, each prepared when its turn comes, then every mean. `root`: as --root; None: the suite's."""
    place = suite.root if root is None else root
    yield from with_means(suite, (SetOfSuite(one, place, prepare).measure(encoder, weights) for one in suite.sets))


def with_means(suite: config.Suite, sets: Iterator[Measured]) -> Iterator[Measured]:
    found = {}
    for measured in sets:
        found[measured.row.name] = measured
        yield measured
    for mean in suite.means:
        yield Measured(_mean_row(mean, [found[name] for name in mean.of]))


def _mean_row(mean: config.SuiteMean, sets: Sequence[Measured]) -> Row:
    """The plain mean over the sets. Where one has no figure the mean has none: that of the others is named apart."""
    known = [one.row.main for one in sets if one.row.main is not None]
    lost = [one.row.name for one in sets if one.row.main is None]
    drawn = [one.draws for one in sets if one.draws is not None]
    sure = not lost and len(drawn) == len(sets)
    return Row(
        name=mean.name,
        dataset=mean.name,
        model=sets[0].row.model,
        pretrained=sets[0].row.pretrained,
        task=MEAN,
        metrics={"mean": None if lost else _mean(known), "mean_of_present": _mean(known), "sets": len(sets)},
        main_metric="mean",
        main=None if lost else _mean(known),
        main_of=mean.of,
        ci95=interval(np.mean(drawn, axis=0)) if sure else None,
        n=len(known),
        protocol=mean.protocol,
        absent=f"{len(lost)} of {len(sets)} sets have no figure: {', '.join(lost)}" if lost else "",
    )


def run_suite(found: Iterator[Measured], folder: Path, say: Callable[[str], None]) -> list[Row]:
    """Writes the rows to `folder`, anew after every set, and says each in a line. Raises ConfigError where no set is there."""
    rows: list[Row] = []
    for measured in found:
        rows.append(measured.row)
        results.write_examples(folder, measured.row.name, measured.examples)
        results.write(folder, rows)
        say(line(measured.row))
    sets = [row for row in rows if row.task != MEAN]
    if all(row.absent for row in sets):
        raise ConfigError(f"SUITE: none of its {len(sets)} sets is there: {sets[0].absent}")
    return rows


def line(row: Row) -> str:
    """A row as a line to print."""
    figure = "absent" if row.main is None else f"{row.main:.4f}"
    low_high = "" if row.ci95 is None else "  [{:.4f}, {:.4f}]".format(*row.ci95)
    of_present = row.metrics.get("mean_of_present")
    rest = "" if of_present is None or not row.absent else f" ({of_present:.4f} over the {row.n} others)"
    return f"{row.name}  {row.main_metric}  {figure}{low_high}{f'  {row.absent}' if row.absent else ''}{rest}"


class SuiteEvaluation(Evaluation):
    """A suite during training: the main figure of each set, and the means, as metrics. What is absent is left out, and told."""

    reads_text: ClassVar = False  # of a model of one tower, the sets that need both are absent

    def __init__(self, suite: config.Suite, name: str, sets: Sequence[SetOfSuite], encoder: Encoder) -> None:
        self.dataset = name
        self._suite, self._sets, self._encoder = suite, sets, encoder
        self._told: set[str] = set()  # the sets that are known to be absent
        for one in sets:
            self._tell(one.wanted.name, one.absent)
        config.require(len(self._told) < len(sets), "suite", name, "none of its sets is there")

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer | None, data: config.Data, cfg: config.RunSuite) -> Self:
        """Opens all sets. `data`: the run's own."""
        from clipjax.evals.training import prepare

        suite = load_suite(cfg.suite)
        root = suite.root if cfg.root is None else cfg.root
        sets = [SetOfSuite(one, root, lambda wanted: prepare(wanted, encoder, tokenizer, data)) for one in suite.sets]
        return cls(suite, cfg.dataset(data), sets, encoder)

    def run(self, params: Params) -> Results:
        weights = Weights("", "", params)
        found = with_means(self._suite, (one.measure(self._encoder, weights, draw=False) for one in self._sets))
        rows = [measured.row for measured in found]
        for row in rows:
            self._tell(row.name, row.absent if row.task != MEAN else "")
        return Results({row.name: row.main for row in rows})

    def _tell(self, name: str, absent: str) -> None:
        """Warns, once and in the first process, of a set that is absent."""
        if absent and name not in self._told:
            self._told.add(name)
            if jax.process_index() == 0:
                log.warning("suite %s: %s is absent: %s", self.dataset, name, absent)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) > 0 else None


def _queries(examples: Sequence[Examples], metrics: Sequence[str]) -> int:
    """How many queries count to one of the metrics at least."""
    counted = [[~np.isnan(kind.values[m]) for m in metrics if m in kind.values] for kind in examples]
    return sum(int(np.any(of_kind, axis=0).sum()) for of_kind in counted if of_kind)
