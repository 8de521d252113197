"""Locked layers (`unlock`), layer-wise learning rates (`Rule.layer_decay`), and what a step then costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import config, hlo
from clipjax.config import ConfigError
from clipjax.metrics.flops import model_flops
from clipjax.plan.program import state_of
from clipjax.train import remat
from clipjax.train.optimizer import layer_factors, make_optimizer, trained_names
from tests import torch_reference
from tests.train import tiny
from tests.train.test_step import named

DEEP = {name: dataclasses.replace(getattr(tiny.CLIP, name), depth=4) for name in ("image", "text")}
MODEL = dataclasses.replace(tiny.CLIP, unroll=4, **DEEP)


def unlocked(**layers):
    towers = {name: dataclasses.replace(DEEP[name], unlock=n) for name, n in layers.items()}
    return tiny.run(dataclasses.replace(MODEL, **towers), optim=dataclasses.replace(tiny.OPTIM, weight_decay=0.2))


def changed(before, after):
    """Of every parameter, whether it moved; of stacked ones, whether each layer did."""
    before, after = named(before), named(after)
    moved = {}
    for name, x in before.items():
        differs = np.asarray(np.asarray(x) != np.asarray(after[name]))
        moved[name] = differs.reshape(len(x), -1).any(1).tolist() if "/blocks/" in name else [bool(differs.any())]
    return moved


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 1), (1, 1, 2)], ids=str)
def test_the_last_layers_learn_and_nothing_else_moves(axes):
    run = unlocked(image=1, text=3)
    start, _, _ = tiny.train(run, tiny.mesh_of(), 0)
    end, losses, _ = tiny.train(run, tiny.mesh_of(*axes), 3)
    if axes != (1, 1, 1):
        np.testing.assert_allclose(losses, tiny.train(run, tiny.mesh_of(), 3)[1], rtol=1e-5)
    for name, moved in changed(start.params, end.params).items():
        tower, _, part = name.partition("/")
        if part.startswith("blocks"):
            if not name.endswith("qkv/bias"):  # of keys it has no gradient
                assert moved == ([False] * 3 + [True] if tower == "image" else [False] + [True] * 3), name
        else:
            below = part.split("/")[0] in ("patch", "tokens", "class_token", "positions", "pre_norm")
            assert moved == [not below], name


def flops_of(run):
    """Of the compiled step, by kind of product."""
    state, _, step = tiny.train(run, tiny.mesh_of(), 0)
    batch = {k: jnp.asarray(v) for k, v in tiny.batches(run, 1)[0].items()}
    return hlo.cost(step.lower(state, batch).compile().as_text()).flops


def test_what_is_locked_has_no_backward_pass():
    full, size = flops_of(tiny.run(MODEL)), tiny.TRAIN.batch_size
    for layers in (dict(image=1), dict(image=0), dict(image=0, text=2)):
        run = unlocked(**layers)
        params = tiny.train(run, tiny.mesh_of(), 0)[0].params
        trained = trained_names(run.optim_in_use.rules, params)
        expected = (model_flops(MODEL) - model_flops(run.model, trained)) * size
        if layers["image"] == 0:  # the patches' own kernel is all that had no gradient to its input
            expected -= 2 * size * MODEL.image.patches * 3 * MODEL.image.patch_size**2 * MODEL.image.width
        assert expected > 0.1 * full
        assert full - flops_of(run) == pytest.approx(expected, rel=0.05), layers


def test_a_locked_tower_alone_has_no_state():
    run = unlocked(image=0)
    state = tiny.train(run, tiny.mesh_of(), 0)[0]
    assert not [name for name in named(state.opt_state) if "/image/" in name]
    assert any("/text/" in name for name in named(state.opt_state))


@pytest.mark.parametrize("kind", ["adamw", "lion", "lamb", "adafactor"])
def test_layer_decay_scales_each_layers_update(kind):
    params = jax.tree.map(lambda x: x + 0.1, tiny.train(tiny.run(MODEL), tiny.mesh_of(), 0)[0].params)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)

    def update(decay):
        rules = tuple(dataclasses.replace(rule, layer_decay=decay) for rule in config.RULES)
        tx = make_optimizer(config.Optim(kind=kind, rules=rules), 9, params)
        return named(jax.jit(tx.update)(grads, tx.init(params), params)[0])

    plain, decayed = update(1.0), update(0.75)
    for name, u in plain.items():
        part = name.split("/")[1] if "/" in name else ""
        if part == "blocks":  # 4 layers: 0.75^4 of the first, 0.75 of the last
            want = u * (0.75 ** np.arange(4, 0, -1)).reshape(-1, *[1] * (u.ndim - 1)).astype(np.float32)
        else:
            want = u * np.float32(0.75**5 if part in ("patch", "tokens", "class_token", "positions", "pre_norm") else 1)
        np.testing.assert_allclose(decayed[name], want, rtol=1e-6, atol=0, err_msg=name)


def test_timm_has_the_same_factors():
    torch_reference.load()
    import timm
    import timm.optim._param_groups
    import torch

    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=10, depth=3)
    names = {id(p): name for name, p in theirs.named_parameters()}
    scale = {
        names[id(p)]: g["lr_scale"]
        for g in timm.optim._param_groups.param_groups_layer_decay(theirs, layer_decay=0.6)
        for p in g["params"]
    }
    ours = {name: layer_factors(f"image/{name}/kernel", {"image": 3}, 0.6, {}) for name in ("blocks", "patch", "norm")}
    assert ours["norm"] is None
    assert ours["patch"] is not None
    assert ours["blocks"] is not None
    assert scale["head.weight"] == 1  # the last norm is with the last layer in timm, and with the head in BEiT and here
    np.testing.assert_allclose(ours["patch"], [scale["patch_embed.proj.weight"]], rtol=1e-6)
    np.testing.assert_allclose(ours["blocks"], [scale[f"blocks.{i}.attn.qkv.weight"] for i in range(3)], rtol=1e-6)


def test_no_decay_is_the_same_program():
    rules = tuple(dataclasses.replace(rule, layer_decay=1.0) for rule in config.RULES)
    one, other = (
        tiny.train(tiny.run(MODEL, optim=dataclasses.replace(tiny.OPTIM, rules=r)), tiny.mesh_of(), 2)[0].params
        for r in (rules, config.RULES)
    )
    assert all(not any(moved) for moved in changed(one, other).values())
    assert layer_factors("image/blocks/mlp/up/kernel", {"image": 4}, 1.0, {}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(unlock=5), r"model\.image\.unlock = 5: must be a number of layers: 0 to model\.image\.depth = 4"),
        (dict(unlock=-1), r"model\.image\.unlock = -1"),
    ],
)
def test_what_can_not_be_unlocked_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DEEP["image"], **changes)


def test_the_estimate_of_memory_knows_what_is_locked():
    mesh, needed = tiny.mesh_of(), []
    for layers in (dict(image=4), dict(image=1), dict(image=0)):
        run = unlocked(**layers)
        needed.append(remat.needed(run, mesh, state_of(run, mesh), "none"))
    assert needed[0] > needed[1] >= needed[2]
