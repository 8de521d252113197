"""The losses of several views and of several modalities against float64, their golden values, and what must hold of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax import config
from clipjax.losses import (
    HeadRows,
    Rows,
    Shared,
    Sizes,
    alignment,
    barlow,
    clip_loss,
    multi_view_loss,
    objective,
    pairwise,
    prototype_loss,
    swap_loss,
    symile_loss,
    term_flops,
)
from clipjax.losses.views import column_offsets
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled

ROWS, WIDTH = 16, 6
T, T_VIEWS, T_SWAP = 1 / 0.07, 5.0, 10.0
IDS = np.random.default_rng(2).integers(0, ROWS // 2, ROWS).astype(np.int32)
GOLDEN = {  # of `ref.fixture` and a third of its kind, to 1e-9
    "symile": 2.3492112313,
    "infonce": 1.0905151288,
    "dhel": 2.9389963466,
    "siamese": 0.8402941031,
    "swap": 0.5854211199,
    "prototypes": 2.7058798449,
}


held = jax.lax.stop_gradient


def losses(axis, x, y, z, prototypes, ids):
    views = jnp.stack([x, y, z])
    return {
        "symile": symile_loss(views, T, axis=axis),
        "infonce": multi_view_loss(views, T_VIEWS, "infonce", axis=axis),
        "dhel": multi_view_loss(views, T_VIEWS, axis=axis),
        "infonce: ids": multi_view_loss(views, T_VIEWS, "infonce", axis=axis, ids=ids),
        "dhel: ids": multi_view_loss(views, T_VIEWS, axis=axis, ids=ids),
        "barlow": barlow(x, y, 5e-3, 0.025, axis=axis),
        "siamese": (alignment(z, held(y), axis=axis) + alignment(y, held(x), axis=axis)) / 2,
        "swap": swap_loss((x, y), T_SWAP, (z, y), 0.05, 3, axis=axis),
        "prototypes": prototype_loss((x, z), T_SWAP, prototypes, 0.05, 3, axis=axis),
    }


# The same in float64, from the papers' equations.


def cross_entropy(logits):
    return (ref.logsumexp(logits) - np.diag(logits)).mean()


def symile(x, y, z):
    def of_anchor(a, b, c):
        mips = T * a @ (b * np.roll(c, -1, 0)).T
        own = np.eye(len(a), dtype=bool)
        return cross_entropy(np.where(own, T * (a * b * c).sum(1)[:, None], mips))

    return (of_anchor(x, y, z) + of_anchor(y, x, z) + of_anchor(z, x, y)) / 3


def multi_view(form, *views, ids):
    b, own = len(ids), np.eye(len(ids), dtype=bool)
    other = ids[:, None] != ids[None]
    e = [[np.exp(T_VIEWS * u @ v.T) for v in views] for u in views]
    positive = sum(np.diag(e[n][m]) for m in range(len(views)) for n in range(m))
    if form == "infonce":
        kept = [[other | (own & (n != m)) for m in range(len(views))] for n in range(len(views))]
        total = sum((x * k).sum(1) for row, of in zip(e, kept, strict=True) for x, k in zip(row, of, strict=True)) / 2
    else:
        total = np.prod([(e[n][n] * other).sum(1) for n in range(len(views))], 0)
    some = other.any(1)
    return np.log(total[some] / positive[some]).sum() / b


def barlow_twins(x, y):
    x, y = ((z - z.mean(0)) / np.sqrt(((z - z.mean(0)) ** 2).mean(0)) for z in (x, y))
    squares = (x.T @ y / len(x) - np.eye(x.shape[1])) ** 2
    return 0.025 * np.where(np.eye(len(squares)), 1, 5e-3).ravel() @ squares.ravel()


def sinkhorn(cos, rounds=3):
    """[b, k]: the assignments of rows to columns, after the columns' sums and then the rows' were made equal so often."""
    q = np.exp(np.real(cos) / 0.05)
    for _ in range(rounds):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    return q


def towards(targets, logits):
    return -(targets * (logits - ref.logsumexp(logits)[:, None])).sum(1).mean()


def siamese_two(x, y, z):
    return (ref.alignment(z, np.real(y)) + ref.alignment(y, np.real(x))) / 2


def swap(x, y, z):
    logits = T_SWAP * x @ y.T
    return (towards(sinkhorn(z @ y.T), logits) + towards(sinkhorn(y @ z.T), logits.T)) / 2


def prototype(x, z, w):
    w = ref.unit_rows(w)
    return (towards(sinkhorn(z @ w.T), T_SWAP * x @ w.T) + towards(sinkhorn(x @ w.T), T_SWAP * z @ w.T)) / 2


REFERENCES = {
    "symile": lambda x, y, z, w, ids: symile(x, y, z),
    "infonce": lambda x, y, z, w, ids: multi_view("infonce", x, y, z, ids=np.arange(len(x))),
    "dhel": lambda x, y, z, w, ids: multi_view("dhel", x, y, z, ids=np.arange(len(x))),
    "infonce: ids": lambda x, y, z, w, ids: multi_view("infonce", x, y, z, ids=ids),
    "dhel: ids": lambda x, y, z, w, ids: multi_view("dhel", x, y, z, ids=ids),
    "barlow": lambda x, y, z, w, ids: barlow_twins(x, y),
    "siamese": lambda x, y, z, w, ids: siamese_two(x, y, z),
    "swap": lambda x, y, z, w, ids: swap(x, y, z),
    "prototypes": lambda x, y, z, w, ids: prototype(x, z, w),
}


@functools.cache
def random_views():
    x, y = ref.random_pairs(ROWS, WIDTH)
    z, w = ref.random_pairs(ROWS, WIDTH, seed=4)
    return x, y, np.float64(np.float32(ref.unit_rows(y + z))), w[:7], IDS


@functools.cache
def fixture():
    (x, y), k = ref.fixture(4, 3), np.arange(6.0)[:, None]
    i, j = np.arange(4.0)[:, None], np.arange(3.0)[None]
    z = x + 0.9 * np.sin(0.5 + 7 * i + j + 0.3 * i * j)
    w = np.sin(2 + 1.3 * k + j * j + 0.7 * k * j)
    return *(ref.unit_rows(a) for a in (x, y, z, w)), np.int32([0, 1, 1, 2])


@functools.cache
def wanted(inputs):
    """By name: the value, and the gradients by x, y, z and the prototypes."""
    *vectors, ids = inputs()
    of = {name: functools.partial(fn, ids=ids) for name, fn in REFERENCES.items()}
    return {name: (np.real(fn(*vectors)), ref.gradients(fn, *vectors)) for name, fn in of.items()}


@pytest.fixture
def travelling(monkeypatch):
    def set_to(tile, travel):
        for primitive in (pairwise.pairwise_logsumexp, pairwise.pairwise_cross_entropy):
            monkeypatch.setitem(primitive.__kwdefaults__, "tile", tile)
            monkeypatch.setitem(primitive.__kwdefaults__, "travel", travel)

    return set_to


def check(inputs, shape, way):
    *vectors, ids = inputs()
    padded = np.concatenate([vectors[3], np.zeros((8 - len(vectors[3]), vectors[3].shape[1]))])  # for devices to have equal parts
    args = [jnp.float32(z) for z in (*vectors[:3], padded)]
    run, want = pulled(lambda *args: losses(axis_of(shape), *args), shape, way), wanted(inputs)
    for name, (value, grads) in want.items():
        ct = {other: jnp.float32(other == name) for other in want}
        got, got_grads = run(args, ct, [jnp.asarray(ids)])
        assert abs(got[name] - value) <= 1e-6 * max(abs(value), 1), f"{name}: {got[name]} for {value}"
        for a, b in zip(got_grads, grads, strict=True):
            assert not np.any(a[len(b) :])
            np.testing.assert_allclose(a[: len(b)], b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3), err_msg=name)


@pytest.mark.parametrize(
    ("inputs", "shape", "tile", "travel", "way"),
    [
        (random_views, None, 5, None, "outside"),
        (fixture, (4, 1), 512, "gather", "inside"),
        (random_views, (2, 4), 3, "ring", "outside"),
    ],
)
def test_values_and_gradients(inputs, shape, tile, travel, way, travelling):
    travelling(tile, travel)
    check(inputs, shape, way)


def test_golden():
    want = wanted(fixture)
    assert {name: want[name][0] for name in GOLDEN} == pytest.approx(GOLDEN, abs=1e-9)


def test_symile_is_softmax_where_it_must_be():
    """Of two modalities; and of a third that is constant, at scale t / sqrt(d), but for the constant's own anchor."""
    x, y = (jnp.float32(z) for z in random_views()[:2])
    symile = jax.jit(symile_loss)
    np.testing.assert_allclose(symile(jnp.stack([x, y]), T), clip_loss(x, y, T), rtol=1e-6)
    constant = jnp.full_like(x, WIDTH**-0.5)
    shifted, own = (T * WIDTH**-0.5 * (np.float64(x) * z).sum(1) for z in (np.roll(np.float64(y), -1, 0), np.float64(y)))
    of_constant = cross_entropy(np.where(np.eye(ROWS, dtype=bool), own[:, None], shifted[None]))
    want = (2 * clip_loss(x, y, T * WIDTH**-0.5) + of_constant) / 3
    np.testing.assert_allclose(symile(jnp.stack([x, y, constant]), T), want, rtol=1e-6)


