"""Low-rank adapters: their equation, what fresh ones change, where they are on a mesh, and the kernels that take them in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from clipjax import sharding
from clipjax.config import ConfigError, Decoder, ImageTower, Lora, Model, TextTower
from clipjax.models import clip, lora
from clipjax.models.facts import Layout
from tests.test_metrics import dots

ALL = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
SHAPE = dict(width=32, depth=2, heads=2, mlp_dim=48)
IMAGE = ImageTower(image_size=16, patch_size=8, embed_dim=24, pool="map", **SHAPE)
TEXT = TextTower(length=7, vocab_size=50, embed_dim=24, **SHAPE)


def model(image: Lora | None, text: Lora | None, **changes) -> Model:
    towers = dict(image=dataclasses.replace(IMAGE, lora=image), text=dataclasses.replace(TEXT, lora=text))
    return Model(**towers, dtype="float32", **changes)


PLAIN = model(None, None)
ADAPTED = model(Lora(rank=4, alpha=6, kernels=ALL), Lora(rank=3, kernels=("mlp/down", "attention/qkv")))


def drawn(cfg: Model) -> clip.Params:
    """Parameters whose adapters are not zero."""
    rng = np.random.default_rng(1)

    def draw(path: tuple, x: jax.Array) -> jax.Array:
        is_b = path[-1].key == "lora_b"
        return jnp.asarray(rng.normal(size=x.shape).astype(np.float32) / 10) if is_b else x

    return jax.tree.map_with_path(draw, clip.init(cfg, 0))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.integers(0, 256, (4, 16, 16, 3), np.uint8), rng.integers(1, 50, (4, 7), np.int32)


def embeddings(cfg: Model, params: clip.Params) -> list[np.ndarray]:
    @jax.jit
    def both(params, images, tokens):
        bound = clip.bind(cfg, params)
        return bound.encode_image(images), bound.encode_text(tokens)

    return [np.asarray(z) for z in both(params, *inputs())]


def leaves(params: clip.Params) -> dict[str, jax.Array]:
    return {sharding.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}


def test_fresh_adapters_change_no_weight_and_no_embedding():
    plain, adapted = clip.init(PLAIN, 0), clip.init(ADAPTED, 0)
    before, after = leaves(plain), leaves(adapted)
    assert all(np.array_equal(x, after[name]) for name, x in before.items())
    new = {name: x.shape for name, x in after.items() if name not in before}
    assert new["image/blocks/attention/qkv/lora_a"] == (2, 32, 3, 4)
    assert new["image/blocks/attention/qkv/lora_b"] == (2, 3, 4, 2, 16)
    assert new["image/blocks/attention/out/lora_a"] == (2, 2, 16, 4)
    assert new["text/blocks/mlp/down/lora_b"] == (2, 3, 32)
    assert len(new) == 2 * (4 + 2)  # none in the pooling head, which has an MLP too
    a = np.asarray(after["image/blocks/attention/qkv/lora_a"])
    assert a.std() == pytest.approx(32**-0.5, rel=0.1)
    assert not np.any(after["image/blocks/attention/qkv/lora_b"])
    for x, y in zip(embeddings(PLAIN, plain), embeddings(ADAPTED, adapted), strict=True):
        np.testing.assert_array_equal(x, y)


def test_merged_kernels_are_those_of_the_paper_s_equation_and_give_the_same_embeddings():
    params = drawn(ADAPTED)
    cfg, merged = lora.merged(ADAPTED, params)
    assert cfg == PLAIN
    assert leaves(merged).keys() == leaves(clip.init(PLAIN, 0)).keys()
    wide = {name: np.asarray(x, np.float64) for name, x in leaves(params).items()}
    equations = {
        "image/blocks/attention/qkv": "ldsr,lsrhk->ldshk",
        "image/blocks/attention/out": "lhkr,lrd->lhkd",
        "image/blocks/mlp/up": "ldr,lrf->ldf",
        "text/blocks/mlp/down": "lfr,lrd->lfd",
    }
    for name, equation in equations.items():
        change = np.einsum(equation, wide[f"{name}/lora_a"], wide[f"{name}/lora_b"])
        factor = 6 / 4 if name.startswith("image") else 16 / 3
        expected = wide[f"{name}/kernel"] + factor * change
        np.testing.assert_allclose(leaves(merged)[f"{name}/kernel"], expected, rtol=1e-6, atol=1e-7)
        assert np.abs(factor * change).max() > 0.05
    before = embeddings(PLAIN, clip.init(PLAIN, 0))
    for x, y, z in zip(embeddings(ADAPTED, params), embeddings(PLAIN, merged), before, strict=True):
        assert np.abs(x - y).max() < 1e-6
        assert np.abs(x - z).max() > 0.01


def test_a_model_without_adapters_is_merged_already():
    params = clip.init(PLAIN, 0)
    cfg, merged = lora.merged(PLAIN, params)
    assert cfg == PLAIN
    assert all(merged[name] is x for name, x in params.items())


@pytest.mark.parametrize("kernels", [ALL, ALL[:2], ALL[3:]])
def test_flops_and_weights_are_those_of_the_traced_program(kernels):
    def traced(cfg: Model) -> float:
        params, (images, tokens) = jax.eval_shape(lambda: clip.init(cfg, 0)), inputs()

        def both(params):
            bound = clip.bind(cfg, params)
            return bound.encode_image(images), bound.encode_text(tokens)

        return dots(jax.make_jaxpr(both)(params).jaxpr) / 4

    cfg = model(Lora(rank=4, kernels=kernels), Lora(rank=2, kernels=kernels))
    own, plain = clip.facts(cfg), clip.facts(PLAIN)
    assert sum(own[t].flops - plain[t].flops for t in own) == traced(cfg) - traced(PLAIN)
    shapes = leaves(jax.eval_shape(lambda: clip.init(cfg, 0)))
    for tower in own:
        numbers = sum(x.size for name, x in shapes.items() if name.startswith(tower) and "/lora_" in name)
        assert 2 * (own[tower].layer_weights - plain[tower].layer_weights) == numbers
        kept = [own[tower].kept(policy, Layout(4)) - plain[tower].kept(policy, Layout(4)) for policy in ("none", "dots", "mlp")]
        assert kept[1] > kept[0] > kept[2] == 0


def test_adapters_are_sharded_as_the_axes_of_the_kernels_that_they_stand_beside():
    shapes = leaves(jax.eval_shape(lambda: clip.init(ADAPTED, 0)))

    def specs(fsdp: int, tensor: int) -> dict[str, P]:
        mesh = AbstractMesh((1, 1, fsdp, tensor), sharding.AXES, axis_types=sharding.AUTO)
        named = {name.removeprefix("image/blocks/"): x for name, x in shapes.items() if name.startswith("image/blocks/")}
        return {name: sharding.spec(f"params/image/blocks/{name}", x.shape, mesh) for name, x in named.items() if "lora" in name}

    assert specs(1, 2) == {
        "attention/out/lora_a": P(None, "tensor", None, None),
        "attention/out/lora_b": P(None, None, None),
        "attention/qkv/lora_a": P(None, None, None, None),
        "attention/qkv/lora_b": P(None, None, None, "tensor", None),
        "mlp/down/lora_a": P(None, "tensor", None),
        "mlp/down/lora_b": P(None, None, None),
        "mlp/up/lora_a": P(None, None, None),
        "mlp/up/lora_b": P(None, None, "tensor"),
    }
    assert all("fsdp" in spec for spec in specs(4, 1).values())


def test_a_captioning_head_goes_on_top_of_a_tower_with_adapters():
    cfg = model(None, Lora(rank=2), decoder=Decoder(depth=1, heads=2, mlp_dim=32))
    images, tokens = inputs()
    params = drawn(cfg)
    plain, merged = lora.merged(cfg, params)
    (*_, x), (*_, y) = (clip.bind(c, p).encode_pairs(images, tokens) for c, p in ((cfg, params), (plain, merged)))
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), "model.image.lora.rank = 0: must be positive"),
        (dict(alpha=0.0), "model.image.lora.alpha = 0.0: must be positive and finite"),
        (dict(kernels=()), "model.image.lora.kernels = (): must name one kernel or more, each once"),
        (dict(kernels=("mlp/up", "mlp/up")), "model.image.lora.kernels = ('mlp/up', 'mlp/up'): must name one kernel"),
        (dict(kernels=("mlp/uq",)), "lora.kernels.0 = 'mlp/uq': must be"),
    ],
)
def test_impossible_adapters_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        ImageTower(lora=Lora(**changes))
    assert str(error.value).startswith(message)
