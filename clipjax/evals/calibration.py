"""Calibration: whether a zero-shot classifier is right as often as it says, before and after one temperature is fitted."""

from typing import Self

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.classifiers import expected_right
from clipjax.evals.encoder import Encoder, to_host
from clipjax.evals.evaluation import Evaluation, Examples, Results
from clipjax.evals.zeroshot import ZeroshotEvaluation
from clipjax.models.clip import Params

BINS = 15  # of equal width
TEMPERATURES = (1e-3, 1e3)  # between which one is looked for

Logits = Float[np.ndarray, "n c"]
Labels = Int[np.ndarray, " n"]


class CalibrationEvaluation(Evaluation):
    """The probabilities softmax(scale cos) of the classes of a dataset, with the model's own scale."""

    def __init__(self, zeroshot: ZeroshotEvaluation) -> None:
        self.zeroshot, self.dataset = zeroshot, zeroshot.dataset

    @classmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer, data: config.Data, cfg: config.Calibration) -> Self:
        """Classes and prompts are as in `ZeroshotEvaluation.prepare`."""
        wanted = config.Zeroshot(data=cfg.data, split=cfg.split, templates=cfg.templates, classnames=cfg.classnames)
        return cls(ZeroshotEvaluation.prepare(encoder, tokenizer, data, wanted))

    def run(self, params: Params) -> Results:
        """Of the images at odd places in the dataset: `ece` and `nll` with the model's scale, and `ece_calibrated` and
        `nll_calibrated` with logits divided by `temperature`, which has the lowest NLL on the images at even places.

        Raises ConfigError where fewer than two images can be read."""
        cosines, labels, index = self._cosines(params)
        logits = cosines * np.exp(np.float64(to_host(params["log_scale"])))
        odd = np.arange(len(logits)) % 2 == 1
        config.require(bool(odd.any()), "data.spec", self.dataset, "has fewer than two labelled images that can be read")
        temperature = best_temperature(logits[~odd], labels[~odd])
        before, after = logits[odd], logits[odd] / temperature
        values = {"nll": nll(before, labels[odd]), "nll_calibrated": nll(after, labels[odd])}
        errors = {"ece": ece(before, labels[odd]), "ece_calibrated": ece(after, labels[odd])}
        keys = [self.zeroshot.classes.keys[i] for i in index[odd]]
        means = {name: float(value.mean()) for name, value in values.items()}
        return Results({"images": len(keys), "temperature": temperature, **errors, **means}, examples=[Examples(keys, values)])

    def _cosines(self, params: Params) -> tuple[Logits, Labels, Labels]:
        """Of every image that has a label and can be read, with its label and its number, in the dataset's order."""
        encoder = self.zeroshot.encoder
        weights = np.asarray(self.zeroshot.class_embeddings(params), np.float64)
        rows = []
        for z, rest in encoder.stream(params, self.zeroshot.images):
            label, index = to_host(rest["label"]), to_host(rest["index"])
            used = (label >= 0) & (index >= 0)
            rows.append((to_host(z)[used].astype(np.float64) @ weights.T, label[used], index[used]))
        cosines, labels, index = (np.concatenate(column) for column in zip(*rows, strict=True))
        order = np.argsort(index)
        return cosines[order], labels[order], index[order]


def nll(logits: Logits, labels: Labels) -> Float[np.ndarray, " n"]:
    """`-log softmax(logits)` of each row's label."""
    top = logits.max(1)
    own = logits[np.arange(len(logits)), labels]
    return np.log(np.exp(logits - top[:, None]).sum(1)) + top - own


def best_temperature(logits: Logits, labels: Labels) -> float:
    """The T within TEMPERATURES with the lowest mean NLL of logits / T (Guo et al., 1706.04599)."""
    low, high = np.log(TEMPERATURES)
    found = scipy.optimize.minimize_scalar(lambda t: nll(logits / np.exp(t), labels).mean(), bounds=(low, high), method="bounded")
    return float(np.exp(found.x))


def ece(logits: Logits, labels: Labels) -> float:
    """The expected calibration error (1706.04599): the mean over rows of |accuracy - mean confidence| of the row's bin.

    Bins are (0, 1/15], (1/15, 2/15], ... of the highest probability. Equal highest ones share the hit."""
    confidence = np.exp(-nll(logits, logits.argmax(1)))
    right = expected_right(logits, labels)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence, BINS)).sum() / len(logits))
