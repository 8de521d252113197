"""The towers by themselves: initialisation, randomness, positions, precision, and what changes nothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.config import ImageTower, Model, TextTower
from clipjax.models.clip import bind, init
from clipjax.models.layers import unit
from clipjax.models.vit import drop_patches, sincos2d

SHAPE = dict(width=64, depth=3, heads=4, mlp_dim=192)
IMAGE = dict(image_size=24, patch_size=8, **SHAPE)
CLIP = Model(
    image=ImageTower(embed_dim=48, **IMAGE), text=TextTower(length=9, vocab_size=300, embed_dim=48, **SHAPE), dtype="float32"
)
SIGLIP = Model(
    image=ImageTower.siglip("B", **IMAGE),
    text=TextTower.siglip("B", length=9, vocab_size=300, embed_dim=64, **SHAPE),
    init_bias=-10.0,
    dtype="float32",
)
MEAN = dataclasses.replace(CLIP, image=dataclasses.replace(CLIP.image, pool="mean", positions="sincos2d"))
MODELS = {"clip": CLIP, "siglip": SIGLIP, "mean": MEAN}


def by_path(tree) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def inputs(model: Model, n: int = 6):
    rng = np.random.default_rng(0)
    side, text = model.image.image_size, model.text
    images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
    tokens = rng.integers(3, text.vocab_size - 1, (n, text.length), np.int32)
    for row, end in enumerate(rng.integers(2, text.length, n)):
        tokens[row, end] = text.vocab_size - 1
        tokens[row, end + 1 :] = 0
    return images, tokens


def encode(model: Model, params, images, tokens, keys=None):
    def both(params):
        m = bind(model, params)
        return m.encode_image(images, keys), m.encode_text(tokens)

    return jax.jit(both)(params)


def loud(params):
    """Larger weights than an initialisation's, so that the residual stream hides no part."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), params)


# openai/CLIP, model.py: `initialize_parameters` and the constructor of VisionTransformer. Two things it leaves to PyTorch:
# the image tower's blocks, here drawn as the text tower's, and the patches, here of the same variance, 1 / (3 fan-in).
def published_std(path: str, tower: ImageTower | TextTower) -> float:
    d, depth = tower.width, tower.depth
    attention, projected, fully_connected = d**-0.5, d**-0.5 * (2 * depth) ** -0.5, (2 * d) ** -0.5
    ends = {
        "qkv/kernel": attention, "attention/out/kernel": projected, "mlp/up/kernel": fully_connected,
        "mlp/down/kernel": projected, "projection/kernel": d**-0.5,
        "text/tokens": 0.02, "text/positions": 0.01, "image/class_token": d**-0.5, "image/positions": d**-0.5,
        "image/patch/kernel": (3 * 3 * 8 * 8) ** -0.5,
    }  # fmt: skip
    return next(std for end, std in ends.items() if path.endswith(end))


def test_clip_starts_as_published():
    wide = Model(
        image=ImageTower(image_size=128, patch_size=8, width=256, depth=4, heads=4, mlp_dim=1024, embed_dim=128),
        text=TextTower(length=64, vocab_size=500, width=192, depth=6, heads=3, mlp_dim=768, embed_dim=128),
    )
    params = by_path(init(wide, 0))
    kernels = {p: x for p, x in params.items() if p.endswith(("kernel", "tokens", "positions", "class_token"))}
    assert len(kernels) == 15
    for path, x in kernels.items():
        x = np.asarray(x, np.float64)
        want = published_std(path, wide.image if path.startswith("image") else wide.text)
        margin = 5 / math.sqrt(2 * x.size)  # five standard errors
        assert x.std() == pytest.approx(want, rel=margin), path
        assert abs(x.mean()) < 5 * want / math.sqrt(x.size), path
    for path, x in params.items():
        if path.endswith(("bias", "scale")) and path != "log_scale":
            assert np.all(x == (1 if path.endswith("scale") else 0)), path
    assert params["log_scale"] == pytest.approx(math.log(1 / 0.07))
    assert len(params) == len(kernels) + sum(p.endswith(("bias", "scale")) for p in params)
    assert {x.dtype for x in params.values()} == {np.dtype("float32")}


def test_layers_are_drawn_independently():
    for path, x in by_path(init(CLIP, 0)).items():
        if path.endswith("kernel") and "/blocks/" in path:
            rows = np.asarray(x).reshape(len(x), -1)
            assert np.abs(np.corrcoef(rows) - np.eye(len(x))).max() < 0.1