def test_closed_forms():
    """Where all vectors are equal; B examples, V views. Where no example has a negative, the value and the gradient are 0."""
    b, tau = 6, 0.2

    @jax.jit
    def values(z):
        alone = functools.partial(multi_view_loss, scale=1 / tau, ids=jnp.zeros(b, jnp.int32))
        of = [[multi_view_loss(z[:n], 1 / tau, form) for form in ("infonce", "dhel")] for n in (2, 3)]
        none = [jax.value_and_grad(lambda z, form=form: alone(z, form=form))(z) for form in ("infonce", "dhel")]
        return symile_loss(z, 30.0), of, none

    z = jnp.broadcast_to(jnp.float32([0.6, 0.8]), (3, b, 2))
    symile, of, none = values(z)
    np.testing.assert_allclose(symile, np.log(b), rtol=1e-6)
    for n, (infonce, dhel) in zip((2, 3), of, strict=True):
        np.testing.assert_allclose(infonce, np.log((n * b - 1) / (n - 1)), rtol=1e-6)
        np.testing.assert_allclose(dhel, n * np.log(b - 1) + (n - 1) / tau - np.log(n * (n - 1) / 2), rtol=1e-6)
    assert not any(np.any(a) for a in jax.tree.leaves(none))


def test_barlow_is_zero_for_white_inputs_and_finite_for_a_constant_coordinate():
    white = np.linalg.qr(np.c_[np.ones(ROWS), np.random.default_rng(0).normal(size=(ROWS, WIDTH))])[0][:, 1:]
    np.testing.assert_allclose(barlow(jnp.float32(white), jnp.float32(3 * white), 5e-3, 0.025), 0, atol=1e-8)
    value, grad = jax.value_and_grad(barlow)(jnp.float32(white).at[:, 0].set(0.5), jnp.float32(white), 5e-3, 0.025)
    np.testing.assert_allclose(value, 0.025, rtol=1e-5)
    assert np.all(np.isfinite(grad))


