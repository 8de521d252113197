"""What layers and towers say about themselves: tensor axes, FLOPs, memory; and the pooler of docs/extending.md."""

import dataclasses
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from clipjax import sharding
from clipjax.config import Decoder, ImageTower, Lora, Model, TextTower, fields
from clipjax.models import clip, layers, pooling
from clipjax.models.facts import Layout
from clipjax.train.remat import POLICIES_BY_MEMORY
from tests.test_metrics import dots

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SHAPE = dict(width=64, depth=2, heads=4, mlp_dim=128)
TEXT = TextTower(length=9, vocab_size=300, embed_dim=48, **SHAPE)
IMAGE = ImageTower(image_size=16, patch_size=4, queries=5, pool_heads=4, embed_dim=48, **SHAPE)
POOLS = typing.get_args(typing.get_type_hints(ImageTower)["pool"])


def model(pool: str, **changes) -> Model:
    return Model(image=dataclasses.replace(IMAGE, pool=pool), text=TEXT, dtype="float32", **changes)


@pytest.mark.parametrize("pool", POOLS)
def test_every_tensor_axis_is_of_a_parameter_of_the_layer_that_declares_it(pool):
    """And no other parameter has that name by accident. Adapters are only where the configuration asks for them."""
    lora = Lora(kernels=("attention/qkv", "attention/out", "mlp/up", "mlp/down"))
    cfg = model(pool, decoder=Decoder(depth=2, heads=4, mlp_dim=64, mlps=2))
    cfg = dataclasses.replace(cfg, image=dataclasses.replace(cfg.image, lora=lora))
    bound = nnx.eval_shape(lambda: clip.CLIP(cfg, jax.random.key(0)))
    declared = set()
    for path, module in nnx.iter_modules(bound):
        for name in getattr(module, "TENSOR_AXES", {}):
            declared.add("/".join((*map(str, path), name)))
    params = jax.eval_shape(lambda: clip.init(cfg, 0))
    names = {sharding.keystr(path) for path, _ in jax.tree.leaves_with_path(params)}
    declared = {name for name in declared if name in names or "/lora_" not in name}
    assert declared <= names
    assert declared == {name for name in names if "/".join(name.split("/")[-2:]) in layers.TENSOR_AXES}
    assert len(declared) > 20


def test_layers_that_contradict_each_other_fail_at_once():
    with pytest.raises(TypeError, match=r"^Wrong\.TENSOR_AXES: 'out/kernel' must have two parts, and one axis in all layers$"):

        class Wrong(layers.Layer):
            TENSOR_AXES: typing.ClassVar = {"out/kernel": -1}

    assert layers.TENSOR_AXES["out/kernel"] == -3


def test_every_pooler_of_the_table_can_be_chosen():
    assert pooling.POOLERS.keys() < set(POOLS)


def traced_flops(cfg: Model) -> float:
    """Of a forward pass of the image tower on one image, in the traced program."""
    params = jax.eval_shape(lambda: clip.init(cfg, 0))
    images = jax.ShapeDtypeStruct((5, 16, 16, 3), jnp.uint8)
    return dots(jax.make_jaxpr(lambda params, images: clip.bind(cfg, params).encode_image(images))(params, images).jaxpr) / 5


@pytest.fixture
def score(monkeypatch):
    """The pooler of the page, defined where and as it says: the class, the line in the table, the name in the field."""
    section = PAGE.read_text().partition("## A tower or a pooler")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (name, found) = re.search(r'`"(\w+)": (\w+),`', section).groups()
    axes, names = dict(layers.TENSOR_AXES), dict(vars(pooling))
    exec(compile(code, PAGE.name, "exec"), names)
    monkeypatch.setitem(pooling.POOLERS, name, names[found])
    monkeypatch.setitem(fields._hints(ImageTower), "pool", typing.Literal[(*POOLS, name)])
    yield name
    layers.TENSOR_AXES.clear()
    layers.TENSOR_AXES.update(axes)


def test_the_pooler_of_the_documentation_works(score):
    cfg = model(score)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    params = clip.init(cfg, 0)
    assert set(params["image"][score]) == {"hidden", "score"}

    def loss(params, remat):
        z = clip.bind(dataclasses.replace(cfg, remat=remat), params).encode_image(images)
        return (z * jnp.arange(48.0)[None]).sum(), z

    (_, z), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, "none")
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    assert all(np.any(g) for g in jax.tree.leaves(grads["image"][score]))

    mean = model("mean")
    facts, other = clip.facts(cfg)["image"], clip.facts(mean)["image"]
    assert facts.flops - other.flops == traced_flops(cfg) - traced_flops(mean) == 2 * 16 * (64 * 16 + 16 + 64)
    kept = [facts.kept(policy, Layout(4)) - other.kept(policy, Layout(4)) for policy in POLICIES_BY_MEMORY]
    assert kept == [2 * 4 * 16 * 16, 0, 0, 0]
    assert score in facts.after_blocks

    mesh = AbstractMesh((1, 1, 1, 4), sharding.AXES, axis_types=sharding.AUTO)
    specs = {name: sharding.spec(f"image/{score}/{name}", x.shape, mesh) for name, x in {
        "hidden/kernel": params["image"][score]["hidden"]["kernel"], "score/kernel": params["image"][score]["score"]["kernel"],
    }.items()}  # fmt: skip
    assert specs == {"hidden/kernel": P(None, "tensor"), "score/kernel": P("tensor", None)}


@pytest.mark.parametrize("pool", POOLS)
def test_flops_of_every_pooling_are_those_of_the_traced_program(pool):
    """But for queries that are computed once a batch."""
    cfg = model(pool)
    d, e = cfg.image.width, cfg.image.embed_dim
    once = {"map": 2 * d * d, "cascade": 2 * 6 * e * e, "parallel": 2 * 6 * e * e, "single": 2 * 5 * e * e}.get(pool, 0) / 5
    assert clip.facts(cfg)["image"].flops == pytest.approx(traced_flops(cfg) - once, abs=1)
