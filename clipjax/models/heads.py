"""Heads: MLPs from a tower's pooled feature, before its projection, for the terms of the objective that name them."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clipjax import config
from clipjax.models.layers import LayerNorm, Linear, Scope, activate, unit
from clipjax.models.runner import Runner

Side = Literal["image", "text"]
ByName = dict[str, Float[Array, "b w"]]


class Vectors(NamedTuple):
    """What a tower gives of its rows: unit vectors, float32."""

    embedding: Float[Array, "b e"]
    heads: ByName = {}
    predicted: ByName = {}  # the heads' after their predictors, of heads with one
    feature: Float[Array, "b d"] | None = None  # before the projection, where it is asked for


class Projector(nnx.Module):
    """Linear maps `up`, `middle` and `down`, or the last of these. A LayerNorm and the activation follow each but the last."""

    def __init__(self, scope: Scope, widths: tuple[int, ...], activation: config.Activation, eps: float) -> None:
        """`widths`: of the input, between the maps, and of the output."""
        self.activation: config.Activation = activation
        self.down: Linear
        self.names = (*("up", "middle")[: len(widths) - 2], "down")
        for name, inner, outer in zip(self.names, widths[:-1], widths[1:], strict=True):
            last = name == "down"
            setattr(self, name, Linear(scope / name, (inner,), (outer,), std=inner**-0.5, bias=last))
            if not last:
                setattr(self, f"norm_{name}", LayerNorm(scope / f"norm_{name}", outer, eps))

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b w"]:
        for name in self.names[:-1]:
            x = activate(getattr(self, f"norm_{name}")(getattr(self, name)(x)), self.activation)
        return self.down(x)


class Head(nnx.Module):
    """A projector, and a predictor if it has one, of each of its towers; and its logit scale, if that is its own."""

    def __init__(self, cfg: config.Head, model: config.Model, scope: Scope) -> None:
        for side in cfg.sides:
            tower = getattr(model, side)
            for name, widths in _widths(cfg, model, side).items():
                setattr(self, name, Projector(scope / name, widths, tower.activation, tower.norm_eps))
        self.log_scale = None if cfg.scale is None else nnx.Param(jnp.float32(math.log(cfg.scale)))


class Heads(nnx.Module):
    """All heads of a model, each under its name."""

    def __init__(self, model: config.Model, scope: Scope) -> None:
        self._cfgs = model.heads
        for head in model.heads:
            setattr(self, head.name, Head(head, model, scope / head.name))

    @jax.named_scope("heads")
    def __call__(self, side: Side, feature: Float[Array, "b d"], runner: Runner) -> tuple[ByName, ByName]:
        """A tower's pooled features -> the unit vectors of its heads, and those after the predictors."""
        found, predicted = {}, {}
        for cfg in self._cfgs:
            if side in cfg.sides:
                head = getattr(self, cfg.name)
                x = _run(getattr(head, side), feature, runner)
                found[cfg.name] = unit(x)
                if cfg.predictor:
                    predicted[cfg.name] = unit(_run(getattr(head, f"{side}_predictor"), x, runner))
        return found, predicted


def _run(projector: Projector, x: Float[Array, "b d"], runner: Runner) -> Float[Array, "b w"]:
    """As a part of a tower with one token: weights are gathered and rows are recomputed as there."""
    return runner.from_chunks(runner.around_layers(Projector.__call__, projector, runner.to_chunks(x, 1)), len(x))


def joined(heads: Sequence[Float[Array, "b w"]]) -> Float[Array, "b w"]:
    """Unit vectors of heads as one, whose cosines are the mean of theirs."""
    return jnp.concatenate(heads, axis=-1) / math.sqrt(len(heads))


def _widths(cfg: config.Head, model: config.Model, side: str) -> dict[str, tuple[int, ...]]:
    """The widths of a tower's projector and predictor, by their names in a parameter's path."""
    pooled = model.image.pooled_width if side == "image" else model.text.width
    widths = {side: (pooled, *[cfg.hidden] * (cfg.depth - 1), cfg.width)}
    return widths | ({f"{side}_predictor": (cfg.width, cfg.hidden, cfg.width)} if cfg.predictor else {})


def flops(model: config.Model, side: str) -> int:
    """FLOPs of a forward pass of all heads on one image, or on one text."""
    found = (w for cfg in model.heads if side in cfg.sides for w in _widths(cfg, model, side).values())
    return sum(2 * a * b for widths in found for a, b in itertools.pairwise(widths))