def test_assignments_are_balanced():
    x, y = random_views()[:2]
    worst = []
    for rounds in (1, 3, 50):
        offsets = np.float64(column_offsets(jnp.float32(x), jnp.float32(y), 0.05, rounds, None))
        q = ref.softmax((x @ y.T + offsets) / 0.05)
        np.testing.assert_allclose(q, sinkhorn(x @ y.T, rounds), rtol=0, atol=1e-5)
        worst.append(np.abs(q.sum(0) - 1).max())
    assert worst[0] > 1.5 * worst[1] > 3 * worst[2]


def test_symile_learns_what_no_pair_of_modalities_shows():
    """c = a xor b (2411.01053): any two of the three are independent."""

    def value(tables, key):
        a, b = jax.random.randint(key, (2, 64), 0, 2)
        unit = tables / jnp.linalg.norm(tables, axis=-1, keepdims=True)
        return symile_loss(jnp.stack([unit[m][v] for m, v in enumerate((a, b, a ^ b))]), 30.0)

    optimizer = optax.adam(0.05)

    def step(state, key):
        tables, opt = state
        loss, grad = jax.value_and_grad(value)(tables, key)
        updates, opt = optimizer.update(grad, opt)
        return (optax.apply_updates(tables, updates), opt), loss

    start = jax.random.normal(jax.random.key(1), (3, 2, 8))
    (tables, _), found = jax.jit(lambda t: jax.lax.scan(step, (t, optimizer.init(t)), jax.random.split(jax.random.key(2), 200)))(
        start
    )
    assert np.mean(found[-20:]) < np.log(1 + 63 / 2) + 0.05 < np.log(64) - 0.5  # half of the others are right by chance
    a, b, c = tables
    for i, j in np.ndindex(2, 2):
        assert np.argmax(c @ (a[i] * b[j])) == i ^ j


def some_rows():
    """Two views and two captions, of the model and of a head with a predictor and a scale, and prototypes."""
    x, y, z, w, _ = (jnp.float32(a) for a in random_views())
    image, text = jnp.stack([x, z], 1), jnp.stack([y, -x], 1)
    head = HeadRows(text, image, jnp.stack([z, y], 1), jnp.stack([x, -z], 1))
    return Rows(image, text, jnp.asarray(IDS), heads={"local": head}, classes=w, shared=Shared({"local": jnp.float32(T_SWAP)}))


