"""What a training run reports: lines of metrics, a progress line, its rate, and how often its data had to be repaired."""

import sys
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from clipjax import config
from clipjax.data.ordering.mixture import shares
from clipjax.data.source import Source
from clipjax.metrics.clock import Clock
from clipjax.metrics.counts import BadExamples, DataCounts
from clipjax.metrics.flops import mfu
from clipjax.metrics.writer import EvaluationResults, MetricsWriter
from clipjax.train.optimizer import can_grow
from clipjax.train.origin import Origin, changes_order
from clipjax.train.progress import Progress
from clipjax.train.weights import Weights
from clipjax.train.workdir import Saved, changes


def say(text: str) -> None:
    """Prints a line to stderr, from the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def say_start(run: config.Run, workdir: Path, begin: Saved | Origin | Weights | None, source: Source | None) -> None:
    """Prints where a run starts, if it resumes or has another run's weights or state, and how long it is: its steps, examples and
    epochs."""
    train = run.train
    if isinstance(begin, Weights):
        say("\n  ".join([f"{workdir}: starts from the weights of {begin}, at step 0 of {train.steps:,}", *begin.report(run)]))
    elif begin:
        changed = "; ".join(line for line in changes(begin.run, run) if not line.startswith("init"))
        changed = f"; changed: {changed}" if changed else ""
        starts = f"starts from {begin}" if isinstance(begin, Origin) else "resuming"
        say(f"{workdir}: {starts} at step {begin.step:,} of {train.steps:,}{changed}")
        if changes_order(begin.run, run):
            say(f"the order of the data is another one: it goes on with its batch {train.place(begin.step):,}")
        if isinstance(begin, Saved) and run.init is not None and run.init != begin.run.init:
            say(f"{run.init} is not read: what came from it stands in the checkpoint")
    if source is not None:
        examples, size = train.steps * train.batch_size, len(source)
        steps = f"{train.steps:,} steps of {train.batch_size:,} = {examples:,} examples"
        say(f"{steps}, {_shown(examples / size)} epochs of {source.name} ({size:,})")
        for share in shares(source, run.data, train.batch_size):
            part = f"{share.count:,} of each batch ({share.count / train.batch_size:.2%})"
            say(f"  {share.name}: {part}, {_shown(share.epochs(train.steps))} epochs of {share.dataset} ({share.examples:,})")


def _shown(epochs: float) -> str:
    return f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2g}"


def say_finished(run: config.Run, workdir: Path) -> None:
    """Prints that a run has all its steps, and how to go on."""
    steps = run.train.steps
    remedy = "raise train.steps, or choose a new --workdir"
    if can_grow(run.optim, steps, steps + 1, steps) is not None:
        remedy = f"its schedule ends here: choose a new --workdir, which init = Init(run='{workdir}', state='all') starts from it"
    say(f"{workdir}: finished, with all its {steps:,} steps; {remedy}")


class Report:
    """Collects what a run reports, and writes it to the files, to the progress line and to stderr."""

    def __init__(
        self, run: config.Run, mesh: Mesh, writer: MetricsWriter, progress: Progress, flops: float, source: Source | None
    ) -> None:
        """`flops`: what the model needs for one image-text pair, forward and backward. `source`: of the batches; None where
        that is not known."""
        self._bad = BadExamples(run.data.max_bad)
        self.clock, self.counts = Clock(), DataCounts(mesh, self._bad)
        self._run, self._devices = run, list(mesh.devices.flat)
        self._writer, self._progress, self._flops, self._source = writer, progress, flops, source
        self._shares = () if source is None else shares(source, run.data, run.train.batch_size)

    def log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of step `step` (finished steps, so from 1). Every train.log_every steps they become a line.

        Raises as `flush`, one log interval late."""
        cfg = self._run.train
        due = step % cfg.log_every == 0 or step == cfg.steps
        host = self._rates() | self._position(step) if due else None
        values = {**metrics, **self.counts.read()} if due else metrics
        if host is not None and "skipped_steps" not in metrics:
            host["skipped_steps"] = 0
        self._progress.update(step, self._writer.push(step, values, host))
        if due:
            self._bad.check(self._source)

    def flush(self, step: int) -> None:
        """Checks and writes what was logged so far; waits for the devices. Raises NonFiniteError as `MetricsWriter.push`, and
        TooManyBadError where too many examples are bad."""
        self._progress.update(step, self._writer.flush())
        self.counts.fetch()
        self._bad.check(self._source, self.counts.so_far())

    def evaluation(self, step: int, task: str, dataset: str, results: EvaluationResults) -> dict[str, float]:
        """Writes and prints the line of an evaluation, and returns its metrics."""
        metrics = self._writer.evaluation(step, task, results, dataset=dataset)
        say(f"step {step:,}  {task} on {dataset}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        return metrics

    def say_repairs(self, steps: int) -> None:
        """At the end: how many examples were bad or left out, and captions truncated, in `steps` trained steps."""
        examples, total = steps * self._run.train.batch_size, self.counts.total
        if total["replaced"]:
            say(f"{total['replaced']:,} of {examples:,} examples were bad (the log says why); others were used in their place")
        if total["filtered"]:
            share = f"{100 * total['filtered'] / examples:.2g}%"
            say(f"{total['filtered']:,} of {examples:,} examples ({share}) were left out by data.filter, and others used instead")
        if total["truncated"]:
            captions, length = examples * self._run.data.texts_per_image, self._run.model.text.length
            say(f"{total['truncated']:,} of {captions:,} captions were truncated to model.text.length = {length} tokens")

    def _rates(self) -> dict[str, float]:
        values = self.clock.read()
        if "examples_per_second" not in values:
            return values
        utilisation = mfu(values["examples_per_second"] * self._flops, self._devices)
        return values if utilisation is None else values | {"mfu": utilisation}

    def _position(self, step: int) -> dict[str, float]:
        """How far the run is in its data after `step` steps. Batches that it left out were passed, too, but not seen."""
        train, source = self._run.train, self._source
        seen: dict[str, float] = {"examples_seen": step * train.batch_size}
        if source is None:
            return seen
        passed = train.place(step)
        of_parts = {f"epoch/{share.name}": share.epochs(passed) for share in self._shares}
        return seen | {"epoch": passed * train.batch_size / len(source)} | of_parts
