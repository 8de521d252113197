"""From `config.Optim` to one optax transformation. Pure: no step or state is stored here.

Every kind updates in the same decoupled form, p <- p - lr(step) * rule.lr * (u + weight_decay * rule.decay * p). Here u is the
kind's direction, made of optax's transformations (LAMB scales the whole bracket). One list of rules says which parameters are
frozen, which decay, and how fast each learns. Layers are stacked: what differs between them is a factor along the first axis.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax.config import ConfigError, Constant, Cosine, Optim, Rsqrt, Rule, Run
from clipjax.config.towers import locked_layers
from clipjax.config.train import BELOW
from clipjax.sharding import keystr

NOTHING: Mapping[str, int] = MappingProxyType({})
Params = Any  # nested dict of float32 arrays, or of their ShapeDtypeStructs


def learning_rate(optim: Optim, steps: int) -> optax.Schedule:
    """The learning rate of the update after `count` finished ones: float32 [], positive for 0 <= count < steps.

    Warm-up is peak * (count + 1) / warmup, so the first update changes the weights too. Cosine reaches `final` * peak at
    count = steps. Rsqrt is peak / sqrt(1 + (count - warmup) / timescale) (Zhai et al. 2106.04560). The cool-down of rsqrt and
    constant multiplies by (steps - count) / cooldown.
    """
    schedule = optim.schedule

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        since = jnp.maximum(count - schedule.warmup, 0)
        shape = jnp.minimum(1.0, (count + 1) / max(schedule.warmup, 1))
        match schedule:
            case Cosine():
                left = jnp.clip((steps - schedule.warmup - since) / (steps - schedule.warmup), 0, 1)
                # (1 + cos(pi (1 - left))) / 2, which float32 would round to 0 in the last of many steps
                shape *= schedule.final + (1 - schedule.final) * jnp.sin(jnp.pi / 2 * left) ** 2
            case Rsqrt():
                shape *= jax.lax.rsqrt(1 + since / schedule.timescale)
            case Constant():
                pass
        if not isinstance(schedule, Cosine) and schedule.cooldown:
            shape *= jnp.clip((steps - count) / schedule.cooldown, 0, 1)
        return optim.lr * shape

    return rate


def next_rate(optim: Optim, steps: int, opt_state: optax.OptState) -> jax.Array | None:
    """The learning rate of the update that follows `opt_state`, before the factors of the rules: float32 []. None for another
    optimizer than `make_optimizer`'s.

    From the optimizer's own count of updates, which is not the number of steps where updates were skipped.
    """
    count = finished_updates(opt_state)
    return None if count is None else jnp.asarray(learning_rate(optim, steps)(count))


def finished_updates(opt_state: optax.OptState) -> jax.Array:
    """How many updates the optimizer has made, int32 []: the count of its schedule. Steps that were skipped do not count.

    None, against the annotation, for another optimizer than `make_optimizer`'s, which only tests have.
    """
    return optax.tree.get(opt_state, "count", filtering=lambda path, _: "ScaleByScheduleState" in str(path[-1]))


def can_grow(optim: Optim, old_steps: int, new_steps: int, at_step: int) -> str | None:
    """Whether a run of `old_steps` may continue at `at_step` as a run of `new_steps`: None if so, else a message with the remedy.

    It may if the new schedule gives the same learning rate for every step so far, so that both runs are equal up to here.
    """
    if new_steps == old_steps:
        return None
    field = f"train.steps = {new_steps}: this run was started with {old_steps}"
    if isinstance(optim.schedule, Cosine):
        return f"{field}, which its cosine depends on; keep that, or start a new --workdir from it by init"
    cooled = max(optim.schedule.cooldown - 1, 0)  # finished steps at the end that had part of the cool-down
    shared = min(old_steps, new_steps) - cooled
    if at_step <= shared:
        return None
    begun = f"{field}, and by step {at_step} the cool-down of {min(old_steps, new_steps)} steps has begun"
    if new_steps > old_steps:
        return f"{begun}; keep that, or start a new --workdir by init from a checkpoint of step {shared} at most"
    least = min(at_step + cooled, old_steps)
    return f"{begun if at_step <= new_steps else f'{field}, and has {at_step} finished steps'}; ask for {least} at least"


def match_rules(rules: tuple[Rule, ...], params: Params, part: bool = False) -> dict[str, Rule]:
    """Path -> rule for every parameter. A path is as `image/blocks/mlp/up/kernel`; the first rule that matches all of it holds.

    Raises ConfigError if a parameter matches no rule, or if no parameter is left for a rule, which is most likely a typo;
    unless another rule froze one that it matches. `part`: of a part of the parameters, in which a rule may have none.
    """
    shapes = {keystr(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    found: dict[str, Rule] = {}
    for name in shapes:
        if rule := next((r for r in rules if re.fullmatch(r.pattern, name)), None):
            found[name] = rule
    if missed := [f"{name} {shape}" for name, shape in shapes.items() if name not in found]:
        raise ConfigError(f"optim.rules: no rule matches {', '.join(missed)}; end the list with Rule(pattern='.*')")
    for i, rule in enumerate(() if part else rules):
        if not any(r is rule or (r.lr == 0 and re.fullmatch(rule.pattern, name)) for name, r in found.items()):
            path = max(shapes, key=len)
            remedy = f"no parameter is left for it; it must match a full path, as {path!r}, that no earlier rule matches"
            raise ConfigError(f"optim.rules.{i}.pattern = {rule.pattern!r}: {remedy}")
    return found


def trained_names(rules: tuple[Rule, ...], params: Params) -> set[str]:
    """The paths of the parameters that are trained: those whose rule has lr > 0."""
    return {name for name, rule in match_rules(rules, params).items() if rule.lr != 0}


def stop_frozen(rules: tuple[Rule, ...], params: Params) -> Params:
    """`params`, or some, for the forward pass; frozen ones get no gradient. So XLA leaves out their part of the backward pass."""
    found = match_rules(rules, params, part=True)
    return jax.tree.map_with_path(lambda path, p: p if found[keystr(path)].lr != 0 else jax.lax.stop_gradient(p), params)


def optimizer_of(run: Run, params: Params) -> optax.GradientTransformation:
    """The optimizer of a run, for parameters with the names and shapes of `params`. Raises as `make_optimizer`."""
    locked = {name: locked_layers(tower) for name, tower in (("image", run.model.image), ("text", run.model.text))}
    return make_optimizer(run.optim_in_use, run.train.steps, params, locked)


def make_optimizer(optim: Optim, steps: int, params: Params, locked: Mapping[str, int] = NOTHING) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates, for parameters with the names and shapes of `params` (values are not read).
    `locked`: how many of a tower's first layers stay as they are.

    Frozen parameters (rule.lr = 0) have no state, get an update of exactly 0 and do not count in the norm that is clipped. Raises
    ConfigError as `match_rules` does.
    """
    rules = match_rules(optim.rules, params)
    trained = trained_names(optim.rules, params)
    depths = {name.split("/")[0]: len(x) for path, x in jax.tree.leaves_with_path(params) if "/blocks/" in (name := keystr(path))}

    def decay(path: tuple, u: jax.Array, p: jax.Array) -> jax.Array:
        return u + optim.weight_decay * rules[keystr(path)].decay * p

    def factor(path: tuple, u: jax.Array, _: jax.Array) -> jax.Array:
        name = keystr(path)
        by_layer = layer_factors(name, depths, rules[name].layer_decay, locked)
        return rules[name].lr * (u if by_layer is None else jnp.asarray(by_layer).reshape(-1, *[1] * (u.ndim - 1)) * u)

    match optim.kind:
        case "adamw":
            direction = [optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype), _with_path(decay)]
        case "lion":
            direction = [optax.scale_by_lion(optim.b1, optim.b2, optim.mu_dtype), _with_path(decay)]
        case "lamb":
            adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype)
            direction = [adam, _with_path(decay), _trust_ratio(rules, trained)]
        case "adafactor":
            # The first moment is taken after the scaling. b1 = 0 turns it off and saves its memory.
            ema = optax.ema(optim.b1, debias=False, accumulator_dtype=optim.mu_dtype) if optim.b1 else optax.identity()
            direction = [_by_layer(_factored_rms(optim), trained), ema, _with_path(decay)]
    clip = optax.identity() if optim.clip_norm is None else optax.clip_by_global_norm(optim.clip_norm)
    train = optax.chain(clip, *direction, _with_path(factor), optax.scale_by_learning_rate(learning_rate(optim, steps)))
    label = _labels(lambda name: "train" if name in trained else "freeze")
    return optax.partition({"train": train, "freeze": optax.set_to_zero()}, label)


