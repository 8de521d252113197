"""Evaluations as the training loop runs them."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals import caption_metrics
from clipjax.evals.captioning import Captioned, Captioning, save_png, sheet
from clipjax.evals.encoder import Encoder
from clipjax.evals.geometry import Geometry
from clipjax.evals.geometry_plot import file_name, plot
from clipjax.evals.inputs import eval_data
from clipjax.evals.retrieval import Retrieval
from clipjax.evals.zeroshot import Zeroshot
from clipjax.metrics.writer import EvaluationResults
from clipjax.models.clip import Params
from clipjax.train.loop import say


@dataclass(frozen=True)
class Evaluator:
    """An evaluation and its cadence. The loop also runs each at the end."""

    evaluation: Zeroshot | Retrieval | Geometry | Captioning
    every: int  # steps
    pictures: Path | None = None  # folder for what an evaluation draws; None: nothing is drawn
    samples: int = 0  # captions that are shown

    @property
    def task(self) -> str:
        return self.evaluation.task

    @property
    def dataset(self) -> str:
        return self.evaluation.dataset

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def run(self, params: Params, step: int) -> EvaluationResults:
        """The metrics that are a number: of acc5 with fewer than 5 classes there is no curve to draw, nor one of curves.

        Draws geometry, and captions with their pictures, to `pictures`; a run that is resumed does it again, into the same files.
        The latter is also among what is found.
        """
        if isinstance(self.evaluation, Geometry):
            found = self.evaluation.measure(params)
            metrics = found.metrics
            if self.pictures:
                plot(self.pictures / file_name(f"{self.dataset}-{step:06}"), found, f"step {step:,}, on {self.dataset}")
        elif isinstance(self.evaluation, Captioning):
            found = self.evaluation.measure(params)
            metrics = found.metrics
        else:
            metrics = self.evaluation.run(params)
        figures = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        return figures | (self._show(found, step) if self.samples else {})

    def _show(self, found: Captioned, step: int) -> dict[str, np.ndarray]:
        """Captions as lines and as a sheet, from the first process."""
        if jax.process_index() > 0:
            return {}
        samples = self.evaluation.samples(found, self.samples)
        for sample in samples:
            say(f"step {step:,}  {self.dataset}  {sample}")
        picture = sheet(samples, f"step {step:,}, on {self.dataset}")
        if self.pictures:
            save_png(self.pictures / file_name(f"{self.dataset}-{step:06}"), picture)
        return {"samples": np.asarray(picture)}


def make_evaluators(run: config.Run, mesh: Mesh, tokenizer: Tokenizer, workdir: Path | None = None) -> list[Evaluator]:
    """The evaluations of `run.evals`, prepared once: they share two compiled towers, and small datasets are read once. What
    they draw goes to `workdir`/geometry and `workdir`/captioning.

    Raises ConfigError for a dataset, class names or templates that can't be had, a caption's metrics as train.best
    whose packages are missing, and captions of a model without a decoder, before any training."""
    encoder = Encoder(run.model, mesh, run.train.eval_batch_size)

    def prepare(wanted: config.Evaluation) -> Evaluator:
        data, samples = eval_data(run, wanted.data, wanted.split), 0
        match wanted:
            case config.Zeroshot(templates=templates, classnames=names):
                evaluation = Zeroshot.prepare(encoder, tokenizer, data, templates, names)
            case config.Retrieval():
                evaluation = Retrieval.prepare(encoder, tokenizer, data)
            case config.Geometry():
                evaluation = Geometry.prepare(encoder, tokenizer, data)
            case config.Captioning(samples=samples):
                evaluation = Captioning.prepare(encoder, tokenizer, data)
        return Evaluator(evaluation, wanted.every, workdir / wanted.task if workdir else None, samples)

    best = run.train.best or ""
    if best.startswith(config.Captioning.task) and not best.endswith("exact_match"):
        remedy = f"needs {' and '.join(caption_metrics.missing())}: {caption_metrics.INSTALL}"
        config.require(not caption_metrics.missing(), "train.best", best, remedy)

    return [prepare(wanted) for wanted in run.evals]