OTHERS = {
    "with a bias": dataclasses.replace(CLIP, init_bias=-10.0),
    "patch bias, no pre-norm": dataclasses.replace(CLIP, image=dataclasses.replace(CLIP.image, patch_bias=True, pre_norm=False)),
    "mean": dataclasses.replace(CLIP, image=dataclasses.replace(CLIP.image, pool="map", embed_dim=48)),
    "longer text": dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, length=20, projection_bias=True)),
    "bfloat16": dataclasses.replace(CLIP, dtype="bfloat16", remat="full", unroll=3),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_parameter_is_a_function_of_seed_path_and_shape(other):
    """Adding a part leaves the parameters of the others bit-equal."""
    mine, theirs = by_path(init(CLIP, 3)), by_path(init(other, 3))
    shared = [p for p in mine.keys() & theirs.keys() if mine[p].shape == theirs[p].shape]
    assert len(shared) >= len(mine) - 3
    for path in shared:
        np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)


def test_seeds_and_paths_differ():
    one, two = by_path(init(CLIP, 0)), by_path(init(CLIP, 1))
    kernels = [p for p in one if p.endswith("kernel")]
    assert not any(np.array_equal(one[p], two[p]) for p in kernels)
    same_shape = [one[f"{tower}/blocks/mlp/up/kernel"] for tower in ("image", "text")]
    assert abs(np.corrcoef(*(np.ravel(x) for x in same_shape))[0, 1]) < 0.05


def test_init_is_the_same_under_jit():
    """As initial_state makes it, on a mesh."""
    eager, jitted = by_path(init(CLIP, 5)), by_path(jax.jit(lambda: init(CLIP, 5))())
    for path, x in eager.items():
        np.testing.assert_allclose(jitted[path], x, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("n", "rate", "kept"), [(16, 0.5, 8), (9, 0.25, 7), (16, 0.99, 1), (10, 0.0, 10), (49, 0.75, 12)])
def test_dropping_keeps_so_many_distinct_patches(n, rate, kept):
    x = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32)[None, :, None], (32, n, 1))
    out = np.asarray(drop_patches(x, jax.random.split(jax.random.key(0), 32), rate))[..., 0]
    assert out.shape == (32, kept)
    assert all(len(set(row)) == kept for row in out.tolist())
    assert set(out.ravel()) <= set(range(n))


def test_every_patch_is_as_likely_and_pairs_are_too():
    examples, n, kept = 20_000, 12, 4
    x = jnp.broadcast_to(jnp.arange(n)[None, :, None], (examples, n, 1))
    out = np.asarray(drop_patches(x, jax.random.split(jax.random.key(0), examples), 2 / 3))[..., 0]
    there = np.zeros((examples, n))
    there[np.arange(examples)[:, None], out] = 1
    p = kept / n
    # Draws without replacement: the counts' covariance is examples p (1 - p) n / (n - 1) times (identity - 1/n).
    chi2 = ((there.sum(0) - examples * p) ** 2).sum() / (examples * p * (1 - p) * n / (n - 1))
    assert 1.6 < chi2 < 35.0  # 11 degrees of freedom: 0.0005 to 0.9997
    pairs = (there.T @ there)[np.triu_indices(n, 1)] / examples
    assert np.abs(pairs - p * (kept - 1) / (n - 1)).max() < 5 * math.sqrt(pairs.mean() / examples)


