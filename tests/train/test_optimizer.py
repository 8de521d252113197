"""Each update rule against float64 numpy, stacked against unstacked layers, schedules at pinned steps, rules and their errors."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax.config import RULES, ConfigError, Constant, Cosine, ImageTower, Model, Optim, Rsqrt, Rule, TextTower
from clipjax.models import clip
from clipjax.train.optimizer import can_grow, clamp_scale, ema_update, learning_rate, make_optimizer, match_rules, next_rate

STEPS = 6
KINDS = ("adamw", "lamb", "lion", "adafactor")
DEPTHS = {"image": 3, "text": 2}


def tree(seed, f=lambda g, shape: g.normal(size=shape)):
    """Parameters of every kind: two stacks of unequal depth, a head, scalars. Wide enough for Adafactor to factor."""
    g = np.random.default_rng(seed)
    blocks = {
        t: {"up": {"kernel": (n, 40, 48), "bias": (n, 48)}, "qkv": {"kernel": (n, 40, 3, 2, 33)}} for t, n in DEPTHS.items()
    }
    shapes = {t: {"blocks": b, "norm": {"scale": (40,)}} for t, b in blocks.items()} | {"log_scale": (), "bias": ()}
    shapes["text"]["tokens"] = (50, 40)
    return jax.tree.map(lambda s: jnp.asarray(f(g, s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(optim, params, grads):
    """The parameters after one update for each of `grads`."""
    tx = make_optimizer(optim, STEPS, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def flat(params):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in jax.tree.leaves_with_path(params)}


def direction(optim, name, p, g, state, t):
    """One float64 step of one unstacked array: u of the published rule, before learning rate; `state` is changed in place."""
    b1, b2, eps = optim.b1, optim.b2, optim.eps
    decay = optim.weight_decay * p if "kernel" in name or "tokens" in name else 0 * p
    if optim.kind == "lion":  # Chen et al. 2302.06675, algorithm 2
        m = state.setdefault("m", 0 * p)
        state["m"] = b2 * m + (1 - b2) * g
        return np.sign(b1 * m + (1 - b1) * g) + decay
    if optim.kind == "adafactor":  # Shazeer & Stern 1804.04235, algorithm 4, with Zhai et al.'s momentum and cap
        rho, square, dims = min(b2, 1 - t**-0.8), g**2 + eps**2, np.argsort(p.shape)[-2:]
        if p.ndim >= 2 and min(p.shape[d] for d in dims) >= 32:
            rows, cols = (square.mean(d, keepdims=True) for d in dims[::-1])
            state["r"] = rho * state.get("r", 0) + (1 - rho) * rows
            state["c"] = rho * state.get("c", 0) + (1 - rho) * cols
            v = state["r"] * state["c"] / state["r"].mean(dims[0], keepdims=True)
        else:
            v = state["v"] = rho * state.get("v", 0) + (1 - rho) * square
        state["m"] = b1 * state.get("m", 0) + (1 - b1) * g / np.sqrt(v)
        return state["m"] + decay
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g  # Loshchilov & Hutter 1711.05101, algorithm 2
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    u = state["m"] / (1 - b1**t) / (np.sqrt(state["v"] / (1 - b2**t)) + eps) + decay
    adapts = optim.kind == "lamb" and ("kernel" in name or "tokens" in name)  # You et al. 1904.00962, algorithm 2
    return u * np.linalg.norm(p) / np.linalg.norm(u) if adapts else u


def reference(optim, params, grads, rates):
    """`run` in float64, with every stacked layer taken as an array of its own."""
    out = {}
    for name, p in flat(params).items():
        stacked = "/blocks/" in name
        layers = list(np.float64(p)) if stacked else [np.float64(p)]
        states = [{} for _ in layers]
        for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
            g = np.float64(flat(g)[name])
            each = list(g) if stacked else [g]
            layers = [p - rate * direction(optim, name, p, g, s, t) for p, g, s in zip(layers, each, states, strict=True)]
        out[name] = np.stack(layers) if stacked else layers[0]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_the_published_rule_of_each_layer(kind):
    optim = Optim(kind=kind, lr=0.01, b1=0.8, b2=0.95, weight_decay=0.3, schedule=Constant(warmup=2))
    # Gradients whose size differs from layer to layer, so that statistics shared by a stack would show.
    scale = {"image": np.array([1, 30, 0.01]), "text": np.array([5, 0.2])}

    def uneven(g):
        def one(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if "/blocks/" not in name:
                return x
            return x * jnp.asarray(scale[name.partition("/")[0]], jnp.float32).reshape(-1, *[1] * (x.ndim - 1))

        return jax.tree.map_with_path(one, g)

    params, grads = uneven(tree(0)), [uneven(tree(k)) for k in (1, 2, 3)]
    want = reference(optim, params, grads, rates=(0.005, 0.01, 0.01))
    start, got = flat(params), flat(run(optim, params, grads))
    for name in want:
        moved = np.abs(want[name] - start[name]).max()
        assert moved > 1e-4, name
        np.testing.assert_allclose(got[name], want[name], rtol=2e-7, atol=1e-4 * moved, err_msg=name)


def test_clipping_takes_the_norm_of_all_that_is_trained():
    rules = (Rule(pattern="text/.*", lr=0.0), *RULES)
    optim = Optim(kind="lion", lr=0.1, b1=0.0, weight_decay=0.0, clip_norm=1.0, rules=rules, schedule=Constant(warmup=1))
    grads, params = tree(1), tree(0)
    tx = make_optimizer(optim, STEPS, params)
    _, state = tx.update(grads, tx.init(params), params)
    norm = math.sqrt(sum((np.float64(g) ** 2).sum() for name, g in flat(grads).items() if not name.startswith("text/")))
    mu = [x for p, x in jax.tree.leaves_with_path(state) if jax.tree_util.keystr(p).endswith(".mu['image']['norm']['scale']")]
    np.testing.assert_allclose(mu[0], (1 - optim.b2) * np.float64(grads["image"]["norm"]["scale"]) / norm, rtol=1e-5)


def test_learning_rate_factor_scales_the_full_update():
    params, grads = tree(0), [tree(1)]
    optim = Optim(lr=0.01, schedule=Constant(warmup=1))
    slow = dataclasses.replace(optim, rules=(Rule(pattern="text/tokens", lr=0.25), *RULES))
    full, part = (run(o, params, grads)["text"]["tokens"] - params["text"]["tokens"] for o in (optim, slow))
    np.testing.assert_allclose(part, 0.25 * full, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_keep_every_bit_and_have_no_state(kind):
    optim = Optim(kind=kind, lr=0.1, rules=(Rule(pattern="image/.*", lr=0.0), *RULES), schedule=Constant(warmup=1))
    params = tree(0)
    after = run(optim, params, [tree(k) for k in range(1, 5)])
    for name, x in flat(params).items():
        assert (np.array_equal(x, flat(after)[name])) == name.startswith("image/"), name
    state = jax.eval_shape(make_optimizer(optim, STEPS, params).init, params)
    kept = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert [name for name in kept if "['text']['tokens']" in name]
    assert not [name for name in kept if "['image']" in name]


@pytest.mark.parametrize("kind", ["lamb", "adafactor"])
def test_the_mesh_does_not_change_the_update(kind):
    optim = Optim(kind=kind, lr=0.01, b2=0.95, clip_norm=1.0, schedule=Constant(warmup=1))
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(x):  # the last axis that fsdp divides
        axes = [i for i, n in enumerate(x.shape) if n % 2 == 0]
        spec = ["fsdp" if axes and i == axes[-1] else None for i in range(x.ndim)]
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    def some(seed):  # one stack and one array: the rest would only take longer to compile
        params = tree(seed)
        up = {"kernel": params["image"]["blocks"]["up"]["kernel"]}
        return {"image": {"blocks": {"up": up}}, "text": {"tokens": params["text"]["tokens"]}}

    optim = dataclasses.replace(optim, rules=RULES[:1])
    params, grads = some(0), [some(1), some(2)]
    one = flat(run(optim, params, grads))
    eight = run(optim, jax.tree.map(place, params), jax.tree.map(place, grads))
    assert not eight["text"]["tokens"].sharding.is_fully_replicated
    for name, x in flat(eight).items():
        np.testing.assert_allclose(x, one[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_state_is_strongly_typed_and_keeps_its_types(kind, mu_dtype):
    optim = Optim(kind=kind, mu_dtype=mu_dtype, clip_norm=1.0)
    params = tree(0)
    tx = make_optimizer(optim, 10000, params)
    types = lambda t: [(jax.tree_util.keystr(p), x.shape, x.dtype, x.weak_type) for p, x in jax.tree.leaves_with_path(t)]  # noqa: E731
    state = jax.eval_shape(tx.init, params)
    updates, then = jax.eval_shape(tx.update, params, state, params)
    assert types(state) == types(then)
    assert types(updates) == types(jax.eval_shape(lambda: params))
    assert not [name for name, _, _, weak in types(state) if weak]
    moments = {dtype for name, _, dtype, _ in types(state) if ".mu[" in name or ".ema[" in name}
    assert moments == {jnp.dtype(mu_dtype)}


@pytest.mark.parametrize("kind", ["lamb", "adafactor"])
def test_orbax_stores_the_state(kind, tmp_path):
    import orbax.checkpoint as ocp

    params = tree(0)
    tx = make_optimizer(Optim(kind=kind, mu_dtype="bfloat16", rules=(Rule(pattern="image/.*", lr=0.0), *RULES)), STEPS, params)
    _, state = tx.update(tree(1), tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), restored, state))


SCHEDULES = [  # each value worked out by hand from the formulas in the docstrings of config.train
    (Cosine(warmup=4), 12, {0: 0.25, 3: 1.0, 4: 1.0, 6: (2 + math.sqrt(2)) / 4, 8: 0.5, 12: 0.0, 13: 0.0}),
    (Cosine(warmup=0, final=0.1), 8, {0: 1.0, 4: 0.55, 8: 0.1, 9: 0.1}),
    (Rsqrt(warmup=2, timescale=4), 100, {0: 0.5, 1: 1.0, 2: 1.0, 6: math.sqrt(0.5), 14: 0.5, 98: 0.2}),
    (
        Rsqrt(warmup=2, timescale=4, cooldown=20),
        24,
        {0: 0.5, 4: math.sqrt(2 / 3), 14: 0.25, 23: 0.05 * math.sqrt(4 / 25), 24: 0.0},
    ),
    (Constant(warmup=5, cooldown=4), 20, {0: 0.2, 4: 1.0, 16: 1.0, 17: 0.75, 19: 0.25, 20: 0.0, 21: 0.0}),
    (Constant(warmup=0), 3, {0: 1.0, 2: 1.0, 5: 1.0}),
]


@pytest.mark.parametrize(("schedule", "steps", "values"), SCHEDULES)
def test_schedule_values(schedule, steps, values):
    rate = learning_rate(Optim(lr=2e-3, schedule=schedule), steps)
    got = jax.jit(jax.vmap(rate))(jnp.array(list(values), jnp.int32))
    np.testing.assert_allclose(got, 2e-3 * np.array(list(values.values())), rtol=1e-6, atol=1e-10)
    assert got.dtype == jnp.float32
    every = jax.vmap(rate)(jnp.arange(steps))
    assert bool(((every > 0) & jnp.isfinite(every)).all())


@pytest.mark.parametrize("steps", [30_000, 10_000_000])
def test_the_last_of_many_steps_still_learns(steps):
    """The cosine of an angle near pi is -1 in float32."""
    rate = learning_rate(Optim(lr=1.0, schedule=Cosine(warmup=10)), steps)
    counts = np.array([steps - 1, steps - 2, steps - 100])
    exact = np.sin(np.pi / 2 * (steps - counts) / (steps - 10)) ** 2  # (1 + cos(pi (1 - x))) / 2 = sin(pi x / 2) ** 2
    np.testing.assert_allclose([rate(int(count)) for count in counts], exact, rtol=1e-5)


@pytest.mark.parametrize(("schedule", "old", "new", "step", "says"), [
    (Cosine(warmup=1), 10, 10, 5, None),
    (Cosine(warmup=1), 10, 20, 5, "started with 10, which its cosine depends on"),
    (Constant(warmup=1), 10, 20, 10, None),
    (Rsqrt(warmup=1, timescale=5), 10, 20, 10, None),
    (Constant(warmup=1, cooldown=4), 10, 20, 7, None),  # updates 0 to 6: the first cooled one is number 7
    (Constant(warmup=1, cooldown=4), 10, 20, 8, "checkpoint of step 7 at most"),
    (Rsqrt(warmup=1, timescale=5, cooldown=4), 10, 20, 9, "by step 9 the cool-down of 10 steps has begun"),
    (Constant(warmup=1, cooldown=4), 20, 10, 8, "by step 8 the cool-down of 10 steps has begun"),
])  # fmt: skip
def test_a_run_may_grow_where_its_past_stays_true(schedule, old, new, step, says):
    optim = Optim(schedule=schedule)
    message = can_grow(optim, old, new, step)
    assert message is None if says is None else says in message
    before, after = (np.array([learning_rate(optim, n)(c) for c in range(step)]) for n in (old, new))
    assert np.array_equal(before, after) == (message is None)  # the message says no exactly where the past would differ


@pytest.mark.parametrize("schedule", [Constant(warmup=1), Rsqrt(warmup=1, timescale=5)])
def test_a_run_does_not_shrink_below_what_is_done(schedule):
    assert "has 60 finished steps; ask for 60 at least" in can_grow(Optim(schedule=schedule), 100, 50, 60)
    assert can_grow(Optim(schedule=schedule), 100, 60, 60) is None


@pytest.mark.parametrize("cooldown", [0, 1, 4])
@pytest.mark.parametrize("at_step", [7, 16, 17, 18, 20])
def test_the_number_of_steps_that_a_refusal_names_is_not_refused(cooldown, at_step):
    optim = Optim(schedule=Constant(warmup=1, cooldown=cooldown))
    for new in range(1, 30):
        message = can_grow(optim, 20, new, at_step)
        if message and new < 20:
            least = int(re.search(r"ask for (\d+) at least$", message)[1])
            assert can_grow(optim, 20, least, at_step) is None
            assert least == 20 or can_grow(optim, 20, least - 1, at_step) is not None
        elif message:
            step = int(re.search(r"of step (\d+) at most$", message)[1])
            assert can_grow(optim, 20, new, step) is None


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_default_rules_fit_both_families(family):
    small = dict(width=64, depth=2, heads=1, mlp_dim=128)
    image = getattr(ImageTower, family)("Ti/16", image_size=32, **small, embed_dim=64)
    text = getattr(TextTower, family)("Ti", vocab_size=100, **small | dict(embed_dim=64))
    config = Model(image=image, text=text, init_bias=-10.0 if family == "siglip" else None)
    params = jax.eval_shape(lambda: clip.init(config, seed=0))
    decays = {name for name, rule in match_rules(RULES, params).items() if rule.decay}
    assert {"image/patch/kernel", "text/tokens", "image/blocks/attention/qkv/kernel", "text/blocks/mlp/down/kernel"} <= decays
    assert not [n for n in decays if n.endswith(("bias", "scale", "positions", "token", "probe"))]
    assert all(rule.lr == 1 for rule in match_rules(RULES, params).values())
    make_optimizer(Optim(), 10000, params)


def test_the_first_rule_that_matches_a_full_path_holds():
    rules = (Rule(pattern="bias", lr=0.5), Rule(pattern=".*bias", decay=0.0), Rule(pattern=".*"))
    found = match_rules(rules, tree(0))
    assert found["bias"] == rules[0]
    assert found["image/blocks/up/bias"] == rules[1]
    assert found["text/tokens"] == rules[2]


def test_a_parameter_without_a_rule_is_named():
    message = r"optim\.rules: no rule matches bias \(\), log_scale \(\), text/tokens \(50, 40\); end"
    with pytest.raises(ConfigError, match=message):
        match_rules((Rule(pattern=".*/(kernel|bias|scale)"),), tree(0))


@pytest.mark.parametrize("pattern", ["image/block/.*", "kernel", ".*/up/kernel"])
def test_a_rule_without_a_parameter_is_named(pattern):
    rules = (Rule(pattern=".*/kernel"), Rule(pattern=pattern), Rule(pattern=".*"))
    with pytest.raises(ConfigError, match=r"optim\.rules\.1\.pattern = .*no parameter is left for it"):
        make_optimizer(Optim(rules=rules), STEPS, tree(0))


def test_clamp_scale():
    high, low = {"log_scale": jnp.float32(5), "bias": jnp.float32(-10)}, {"log_scale": jnp.float32(-1)}
    assert jnp.exp(clamp_scale(high, 100.0)["log_scale"]) == pytest.approx(100, rel=1e-6)
    assert clamp_scale(low, 100.0)["log_scale"] == 0
    assert clamp_scale(high, None) is high
    clamped = jax.eval_shape(lambda p: clamp_scale(p, 100.0), high)
    assert clamped["bias"].dtype == clamped["log_scale"].dtype == jnp.float32
    assert not clamped["log_scale"].weak_type


def test_ema_is_a_mean_at_first_and_slow_later():
    ema = params = {"w": jnp.zeros(3, jnp.float32)}
    want = np.zeros(3)
    for step in range(5):
        params = {"w": params["w"] + jnp.arange(3.0)}
        ema = jax.jit(ema_update, static_argnums=2)(ema, params, 0.35, jnp.int32(step))
        d = min(0.35, (1 + step) / (10 + step))
        want = d * want + (1 - d) * (step + 1) * np.arange(3)
    np.testing.assert_allclose(ema["w"], want, rtol=1e-6)
    assert not ema["w"].weak_type


@pytest.mark.parametrize("schedule", [Cosine(warmup=2), Rsqrt(warmup=1, timescale=3, cooldown=2), Constant(warmup=3, cooldown=2)])
def test_the_logged_rate_is_that_of_the_update(schedule):
    """Lion moves every weight by the rate, times its rule's factor; an update that is skipped leaves the rate as it is."""
    optim = Optim(
        kind="lion", lr=0.25, weight_decay=0.0, schedule=schedule, rules=(Rule(pattern="half", lr=0.5), Rule(pattern=".*"))
    )
    params = {"half": jnp.zeros(()), "full": jnp.zeros(())}
    tx = make_optimizer(optim, STEPS, params)
    state = tx.init(params)
    for count in range(STEPS):
        rate = next_rate(optim, STEPS, state)
        updates, state = tx.update({"half": jnp.float32(1), "full": jnp.float32(-1)}, state, params)
        assert (rate, rate / 2) == (updates["full"], -updates["half"])
        assert rate == learning_rate(optim, STEPS)(count)
