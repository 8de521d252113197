"""The configuration of a run: frozen dataclasses that check their values.

A config file has one function `config() -> Run`. `to_json` and `from_json` are exact inverses, so the config.json of a workdir
rebuilds its run. Fields declared with `free` may change when a run resumes; the others are its *identity*, and must stay.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clipjax.config.augment import Augment, TextAugment, View
from clipjax.config.data import BPE, Clean, Data, Filter, Part, Tokenizer, TokenizerFile
from clipjax.config.embeddings import check_embeddings
from clipjax.config.evals import Captioning, Geometry, Retrieval, TrainingEvaluation, Zeroshot, check_best
from clipjax.config.fields import ConfigError, Strict, free, require
from clipjax.config.model import Attention, Classes, Decoder, Head, Model
from clipjax.config.objective import (
    CUA,
    CUAXU,
    Alignment,
    Caption,
    Classify,
    CrossUniformity,
    Cwcl,
    Cyclip,
    Decoupled,
    Distillation,
    HardNegative,
    Isogclr,
    MultiPositive,
    Preserve,
    Sigmoid,
    Softmax,
    Sogclr,
    Uniformity,
    check_objective,
)
from clipjax.config.pairs import Barlow, MannWhitney, Mixup, MultiSimilarity, MultiView, Repulsion, Siamese, Swap, Symile
from clipjax.config.start import start_from
from clipjax.config.suite import Suite, SuiteMean, SuiteSet
from clipjax.config.tasks import Calibration, Choice, Composed, Instance, Probe, RunSuite, Transfer
from clipjax.config.term import Pairs, Remembering, Term
from clipjax.config.towers import SIZES, Activation, ImageTower, Lora, TextTower, size
from clipjax.config.train import RULES, Constant, Cosine, Init, Mesh, Optim, Rsqrt, Rule, Train, freezing
from clipjax.config.unions import registered, require_registered

__all__ = [
    "BPE", "CUA", "CUAXU", "RULES", "SIZES", "Activation", "Alignment", "Attention", "Augment", "Barlow", "Calibration",
    "Caption", "Captioning", "Choice", "Classes", "Classify", "Clean", "Composed", "ConfigError", "Constant", "Cosine",
    "CrossUniformity", "Cwcl", "Cyclip", "Data", "Decoder", "Decoupled", "Distillation", "Filter", "Geometry", "HardNegative",
    "Head", "ImageTower", "Init", "Instance", "Isogclr", "Lora", "MannWhitney", "Mesh", "Mixup", "Model", "MultiPositive",
    "MultiSimilarity", "MultiView", "Optim", "Pairs", "Part", "Preserve", "Probe", "Remembering", "Repulsion", "Retrieval",
    "Rsqrt", "Rule", "Run", "RunSuite", "Siamese", "Sigmoid", "Softmax", "Sogclr", "Suite", "SuiteMean", "SuiteSet", "Swap",
    "Symile", "Term", "TextAugment", "TextTower", "Tokenizer", "TokenizerFile", "Train", "TrainingEvaluation", "Transfer",
    "Uniformity", "View", "Zeroshot", "from_json", "identity_differences", "lines", "require", "size", "start_from",
    "to_json",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run(Strict, prefix=""):
    """Everything that defines a run."""

    seed: int = 0  # of the initial weights, the order of the data and all noise
    data: Data  # images and captions
    tokenizer: Tokenizer = BPE()  # from captions to tokens
    model: Model = field(default_factory=Model)  # the towers
    objective: tuple[Term, ...] = (Softmax(),)  # weighted terms that add up
    optim: Optim = Optim()  # optimizer, schedule, and rules by parameter name
    train: Train = Train()  # steps, batch size, cadences
    evals: tuple[TrainingEvaluation, ...] = free(())  # evaluations during training
    mesh: Mesh = Mesh()  # how devices share the work
    init: Init | None = free(None)  # other runs' weights, or the state of one, to start from; None: new weights

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "must lie in [0, 2^32)")
        check_objective(self.objective, self.model, self.data)
        check_embeddings(self.model, self.data)
        for i, evaluation in enumerate(self.evals):
            evaluation.require_member(f"evals.{i}")
            evaluation.check_data(self.data, f"evals.{i}")
        check_best(self.train.best, self.evals, self.data)
        schedule = self.optim.schedule
        if isinstance(schedule, Cosine):
            enough = schedule.warmup < self.train.steps
            require(enough, "optim.schedule.warmup", schedule.warmup, f"must be less than train.steps = {self.train.steps}")
        else:
            ramps = schedule.warmup + schedule.cooldown
            enough = ramps <= self.train.steps
            remedy = f"with a warm-up of {schedule.warmup} steps must fit into train.steps = {self.train.steps}"
            require(enough, "optim.schedule.cooldown", schedule.cooldown, remedy)

    @property
    def captioning(self) -> bool:
        """Whether a term of the objective asks for captions."""
        return any(isinstance(term, Caption) and term.weight for term in self.objective)

    @property
    def embedded(self) -> Literal["image", "text"] | None:
        """The tower for which data.embeddings stand."""
        if self.data.embeddings is None:
            return None
        return "image" if self.model.image.unlock == 0 else "text"

    @property
    def optim_in_use(self) -> Optim:
        """The optimizer as the train step uses it: with the rules that the model's `lora` and `unlock` stand for."""
        return dataclasses.replace(self.optim, rules=(*freezing(self.model), *self.optim.rules))

    @property
    def model_in_use(self) -> Model:
        """The model as the train step runs it: without a captioning head that no term asks for."""
        return self.model if self.captioning else dataclasses.replace(self.model, decoder=None)


