"""Evaluations as the training loop runs them."""

from dataclasses import dataclass

from jax.sharding import Mesh

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Encoder
from clipjax.evals.inputs import eval_data
from clipjax.evals.retrieval import Retrieval
from clipjax.evals.zeroshot import Zeroshot
from clipjax.models.clip import Params


@dataclass(frozen=True)
class Evaluator:
    """An evaluation and its cadence. The loop also runs each at the end."""

    evaluation: Zeroshot | Retrieval
    every: int  # steps

    @property
    def task(self) -> str:
        return self.evaluation.task

    @property
    def dataset(self) -> str:
        return self.evaluation.dataset

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def run(self, params: Params) -> dict[str, float]:
        """The metrics that exist: of acc5 with fewer than 5 classes there is no curve to draw."""
        return {name: value for name, value in self.evaluation.run(params).items() if value is not None}


def make_evaluators(run: config.Run, mesh: Mesh, tokenizer: Tokenizer) -> list[Evaluator]:
    """The evaluations of `run.evals`, prepared once: they share two compiled towers, and small datasets are read once.

    Raises ConfigError for a dataset, class names or templates that can't be had, before any training."""
    encoder = Encoder(run.model, mesh, run.train.eval_batch_size)

    def prepare(wanted: config.Zeroshot | config.Retrieval) -> Evaluator:
        data = eval_data(run, wanted.data, wanted.split)
        match wanted:
            case config.Zeroshot(templates=templates, classnames=names):
                evaluation = Zeroshot.prepare(encoder, tokenizer, data, templates, names)
            case config.Retrieval():
                evaluation = Retrieval.prepare(encoder, tokenizer, data)
        return Evaluator(evaluation, wanted.every)

    return [prepare(wanted) for wanted in run.evals]
