"""Every loss and regularizer against its float64 reference, value and every gradient, on one device and on eight."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import losses
from clipjax.losses import pairwise
from tests.losses import reference as ref
from tests.losses.meshes import Shape, axis_of, pulled
from tests.losses.test_pairwise import close

ROWS, WIDTH = 16, 6
SETTINGS = (  # pairs so near that the loss is small, ids that are all equal, scale
    *[(False, False, t) for t in (1.0, 14.3, 100.0)],
    *[(True, False, t) for t in (14.3, 100.0)],
    (False, True, 14.3),
)


class Beside(NamedTuple):
    """What comes with each pair, beside its vectors."""

    ids: np.ndarray
    text_ids: np.ndarray
    tx: np.ndarray
    ty: np.ndarray


class Case(NamedTuple):
    """`loss(x, y, scale, *scalars, rows, axis)` and `reference(x, y, scale, *scalars, rows)`."""

    loss: Callable
    reference: Callable
    scalars: tuple[float, ...] = ()  # after the scale
    texts: int = 1
    equal_ids: bool = False  # also with ids that are all equal
    # (x, y, rows) -> functions of (x, y, scale, *scalars) that add up to the loss and see x and y through the logits alone, with
    # those x and y: what the scalars' gradients add up is read off their logits. None: the loss itself is one.
    parts: Callable | None = None


@functools.cache
def some_rows(texts: int, equal_ids: bool) -> Beside:
    ids = np.random.default_rng(2).integers(0, ROWS // 2, ROWS) * (not equal_ids)
    text_ids = np.repeat(ids, texts)
    text_ids[5::7] = 99  # of no image
    return Beside(np.int32(ids), np.int32(text_ids), *ref.random_pairs(ROWS, 12, seed=9))


def smooth(x, y, t, ids=None, weight=0.5):
    return ref.clip(x, y, t, image_weight=weight, label_smoothing=0.1, ids=ids)


CASES = {
    "clip": Case(
        lambda x, y, t, rows, axis: losses.clip_loss(x, y, t, axis=axis),
        lambda x, y, t, rows: ref.clip(x, y, t),
    ),
    "clip: ALIGN": Case(
        lambda x, y, t, rows, axis: losses.clip_loss(x, y, t, axis=axis, label_smoothing=0.1, reduction="sum"),
        lambda x, y, t, rows: 2 * smooth(x, y, t),
    ),
    "clip: ids, smoothed, ConVIRT": Case(
        lambda x, y, t, rows, axis: losses.clip_loss(x, y, t, axis=axis, image_weight=0.75, label_smoothing=0.1, ids=rows.ids),
        lambda x, y, t, rows: smooth(x, y, t, rows.ids, 0.75),
        equal_ids=True,
    ),
    "siglip": Case(
        lambda x, y, t, b, rows, axis: losses.siglip_loss(x, y, t, b, axis=axis),
        lambda x, y, t, b, rows: ref.siglip(x, y, t, b),
        (-3.0,),
    ),
    "siglip: ids": Case(
        lambda x, y, t, b, rows, axis: losses.siglip_loss(x, y, t, b, axis=axis, ids=rows.ids),
        lambda x, y, t, b, rows: ref.siglip(x, y, t, b, ids=rows.ids),
        (-10.0,),
        equal_ids=True,
    ),
    "decoupled": Case(
        lambda x, y, t, rows, axis: losses.decoupled_loss(x, y, t, axis=axis),
        lambda x, y, t, rows: ref.decoupled(x, y, t),
    ),
    "decoupled: DCLW, ids": Case(
        lambda x, y, t, rows, axis: losses.decoupled_loss(x, y, t, axis=axis, sigma=0.5, ids=rows.ids),
        lambda x, y, t, rows: ref.decoupled(x, y, t, sigma=0.5, ids=rows.ids),
        equal_ids=True,
        parts=lambda x, y, rows: [(functools.partial(ref.decoupled, sigma=0.5, ids=rows.ids, stop_gradient=True), x, y)],
    ),
    "decoupled: DCLW, held": Case(
        lambda x, y, t, rows, axis: losses.decoupled_loss(x, y, t, axis=axis, sigma=0.3, stop_gradient=True),
        lambda x, y, t, rows: ref.decoupled(x, y, t, sigma=0.3, stop_gradient=True),
    ),
    "hard negatives": Case(
        lambda x, y, t, rows, axis: losses.hard_negative_loss(x, y, t, axis=axis),
        lambda x, y, t, rows: ref.hard_negative(x, y, t),
    ),
    "hard negatives: held, ids": Case(
        lambda x, y, t, rows, axis: losses.hard_negative_loss(
            x, y, t, axis=axis, alpha=0.5, beta=0.5, stop_gradient=True, ids=rows.ids
        ),
        lambda x, y, t, rows: ref.hard_negative(x, y, t, alpha=0.5, beta=0.5, stop_gradient=True, ids=rows.ids),
        equal_ids=True,
    ),
    "hard negatives: decoupled": Case(
        lambda x, y, t, rows, axis: losses.hard_negative_loss(x, y, t, axis=axis, alpha=0.0, ids=rows.ids),
        lambda x, y, t, rows: ref.hard_negative(x, y, t, alpha=0.0, ids=rows.ids),
        equal_ids=True,
    ),
    "several positives": Case(
        lambda x, y, t, rows, axis: losses.multi_positive_loss(x, y, t, rows.ids, rows.text_ids, axis=axis),
        lambda x, y, t, rows: ref.multi_positive(x, y, t, rows.ids, rows.text_ids),
        equal_ids=True,
    ),
    "several positives: two texts": Case(
        lambda x, y, t, rows, axis: losses.multi_positive_loss(x, y, t, rows.ids, rows.text_ids, axis=axis),
        lambda x, y, t, rows: ref.multi_positive(x, y, t, rows.ids, rows.text_ids),
        texts=2,
    ),
    "Matryoshka": Case(
        lambda x, y, t, b, rows, axis: losses.matryoshka(losses.siglip_loss, x, y, (3, 6), t, b, axis=axis),
        lambda x, y, t, b, rows: ref.matryoshka(ref.siglip, x, y, (3, 6), t, b),
        (-3.0,),
        parts=lambda x, y, rows: [(ref.siglip, *(ref.unit_rows(z[:, :m]) for z in (x, y))) for m in (3, 6)],
    ),
    "CWCL": Case(
        lambda x, y, t, rows, axis: losses.cwcl_loss(x, y, t, axis=axis),
        lambda x, y, t, rows: ref.cwcl(x, y, t),
        parts=lambda x, y, rows: [(functools.partial(ref.cwcl, weights=1 + x @ x.T), x, y)],
    ),
    "distillation": Case(
        lambda x, y, t, rows, axis: losses.distillation_loss(x, y, t, rows.tx, rows.ty, 20.0, axis=axis),
        lambda x, y, t, rows: ref.distillation(x, y, t, rows.tx, rows.ty, 20.0),
    ),
}
# What differs from another case in nothing that a mesh sees is slow there, and some are differentiated within the map.
LATER = {"clip", "siglip", "decoupled: DCLW, held", "hard negatives", "hard negatives: decoupled", "several positives"}
WITHIN = {"clip: ids, smoothed, ConVIRT", "siglip: ids", "decoupled: DCLW, ids", "Matryoshka", "CWCL"}


@pytest.fixture
def travelling(monkeypatch):
    """Sets how the primitives that a loss calls go about it; the losses themselves leave that to them."""

    def set_to(tile: int, travel: str | None) -> None:
        for primitive in (pairwise.pairwise_logsumexp, pairwise.pairwise_softplus, pairwise.pairwise_cross_entropy):
            monkeypatch.setitem(primitive.__kwdefaults__, "tile", tile)
            monkeypatch.setitem(primitive.__kwdefaults__, "travel", travel)

    return set_to


@functools.cache
def vectors(texts: int, near: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs with a gap; or so near that the loss is small at a large scale."""
    x, y = ref.random_pairs(ROWS, WIDTH, texts=texts)
    near_x = np.repeat(x, texts, 0)
    return x, np.float64(np.float32(ref.unit_rows(near_x + 0.2 * (y - near_x)))) if near else y