def layer_factors(name: str, depths: Mapping[str, int], decay: float, locked: Mapping[str, int]) -> np.ndarray | None:
    """The factors on the learning rate of a parameter, float32 [L] of stacked layers, [1] of others; None where all are 1.

    `depths`: layers of each tower. With L layers: decay^(L + 1) below them, decay^L to decay^1 of the layers, 1 above, as BEiT
    (2106.08254, optim_factory.py `LayerDecayValueAssigner`) and timm have it. 0 of the first `locked` layers.
    """
    tower, _, part = name.partition("/")
    if tower not in depths:  # a head may have any name
        return None
    depth, part = depths[tower], part.partition("/")[0]
    if part == "blocks":
        layers = np.arange(depth)
        factors = np.where(layers < locked.get(tower, 0), 0.0, decay ** (depth - layers))
    else:
        factors = np.array([decay ** (depth + 1) if part in BELOW else 1.0])
    return None if (factors == 1).all() else factors.astype(np.float32)


def clamp_scale(params: Params, max_scale: float | None) -> Params:
    """`params` with log_scale, and that of each head, clamped to [0, log max_scale]. Call it after the update: in the loss it
    would stop the gradient.
    """
    if max_scale is None:
        return params
    most = math.log(max_scale)
    return jax.tree.map_with_path(lambda path, p: jnp.clip(p, 0.0, most) if keystr(path).endswith("log_scale") else p, params)


