"""Heads: their equation, one pass with the embedding, rows apart, nonsense refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, sharding
from clipjax.config import ConfigError, Head
from clipjax.models import clip, heads
from clipjax.models.runner import Runner
from tests.train import tiny

HEADS = (
    Head(name="a", depth=1, width=6),
    Head(name="b", hidden=20, width=10, scale=10.0, predictor=True),
    Head(name="c", side="image", depth=3, hidden=12, width=4),
)
MODEL = dataclasses.replace(tiny.CLIP, heads=HEADS)


@pytest.fixture(scope="module")
def params():
    """Noise, gains and biases too."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: clip.init(MODEL, 0))
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def batch():
    return tiny.batches(tiny.run(), 1)[0]


def equation(weights: dict, x: np.ndarray) -> np.ndarray:
    """In float64: linear map, LayerNorm, GELU; then the last linear map."""
    weights = jax.tree.map(np.float64, weights)
    for name in ("up", "middle"):
        if name in weights:
            x = x @ weights[name]["kernel"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * weights[f"norm_{name}"]["scale"] + weights[f"norm_{name}"]["bias"]
            x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ weights["down"]["kernel"] + weights["down"]["bias"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_head_is_its_equation(params):
    x = np.random.default_rng(1).standard_normal((5, 32))
    bound = clip.bind(MODEL, params)
    for side, names in {"image": "abc", "text": "ab"}.items():
        got, predicted = bound.heads(side, jnp.float32(x), Runner())
        assert [*got] == [*names]
        assert [*predicted] == ["b"]
        for name in names:
            of = params["heads"][name]
            z = equation(of[side], x)
            np.testing.assert_allclose(got[name], unit(z), atol=2e-6)
            if name in predicted:
                np.testing.assert_allclose(predicted[name], unit(equation(of[f"{side}_predictor"], z)), atol=2e-6)


def test_the_embedding_and_the_features_are_those_of_the_model_without_heads(params, batch):
    """In one pass; and a tower's parameters do not depend on its heads."""
    drawn, before = jax.jit(lambda: (clip.init(MODEL, 0), clip.init(tiny.CLIP, 0)))()
    assert jax.tree.all(jax.tree.map(np.array_equal, {**drawn, "heads": {}}, {**before, "heads": {}}))
    assert drawn["heads"]["b"]["log_scale"] == pytest.approx(math.log(10))

    @jax.jit
    def both(params):
        m, plain = clip.bind(MODEL, params), clip.bind(MODEL, {k: v for k, v in params.items() if k != "heads"})
        return [[x.vectors(side, batch[side], feature=True) for side in ("image", "text")] for x in (m, plain)]

    with_heads, plain = both(params)
    for got, want in zip(with_heads, plain, strict=True):
        assert want.heads == {}
        np.testing.assert_allclose(got.embedding, want.embedding, atol=1e-6)
        np.testing.assert_allclose(got.feature, want.feature, atol=1e-6)
        assert got.feature.shape == (16, 32)


def test_rows_are_apart_and_run_in_chunks(params, batch):
    """A row depends on its example alone; where layers are recomputed, chunk by chunk, values and gradients are the same."""

    def loss(params, model, images):
        found = clip.bind(model, params).vectors("image", images)
        return sum(jnp.sum(jnp.sin(3 * z)) for z in (*found.heads.values(), *found.predicted.values())), found

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    chunked = dataclasses.replace(MODEL, remat="full", part=12)  # three images a chunk, 12 rows of a head
    (want, vectors), (got, again) = grad(params, MODEL, batch["image"]), grad(params, chunked, batch["image"])
    for a, b in zip(jax.tree.leaves((want, vectors)), jax.tree.leaves((got, again)), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(1e-3, np.abs(a).max()))
    assert all(np.any(g) for name in ("image", "image_predictor") for g in jax.tree.leaves(want["heads"]["b"][name]))
    assert not any(np.any(g) for g in jax.tree.leaves(want["heads"]["b"]["text"]))
    changed = np.concatenate([batch["image"][:1], 255 - batch["image"][1:]])
    for a, b in zip(jax.tree.leaves(grad(params, MODEL, changed)[1]), jax.tree.leaves(vectors), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        assert np.abs(a[1:] - b[1:]).max() > 1e-3


def test_bfloat16_is_of_the_arithmetic_alone(params):
    coarse = dataclasses.replace(MODEL, dtype="bfloat16")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 32)), jnp.bfloat16)
    got, _ = clip.bind(coarse, params).heads("image", x, Runner())
    for name, z in got.items():
        assert z.dtype == jnp.float32
        want = unit(equation(params["heads"][name]["image"], np.float64(x)))
        assert 1e-5 < np.abs(z - want).max() < 0.05


def test_costs_by_hand():
    """Products only: a: 32 x 6. b: 32 x 20 + 20 x 10, and its predictor 10 x 20 + 20 x 10. c: 32 x 12 + 12 x 12 + 12 x 4."""
    assert heads.flops(MODEL, "text") == 2 * (192 + 840 + 400)
    assert heads.flops(MODEL, "image") == 2 * (192 + 840 + 400 + 384 + 144 + 48)


REFUSED = {
    "name": (lambda: Head(name="A b"), r"model\.heads\.name = 'A b': must be lower-case"),
    "blocks": (lambda: Head(name="blocks"), r"model\.heads\.name = 'blocks': "),
    "depth": (lambda: Head(name="a", depth=4), r"model\.heads\.a\.depth = 4: must be 1, 2 or 3"),
    "width": (lambda: Head(name="a", width=0), r"model\.heads\.a\.width = 0: must be positive"),
    "twice": (lambda: config.Model(heads=(Head(name="a"), Head(name="a"))), r"model\.heads = \('a', 'a'\): .* must differ"),
    "scale": (lambda: config.Model(heads=(Head(name="a", scale=0.5),)), r"model\.heads\.a\.scale = 0\.5: must lie in \[1, max"),
    "embedded": (
        lambda: config.Run(
            data=config.Data(spec="emoji", embeddings="a.npz"),
            model=config.Model(image=config.ImageTower(unlock=0), heads=(Head(name="a"),)),
        ),
        r"data\.embeddings = 'a\.npz': model\.heads need what the towers compute",
    ),
    "tensor": (
        lambda: sharding.check_tensor(MODEL, tiny.mesh_of(1, 1, 8)),
        r"mesh\.tensor = 8: .* does not divide .*model\.heads\.b\.hidden = 20, model\.heads\.c\.hidden = 12; use a divisor of 4$",
    ),
    "one tower": (lambda: config.Model(towers="image", heads=(Head(name="a"),)), r"model\.heads = \('a',\): .* both towers"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nonsense_is_refused(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()
