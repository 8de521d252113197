"""Evaluations as the training loop runs them."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Encoder
from clipjax.evals.geometry import Geometry
from clipjax.evals.geometry_plot import file_name, plot
from clipjax.evals.inputs import eval_data
from clipjax.evals.retrieval import Retrieval
from clipjax.evals.zeroshot import Zeroshot
from clipjax.models.clip import Params


@dataclass(frozen=True)
class Evaluator:
    """An evaluation and its cadence. The loop also runs each at the end."""

    evaluation: Zeroshot | Retrieval | Geometry
    every: int  # steps
    pictures: Path | None = None  # folder for what an evaluation draws; None: nothing is drawn

    @property
    def task(self) -> str:
        return self.evaluation.task

    @property
    def dataset(self) -> str:
        return self.evaluation.dataset

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def run(self, params: Params, step: int) -> dict[str, float]:
        """The metrics that are a number: of acc5 with fewer than 5 classes there is no curve to draw, nor one of curves.

        Draws geometry to `pictures`; a run that is resumed does it again, into the same files.
        """
        if isinstance(self.evaluation, Geometry):
            found = self.evaluation.measure(params)
            metrics = found.metrics
            if self.pictures:
                plot(self.pictures / file_name(f"{self.dataset}-{step:06}"), found, f"step {step:,}, on {self.dataset}")
        else:
            metrics = self.evaluation.run(params)
        return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def make_evaluators(run: config.Run, mesh: Mesh, tokenizer: Tokenizer, workdir: Path | None = None) -> list[Evaluator]:
    """The evaluations of `run.evals`, prepared once: they share two compiled towers, and small datasets are read once. Pictures
    of geometry go to `workdir`/geometry.

    Raises ConfigError for a dataset, class names or templates that can't be had, before any training."""
    encoder = Encoder(run.model, mesh, run.train.eval_batch_size)
    pictures = workdir / Geometry.task if workdir else None

    def prepare(wanted: config.Zeroshot | config.Retrieval | config.Geometry) -> Evaluator:
        data = eval_data(run, wanted.data, wanted.split)
        match wanted:
            case config.Zeroshot(templates=templates, classnames=names):
                evaluation = Zeroshot.prepare(encoder, tokenizer, data, templates, names)
            case config.Retrieval():
                evaluation = Retrieval.prepare(encoder, tokenizer, data)
            case config.Geometry():
                evaluation = Geometry.prepare(encoder, tokenizer, data)
        return Evaluator(evaluation, wanted.every, pictures)

    return [prepare(wanted) for wanted in run.evals]