UNIONS = (Term, TrainingEvaluation)  # a config file can add its own classes to these: `clipjax.register`


def to_json(run: Run) -> str:
    """The run as JSON, one field a line. If it uses registered classes, `registered` lists them and their files."""
    foreign = registered(run, UNIONS)
    return json.dumps(dataclasses.asdict(run) | ({"registered": foreign} if foreign else {}), indent=2) + "\n"


def from_json(text: str) -> Run:
    """The run that `to_json` wrote.

    Raises ConfigError for an unknown or ill-typed field, for a missing field that has no default (a `kind`, a pattern, a path),
    and for a registered class that is not registered now. Such a class is never imported from the file that is named: opening a
    run executes no code.
    """
    import pydantic  # not above: the step benchmark runs without pydantic

    try:
        tree = json.loads(text)
    except ValueError:
        tree = None  # pydantic says what is wrong with it
    try:
        if isinstance(tree, dict) and "registered" in tree:
            names = {"registered": tree.pop("registered")}
            names = pydantic.TypeAdapter(dict[str, dict[str, dict[str, dict[str, str]]]]).validate_python(names, strict=True)
            require_registered(names["registered"], UNIONS)
            text = json.dumps(tree)
        return pydantic.TypeAdapter(Run).validate_json(text, strict=True)
    except pydantic.ValidationError as e:
        raise ConfigError("config.json: " + "; ".join(_row(error["type"], error) for error in e.errors())) from e


def _row(kind: str, error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as text: field, value and what is wrong."""
    if kind == "value_error":  # a ConfigError, which says all that itself
        return str(error["ctx"]["error"])
    name = ".".join(map(str, error["loc"]))
    if kind in ("missing", "union_tag_not_found"):
        return f"{name}{'.kind' * (kind != 'missing')}: is missing"
    return f"{name} = {error['input']!r}: {error['msg']}" if name else error["msg"]


def lines(config: Any, prefix: str = "") -> list[str]:
    """One line for each leaf, as `optim.lr = 0.001`: for logs, differences and golden files."""
    return [f"{name} = {value!r}" for name, value, _ in _leaves(config, prefix, False)]


def identity_differences(saved: Run, now: Run) -> list[str]:
    """The identity fields in which two runs differ, each as `field: saved -> now`. Free fields and `train.steps` are left out."""
    before = {name: value for name, value, is_free in _leaves(saved, "", False) if not is_free}
    after = {name: value for name, value, is_free in _leaves(now, "", False) if not is_free}
    names = [n for n in {**before, **after} if before.get(n, ...) != after.get(n, ...) and n != "train.steps"]
    return [f"{n}: {before.get(n, 'absent')!r} -> {after.get(n, 'absent')!r}" for n in names]


def _leaves(value: Any, name: str, is_free: bool) -> list[tuple[str, Any, bool]]:
    if dataclasses.is_dataclass(value):
        children = [(f.name, getattr(value, f.name), is_free or "free" in f.metadata) for f in dataclasses.fields(value)]
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        children = [(str(i), child, is_free) for i, child in enumerate(value)]
    else:
        return [(name, value, is_free)]
    return [leaf for key, child, f in children for leaf in _leaves(child, f"{name}.{key}" if name else key, f)]
