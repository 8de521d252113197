"""Which class does the work of which evaluation's configuration."""

import typing

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

if missing := set(typing.get_args(typing.get_args(config.Evaluation)[0])) - EVALUATIONS.keys():
    raise TypeError(f"evaluations that nothing is bound to: {', '.join(c.__name__ for c in missing)}")
