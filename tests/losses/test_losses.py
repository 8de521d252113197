"""Softmax and sigmoid losses against float64 NumPy, the fixtures of the methods notes, closed forms, and every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, losses, sharding
from clipjax.losses import clip_loss, siglip_loss


def unit_rows(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def fixture(rows, width):
    """The golden fixture: closed formulas, so that any language can make it."""
    i, j = np.arange(rows, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)[None]
    x = np.sin(1 + 3 * i + 2 * j * j + 0.5 * i * j)
    return unit_rows(x), unit_rows(x + 0.7 * np.cos(2 + 5 * i + 2 * j + i * j))


def softmax_reference(x, y, scale):
    """Value and gradients, float64 NumPy: dS = (P_rows + P_columns) / 2B - I / B."""
    s = scale * x @ y.T
    rows, cols = (np.exp(s - s.max(a, keepdims=True)) for a in (1, 0))
    rows, cols = rows / rows.sum(1, keepdims=True), cols / cols.sum(0, keepdims=True)
    value = -(np.log(np.diag(rows)) + np.log(np.diag(cols))).mean() / 2
    ds = (rows + cols) / 2 / len(x) - np.eye(len(x)) / len(x)
    return value, (scale * ds @ y, scale * ds.T @ x, (ds * (x @ y.T)).sum()), np.abs(ds * (x @ y.T)).sum()


def sigmoid_reference(x, y, scale, bias):
    s = scale * x @ y.T + bias
    sign = 2 * np.eye(len(x)) - 1
    ds = -sign / (1 + np.exp(sign * s)) / len(x)
    value = np.logaddexp(0, -sign * s).sum() / len(x)
    return value, (scale * ds @ y, scale * ds.T @ x, (ds * (x @ y.T)).sum(), ds.sum()), np.abs(ds).sum()


def mesh_of(data, fsdp):
    return sharding.make_mesh(config.Mesh(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])


def random_pairs(rows, width, gap=0.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width))
    y = x + rng.normal(size=(rows, width))
    x[:, 0] += gap
    y[:, 0] -= gap
    return tuple(np.float64(np.float32(unit_rows(z))) for z in (x, y))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("shape", [None, (1, 1), (2, 1), (4, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_value_and_gradients_equal_float64_on_every_mesh(kind, shape, scale):
    x, y = random_pairs(32, 16, gap=1.0)
    scalars = (scale,) if kind == "softmax" else (scale, -5.0)
    reference = softmax_reference if kind == "softmax" else sigmoid_reference
    loss = clip_loss if kind == "softmax" else siglip_loss
    fn = loss if shape is None else sharding.on_shards(functools.partial(loss, axis=sharding.BATCH), mesh_of(*shape))
    want, want_grads, terms = reference(x, y, *scalars)
    args = [jnp.float32(a) for a in (x, y, *scalars)]
    got, grads = jax.jit(jax.value_and_grad(fn, argnums=tuple(range(len(args)))))(*args)
    assert abs(got - want) <= 1e-5 * max(abs(want), 1e-2)
    rtol = 5e-5 if scale == 100 else 1e-5
    for g, w in zip(grads[:2], want_grads[:2], strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max())
    for g, w in zip(grads[2:], want_grads[2:], strict=True):
        assert abs(g - w) <= 1e-5 * terms


def test_golden_values():
    x, y = (jnp.float32(z) for z in fixture(4, 3))
    np.testing.assert_allclose(clip_loss(x, y, 1 / 0.07), 1.1495012874, rtol=1e-5)
    np.testing.assert_allclose(clip_loss(x, y, 100.0), 7.567003924, rtol=1e-5)
    np.testing.assert_allclose(siglip_loss(x, y, 10.0, -10.0), 2.8876405536, rtol=1e-5)
    x, y = (jnp.float32(z) for z in fixture(64, 16))
    np.testing.assert_allclose(clip_loss(x, y, 1 / 0.07), 0.09090551604803836, rtol=1e-5)
    np.testing.assert_allclose(clip_loss(x, y, 100.0), 0.031232094642624997, rtol=1e-4)
    np.testing.assert_allclose(siglip_loss(x, y, 10.0, -10.0), 2.0865084092372848, rtol=1e-5)
    accuracy = losses.accuracies(x, y)
    assert (accuracy["image_to_text_accuracy"], accuracy["text_to_image_accuracy"]) == (1.0, 0.984375)


def test_closed_forms():
    same = jnp.zeros((256, 8)).at[:, 0].set(1)
    np.testing.assert_allclose(clip_loss(same, same, 100.0), np.log(256), rtol=1e-5)
    np.testing.assert_allclose(siglip_loss(same, same, 10.0, -10.0), 256 * np.log(2), rtol=1e-6)
    eye = jnp.eye(256)
    np.testing.assert_allclose(clip_loss(eye, eye, 1 / 0.07), 1.593304e-4, rtol=1e-5)  # the form lse - s_ii fails this


def test_collapsed_embeddings_are_never_accurate():
    same = jnp.zeros((8, 4)).at[:, 0].set(1)
    assert losses.accuracies(same, same)["image_to_text_accuracy"] == 0


def test_a_nan_shows():
    x = jnp.eye(4).at[0, 0].set(jnp.nan)
    assert jnp.isnan(clip_loss(x, jnp.eye(4), 10.0))
    assert jnp.isnan(siglip_loss(x, jnp.eye(4), 10.0, 0.0))


def test_objective_adds_weighted_terms_and_leaves_out_weight_zero():
    x, y = (jnp.float32(z) for z in fixture(4, 3))
    terms = (config.Softmax(weight=0.5), config.Sigmoid(weight=2.0))
    loss, logged = losses.objective(terms, x, y, jnp.float32(10), jnp.float32(-10))
    want = 0.5 * clip_loss(x, y, 10.0) + 2 * siglip_loss(x, y, 10.0, -10.0)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert {"softmax_loss", "sigmoid_loss"} < logged.keys()
    _, logged = losses.objective((config.Softmax(), config.Sigmoid(weight=0.0)), x, y, jnp.float32(10), None)
    assert "sigmoid_loss" not in logged
