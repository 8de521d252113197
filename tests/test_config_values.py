"""What a field takes: values of its type, as Python's own, and nothing that config.json could not give back.

The first tests walk all configuration classes, so that a field which is added later is tested as it is.
"""

import dataclasses
import json
import math
import pickle
import re
import types
import typing
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from clipjax import config
from clipjax.config import ConfigError, Data, ImageTower, Model, Optim, Run, Term, Train, TrainingEvaluation
from clipjax.config.fields import Strict
from clipjax.config.load import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
NEEDED = {"spec": "emoji", "path": "tokenizer.json", "pattern": ".*", "examples": 10, "name": "a", "count": 10}

SET = dict(name="a", evaluation=config.Retrieval(data="emoji"), main=("a",))
ONE_OF_SEVERAL = {  # what a class needs of fields that all have defaults, or of those that others have with other values
    config.Init: {"run": "RUN"},
    config.SuiteSet: SET,
    config.SuiteMean: {"name": "mean", "of": ("a",)},
    config.Suite: {"sets": (config.SuiteSet(**SET),)},
}


def classes(base: type = Strict) -> list[type]:
    """Every configuration class of clipjax's own that has objects."""
    found = [cls for direct in base.__subclasses__() for cls in (direct, *classes(direct))]
    own = [cls for cls in found if cls.__module__.startswith("clipjax.") and "__dataclass_fields__" in vars(cls)]
    return list(dict.fromkeys(cls for cls in own if cls not in (Term, config.Pairs, TrainingEvaluation)))


def made(cls: type, **values: object) -> Strict:
    """An object of a class. What it needs are the values that its fields of these names take."""
    needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    given = {name: NEEDED[name] if name in NEEDED else Data(spec="emoji") for name in needed}
    return cls(**(given | ONE_OF_SEVERAL.get(cls, {}) | values))


FIELDS = [(cls, f.name) for cls in classes() for f in dataclasses.fields(cls)]