def test_terms_are_their_equations():
    rows = some_rows()
    terms, found = [], []

    def run(rows):
        (x, z), (y, v) = (jnp.unstack(a, axis=1) for a in (rows.image, rows.text))  # as the head has them: texts and images
        head, w, ids = rows.heads["local"], rows.classes, rows.ids
        (p, q), (r, _) = (jnp.unstack(a, axis=1) for a in (head.image_predicted, head.text_predicted))

        def mean(fn, *of):
            return sum(fn(*args) for args in of) / len(of)

        def swap(a, b, c, d):
            return swap_loss((a, b), T_SWAP, (c, d), 0.05, 3)

        wanted = {
            config.Symile(images=(1,), temperature=0.5): symile_loss(jnp.stack([z, y, v]), 2.0),
            config.MultiView(form="infonce"): multi_view_loss(jnp.stack([x, z, y, v]), 5.0, "infonce", ids=ids),
            config.MultiView(sides="image-image", temperature=0.1): multi_view_loss(jnp.stack([x, z]), 10.0, ids=ids),
            config.MultiView(head="local", texts=(1,)): multi_view_loss(jnp.stack([y, v, z]), 5.0, ids=ids),
            config.Barlow(texts=(0,), off=0.5, scale=2.0): mean(barlow, (x, y, 0.5, 2.0), (z, y, 0.5, 2.0)),
            config.Siamese(head="local", texts=(0,)): mean(alignment, (p, x), (r, y), (q, x), (r, v)),
            config.Siamese(head="local", sides="image-image"): mean(alignment, (p, v), (q, y)),
            config.Swap(head="local"): mean(swap, (y, x, v, z), (y, z, v, x), (v, x, y, z), (v, z, y, x)),
            config.Swap(sides="image-image", prototypes=True, temperature=0.1): prototype_loss((x, z), 10.0, w, 0.05, 3),
        }
        terms.extend(wanted)
        return [(objective((term,), rows, jnp.float32(T), None)[:2], want) for term, want in wanted.items()]

    found = jax.jit(run)(rows)
    for term, ((loss, logged), want) in zip(terms, found, strict=True):
        np.testing.assert_allclose(loss, want, rtol=2e-6, err_msg=str(term))
        assert logged == {f"{term.kind}_loss": loss}


def test_flops():
    """8 B^2 d a pass; of infonce one for each two views, of swap a distillation's 12 and 20 more."""
    sizes = Sizes(100, 2, 16, views=2, heads={"local": 8}, classes=50)
    wanted = {
        config.Symile(): 4 * 8,
        config.Symile(images=(0,)): 3 * 8,
        config.MultiView(sides="image-image"): 2 * 8,
        config.MultiView(form="infonce", head="local"): 16 * 8 / 2,
        config.Swap(texts=(0,)): 2 * (12 + 20),
        config.Swap(prototypes=True, texts=(0,)): 2 * 12 / 2,
        config.Siamese(head="local"): 0,
    }
    assert {term: term_flops(term, sizes) for term in wanted} == {term: n * 100**2 * 16 for term, n in wanted.items()}
    assert term_flops(config.Barlow(head=("local", "local")), sizes) == 2 * 4 * 6 * 100 * 8**2


@pytest.mark.parametrize(
    ("term", "model", "data", "message"),
    [
        (config.Symile(), {}, {"captions": (0, 1)}, "model.max_scale = 100.0: objective.0 has products of 3 unit vectors"),
        (config.Symile(), {"max_scale": None}, {}, "objective.0.texts = None: Symile takes three"),
        (config.Siamese(), {}, {}, "objective.0.head = None: must name a head"),
        (config.Swap(), {}, {}, "objective.0.images = None: the targets are another pair's"),
        (config.Swap(sides="all"), {}, {"captions": (0, 1)}, "objective.0.sides = 'all': must be image-text"),
        (config.Swap(prototypes=True), {}, {}, "model.classes = None: objective.0 takes them"),
        (config.Swap(prototypes=True), {"classes": config.Classes(count=9, width=8)}, {}, "width=8): objective.0 takes them"),
        (config.Barlow(temperature=0.1), {}, {}, "objective.0.temperature = 0.1: leave it out"),
    ],
)
def test_what_cannot_be_served_is_refused(term, model, data, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        term.check("objective.0", config.Model(**model), config.Data(spec="emoji", **data))


def test_symile_with_a_temperature_of_its_own_leaves_the_models_scale():
    config.Symile(temperature=0.01).check("objective.0", config.Model(), config.Data(spec="emoji", captions=(0, 1)))
