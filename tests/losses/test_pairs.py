"""Which vectors a term compares: views, captions, heads, negatives by captions and by labels; against float64, on meshes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clipjax import config, losses, sharding
from clipjax.losses import HeadRows, Rows, Shared
from clipjax.losses.flops import Sizes
from clipjax.losses.pairwise import operands, tiles
from clipjax.losses.pairwise.operands import equal_ids
from tests.losses import reference as ref
from tests.losses.meshes import mesh_of

B, V, K, WIDTH, SCALE, BIAS, CLASSES = 8, 2, 3, 5, 7.0, -5.0, 6
RNG = np.random.default_rng(0)


def unit(*shape: int) -> np.ndarray:
    return np.float64(np.float32(ref.unit_rows(RNG.normal(size=shape) + 0.3)))


IMAGE, TEXT = unit(B, V, WIDTH), unit(B, K, WIDTH)
HEADS = {"a": (unit(B, V, 4), unit(B, K, 4)), "b": (unit(B, V, 3), unit(B, K, 3))}
HEAD_SCALE = 4.0  # of b
LABELS = RNG.integers(-1, CLASSES, (B, 2))
LABELS[2] = -1  # it has none, so no negatives of its group either
LABELS[0] = 5  # twice the same
RANKING = ("image_to_text_accuracy", "text_to_image_accuracy", "positive_cosine", "hardest_negative_cosine")


def views(z):
    return [z[:, i] for i in range(z.shape[1])]


def mean_over(fn, images, texts):
    return np.mean([fn(x, y) for x in images for y in texts])


def mean_of_two(fn, vectors):
    return np.mean([fn(x, y) for x, y in itertools.combinations(vectors, 2)])


def clip(scale):
    return lambda x, y: ref.clip(x, y, scale)


def negative_captions(image, text, scale):
    """Of an image: the log of its own caption's share among the first captions of all and the wrong ones of all."""
    wrong = np.concatenate(views(text)[1:])
    own = scale * image @ text[:, 0].T
    rows = ref.logsumexp(np.concatenate([own, scale * image @ wrong.T], 1)) - np.diag(own)
    return (rows.mean() + (ref.logsumexp(own.T) - np.diag(own)).mean()) / 2


def same_labels(scale):
    shared = ((LABELS[:, None, :, None] == LABELS[None, :, None, :]) & (LABELS >= 0)[:, None, :, None]).any((2, 3))
    mask = np.eye(B, dtype=bool) | shared
    return lambda x, y: ref.both(lambda s, mask: ref.logsumexp(s, mask) - np.diag(s), scale * x @ y.T, mask)


def label_targets(scale):
    sets = (LABELS[:, :, None] == np.arange(CLASSES)).any(1)
    sets = sets / np.sqrt(np.maximum(sets.sum(1, keepdims=True), 1))
    return lambda x, y: (sets.any(1) * sum(ref.pairwise_cross_entropy(x, y, scale, sets, sets, 3.0))).mean() / 2


def several_heads(x, y, a, b, t, h):
    return (mean_over(clip(t), [a[0][:, 0]], views(a[1])) + mean_over(clip(h), [b[0][:, 0]], views(b[1]))) / 2


# A term, and what it stands for: of images x and texts y [B, n, e], of the heads a and b, at the model's scale t and b's h.
PLACES = [
    (config.Softmax(sides="all"), lambda x, y, a, b, t, h: mean_of_two(clip(t), views(x) + views(y))),
    (config.Softmax(head=("a", "b"), images=(0,)), several_heads),
    (config.Sigmoid(sides="text-text"), lambda x, y, a, b, t, h: mean_of_two(lambda x, y: ref.siglip(x, y, t, BIAS), views(y))),
    (
        config.Alignment(head="a", sides="all", texts=(1,)),
        lambda x, y, a, b, t, h: mean_of_two(ref.alignment, [*views(a[0]), a[1][:, 1]]),
    ),
]
NEGATIVES = [
    (
        config.Softmax(negatives="captions", temperature=0.5),
        lambda x, y, a, b, t, h: np.mean([negative_captions(z, y, 2) for z in views(x)]),
    ),
    (
        config.Softmax(negatives="same", texts=(2, 0)),
        lambda x, y, a, b, t, h: mean_over(same_labels(t), views(x), [y[:, 2], y[:, 0]]),
    ),
    (
        config.Distillation(targets="labels", classes=CLASSES, teacher_scale=3.0),
        lambda x, y, a, b, t, h: mean_over(label_targets(t), views(x), views(y)),
    ),
]