def test_dropping_belongs_to_the_key():
    x = jnp.broadcast_to(jnp.arange(30)[None, :, None], (5, 30, 1))
    keys = jax.random.split(jax.random.key(1), 5)
    out = np.asarray(drop_patches(x, keys, 0.5))
    np.testing.assert_array_equal(out[::-1], drop_patches(x, keys[::-1], 0.5))
    assert len({tuple(sorted(row)) for row in out[..., 0].tolist()}) == 5


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_only_training_drops_and_a_rate_of_zero_drops_nothing(model):
    images, tokens = inputs(model)
    params = loud(init(model, 0))
    keys = jax.random.split(jax.random.key(0), len(images))
    full, _ = encode(model, params, images, tokens)
    zero, _ = encode(model, params, images, tokens, keys)
    np.testing.assert_array_equal(zero, full)
    dropping = dataclasses.replace(model, image=dataclasses.replace(model.image, patch_dropout=0.5))
    evaluated, _ = encode(dropping, params, images, tokens)
    np.testing.assert_array_equal(evaluated, full)
    trained, _ = encode(dropping, params, images, tokens, keys)
    assert np.abs(trained - full).max() > 1e-2


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_class_token_is_never_dropped_and_order_does_not_matter(model):
    """The kept patches arrive in a random order, with their positions: the tower must not care."""
    dropping = dataclasses.replace(model, image=dataclasses.replace(model.image, patch_dropout=1e-9))  # all, shuffled
    images, tokens = inputs(model)
    params = loud(init(model, 0))
    keys = jax.random.split(jax.random.key(0), len(images))
    x = jnp.arange(9.0)[None, :, None]
    assert np.asarray(drop_patches(x, keys[:1], 1e-9))[0, :, 0].tolist() != list(range(9))
    got, _ = encode(dropping, params, images, tokens, keys)
    want, _ = encode(model, params, images, tokens)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_an_embedding_does_not_depend_on_its_neighbours(model):
    images, tokens = inputs(model)
    params = loud(init(model, 0))
    order = np.random.default_rng(0).permutation(len(images))
    for got, want in zip(encode(model, params, images[order], tokens[order]), encode(model, params, images, tokens), strict=True):
        np.testing.assert_allclose(got, want[order], atol=1e-6)
        assert np.abs(want - want[:1]).max() > 1e-2


def test_the_place_of_a_patch_matters():
    images, tokens = inputs(CLIP)
    rolled = np.roll(images, 8, axis=2)  # by a patch: the same patches elsewhere
    for model in MODELS.values():
        params = loud(init(model, 0))
        assert np.abs(encode(model, params, rolled, tokens)[0] - encode(model, params, images, tokens)[0]).max() > 1e-2


@pytest.mark.parametrize(("width", "side", "pool"), [(64, 3, "cls"), (32, 7, "mean"), (8, 2, "map")])
def test_sincos_positions(width, side, pool):
    """Pair by pair from the definition (2205.01580, as in MoCo v3): a quarter each of sin x, cos x, sin y, cos y."""
    cfg = ImageTower(image_size=8 * side, patch_size=8, width=width, heads=1, pool=pool, embed_dim=8, positions="sincos2d")
    got = np.asarray(sincos2d(cfg))
    first = 1 if pool == "cls" else 0
    assert got.shape == (side * side + first, width)
    assert got.dtype == np.float32
    assert not got[:first].any()
    quarter = width // 4
    for y in range(side):
        for x in range(side):
            for i in range(quarter):
                w = 1 / 10_000 ** (i / (quarter - 1))
                want = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                np.testing.assert_allclose(got[first + y * side + x, i::quarter], want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_remat_and_unroll_change_neither_values_nor_gradients(model):
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, patch_dropout=0.3))
    images, tokens = inputs(model)
    params = loud(init(model, 0))
    keys = jax.random.split(jax.random.key(0), len(images))

    def loss(params, model):
        m = bind(model, params)
        cosines = jnp.exp(m.log_scale[...]) * m.encode_image(images, keys) @ m.encode_text(tokens).T
        return -jax.nn.log_softmax(cosines).trace() / len(images)

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want_loss, want = step(params, model)
    for remat in ("none", "dots", "mlp", "full"):
        for unroll in (1, 3):
            if (remat, unroll) == ("none", 1):
                continue
            got_loss, got = step(params, dataclasses.replace(model, remat=remat, unroll=unroll))
            np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
            for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
                assert np.abs(g - w).max() <= 1e-5 * max(np.abs(w).max(), 1e-6), (remat, unroll, path)
    assert all(np.abs(w).max() > 0 for path, w in by_path(want).items() if path not in ("bias",))


