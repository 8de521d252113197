"""Other runs' weights as the start of a new workdir: `Init(run=..., image=..., text=...)`.

Towers, captioning head, scale and bias come from `run`; a tower that `image` or `text` names comes from there instead. What none
of them gives is new. Optimizer, step and place in the data begin anew.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from clipjax import config, sharding
from clipjax.restore import load_weights, look_up
from clipjax.train.match import PARTS, TOWERS, Match, Shape, Source, match, resized
from clipjax.train.origin import Origin, naming, restore_origin
from clipjax.train.state import TrainState, abstract_state, initial_state

NAMES = 5  # of arrays, that a line of the report lists
ROUNDING = 1e-3  # of a scale that was at its bound and stored in half precision, relative


@dataclass(frozen=True)
class Weights:
    """The weights that a new workdir starts from."""

    sources: tuple[Source, ...]
    found: Match
    step: int = 0  # finished steps of the run that starts from them

    def __str__(self) -> str:
        return ", ".join(f"{source} ({source.field})" for source in self.sources)

    def report(self, run: config.Run) -> list[str]:
        """Lines that say how many parameters came, were resized, are new and were left, and what else their user must know."""
        found = self.found
        changed = [f"{name} {list(old)} -> {list(new)}, {_how(name, old, new)}" for name, (old, new) in found.resized.items()]
        rows = [
            _row("came", found.came),
            _row("resized", {name: now for name, (_, now) in found.resized.items()}, "; ".join(changed)),
            _row("new", found.fresh, _names(found.fresh)),
            _row("left", found.left, _names(found.left)),
        ]
        return rows + found.notes + self._differences(run)

    def _differences(self, run: config.Run) -> list[str]:
        """What is not of the parameters: moving averages, the tokenizer, and another way to make images square."""
        notes = [f"the weights of {source} are its moving average" for source in self.sources if source.run.optim.ema is not None]
        if self.tokenizer is not None:
            notes.append(f"the tokenizer is that of {self.tokenizer}; tokenizer.clean = {run.tokenizer.clean!r}")
        for source in self.sources:
            before, now = source.run.data.resize, run.data.resize
            if "image" in source.parts and before != now:
                notes.append(f"data.resize: {before!r} in {source} -> {now!r} here")
        return notes

    @property
    def tokenizer(self) -> Path | None:
        """The workdir whose tokenizer the run has: that which its token vectors are of. None: they are new."""
        return next((s.path for s in self.sources if "text" in s.parts and "text/tokens" in self.found.came), None)


def find_weights(run: config.Run) -> Weights:
    """The checkpoints that `run.init` names, and which of their weights come.

    Raises ConfigError where there is no such checkpoint or it can't be read, where its weights do not fit (`match`), where its
    texts were cleaned in another way, and for a scale that model.max_scale would change.
    """
    sources = tuple(_sources(run))
    weights = Weights(sources, match(run, sources))
    for source in sources:
        if source.path == weights.tokenizer and "text" in source.parts:
            before, now = source.run.tokenizer.clean, run.tokenizer.clean
            remedy = f"the token vectors of {source} are of texts that were cleaned by {before!r}: set it to that"
            config.require(before == now, "tokenizer.clean", now, remedy)
        if "log_scale" in weights.found.came and "log_scale" in source.parts:
            _check_scale(run.model, source)
    return weights


def started_state(run: config.Run, start: Origin | Weights, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The first state of a run that starts from others: the whole state of one, or a new one with weights, which are read shard
    by shard. Raises ConfigError where they can't be read.
    """
    if isinstance(start, Origin):
        return restore_origin(run, start, abstract_state(run, tx, mesh))
    given: dict[str, Any] = {}
    for source in start.sources:
        _, params = _read(source, mesh, source.parts)
        leaves = {sharding.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
        given |= {name: leaf for name, leaf in leaves.items() if name in start.found.came}
        for name in leaves.keys() & start.found.resized.keys():
            given[name] = resized(name, _on_host(leaves[name], mesh), run.model, source.run.model)
    return initial_state(run, tx, mesh, given)


def _sources(run: config.Run) -> list[Source]:
    """The checkpoints that `run.init` names, with the parts that come from each."""
    assert run.init is not None, "without init nothing comes"
    named = {part: name for part in TOWERS if (name := getattr(run.init, part))}
    wanted = {f"init.{part}": (name, (part,)) for part, name in named.items()}
    if run.init.run:
        wanted = {"init.run": (run.init.run, tuple(part for part in PARTS if part not in named))} | wanted
    found = []
    for field, (name, parts) in wanted.items():
        with naming(field, name):
            path, step, before = look_up(name, field)
        for tower in set(parts) & {*TOWERS} if before.model.towers != "both" else ():
            remedy = f"has no {tower} tower: name the run of one by init.{tower}, or leave init.run out and give init.image"
            remedy += " or init.text: the other tower is then new"
            config.require(before.model.towers == tower, field, name, remedy)
        found.append(Source(field, name, path, step, before, parts))
    return found


def _check_scale(model: config.Model, source: Source) -> None:
    """Raises ConfigError for a scale that the clamp of `model` would change at the first update."""
    alone = sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])
    scale = math.exp(float(_read(source, alone, ("log_scale",))[1]["log_scale"]))
    highest = math.inf if model.max_scale is None else model.max_scale
    fits = model.max_scale is None or 1 - ROUNDING <= scale <= highest * (1 + ROUNDING)
    remedy = f"the scale of {source} is {scale:.5g}, which the first update would clamp to [1, {highest:g}]: set it to None"
    config.require(fits, "model.max_scale", model.max_scale, remedy)


def _read(source: Source, mesh: Mesh, parts: tuple[str, ...]) -> tuple[config.Model, Any]:
    with naming(source.field, source.name):
        return load_weights(source.path, source.step, source.run, mesh, parts)


def _on_host(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """The whole of a sharded array, on each host."""
    return np.asarray(jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(array))


def _row(what: str, shapes: Mapping[str, Shape], more: str = "") -> str:
    numbers = sum(map(math.prod, shapes.values()))
    return f"{what}: {numbers:,} parameters in {len(shapes):,} arrays" + (f": {more}" if more else "")


def _names(names: Collection[str]) -> str:
    """The names; only their parts of the model where they are many."""
    if len(names) <= NAMES:
        return ", ".join(names)
    counts = Counter(name.partition("/")[0] for name in names)
    return ", ".join(name if name in names else f"{name}/... ({count:,})" for name, count in counts.items())


def _how(name: str, old: Shape, new: Shape) -> str:
    if name == "image/positions":
        return "bicubic"
    return "the first ones" if new < old else "linear in between"