def ema_update(ema: Params, params: Params, decay: float, step: jax.typing.ArrayLike) -> Params:
    """d * ema + (1 - d) * params. d = min(decay, (1 + step) / (10 + step)), so the first weights are soon forgotten.

    `step` counts from 0.
    """
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, ema, 1 - d)


def _labels(label: Any) -> Any:
    """For optax.partition: a function from a tree of parameters to the tree of `label(name)`."""
    return lambda tree: jax.tree.map_with_path(lambda path, _: label(keystr(path)), tree)


def _with_path(f: Any) -> optax.GradientTransformation:
    """The stateless transformation u <- f(path, u, p)."""
    return optax.stateless(lambda updates, params: jax.tree.map_with_path(f, updates, params))


def _by_layer(inner: optax.GradientTransformation, names: set[str]) -> optax.GradientTransformation:
    """Applies `inner` to every layer separately, where scanned layers are stacked along axis 0 of one array (`.../blocks/...`).

    Each stack is a group of its own, because the towers differ in depth.
    """

    def stack(name: str) -> str:
        return name.partition("/blocks/")[0] if "/blocks/" in name else "single"

    stacked = optax.GradientTransformation(jax.vmap(inner.init), jax.vmap(inner.update))
    groups = {stack(name) for name in names}
    return optax.partition({g: inner if g == "single" else stacked for g in groups}, _labels(stack))


def _trust_ratio(rules: dict[str, Rule], names: set[str]) -> optax.GradientTransformation:
    """LAMB's factor |p| / |u| (You et al. 1904.00962, algorithm 2), only for parameters that decay, as in the authors' code.

    With this factor, a bias that starts near 0 could grow only by a factor of 1 + lr a step.
    """
    adapted = {name for name in names if rules[name].decay != 0}
    ratio = _by_layer(optax.scale_by_trust_ratio(), adapted)
    return optax.partition({"adapt": ratio, "keep": optax.identity()}, _labels(lambda n: "adapt" if n in adapted else "keep"))


def _factored_rms(optim: Optim) -> optax.GradientTransformation:
    """Adafactor's scaling as vision transformers use it (Zhai et al. 2106.04560, section 3.4): no scaling by the size of the
    weights, and a decay of 1 - t^-0.8 but at most b2. eps has the unit of a gradient, as in Adam, so its square is added.
    """

    def decay(count: jax.Array, power: float) -> jax.Array:
        return jnp.minimum(optim.b2, 1 - (count + 1.0) ** -power)

    # 32, not optax's 128: kernels have an axis of their own for heads, and the 64 to 104 channels of a head are worth factoring.
    rate: Any = decay  # optax calls it with an array and a float, and declares wider types
    return optax.scale_by_factored_rms(min_dim_size_to_factor=32, epsilon=optim.eps**2, decay_rate_fn=rate)
