"""What a training run reports: lines of metrics, a progress line, its rate, and how often its data had to be repaired."""

import sys
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from clipjax import config
from clipjax.metrics.clock import Clock, DataCounts
from clipjax.metrics.flops import mfu
from clipjax.metrics.writer import EvaluationResults, MetricsWriter
from clipjax.train.progress import Progress


def say(text: str) -> None:
    """Prints a line to stderr, from the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class Report:
    """Collects what a run reports, and writes it to the files, to the progress line and to stderr."""

    def __init__(self, run: config.Run, mesh: Mesh, writer: MetricsWriter, progress: Progress, flops: float) -> None:
        """`flops`: what the model needs for one image-text pair, forward and backward."""
        self.clock, self.counts = Clock(), DataCounts(mesh)
        self._run, self._devices = run, list(mesh.devices.flat)
        self._writer, self._progress, self._flops = writer, progress, flops

    def log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of step `step` (finished steps, so from 1). Every train.log_every steps they become a line."""
        cfg = self._run.train
        due = step % cfg.log_every == 0 or step == cfg.steps
        host = self._rates() if due else None
        values = {**metrics, **self.counts.read()} if due else metrics
        self._progress.update(step, self._writer.push(step, values, host))

    def flush(self, step: int) -> None:
        """Checks and writes what was logged so far; waits for the devices. Raises NonFiniteError as `MetricsWriter.push`."""
        self._progress.update(step, self._writer.flush())

    def evaluation(self, step: int, task: str, dataset: str, results: EvaluationResults) -> dict[str, float]:
        """Writes and prints the line of an evaluation, and returns its metrics."""
        metrics = self._writer.evaluation(step, task, results, dataset=dataset)
        say(f"step {step:,}  {task} on {dataset}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        return metrics

    def say_repairs(self, steps: int) -> None:
        """At the end: how many images were replaced and captions truncated in `steps` trained steps."""
        examples, total = steps * self._run.train.batch_size, self.counts.total
        if total["replaced"]:
            say(f"{total['replaced']:,} of {examples:,} images could not be read; others were used in their place")
        if total["truncated"]:
            captions, length = examples * self._run.data.captions_per_image, self._run.model.text.length
            say(f"{total['truncated']:,} of {captions:,} captions were truncated to model.text.length = {length} tokens")

    def _rates(self) -> dict[str, float]:
        values = self.clock.read()
        if not values["examples_per_second"]:  # only the first step was taken, which has no rate
            return {}
        utilisation = mfu(values["examples_per_second"] * self._flops, self._devices)
        return values if utilisation is None else values | {"mfu": utilisation}