def dense(terms, x, y, a_image, a_text, b_image, b_text, t, h):
    return [equation(x, y, (a_image, a_text), (b_image, b_text), t, h) for _, equation in terms]


@pytest.mark.parametrize(
    ("terms", "shape", "travel"),
    [(PLACES, (2, 4), "gather"), (NEGATIVES, (4, 1), "ring"), (NEGATIVES, None, "gather")],
    ids=["places-8", "negatives-4", "negatives-1"],
)
def test_a_term_takes_what_it_names(terms, shape, travel, monkeypatch):
    monkeypatch.setattr(operands, "TILE", 5 if shape else 512)  # an odd number of captions
    monkeypatch.setattr(tiles, "GATHER", 0 if travel == "ring" else 2**30)
    axis = None if shape is None else sharding.BATCH
    fn = functools.partial(losses.objective, tuple(term for term, _ in terms), axis=axis)
    fn = fn if shape is None else sharding.on_shards(fn, mesh_of(*shape), rows=1, out=P())

    def loss(image, text, a_image, a_text, b_image, b_text, scale, head_scale):
        heads = {"a": HeadRows(a_image, a_text), "b": HeadRows(b_image, b_text)}
        rows = Rows(image, text, labels=jnp.int32(LABELS), heads=heads)
        return fn(rows, scale, jnp.float32(BIAS), Shared({"b": head_scale}))[:2]

    args = [jnp.float32(z) for z in (IMAGE, TEXT, *HEADS["a"], *HEADS["b"], SCALE, HEAD_SCALE)]
    (_, logged), grads = jax.jit(jax.value_and_grad(loss, argnums=range(len(args)), has_aux=True))(*args)
    exact = IMAGE, TEXT, *HEADS["a"], *HEADS["b"], SCALE, HEAD_SCALE
    kinds = [term.kind for term, _ in terms]
    for i, (kind, value) in enumerate(zip(kinds, dense(terms, *exact), strict=True)):
        name = f"{kind}_{i}_loss" if kinds.count(kind) > 1 else f"{kind}_loss"
        np.testing.assert_allclose(logged[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    for got, want in zip(grads, ref.gradients(lambda *args: sum(dense(terms, *args)), *exact), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_terms_of_one_side_are_the_mean_over_views():
    def value(image):
        return losses.objective((config.Uniformity(), config.MultiPositive()), Rows(image, jnp.float32(TEXT)), SCALE, None)[0]

    found = jax.jit(value)(jnp.float32(IMAGE))
    assert found == pytest.approx(np.mean([jax.jit(value)(jnp.float32(z)) for z in views(IMAGE)]), rel=1e-6)


def test_golden_values_of_methods_f():
    """Computed in float64 by another program, of the fixture of reference.py and a third modality."""
    i, j = np.arange(4.0)[:, None], np.arange(3.0)[None]
    x, y = ref.fixture(4, 3)
    x, y, z = (jnp.float32(ref.unit_rows(z)) for z in (x, y, x + 0.9 * np.sin(0.5 + 7 * i + j + 0.3 * i * j)))
    labels = jnp.int32([[0, 1], [2, 3], [5, 4], [2, 0]])

    def value(term, scale, rows):
        return jax.jit(functools.partial(losses.objective, (term,)))(rows, jnp.float32(scale), jnp.float32(-10))[0]

    three = Rows(x, jnp.stack([y, z], 1))
    two = Rows(x, y, labels=labels)
    groups = dataclasses.replace(two, labels=jnp.int32([[0], [0], [1], [1]]))
    by_label = config.Distillation(targets="labels", classes=6, teacher_scale=10.0)
    found = [
        value(config.Softmax(sides="all"), 1 / 0.07, three),
        value(config.Sigmoid(sides="all"), 10, three),
        value(by_label, 10, two),
        value(config.Softmax(negatives="same", image_weight=1.0), 1 / 0.07, groups),
    ]
    np.testing.assert_allclose(found, [2.3445089836, 4.2437574194, 0.8824125883, 0.0001879161], rtol=2e-6)


def test_wrong_captions_of_equal_ids_count_and_unchanged_ones_do_not():
    """Images of one id are no negatives of each other, but the wrong captions of both are negatives of either."""
    image, text = IMAGE[:2, 0], TEXT[:2].copy()
    text[1, 2] = text[1, 0]  # unchanged
    term, rows = config.Softmax(negatives="captions", image_weight=1.0), Rows(jnp.float32(image), jnp.float32(text))
    own, wrong = SCALE * (image * text[:, 0]).sum(1), SCALE * np.einsum("ie,jke->ijk", image, text[:, 1:])
    wrong[1, 1, 1] = -np.inf
    others = np.exp(SCALE * image @ text[:, 0].T)[[0, 1], [1, 0]]
    run = jax.jit(lambda ids: losses.objective((term,), dataclasses.replace(rows, ids=ids), SCALE, None)[0])
    for ids, negatives in ((jnp.int32([3, 5]), others), (jnp.int32([7, 7]), 0)):
        if ids[0] == 7:  # the other's caption unchanged has the id, too
            wrong[0, 1, 1] = -np.inf
        want = np.log(np.exp(own) + np.exp(wrong).sum((1, 2)) + negatives) - own
        np.testing.assert_allclose(run(ids), want.mean(), rtol=1e-6)


def test_labels_in_the_limits():
    """All of one label are all negatives, of labels of their own none; and sharp targets of such labels are the own pairs."""
    image, text = jnp.float32(IMAGE[:, 0]), jnp.float32(TEXT[:, 0])
    terms = config.Softmax(negatives="same"), config.Distillation(targets="labels", classes=B, teacher_scale=100.0)
    run = jax.jit(lambda labels: losses.objective(terms, Rows(image, text, labels=labels[:, None]), SCALE, None)[1])
    plain, one, own = ref.clip(IMAGE[:, 0], TEXT[:, 0], SCALE), run(jnp.zeros(B, int)), run(jnp.arange(B))
    assert (one["softmax_loss"], own["softmax_loss"]) == (pytest.approx(plain, rel=1e-6), 0)
    assert own["distillation_loss"] == pytest.approx(plain, rel=1e-6)
    assert run(jnp.full(B, -1))["distillation_loss"] == 0


def test_rankings_are_of_images_and_texts_and_bear_the_name_of_a_head():
    rows = Rows(*map(jnp.float32, (IMAGE, TEXT)), heads={"a": HeadRows(*map(jnp.float32, HEADS["a"]))})
    terms = config.Softmax(head="a"), config.Softmax(sides="text-text"), config.Softmax(sides="all"), config.Softmax(texts=(0,))
    logged = jax.jit(functools.partial(losses.objective, terms))(rows, jnp.float32(SCALE), None)[1]
    names = {name for name in logged if not name.endswith("_loss")}
    assert names == {f"{prefix}{name}" for prefix in ("", "a_") for name in RANKING}
    assert logged["positive_cosine"] == pytest.approx(np.einsum("bve,bke->bvk", IMAGE, TEXT).mean(), abs=1e-6)
    assert logged["a_positive_cosine"] == pytest.approx(np.einsum("bve,bke->bvk", *HEADS["a"]).mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("term", "passes"),
    [
        (config.Softmax(), 6),
        (config.Softmax(images=(0,), texts=(0, 1)), 2),
        (config.Softmax(sides="all"), 10),
        (config.Sigmoid(sides="text-text"), 2.25),
        (config.Softmax(head=("a", "b"), images=(1,)), 3 * (4 + 3) / 5),
        (config.Softmax(negatives="captions"), 6),
        (config.Distillation(targets="labels", classes=10), 12),
        (config.Uniformity(), 3.75),
    ],
)
def test_flops_count_pairs_views_and_heads(term, passes):
    sizes = Sizes(64, K, WIDTH, views=V, heads={"a": 4, "b": 3})
    assert losses.term_flops(term, sizes) == pytest.approx(passes * 8 * 64**2 * WIDTH)


def test_minus_one_is_no_id():
    rows, cols = jnp.array([[0, -1], [-1, -1], [2, 5]]), jnp.array([[-1, -1], [3, 0], [5, -1]])
    np.testing.assert_array_equal(equal_ids(rows, cols), [[False, True, False], [False, False, False], [False, False, True]])
