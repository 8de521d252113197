"""A configuration that starts from another run's weights, and the names of runs."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.config.fields import require
from clipjax.files import as_path, reach

if TYPE_CHECKING:
    from clipjax.config import Model, Run, Term

TOKENIZER = "tokenizer.json"  # of a workdir
OF_TRAINING = ("lora", "unlock")  # fields of a tower that say what trains: a start has neither


def split_name(name: str, field: str = "RUN") -> tuple[Path, int | None]:
    """`RUN` or `RUN@STEP` -> the workdir, and the step or None.

    Raises ConfigError, with `field` for the name, unless it is a workdir that can be read.
    """
    path, at, step = name.rpartition("@")
    workdir, step = (as_path(path), int(step)) if at and step.isdigit() else (as_path(name), None)
    found = reach(workdir, (workdir / "config.json").exists)
    require(found, field, name, "is not a workdir of `clipjax train`: it has no config.json")
    return workdir, step


def start_from(run: str | os.PathLike, **changes: Any) -> "Run":
    """A run that starts from the weights of `run`, RUN or RUN@STEP: its model, its tokenizer, its way to make images square, and
    `init = Init(run=RUN)`. The objective is a sigmoid loss for a model with a bias, else a softmax loss, and captioning for one
    with a captioning head. All else has its defaults.

    `changes`: fields of the run. A dict changes what it names, at any depth, as `model=dict(image=dict(image_size=336))`; another
    value takes the field's place, as `data=Data(spec="tsv:pairs.tsv")`, which then has its own `resize`. The fields `image` and
    `text` of `init` name the runs of the towers and the tokenizer. The bias follows the objective: a sigmoid loss on a model
    without one begins with SigLIP's scale 10 and bias -10, and a softmax loss leaves it out.

    Raises ConfigError where there is no such run, and for what a run can't be.
    """
    from clipjax.config import BPE, Data, Init, Run

    init = _changed(Init(run=os.fspath(run)), changes.pop("init", {}))
    sources = {name: _read(wanted, f"init.{name}") for name in ("run", "image", "text") if (wanted := getattr(init, name))}
    image, text = sources.get("image") or sources.get("run"), sources.get("text") or sources.get("run")
    given = changes.pop("model", {})
    model = _changed(_model(sources), given)
    objective = changes.pop("objective", None) or _objective(model)
    if isinstance(given, dict):
        model = _with_bias(model, objective, given)
    of_data = changes.pop("data", {})
    of_data = dict(spec="") | of_data if isinstance(of_data, dict) else of_data
    data = _changed(Data(spec="emoji", resize=image.data.resize if image else "squash"), of_data)
    tokenizer = BPE() if text is None else text.tokenizer
    return _changed(Run(data=data, model=model, objective=objective, tokenizer=tokenizer, init=init), changes)


def _read(name: str, field: str) -> "Run":
    """The parts of a run's configuration that its weights need. Its objective and evaluations may be of a user's own classes."""
    from clipjax.config import TokenizerFile, from_json

    workdir, _ = split_name(name, field)
    tree = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    data = {"spec": "emoji", "resize": tree.get("data", {}).get("resize", "squash")}
    run = from_json(json.dumps({"data": data, "model": tree.get("model", {}), "tokenizer": tree.get("tokenizer")}))
    tokenizer = TokenizerFile(path=os.fspath(workdir / TOKENIZER), clean=run.tokenizer.clean)
    return dataclasses.replace(run, tokenizer=tokenizer, model=_trained_whole(run.model))


def _trained_whole(model: "Model") -> "Model":
    """The model without what says that only a part of it trains, and without heads and classes, which are of the objective."""
    towers = {}
    for name in ("image", "text"):
        tower = getattr(model, name)
        own = {f.name: f.default for f in dataclasses.fields(tower) if f.name in OF_TRAINING}
        towers[name] = dataclasses.replace(tower, **own)
    return dataclasses.replace(model, heads=(), classes=None, **towers)


def _model(sources: dict[str, "Run"]) -> "Model":
    """The model whose parts are of the runs that `init`'s fields name. A tower that none gives has its defaults."""
    from clipjax.config import Model, TextTower

    towers, whole = {}, sources.get("run")
    for name in ("image", "text"):
        source = sources.get(name) or whole
        if source is not None:
            source.model.require_towers(name)
            towers[name] = getattr(source.model, name)
    if "image" in towers and "text" not in towers:
        towers["text"] = TextTower(embed_dim=towers["image"].embed_dim or towers["image"].width)
    base = next(iter(sources.values())).model if whole is None else whole.model
    fresh = {} if whole is not None else dict(decoder=None, init_bias=None, init_scale=Model().init_scale)
    return dataclasses.replace(base, towers="both", **towers, **fresh)


def _objective(model: "Model") -> tuple["Term", ...]:
    from clipjax.config import Caption, Sigmoid, Softmax

    contrastive = Softmax() if model.init_bias is None else Sigmoid()
    return (contrastive,) if model.decoder is None else (contrastive, Caption())


def _with_bias(model: "Model", objective: tuple["Term", ...], given: dict[str, Any]) -> "Model":
    """The model with the bias that the objective asks for, and without one that it does not see, but for what is `given`."""
    from clipjax.config import Sigmoid

    sigmoid = any(isinstance(term, Sigmoid) for term in objective)
    own = any(term.members[term.kind].source is not None for term in objective)  # a user's own term may see the bias
    changes: dict[str, Any] = {}
    if sigmoid and model.init_bias is None:
        changes = dict(init_scale=10.0, init_bias=-10.0, max_scale=None)  # 2303.15343, section 3.2
    elif not (sigmoid or own):
        changes = dict(init_bias=None)
    return dataclasses.replace(model, **{name: value for name, value in changes.items() if name not in given})


def _changed(now: Any, changes: Any) -> Any:
    """What a dict changes of `now`, at any depth; any other value takes its place."""
    if not (isinstance(changes, dict) and dataclasses.is_dataclass(now) and not isinstance(now, type)):
        return changes
    fields = {name: _changed(getattr(now, name, None), value) for name, value in changes.items()}
    return dataclasses.replace(now, **fields)
