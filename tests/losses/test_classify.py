"""Classification into classes that are divided over the devices, against all logits in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import Classify
from clipjax.losses import Rows, Shared
from clipjax.losses.classify import classify, own_cosines
from clipjax.losses.pairwise import operands, tiles
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled

B, VIEWS, WIDTH, ROWS, CLASSES, SCALE, SHARE = 16, 2, 8, 24, 21, 16.0, 0.4
RNG = np.random.default_rng(7)
Z = np.float64(np.float32(ref.unit_rows(RNG.normal(size=(B, VIEWS, WIDTH)))))
W = np.float64(np.float32(RNG.normal(size=(ROWS, WIDTH))))  # of any length
W[CLASSES:] = 0  # no classes
LABELS = np.stack([RNG.permutation(CLASSES)[:3] for _ in range(B)])
LABELS[2, 1:] = LABELS[9] = -1  # one label, and none
LABELS[4, 2] = LABELS[4, 0]  # counts once
KEY = jax.random.key(3)


def class_loss(z, w, labels, scale, *, axis=None, key=None, form="softmax", sampled=1.0):
    """Of images for MLCD, and of captions for the softmax."""
    side, other = ("image", "text") if form == "mlcd" else ("text", "image")
    rows = Rows(**{side: z, other: 0 * z}, labels=labels, classes=w, shared=Shared(key=key))
    return classify(Classify(loss=form, sampled=sampled, scale=scale, side=side), rows, None, None, axis).value


def dense(z, w, labels, form, chosen=np.True_, scale=SCALE):
    """`chosen`: the classes that may be negatives of any row, those of a device's rows alone."""
    s = scale * np.einsum("bvd,cd->bvc", z, ref.unit_rows(np.where(w.real == 0, 1, w)))
    positive = (labels[:, :, None] == np.arange(len(w))).any(1)[:, None]
    negative = ref.logsumexp(s, ~positive & (w.real != 0).any(1) & chosen)
    if form == "mlcd":
        losses = ref.softplus(negative) + ref.softplus(ref.logsumexp(-s, positive))
    else:
        each = np.where(positive, ref.softplus(negative[..., None] - s), 0)
        losses = each.sum(-1) / np.maximum(positive.sum(-1), 1)
    return np.where(positive.any(-1), losses, 0).mean()


def sample(devices: int) -> np.ndarray:
    """The classes that all devices draw."""
    per = ROWS // devices
    count = int(np.ceil(SHARE * per))
    drawn = [i * per + jax.random.choice(jax.random.fold_in(KEY, i), per, (count,), replace=False) for i in range(devices)]
    assert all(len(set(d.tolist())) == count for d in drawn)
    return np.isin(np.arange(ROWS), np.concatenate(drawn))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "devices", "travel"),
    [(None, 1, "ring"), ((8, 1), 8, "gather"), ((2, 2, 1, 2), 4, "ring")],
)
def test_both_forms_of_all_classes_and_of_a_sample(shape, devices, travel, monkeypatch):
    monkeypatch.setattr(tiles, "GATHER", 0 if travel == "ring" else tiles.GATHER)
    monkeypatch.setattr(operands, "TILE", 5)
    forms = [(form, share) for form in ("softmax", "mlcd") for share in (1.0, SHARE)]
    chosen = {1.0: np.True_, SHARE: sample(devices)}
    weights = [0.7, 1.3, -0.4, 1.0]

    def losses(z, w, labels):
        key = jax.random.wrap_key_data(jax.random.key_data(KEY))
        made = functools.partial(class_loss, z, w, labels, SCALE, axis=axis_of(shape), key=key)
        return [made(form=form, sampled=share) for form, share in forms]

    def total(z, w):
        each = zip(forms, weights, strict=True)
        return sum(weight * dense(z, w, LABELS, form, chosen[share]) for (form, share), weight in each)

    given = [jnp.float32(Z), jnp.float32(W)]
    found, grads = pulled(losses, shape)(given, [jnp.float32(x) for x in weights], [jnp.int32(LABELS)])
    np.testing.assert_allclose(found, [dense(Z, W, LABELS, form, chosen[share]) for form, share in forms], rtol=1e-6)
    for got, want in zip(grads, ref.gradients(total, Z, W), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not np.any(grads[1][CLASSES:])
    assert not np.any(grads[0][9])


def test_the_golden_values():
    """METHODS_F's fixture: 4 pictures, 6 classes."""
    x = ref.unit_rows(ref.fixture(4, 3)[0])[:, None]
    k, j = np.arange(6.0)[:, None], np.arange(3.0)
    w = np.sin(2 + 1.3 * k + j * j + 0.7 * k * j)
    one, two = np.array([[0], [2], [5], [2]]), np.array([[0, 1], [2, 3], [5, 4], [2, 0]])
    few = np.isin(np.arange(6), (1, 2, 4))
    wanted = [(one, "softmax", 10.2505397717, 4.6760425308), (two, "mlcd", 13.8391678562, 4.3596192175)]
    for labels, form, everything, three in wanted:
        np.testing.assert_allclose(dense(x, w, labels, form), everything, rtol=1e-10)
        np.testing.assert_allclose(dense(x, w, labels, form, few), three, rtol=1e-10)
    found = jax.jit(lambda: [class_loss(jnp.float32(x), jnp.float32(w), jnp.int32(v), 16.0, form=f) for v, f, *_ in wanted])()
    np.testing.assert_allclose(found, [everything for _, _, everything, _ in wanted], rtol=1e-6)


def test_where_all_cosines_are_zero_it_is_the_logarithm_of_the_numbers():
    """ln(1 + l) + ln(1 + m), of l labels and m other classes."""
    z, w, labels = jnp.eye(8)[:4, None], jnp.tile(jnp.eye(8)[7], (11, 1)), jnp.arange(12).reshape(4, 3) % 11
    found = jax.jit(lambda: (class_loss(z, w, labels, 16.0, form="mlcd"), class_loss(z, w, labels[:, :1], 16.0)))()
    np.testing.assert_allclose(found, [np.log(4) + np.log(9), np.log(11)], rtol=1e-6)


@pytest.mark.parametrize("shape", [None, (4, 2)])
def test_cosines_with_own_classes_come_from_their_devices(shape):
    ct, found_in = RNG.normal(size=(B, VIEWS, 3)), np.where(RNG.random((B, 3)) < 0.3, -1, RNG.integers(0, CLASSES, (B, 3)))

    def dense(z, w):
        cos = np.einsum("bvd,bld->bvl", z, ref.unit_rows(np.where(w.real == 0, 1, w))[found_in])
        return np.where(found_in[:, None] < 0, 0, cos)

    def own(z, w, labels):
        return own_cosines(axis_of(shape), z, w, labels)

    found, grads = pulled(own, shape)([jnp.float32(Z), jnp.float32(W)], jnp.float32(ct), [jnp.int32(found_in)])
    np.testing.assert_allclose(found, dense(Z, W), rtol=0, atol=3e-7)
    for got, want in zip(grads, ref.gradients(lambda z, w: (ct * dense(z, w)).sum(), Z, W), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