def allowed(hint: object) -> set[type]:
    """The types of the values that a hint allows, as far as it is no class of clipjax's."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in parts for kind in allowed(part)}
    if origin is typing.Literal:
        return {type(part) for part in parts}
    return {origin or hint}


WRONG = (3, 0.5, True, "sqaush", None, {"a": 1}, math.nan, object(), b"b", {"a"}, np.zeros(3), ("sqaush",), [None], (object(),))


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS])
def test_every_field_refuses_what_is_not_of_its_type_and_says_its_name(cls, name):
    hint = typing.get_type_hints(cls)[name]
    kinds, refused = allowed(hint), 0
    for value in WRONG:
        fits = type(value) in kinds or (float in kinds and type(value) is int) or (tuple in kinds and type(value) is list)
        wrong_number = isinstance(value, float) and math.isnan(value)
        texts = isinstance(value, tuple) and all(isinstance(x, str) for x in value)
        of_text = texts and tuple[str, ...] in (hint, *typing.get_args(hint))
        wrong_content = isinstance(value, tuple | list) and not of_text
        if fits and not wrong_number and not wrong_content:
            continue
        with pytest.raises(ConfigError, match=rf"^{re.escape(cls.named(name))}(\.0)* = "):
            made(cls, **{name: value})
        refused += 1
    assert refused > 8


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_class_names_the_nearest_of_a_misspelt_field(cls):
    name = dataclasses.fields(cls)[-1].name
    with pytest.raises(ConfigError, match=rf"{name}s = 1: {cls.__name__} has no such field; the nearest is {name}$"):
        made(cls, **{f"{name}s": 1})


SPECS = "emoji, tfds:NAME[/CONFIG][:VERSION], wds:SHARDS, parquet:FILES, csv:FILES, tsv:FILES, "
SPECS += "karpathy:FILE.json[::IMAGES] or folder:DIR"
EVALUATIONS = ", ".join(f"{name}(...)" for name in config.TrainingEvaluation.admitted())
EVALUATIONS = " or ".join(EVALUATIONS.rsplit(", ", 1))
REFUSED = {
    "data.resize = 'sqaush': must be 'squash' or 'crop'; the nearest is 'squash'": lambda: Data(spec="emoji", resize="sqaush"),
    "model.image.activation = 'relu': must be 'gelu', 'gelu_tanh' or 'quick_gelu'; the nearest is 'gelu'": (
        lambda: ImageTower(activation="relu")
    ),
    "model.dtype = 'bf16': must be 'float32' or 'bfloat16'; the nearest is 'bfloat16'": lambda: Model(dtype="bf16"),
    "train.batch_size = 1000.0: must be a whole number: write 1000": lambda: Train(batch_size=1e3),
    "train.steps = True: must be a whole number": lambda: Train(steps=True),
    "train.steps = 2147483648: must be less than 2^31: steps are counted in 32 bits": lambda: Train(steps=2**31),
    "optim.lr = '1e-3': must be a number, without quotes": lambda: Optim(lr="1e-3"),
    "optim.lr = nan: must be a finite number": lambda: Optim(lr=math.nan),
    "optim.clip_norm = inf: must be a finite number or None": lambda: Optim(clip_norm=math.inf),
    "optim.schedule = 'cosine': must be Cosine(...), Rsqrt(...) or Constant(...)": lambda: Optim(schedule="cosine"),
    "optim.rules.0 = 'text/.*': must be Rule(...)": lambda: Optim(rules=["text/.*"]),
    "model.decoder.mlps = True: must be 1 or 2": lambda: config.Decoder(mlps=True),
    "model.image.mean = (0.5, 0.5): must have 3 values": lambda: ImageTower(mean=(0.5, 0.5)),
    "model.image.mean.1 = None: must be a number": lambda: ImageTower(mean=(0.5, None, 0.5)),
    "model.image.std = (0.5, 0.0, 0.5): must be positive: colours are divided by these": lambda: ImageTower(std=(0.5, 0, 0.5)),
    "model.image.queries = 0: must be positive": lambda: ImageTower(queries=0),
    "data.spec = '': must be " + SPECS: lambda: Data(),
    "data: is missing: Run(data=...)": lambda: Run(),
    "data.ids = 'captions': must be 'caption' or None": lambda: Data(spec="emoji", ids="captions"),
    "data.spec = 'pairs.tsv': must be " + SPECS + "; for this file tsv:pairs.tsv": (lambda: Data(spec="pairs.tsv")),
    "evals.0.data = 'coco': must be " + SPECS: (lambda: made(Run, evals=(config.Geometry(data="coco"),))),
    "data = {'spec': 'emoji'}: must be Data(...)": lambda: Run(data={"spec": "emoji"}),
    "data.spec = 'a\\udc80': must be Unicode text, which half of a surrogate pair is not": lambda: Data(spec="a\udc80"),
    "evals = Retrieval(...): must be a tuple, as (x,) for one value and () for none": (
        lambda: made(Run, evals=config.Retrieval(data="emoji"))
    ),
    "evals.0 = Softmax(...): must be " + EVALUATIONS: (lambda: made(Run, evals=(config.Softmax(),))),
    "objective.1 = Sigmoid: is the class: write Sigmoid()": lambda: made(Run, objective=(config.Softmax(), config.Sigmoid)),
    "objective.Softmax.prefixes = 64: must be a tuple or None, as (x,) for one value and () for none": (
        lambda: config.Softmax(prefixes=64)
    ),
    "objective.0 = 'Term': is not registered: call clipjax.register(Term, ...) in the file that defines it, before it is used": (
        lambda: made(Run, objective=(Term(kind="softmax"),))
    ),
    "evals.0.data = None: the run's own tsv:a.tsv has no splits: name other examples, as tsv:held_out.tsv, "
    "set data.split = train#0-95 and evals.0.split = train#95-100, or leave the evaluation out (--evals none)": lambda: Run(
        data=Data(spec="tsv:a.tsv"), evals=(config.Retrieval(),)
    ),
}


@pytest.mark.parametrize(("message", "make"), REFUSED.items())
def test_the_message_says_field_value_and_what_is_allowed(message, make):
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == message


class Loud(str):
    __slots__ = ()


def test_what_newcomers_write_becomes_what_is_stored():
    run = Run(
        data=Data(spec=Loud("emoji"), workers=np.int64(3)),
        model=Model(image=ImageTower(mean=[0, 1, 2])),
        objective=[config.Softmax(prefixes=[64, 512])],
        optim=Optim(lr=1, weight_decay=np.float32(0.5), eps=np.float64(1e-6), rules=[config.Rule(pattern=".*")]),
        evals=[config.Retrieval(every=np.int32(7))],
    )
    assert (type(run.data.spec), type(run.data.workers), run.model.image.mean) == (str, int, (0.0, 1.0, 2.0))
    assert run.objective == (config.Softmax(prefixes=(64, 512)),)
    assert {type(x) for x in (run.optim.lr, run.optim.weight_decay, run.optim.eps, *run.model.image.mean)} == {float}
    assert (run.evals, run.evals[0].every) == ((config.Retrieval(every=7),), 7)
    again = config.from_json(config.to_json(run))
    assert (again, config.to_json(again)) == (run, config.to_json(run))
    assert config.identity_differences(again, run) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_packaged_config_comes_back_from_its_json(path):
    run = load_config(str(path))
    again = config.from_json(config.to_json(run))
    assert (again, config.lines(again)) == (run, config.lines(run))
    assert pickle.loads(pickle.dumps(run)) == deepcopy(run) == run


def test_a_class_of_a_user_s_own_is_checked_without_calling_its_base(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Hinge(Term):
        kind: typing.Literal["hinge"] = "hinge"
        margin: float = 1
        frozen: "list[str] | None" = None

        def __post_init__(self):
            object.__setattr__(self, "seen", self.margin)

    assert (Hinge().margin, type(Hinge().margin), Hinge(margin=2).seen) == (1.0, float, 2.0)
    assert Hinge("hinge", 3, ["image"]).frozen == ["image"]
    for wrong, name in ((dict(margin="1"), "margin = '1': must be a number"), (dict(frozen=3), "frozen = 3: must be list")):
        with pytest.raises(ConfigError, match=f"^objective.Hinge.{name}"):
            Hinge(**wrong)
    with pytest.raises(TypeError, match="positional"):
        Hinge("hinge", 3, None, 4)


EARLIER = json.loads((Path(__file__).with_name("configs") / "earlier.json").read_text())


def remade(value: object) -> object:
    """A configuration from its values, by way of every check."""
    if isinstance(value, tuple):
        return tuple(map(remade, value))
    if isinstance(value, Strict):
        return type(value)(**{f.name: remade(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def differences(written: object, now: object, name: str = "") -> list[str]:
    """The places where `now` has not what is `written`. Fields that came later are no differences."""
    if isinstance(written, dict):
        return [d for key, value in written.items() for d in differences(value, now[key], f"{name}.{key}")]
    if isinstance(written, list):
        rows = zip(written, now, strict=True)
        return [d for i, (one, other) in enumerate(rows) for d in differences(one, other, f"{name}.{i}")]
    return [] if written == now else [name]


@pytest.mark.parametrize("name", EARLIER)
def test_every_config_json_of_an_earlier_commit_opens(name):
    """Written by the code of that commit: every set of keys, and every choice, that clipjax ever wrote is in one of them."""
    run = config.from_json(json.dumps(EARLIER[name]))
    assert remade(run) == run
    assert differences(EARLIER[name], json.loads(config.to_json(run))) == []
