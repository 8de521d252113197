"""Which class does the work of which evaluation's configuration."""

from clipjax import config
from clipjax.evals.captioning import Captioning
from clipjax.evals.evaluation import Evaluation
from clipjax.evals.geometry import Geometry
from clipjax.evals.retrieval import Retrieval
from clipjax.evals.zeroshot import Zeroshot

EVALUATIONS: dict[type[config.TrainingEvaluation], type[Evaluation]] = {
    config.Zeroshot: Zeroshot,
    config.Retrieval: Retrieval,
    config.Geometry: Geometry,
    config.Captioning: Captioning,
}

config.TrainingEvaluation.bind(EVALUATIONS)  # fails here, at import, where a class of clipjax's own has no row


def class_of(wanted: config.TrainingEvaluation) -> type[Evaluation]:
    """The class that does an evaluation's work: of this table, or registered by a config file."""
    return wanted.implementation
