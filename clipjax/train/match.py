"""Which parameters of a model come from other runs, by their names and shapes. No arrays are read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from clipjax import config, sharding
from clipjax.config.fields import nearest
from clipjax.models import clip, lora
from clipjax.models.positions import resized_image, resized_text

Shape = tuple[int, ...]
SCALARS = ("log_scale", "bias")
PARTS = ("image", "text", "decoder", *SCALARS)  # of a tree of parameters
TOWERS = ("image", "text")
# Fields of a tower that may differ: those of training and of sizes, and those that the arrays' names and shapes show.
SHOWN = r"image_size|length|patch_dropout|unlock|lora(\..*)?"
SHOWN += r"|width|depth|heads|mlp_dim|embed_dim|patch_size|vocab_size|queries|pre_norm|patch_bias|projection_bias"
ROWS = 8  # that a message has at most


@dataclass(frozen=True)
class Source:
    """A checkpoint of another run whose weights a new one takes."""

    field: str  # of the configuration, that names it
    name: str  # as it is named there
    path: Path
    step: int  # finished steps
    run: config.Run  # as it was when the checkpoint was saved
    parts: tuple[str, ...]  # of the tree of parameters, that come from here

    def __str__(self) -> str:
        return f"{self.path}@{self.step}"


@dataclass(frozen=True)
class Match:
    """What becomes of the parameters of a model (ours) and of its sources (theirs), by their paths."""

    came: dict[str, Shape] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # their shape, and ours
    fresh: dict[str, Shape] = field(default_factory=dict)  # ours, as a run that starts from nothing has them
    left: dict[str, Shape] = field(default_factory=dict)  # theirs
    notes: list[str] = field(default_factory=list)


def match(run: config.Run, sources: Sequence[Source]) -> Match:
    """What becomes of each parameter of `run.model`. Raises ConfigError, with the nearest names and with patterns for init.allow,
    for what has no match and may not be new or left, and for fields that change what the weights compute.
    """
    assert run.init is not None, "without init nothing comes"
    ours, found = shapes(run.model), Match()
    given = {part for source in sources for part in source.parts}
    found.fresh.update({name: shape for name, shape in ours.items() if _part(name) not in given})
    wrong: dict[str, str] = {}  # name of a parameter or field -> what is wrong with it
    for source in sources:
        theirs = {name: shape for name, shape in shapes(lora.without(source.run.model)).items() if _part(name) in source.parts}
        wanted = {name: shape for name, shape in ours.items() if _part(name) in source.parts}
        _decide_scalars(wanted, theirs, source, found)
        _decide(wanted, theirs, run.model, source, found, wrong)
        wrong |= _fields(run.model, source)
    refused = {name: row for name, row in wrong.items() if not any(re.fullmatch(p, name) for p in run.init.allow)}
    if refused:
        raise config.ConfigError(_refusal(sources, refused))
    return found


def shapes(model: config.Model) -> dict[str, Shape]:
    """The shape of each parameter, by its path."""
    tree = jax.eval_shape(lambda: clip.init(model, 0))
    return {sharding.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}


def resized(name: str, values: np.ndarray, model: config.Model, before: config.Model) -> np.ndarray:
    """The positions `name` of the model `before`, as those of `model`."""
    if name == "image/positions":
        return resized_image(values, before.image.class_token, model.image.side)
    if name == "text/positions":
        return resized_text(values, model.text.length, before.text.pool == "cls")
    return resized_text(values, model.text.length - 1, False)  # the captioning head's mask tokens: one for each predicted token


def _is_resized(name: str, model: config.Model, before: config.Model) -> bool:
    """Whether positions may be resized: the rows of both are those of the same things."""
    match name:
        case "image/positions":
            return model.image.width == before.image.width and model.image.class_token == before.image.class_token
        case "text/positions":
            return model.text.width == before.text.width and (model.text.pool == "cls") == (before.text.pool == "cls")
        case "decoder/masks":
            return model.text.width == before.text.width
    return False


def _part(name: str) -> str:
    return name.partition("/")[0]


def _decide_scalars(wanted: dict[str, Shape], theirs: dict[str, Shape], source: Source, found: Match) -> None:
    """Scale and bias belong together: without a bias there, both are new; without one here, it is left. Takes out what it
    decides."""
    if "bias" in wanted and "bias" not in theirs and "log_scale" in theirs:
        for name in SCALARS:
            found.fresh[name] = wanted.pop(name)
        found.left["log_scale"] = theirs.pop("log_scale")
        remedy = "its scale is that of a softmax: scale and bias are new, model.init_scale and model.init_bias"
        found.notes.append(f"{source} has no bias, and {remedy}")
    if "bias" in theirs and "bias" not in wanted:
        found.left["bias"] = theirs.pop("bias")
        found.notes.append(f"the bias of {source} is left: model.init_bias is None, as a softmax does not see it; its scale came")


def _decide(
    wanted: Mapping[str, Shape],
    theirs: Mapping[str, Shape],
    model: config.Model,
    source: Source,
    found: Match,
    wrong: dict[str, str],
) -> None:
    """Enters the parameters of one source into `found`, and into `wrong` those without a match."""
    for name, shape in wanted.items():
        other = theirs.get(name)
        if other == shape:
            found.came[name] = shape
        elif other is not None and _is_resized(name, model, source.run.model):
            found.resized[name] = other, shape
        else:
            found.fresh[name] = shape
            is_adapter = name.endswith((f"/{lora.LORA_A}", f"/{lora.LORA_B}"))  # new by design: the start's are merged
            there = _nearest(name, theirs, wanted) if other is None else list(other)
            wrong |= {} if is_adapter else {name: f"{list(shape)} here, {there} there"}
            found.left.update({} if other is None else {name: other})
    for name, shape in theirs.items():
        if name not in wanted:
            found.left[name] = shape
            wrong[name] = f"{list(shape)} there, {_nearest(name, wanted, theirs)} here"


def _nearest(name: str, known: Mapping[str, Shape], matched: Mapping[str, Shape]) -> str:
    """That there is no such name among the `known`, and the nearest of those that have no match either."""
    single = [other for other in known if other not in matched and _part(other) == _part(name)]
    return f"none of this name (the nearest is {nearest(name, single)})" if single else "none of this name"


def _fields(model: config.Model, source: Source) -> dict[str, str]:
    """The fields of the towers that came, which change what the weights compute, and differ: full name -> what differs."""
    wrong = {}
    for tower in TOWERS:
        if tower in source.parts:
            before, now = (_values(getattr(m, tower)) for m in (source.run.model, model))
            names = [n for n in {**before, **now} if before.get(n) != now.get(n) and not re.fullmatch(SHOWN, n)]
            wrong |= {f"model.{tower}.{n}": f"{before.get(n, 'absent')} -> {now.get(n, 'absent')}" for n in names}
    return wrong


def _values(tower: config.ImageTower | config.TextTower) -> dict[str, str]:
    rows = (line.partition(" = ") for line in config.lines(tower))
    return {name: value for name, _, value in rows}


def _refusal(sources: Iterable[Source], wrong: Mapping[str, str]) -> str:
    rows = [f"{name}: {what}" for name, what in wrong.items()]
    if len(rows) > ROWS:
        rows[ROWS:] = [f"and {len(rows) - ROWS:,} more"]
    named = ", ".join(f"{source.field} = {source.name!r}" for source in sources)
    remedy = "change the model (clipjax.config.start_from has that of the start), or let these be new, left or another by"
    return "\n  ".join([f"{named}: the weights do not fit; {remedy} init.allow = {_patterns(wrong)}:", *rows])


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match these names: each by itself, or by its part of the model where a part has many."""
    names = list(names)
    parts = {name: ("model." if name.startswith("model.") else f"{_part(name)}/") for name in names}
    many = {part for part in parts.values() if sum(p == part for p in parts.values()) > 3 and part != "model."}
    return tuple(dict.fromkeys(f"{parts[name]}.*" if parts[name] in many else name for name in names))
