"""What an evaluation is: a dataset that is prepared once, and metrics of it with any weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float
from PIL import Image

from clipjax import config
from clipjax.data.tokenizer import Tokenizer
from clipjax.evals.encoder import Encoder
from clipjax.models.clip import Params

Metrics = dict[str, float | list[float] | None]  # None: the metric is not defined; a list is a curve


@dataclass(frozen=True)
class Examples:
    """What each of n queries (an image, a caption) gave to the metrics: what comparisons of two runs draw from."""

    keys: Sequence[str]  # one a query; two runs' queries are matched by them
    values: Mapping[str, Float[np.ndarray, " n"]]  # by the name of the metric: of the same query order. NaN: it does not count
    groups: Sequence[str] | None = None  # queries of one group are drawn together, as the captions of an image; None: alone
    facts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what else is known of each, as `class` and `predicted`


@dataclass(frozen=True)
class Results:
    """What an evaluation found with one set of weights. A subclass may also have lines to print and an image to draw."""

    metrics: Metrics
    examples: Sequence[Examples] = field(default=(), kw_only=True)  # one for each kind of query: captions, images
    image_name: ClassVar[str | None] = None  # under which TensorBoard shows the image; None: it is only written as a PNG

    def lines(self) -> Sequence[str]:
        """Examples of the results, printed during training."""
        return ()

    def draw(self, title: str) -> Image.Image | None:
        """An image of the results; None: there is none. Only the first process asks for it."""
        return None


class Evaluation(ABC):
    """One evaluation on one dataset. Training prepares it once and runs it many times."""

    dataset: str  # SPEC/SPLIT, or the SPEC alone where a dataset has no splits
    reads_text: ClassVar[bool] = True  # whether it needs a text tower

    @classmethod
    @abstractmethod
    def prepare(cls, encoder: Encoder, tokenizer: Tokenizer | None, data: config.Data, cfg: Any) -> Self:
        """Opens the dataset `data`. `cfg` is the TrainingEvaluation that asks for this evaluation. `tokenizer`: None of an image
        tower alone, and only where the evaluation reads no text.

        Raises ConfigError for what can't be evaluated, so that a run is refused before it trains.
        """

    @abstractmethod
    def run(self, params: Params) -> Results:
        """The results with these weights, the same on every process."""

    @classmethod
    def unavailable(cls) -> Mapping[str, str]:
        """The metrics that can't be computed on this machine, each with the remedy."""
        return {}
