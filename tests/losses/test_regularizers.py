"""Uniformity, cross-uniformity, alignment, CyCLIP's terms and what is preserved against float64, on one device and on eight."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.losses import alignment, cross_uniformity, cyclip, pairwise_logsumexp, preserved, uniformity
from tests.losses import reference as ref
from tests.losses.meshes import axis_of, pulled

ROWS, WIDTH = 24, 8
NAMES = ("uniformity", "uniformity at 3", "cross-uniformity", "cross-uniformity at 3", "alignment", "in-modal", "cross-modal")
COSINES = NAMES[:5]  # of unit vectors these are functions of cosines and of distances alike, with one gradient along the sphere


def regularizers(axis, x, y):
    return (
        uniformity(x, axis=axis),
        uniformity(y, axis=axis, t=3.0),
        cross_uniformity(x, y, axis=axis),
        cross_uniformity(x, y, axis=axis, t=3.0),
        alignment(x, y, axis=axis),
        *cyclip(x, y, axis=axis),
    )


REFERENCES = (
    lambda x, y: ref.uniformity(x),
    lambda x, y: ref.uniformity(y, 3.0),
    ref.cross_uniformity,
    lambda x, y: ref.cross_uniformity(x, y, 3.0),
    ref.alignment,
    lambda x, y: ref.cyclip(x, y)[0],
    lambda x, y: ref.cyclip(x, y)[1],
)


@functools.cache
def geometries(rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random with a gap; towers that agree to three digits; and narrow cones, where sums are small beside what they add up."""
    x, y = ref.random_pairs(rows, WIDTH)
    others = ref.unit_rows(x + 1e-3 * y), ref.unit_rows(np.ones((rows, WIDTH)) + 0.1 * x)
    near, cone = (np.float64(np.float32(z)) for z in others)
    return [(x, y), (x, near), (cone, -cone), (cone, cone[::-1])]


@functools.cache
def expected(rows: int, geometry: int, k: int) -> tuple[float, tuple[np.ndarray, ...]]:
    """The value and both gradients, the same for every mesh."""
    x, y = geometries(rows)[geometry]
    return REFERENCES[k](x, y), ref.gradients(REFERENCES[k], x, y)


def check(shape, way, rows):
    run = pulled(lambda x, y: regularizers(axis_of(shape), x, y), shape, way)
    for g, (x, y) in enumerate(geometries(rows)):
        for k, name in enumerate(NAMES):
            ct = tuple(jnp.float32(i == k) for i in range(len(NAMES)))
            values, got = run((jnp.float32(x), jnp.float32(y)), ct)
            want, want_grads = expected(rows, g, k)
            # In a cone a log-mean-exp is the small difference of two numbers near 2 t + log B, half a step of float32 there.
            tolerance = 1e-5 * max(abs(want), 6e-2 if "uniformity" in name and g >= 2 else 1e-2)
            assert abs(values[k] - want) <= tolerance, f"{name}, geometry {g}: {values[k]} for {want}"
            for z, a, w in zip((x, y), got, want_grads, strict=True):
                largest = np.abs(w).max(initial=1e-6)
                if name in COSINES:
                    largest = np.abs(a).max(initial=1e-6)  # a gradient off the sphere is rounded as such before it is dropped
                    a, w = (ref.tangent(np.float64(v), z) for v in (a, w))
                rtol = 5e-5 if g == 3 and "modal" in name else 1e-5  # differences of nearly equal cosines, however they are taken
                np.testing.assert_allclose(a, w, rtol=0, atol=rtol * largest, err_msg=f"{name}, geometry {g}")


@pytest.mark.parametrize(("shape", "way", "tile", "travel"), [(None, "outside", 5, None), ((2, 4), "inside", 512, "ring")])
def test_regularizers(shape, way, tile, travel, monkeypatch):
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "tile", tile)
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "travel", travel)
    check(shape, way, ROWS)


@pytest.mark.parametrize("shape", [None, (2, 1), (4, 1), (2, 4)])
def test_what_is_preserved(shape):
    """The start is sharded as the batch, and has no gradient."""
    run = pulled(lambda z, start: preserved(z, start, axis=axis_of(shape)), shape, "outside")
    for z, start in geometries(ROWS)[:2]:
        for k, tolerance in ((0, 0.0), (1, 1e-7)):  # 1 - cosine is rounded as the cosine is
            values, (by_z, by_start) = run((jnp.float32(z), jnp.float32(start)), tuple(jnp.float32(i == k) for i in (0, 1)))
            assert values[k] == pytest.approx(ref.preserved(z, start)[k], rel=1e-5, abs=tolerance)
            want = ref.gradients(lambda z, start=start, k=k: ref.preserved(z, start)[k], z)[0]
            np.testing.assert_allclose(by_z, want, rtol=0, atol=1e-5 * np.abs(want).max())
            assert not np.any(by_start)


# Every way, either way to travel and both tiles on some of the meshes: test_pairwise.py has the primitive on all of them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "way", "travel", "tile"),
    [
        ((1, 1), "outside", "gather", 2),
        ((2, 1), "inside", "ring", 512),
        ((2, 1), "outside, unchecked", "gather", 2),
        ((4, 1), "outside, unchecked", "ring", 2),
        ((4, 1), "inside", "gather", 512),
        ((8, 1), "outside", "ring", 2),
        ((8, 1), "outside, unchecked", "gather", 512),
        ((2, 4), "inside", "ring", 2),
        ((2, 4), "outside", "gather", 2),
    ],
)
def test_regularizers_on_meshes(shape, way, travel, tile, monkeypatch):
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "tile", tile)
    monkeypatch.setitem(pairwise_logsumexp.__kwdefaults__, "travel", travel)
    check(shape, way, 48)
