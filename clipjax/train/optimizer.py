"""From `config.Optim` to one optax transformation: which update, how fast, for which parameter. Pure; knows no step or state.

Every kind ends in the same decoupled form, p <- p - lr(step) * rule.lr * (u + weight_decay * rule.decay * p), where u is the
kind's direction, made of optax's blocks (LAMB scales the whole bracket). One list of rules says what is frozen, what decays
and how fast it learns.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipjax.config import ConfigError, Constant, Cosine, Optim, Rsqrt, Rule

Params = Any  # nested dict of float32 arrays, or of their ShapeDtypeStructs


def learning_rate(optim: Optim, steps: int) -> optax.Schedule:
    """The learning rate of the update that follows `count` finished ones: float32 [], positive for 0 <= count < steps.

    Warm-up is peak * (count + 1) / warmup, so the first update moves too. Cosine reaches `final` * peak at count = steps;
    rsqrt is peak / sqrt(1 + (count - warmup) / timescale) (Zhai et al. 2106.04560); the cool-down of rsqrt and constant is a
    factor (steps - count) / cooldown.
    """
    schedule = optim.schedule

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        since = jnp.maximum(count - schedule.warmup, 0)
        shape = jnp.minimum(1.0, (count + 1) / max(schedule.warmup, 1))
        match schedule:
            case Cosine():
                done = jnp.minimum(1.0, since / (steps - schedule.warmup))
                shape *= schedule.final + (1 - schedule.final) * (1 + jnp.cos(jnp.pi * done)) / 2
            case Rsqrt():
                shape *= jax.lax.rsqrt(1 + since / schedule.timescale)
            case Constant():
                pass
        if not isinstance(schedule, Cosine) and schedule.cooldown:
            shape *= jnp.clip((steps - count) / schedule.cooldown, 0, 1)
        return optim.lr * shape

    return rate


def can_grow(optim: Optim, old_steps: int, new_steps: int, at_step: int) -> str | None:
    """Whether a run of `old_steps` may go on at `at_step` as one of `new_steps`: None, or the message that says how to go on.

    It may where every rate used so far is the one that the new schedule gives, so that both runs are the same up to here.
    """
    if new_steps == old_steps:
        return None
    field = f"train.steps = {new_steps}: this run was started with {old_steps}"
    if isinstance(optim.schedule, Cosine):
        return f"{field}, which its cosine depends on; keep that, or start a new workdir with an rsqrt or constant schedule"
    if new_steps < at_step:
        return f"train.steps = {new_steps}: the workdir's checkpoint has {at_step} finished steps; ask for as many at least"
    shared = min(old_steps, new_steps) - max(optim.schedule.cooldown - 1, 0)  # finished steps before any cool-down
    if at_step <= shared:
        return None
    begun = f"by step {at_step} the cool-down of {min(old_steps, new_steps)} steps has begun"
    return f"{field}, and {begun}; keep that, or go back to a checkpoint of step {shared} at most"


def match_rules(rules: tuple[Rule, ...], params: Params) -> dict[str, Rule]:
    """The rule of every parameter by its path, as `image/blocks/mlp/up/kernel`: the first that matches the whole path.

    Raises ConfigError if a parameter matches no rule, or if no parameter is left for a rule: a typo must not pass in silence.
    """
    shapes = {_name(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    found = {name: next((r for r in rules if re.fullmatch(r.pattern, name)), None) for name in shapes}
    if missed := [f"{name} {shapes[name]}" for name, rule in found.items() if rule is None]:
        raise ConfigError(f"optim.rules: no rule matches {', '.join(missed)}; end the list with Rule(pattern='.*')")
    for i, rule in enumerate(rules):
        if not any(r is rule for r in found.values()):
            remedy = (
                f"no parameter is left for it; it must match a whole path, as {max(shapes, key=len)!r}, that no earlier rule does"
            )
            raise ConfigError(f"optim.rules.{i}.pattern = {rule.pattern!r}: {remedy}")
    return found


def trained_names(rules: tuple[Rule, ...], params: Params) -> set[str]:
    """The paths of the parameters that no rule freezes."""
    return {name for name, rule in match_rules(rules, params).items() if rule.lr != 0}


def stop_frozen(rules: tuple[Rule, ...], params: Params) -> Params:
    """`params`, for the forward pass, with no gradient to what is frozen: XLA leaves that part of the backward pass out."""
    trained = trained_names(rules, params)
    return jax.tree.map_with_path(lambda path, p: p if _name(path) in trained else jax.lax.stop_gradient(p), params)


def make_optimizer(optim: Optim, steps: int, params: Params) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates for parameters named and shaped like `params` (values are not read).

    Frozen parameters (rule.lr = 0) have no state, get an update of exactly 0 and stay out of the clipped norm. Raises
    ConfigError as `match_rules` does.
    """
    rules = match_rules(optim.rules, params)
    trained = trained_names(optim.rules, params)

    def decay(path: tuple, u: jax.Array, p: jax.Array) -> jax.Array:
        return u + optim.weight_decay * rules[_name(path)].decay * p

    def factor(path: tuple, u: jax.Array, _: jax.Array) -> jax.Array:
        return rules[_name(path)].lr * u

    match optim.kind:
        case "adamw":
            direction = [optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype), _with_path(decay)]
        case "lion":
            direction = [optax.scale_by_lion(optim.b1, optim.b2, optim.mu_dtype), _with_path(decay)]
        case "lamb":
            adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype)
            direction = [adam, _with_path(decay), _trust_ratio(rules, trained)]
        case "adafactor":
            direction = [_by_layer(_factored_rms(optim), trained), _momentum(optim), _with_path(decay)]
    clip = optax.identity() if optim.clip_norm is None else optax.clip_by_global_norm(optim.clip_norm)
    train = optax.chain(clip, *direction, _with_path(factor), optax.scale_by_learning_rate(learning_rate(optim, steps)))
    label = _labels(lambda name: "train" if name in trained else "freeze")
    return optax.partition({"train": train, "freeze": optax.set_to_zero()}, label)