def test_remat_keeps_less():
    """What is kept for the backward pass shrinks from none to dots, mlp and full."""
    images, tokens = inputs(CLIP, 64)
    params = jax.eval_shape(lambda: init(CLIP, 0))
    model = dataclasses.replace(
        CLIP, image=dataclasses.replace(CLIP.image, depth=8), text=dataclasses.replace(CLIP.text, depth=8)
    )
    params = jax.eval_shape(lambda: init(model, 0))

    def residuals(remat):
        def loss(params):
            m = bind(dataclasses.replace(model, remat=remat), params)
            return (m.encode_image(images) * m.encode_text(tokens)).sum()

        _, pullback = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))

    none, dots, mlp, full = map(residuals, ("none", "dots", "mlp", "full"))
    assert none > 1.5 * dots
    assert dots > 1.2 * mlp
    assert mlp > 1.3 * full
    assert residuals("auto") == none  # where no policy was chosen


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_bfloat16_is_of_the_arithmetic_alone(model):
    half = dataclasses.replace(model, dtype="bfloat16")
    images, tokens = inputs(model)
    params = init(half, 0)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    for got, want in zip(encode(half, params, images, tokens), encode(model, params, images, tokens), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
        far = np.linalg.norm(got - want, axis=1)
        assert 1e-5 < far.max() < 0.03  # it is bfloat16, and no worse

    def loss(params):
        m = bind(half, params)
        return (m.encode_image(images) * m.encode_text(tokens)[:, : half.embed_dim]).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype("float32")}


def products(jaxpr) -> list[tuple[str, ...]]:
    """The operands' dtypes of every matrix product, those of scans and other inner functions too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(str(v.aval.dtype) for v in eqn.invars))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_every_product_of_both_towers_is_of_that_dtype(model, dtype):
    model = dataclasses.replace(model, dtype=dtype)
    images, tokens = inputs(model)
    params = jax.eval_shape(lambda: init(model, 0))
    image = products(jax.make_jaxpr(lambda p: bind(model, p).encode_image(images))(params).jaxpr)
    text = products(jax.make_jaxpr(lambda p: bind(model, p).encode_text(tokens))(params).jaxpr)
    assert (len(image), len(text)) == ((10, 9) if model.image.pool == "cls" else (16, 9))
    assert set(image + text) == {(dtype, dtype)}


def test_unit_vectors():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)) * np.array([1e-8, 1e-3, 1, 1e3, 1e8])[:, None], jnp.float32)
    np.testing.assert_allclose(unit(x), x / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True), rtol=1e-6)
    assert unit(x.astype(jnp.bfloat16)).dtype == jnp.float32
    zero = jnp.zeros((2, 7))
    assert not np.any(unit(zero))
    for dtype in (jnp.float32, jnp.bfloat16):
        grad = jax.grad(lambda v: (unit(v) * jnp.arange(7.0)[None]).sum())(zero.astype(dtype))
        assert np.all(np.isfinite(np.asarray(grad, np.float32)))


@pytest.mark.parametrize("model", [CLIP, SIGLIP], ids=["causal", "bidirectional"])
def test_what_follows_the_end_token_matters_only_without_a_causal_mask(model):
    _, tokens = inputs(model)
    params = loud(init(model, 0))
    end = tokens.argmax(1)
    after = np.arange(tokens.shape[1])[None] > end[:, None]
    assert after.any(1).sum() >= 3
    rng = np.random.default_rng(1)
    other = np.where(after, rng.integers(3, 200, tokens.shape), tokens).astype(np.int32)
    want, got = (np.asarray(bind(model, params).encode_text(t)) for t in (tokens, other))
    changed = np.abs(got - want).max(1) > 1e-4
    np.testing.assert_array_equal(changed, after.any(1) & (model is SIGLIP))
    before = tokens.copy()
    before[:, 1] = np.where(end == 1, before[:, 1], (before[:, 1] + 1) % 200 + 3)
    assert np.all(np.abs(np.asarray(bind(model, params).encode_text(before)) - want).max(1) > 1e-4)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_images_travel_as_bytes_and_are_normalised_on_the_device(model):
    images, tokens = inputs(model)
    params = loud(init(model, 0))
    want, _ = encode(model, params, images, tokens)
    mean, std = (np.asarray(c, np.float32).reshape(1, 1, 1, 3) for c in (model.image.mean, model.image.std))
    ready = dataclasses.replace(model, image=dataclasses.replace(model.image, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    pixels = (images / np.float32(255) - mean) / std * np.float32(255)
    got, _ = encode(ready, params, pixels, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
    jaxpr = jax.make_jaxpr(lambda p, i: bind(model, p).encode_image(i))(params, images)
    assert str(jaxpr.jaxpr.invars[-1].aval) == "uint8[6,24,24,3]"
    assert np.abs(encode(ready, params, images, tokens)[0] - want).max() > 1e-2
