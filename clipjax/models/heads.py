"""Heads: MLPs from a tower's pooled feature, before its projection, for the terms of the objective that name them."""

import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clipjax import config
from clipjax.models.layers import LayerNorm, Linear, Scope, activate, unit
from clipjax.models.runner import Runner

Side = Literal["image", "text"]
ByName = dict[str, Float[Array, "b w"]]


class TowerOutput(NamedTuple):
    """What a tower gives of its rows: unit vectors, float32."""

    embedding: Float[Array, "b e"]
    heads: ByName = {}
    predicted: ByName = {}  # the heads' after their predictors, of heads with one
    feature: Float[Array, "b d"] | None = None  # before the projection, where it is asked for


class Projector(nnx.Module):
    """Linear maps `up`, `middle` and `down`, or the last of these. A LayerNorm and the activation follow each but the last."""

    def __init__(self, scope: Scope, widths: tuple[int, ...], tower: config.ImageTower | config.TextTower) -> None:
        """`widths`: of the input, between the maps, and of the output."""
        self.activation: config.Activation = tower.activation
        self.names = (*("up", "middle")[: len(widths) - 2], "down")
        for name, inner, outer in zip(self.names, widths[:-1], widths[1:], strict=True):
            setattr(self, name, Linear(scope / name, (inner,), (outer,), std=inner**-0.5, bias=name == "down"))
            if name != "down":
                setattr(self, f"norm_{name}", LayerNorm(scope / f"norm_{name}", outer, tower.norm_eps))

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b w"]:
        for name in self.names[:-1]:
            x = activate(getattr(self, f"norm_{name}")(getattr(self, name)(x)), self.activation)
        return getattr(self, self.names[-1])(x)


class Heads(nnx.Module):
    """All heads of a model. Each has, under its name, the parts of `_widths` of its towers, and its logit scale if it has one."""

    def __init__(self, model: config.Model, scope: Scope) -> None:
        self._cfgs = model.heads
        for cfg in model.heads:
            parts: dict[str, Any] = {} if cfg.scale is None else {"log_scale": nnx.Param(jnp.float32(math.log(cfg.scale)))}
            for side in cfg.sides:
                for name, widths in _widths(cfg, model, side).items():
                    parts[name] = Projector(scope / cfg.name / name, widths, getattr(model, side))
            setattr(self, cfg.name, nnx.Dict(parts))

    @jax.named_scope("heads")
    def __call__(self, side: Side, feature: Float[Array, "b d"], runner: Runner) -> tuple[ByName, ByName]:
        """A tower's pooled features -> the unit vectors of its heads, and those after the predictors."""

        def run(projector: Projector, x: Array) -> Array:  # as a part of a tower with one token
            return runner.from_chunks(runner.around_layers(Projector.__call__, projector, runner.to_chunks(x, 1)), len(x))

        heads = {cfg.name: getattr(self, cfg.name) for cfg in self._cfgs if side in cfg.sides}
        found = {name: run(head[side], feature) for name, head in heads.items()}
        predictors = {name: head[f"{side}_predictor"] for name, head in heads.items() if f"{side}_predictor" in head}
        predicted = {name: unit(run(predictor, found[name])) for name, predictor in predictors.items()}
        return {name: unit(x) for name, x in found.items()}, predicted


def _widths(cfg: config.Head, model: config.Model, side: str) -> dict[str, tuple[int, ...]]:
    """The widths of a tower's projector and predictor, by their names in a parameter's path."""
    pooled = model.image.pooled_width if side == "image" else model.text.width
    widths = {side: (pooled, *[cfg.hidden] * (cfg.depth - 1), cfg.width)}
    return widths | ({f"{side}_predictor": (cfg.width, cfg.hidden, cfg.width)} if cfg.predictor else {})


def flops(model: config.Model, side: str) -> int:
    """FLOPs of a forward pass of all heads on one image, or on one text."""
    found = (w for cfg in model.heads if side in cfg.sides for w in _widths(cfg, model, side).values())
    return sum(2 * a * b for widths in found for a, b in itertools.pairwise(widths))
