"""Evaluations as the training loop runs them."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax import config
from clipjax.data.formats.locations import divided
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Encoder
from clipjax.evals.evaluation import Evaluation, Results
from clipjax.evals.inputs import eval_data
from clipjax.evals.report import png_name, save_png
from clipjax.evals.table import class_of
from clipjax.metrics.writer import EvaluationResults
from clipjax.models.clip import Params
from clipjax.train.report import say


@dataclass(frozen=True)
class Evaluator:
    """An evaluation, when it runs, and where its images go. The loop also runs every evaluator at the end."""

    evaluation: Evaluation
    task: str  # its name in metrics.jsonl
    every: int  # steps
    folder: Path | None = None  # for images; None: they are not written

    @property
    def dataset(self) -> str:
        return self.evaluation.dataset

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def run(self, params: Params, step: int) -> EvaluationResults:
        """The metrics that are a number, and the image that TensorBoard shows.

        Metrics that are None or a curve are left out: TensorBoard can't draw them over steps.
        """
        results = self.evaluation.run(params)
        numbers = {name: value for name, value in results.metrics.items() if isinstance(value, int | float)}
        return numbers | self._show(results, step)

    def _show(self, results: Results, step: int) -> dict[str, np.ndarray]:
        """Prints the lines and writes the image, in the first process. A resumed run writes the same files again."""
        if jax.process_index() > 0:
            return {}
        for line in results.lines():
            say(f"step {step:,}  {self.dataset}  {line}")
        image = results.draw(f"step {step:,}, on {self.dataset}")
        if image is None:
            return {}
        if self.folder:
            save_png(self.folder / png_name(f"{self.dataset}-{step:06}"), image)
        return {} if results.image_name is None else {results.image_name: np.asarray(image)}


def make_evaluators(run: config.Run, mesh: Mesh, tokenizer: Tokenizer, workdir: Path | None = None) -> list[Evaluator]:
    """The evaluations of `run.evals`, prepared once. They share two compiled towers, and small datasets are read once.

    Images go to `workdir`/TASK. Raises ConfigError, before any training, for a dataset, class names or templates that can't be
    read, for captions of a model without a decoder, and where train.best is a metric that can't be computed on this machine.
    """
    encoder = Encoder(run.model, mesh, run.train.eval_batch_size)
    _check_best(run)
    evaluators = []
    for i, wanted in enumerate(run.evals):
        try:
            evaluation = prepare(wanted, encoder, tokenizer, run.data)
        except config.ConfigError as error:  # the data's own messages do not say whose data
            raise config.ConfigError(f"evals.{i}, {wanted.task}: {error}") from error
        evaluators.append(Evaluator(evaluation, wanted.task, wanted.every, workdir / wanted.task if workdir else None))
    return evaluators


def prepare(wanted: config.TrainingEvaluation, encoder: Encoder, tokenizer: Tokenizer | None, own: config.Data) -> Evaluation:
    """The evaluation that `wanted` describes, for a run whose data is `own`. A suite gets that, and opens its sets itself."""
    fields = dict(image_field=wanted.image_field, text_field=wanted.text_field, label_field=wanted.label_field)
    whole = isinstance(wanted, config.RunSuite)
    data = own if whole else eval_data(own, wanted.spec(own), wanted.split, **fields)
    if not whole and wanted.data is None and "#" not in data.split and data.spec.startswith(("parquet:", "folder:")):
        remedy = "the names of its files tell no splits, so these are the examples it trains on: name others, or set data.split"
        config.require(divided(data.spec), "data", data.spec, f"{remedy} = train#0-95 and the evaluation's = train#95-100")
    if class_of(wanted).reads_text:
        encoder.model.require_towers("text")
        image, text = encoder.model.image.pooled_width, encoder.model.text.width
        remedy = f"are {image} numbers of an image and {text} of a text, which have no cosine: take embeddings or a head"
        config.require(encoder.features != "tower" or image == text, "--features", "tower", remedy)
    return class_of(wanted).prepare(encoder, tokenizer and tokenizer.cleaning(wanted.clean), data, wanted)


def _check_best(run: config.Run) -> None:
    best = run.train.best or ""
    for wanted in run.evals:
        for metric, remedy in class_of(wanted).unavailable().items():
            needed = best.startswith(f"{wanted.task}/") and best.endswith(f"/{metric}")
            config.require(not needed, "train.best", best, remedy)
