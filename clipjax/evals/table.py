"""Which class does the work of which evaluation's configuration."""

from clipjax import config
from clipjax.evals.calibration import CalibrationEvaluation
from clipjax.evals.captioning import CaptioningEvaluation
from clipjax.evals.choice import ChoiceEvaluation
from clipjax.evals.composed import ComposedEvaluation
from clipjax.evals.evaluation import Evaluation
from clipjax.evals.geometry import GeometryEvaluation
from clipjax.evals.instance import InstanceEvaluation
from clipjax.evals.probe import ProbeEvaluation
from clipjax.evals.retrieval import RetrievalEvaluation
from clipjax.evals.suite import SuiteEvaluation
from clipjax.evals.transfer import TransferEvaluation
from clipjax.evals.zeroshot import ZeroshotEvaluation

EVALUATIONS: dict[type[config.TrainingEvaluation], type[Evaluation]] = {
    config.Zeroshot: ZeroshotEvaluation,
    config.Retrieval: RetrievalEvaluation,
    config.Geometry: GeometryEvaluation,
    config.Captioning: CaptioningEvaluation,
    config.Calibration: CalibrationEvaluation,
    config.Choice: ChoiceEvaluation,
    config.Composed: ComposedEvaluation,
    config.Instance: InstanceEvaluation,
    config.Probe: ProbeEvaluation,
    config.Transfer: TransferEvaluation,
    config.RunSuite: SuiteEvaluation,
}

config.TrainingEvaluation.bind(EVALUATIONS)  # fails here, at import, where a class of clipjax's own has no row


def class_of(wanted: config.TrainingEvaluation) -> type[Evaluation]:
    """The class that does an evaluation's work: of this table, or registered by a config file."""
    return wanted.implementation