@functools.cache
def wanted(kind: str, near: bool, equal_ids: bool, scale: float) -> tuple[float, tuple[np.ndarray, ...], list[float]]:
    """The value, the gradients, and for each scalar's the sum of the absolute values of what it adds up."""
    case = CASES[kind]
    (x, y), rows = vectors(case.texts, near), some_rows(case.texts, equal_ids)
    value = case.reference(x, y, scale, *case.scalars, rows)
    grads = ref.gradients(lambda *args: case.reference(*args, rows), x, y, scale, *case.scalars)
    parts = case.parts(x, y, rows) if case.parts else [(lambda *args: case.reference(*args, rows), x, y)]
    terms = np.zeros((2, 0))
    for fn, u, v in parts:
        g = ref.by_logit(lambda a, b, t, fn=fn: fn(a, b, t, *case.scalars), u, v, scale)
        terms = np.concatenate([terms, [(g * (u @ v.T)).ravel(), g.ravel()]], 1)
    np.testing.assert_allclose(terms.sum(1)[: len(grads) - 2], grads[2:], rtol=1e-9, atol=1e-12 * np.abs(terms).sum(1).max())
    return float(value), grads, list(np.abs(terms).sum(1))


def check(kind: str, shape: Shape, way: str) -> None:
    case = CASES[kind]
    run = pulled(lambda *args: case.loss(*args, axis=axis_of(shape)), shape, way)
    for near, equal_ids, scale in SETTINGS[: None if case.equal_ids else -1]:
        scale = float(np.float32(scale))
        value, grads, terms = wanted(kind, near, equal_ids, scale)
        args = [jnp.float32(a) for a in (*vectors(case.texts, near), scale, *case.scalars)]
        rows = Beside(
            *(jnp.asarray(z, np.int32 if z.dtype == np.int32 else np.float32) for z in some_rows(case.texts, equal_ids))
        )
        got, got_grads = run(args, jnp.float32(1), [rows])
        case_name = f"{kind} at {scale}, near={near}, equal_ids={equal_ids}"
        assert abs(got - value) <= 1e-5 * max(abs(value), 1e-2), f"{case_name}: {got} for {value}"
        close(got_grads[0], grads[0], scale, f"{case_name}: by image")
        close(got_grads[1], grads[1], scale, f"{case_name}: by text")
        for g, w, most in zip(got_grads[2:], grads[2:], terms, strict=False):
            assert abs(g - w) <= 1e-5 * most, f"{case_name}: {g} for {w} of terms {most}"


@pytest.mark.optimized
@pytest.mark.parametrize("kind", CASES)
def test_one_device_and_an_odd_tile(kind, travelling):
    travelling(5, None)
    check(kind, None, "outside")


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in LATER else kind for kind in CASES])
def test_eight_devices(kind, travelling):
    travelling(512, "ring")
    check(kind, (2, 4), "inside" if kind in WITHIN else "outside")


OTHERS = [
    (None, 512, None, "outside"),
    ((1, 1), 7, "ring", "inside"),
    ((2, 1), 5, "gather", "outside, unchecked"),
    ((4, 1), 4, "ring", "outside"),
    ((8, 1), 2, "gather", "inside"),
    ((8, 1), 1, "ring", "outside, unchecked"),
    ((2, 4), 1000, "gather", "outside"),
]


# Each on two of them: test_pairwise.py has the primitives, of which losses are equations, on all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape", "tile", "travel", "way"),
    [(kind, *OTHERS[(n + more) % len(OTHERS)]) for n, kind in enumerate(CASES) for more in (0, 3)],
)
def test_other_meshes(kind, shape, tile, travel, way, travelling):
    travelling(tile, travel)
    check(kind, shape, way)
