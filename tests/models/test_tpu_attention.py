"""Attention by Pallas kernels: their numbers in JAX's interpreter, the program for TPUs, and what is refused or stays exact."""

import dataclasses
import re
from types import SimpleNamespace

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from clipjax import sharding
from clipjax.config import ConfigError, Data, ImageTower, Lora, Mesh, Model, Run, TextTower, Train
from clipjax.models import clip, tpu_attention
from clipjax.models.attention import SelfAttention, attend
from clipjax.models.facts import BlockShape, Layout
from clipjax.plan import program
from clipjax.train.optimizer import optimizer_of
from clipjax.train.step import make_train_step

SHAPE = dict(width=128, depth=1, heads=2, mlp_dim=32)
IMAGE = ImageTower(image_size=8, patch_size=4, embed_dim=16, **SHAPE)
TEXT = TextTower(length=7, vocab_size=32, embed_dim=16, **SHAPE)
MODEL = Model(image=IMAGE, text=TEXT, attention="pallas")


def exact(qkv, bias, heads, causal):
    q, k, v = einops.rearrange(qkv + bias[:, None, None], "s b t (h k) -> s b h t k", h=heads)
    return einops.rearrange(attend(q, k, v, causal=causal), "b t h k -> b t (h k)")


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "causal"),
    [
        (196, 128, 2, False),
        (77, 128, 2, True),
        (9, 384, 4, False),  # heads of 96 lie in two registers
        pytest.param(256, 1152, 16, False, marks=pytest.mark.slow),  # So400m's heads of 72
        pytest.param(576, 256, 4, True, marks=pytest.mark.slow),  # two programs an example
    ],
)
def test_the_kernels_have_the_values_and_gradients_of_exact_attention(tokens, width, heads, causal):
    """The interpreter fills memory that nothing was written to with NaN."""
    keys = jax.random.split(jax.random.key(tokens), 3)
    shapes = (3, 2, tokens, width), (3, width), (2, tokens, width)
    qkv, bias, slope = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def run(fn, dtype):
        out, back = jax.vjp(lambda *x: fn(*x, heads, causal), qkv.astype(dtype), bias.astype(dtype))
        return [x.astype(jnp.float32) for x in (out, *back(slope.astype(dtype)))]

    expected = run(exact, jnp.float32)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        found = {dtype: jax.jit(lambda dtype=dtype: run(tpu_attention.attend, dtype))() for dtype in (jnp.float32, jnp.bfloat16)}
    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)):
        for x, y in zip(found[dtype], expected, strict=True):
            np.testing.assert_allclose(x, y, atol=error * np.abs(y).max())


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "expected"),
    [
        (196, 768, 12, 768),
        (256, 1152, 16, 1152),  # So400m: no fewer heads of 72 fill whole registers
        (576, 1024, 16, 128),  # a longer sequence in parts
        (1024, 768, 12, 128),
        (729, 1152, 16, 0),  # too many scores
        (196, 192, 3, 0),  # half a register
        (16, 128, 32, 0),  # heads of 4
    ],
)
def test_a_program_takes_whole_heads_in_whole_registers(tokens, width, heads, expected):
    assert tpu_attention.lanes(tokens, width, heads) == expected


def kernels(fn, *args) -> list[str]:
    """Those in a program for TPUs."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    return sorted(re.findall(r'kernel_name = "(\w+)"', text))


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(fsdp=4)], ids=["data", "fsdp"])
def test_a_step_for_tpus_calls_both_kernels_in_both_towers(mesh):
    run = Run(data=Data(spec="emoji"), model=MODEL, train=Train(batch_size=8), mesh=mesh)
    placed = sharding.make_mesh(run.mesh)
    state = program.state_of(run, placed)
    step = make_train_step(run, optimizer_of(run, state.params), placed)
    assert set(kernels(step, state, program.abstract_batch(run, placed))) == {"attention_backward", "attention_forward"}


def test_masks_and_adapters_of_queries_stay_exact():
    tokens = jnp.ones((2, 7), int)
    for change, expected in (({}, ["attention_forward"]), ({"pool": "cls"}, []), ({"lora": Lora(rank=2)}, [])):
        model = dataclasses.replace(MODEL, text=dataclasses.replace(TEXT, **change))
        params = jax.eval_shape(lambda m=model: clip.init(m, 0))
        assert kernels(lambda p, m=model: clip.bind(m, p, "pallas").encode_text(tokens), params) == expected


def test_nothing_is_kept_of_scores():
    shape = BlockShape(77, 512, 8, 2048, "gelu")
    exact, by_kernel = (SelfAttention.kept("none", Layout(2, attention=kind), shape) for kind in ("exact", "pallas"))
    assert exact - by_kernel == 8 * 80 * 128 * (4 + 2)  # scores and weights, in tiles
    masked = shape._replace(masked=True)
    assert SelfAttention.kept("none", Layout(2, attention="pallas"), masked) == exact


@pytest.mark.parametrize(
    ("changes", "kind", "tensor", "message"),
    [
        ({}, "cpu", 1, "model.attention = 'pallas': its kernels are for TPUs from v4 on, .* of kind cpu: use exact"),
        ({}, "TPU v3", 1, "model.attention = 'pallas': .* of kind TPU v3: use exact"),
        ({"dtype": "float32"}, "TPU v4", 1, "model.dtype = 'float32': model.attention = pallas needs bfloat16"),
        ({}, "TPU v4", 2, "mesh.tensor = 2: model.attention = pallas needs 1"),
    ],
)
def test_what_has_no_kernel_is_refused(changes, kind, tensor, message):
    device = SimpleNamespace(platform=kind[:3].lower(), device_kind=kind)
    with pytest.raises(ConfigError, match=message):
        tpu_attention.check(dataclasses.replace(MODEL, **changes), device, tensor)