def clamp_scale(params: Params, max_scale: float | None) -> Params:
    """`params` with log_scale in [0, log max_scale]. For after the update: a clip in the forward pass would end its gradient."""
    if max_scale is None:
        return params
    return params | {"log_scale": jnp.clip(params["log_scale"], 0.0, math.log(max_scale))}


def ema_update(ema: Params, params: Params, decay: float, step: jax.typing.ArrayLike) -> Params:
    """d * ema + (1 - d) * params, where d = min(decay, (1 + step) / (10 + step)) forgets the start and `step` counts from 0."""
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, ema, 1 - d)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _labels(label: Any) -> Any:
    """For optax.partition: a function that puts `label(name)` in each parameter's place."""
    return lambda tree: jax.tree.map_with_path(lambda path, _: label(_name(path)), tree)


def _with_path(f: Any) -> optax.GradientTransformation:
    """The stateless transformation u <- f(path, u, p)."""
    return optax.stateless(lambda updates, params: jax.tree.map_with_path(f, updates, params))


def _by_layer(inner: optax.GradientTransformation, names: set[str]) -> optax.GradientTransformation:
    """`inner` on every layer by itself, where scanned layers lie stacked along axis 0 of one array (`.../blocks/...`).

    Each stack is a group of its own, as the towers differ in depth.
    """

    def stack(name: str) -> str:
        return name.partition("/blocks/")[0] if "/blocks/" in name else "single"

    stacked = optax.GradientTransformation(jax.vmap(inner.init), jax.vmap(inner.update))
    groups = {stack(name) for name in names}
    return optax.partition({g: inner if g == "single" else stacked for g in groups}, _labels(stack))


def _trust_ratio(rules: dict[str, Rule], names: set[str]) -> optax.GradientTransformation:
    """LAMB's factor |p| / |u| (You et al. 1904.00962, algorithm 2), for what decays only, as in the authors' code.

    A bias that starts at 0 would otherwise grow by a factor of 1 + lr a step, from nearly nothing.
    """
    adapted = {name for name in names if rules[name].decay != 0}
    ratio = _by_layer(optax.scale_by_trust_ratio(), adapted)
    return optax.partition({"adapt": ratio, "keep": optax.identity()}, _labels(lambda n: "adapt" if n in adapted else "keep"))


def _factored_rms(optim: Optim) -> optax.GradientTransformation:
    """Adafactor's scaling as vision transformers use it (Zhai et al. 2106.04560, section 3.4): no scaling by the weights' size,
    and b2 as the cap of the decay 1 - t^-0.8. eps is compared with gradients as in Adam, so its square is added to theirs.
    """

    def decay(count: jax.Array, power: float) -> jax.Array:
        return jnp.minimum(optim.b2, 1 - (count + 1.0) ** -power)

    # 32, not optax's 128: kernels keep heads apart, and 64 to 104 channels a head are worth factoring.
    return optax.scale_by_factored_rms(min_dim_size_to_factor=32, epsilon=optim.eps**2, decay_rate_fn=decay)


def _momentum(optim: Optim) -> optax.GradientTransformation:
    """Adafactor's first moment, after the scaling; b1 = 0 saves its memory."""
    return optax.ema(optim.b1, debias=False, accumulator_dtype=optim.mu_dtype) if optim.b1 else optax.identity()
