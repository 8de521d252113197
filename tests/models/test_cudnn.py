"""Attention by cuDNN: its numbers with JAX's own implementation in its place, the program for GPUs, and what is refused."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import sharding
from clipjax.config import ConfigError, Data, Decoder, ImageTower, Mesh, Model, Run, TextTower, Train
from clipjax.models import clip, cudnn
from clipjax.models.attention import SelfAttention, attend
from clipjax.models.facts import BlockShape, Layout
from clipjax.plan import program
from clipjax.train.optimizer import optimizer_of
from clipjax.train.step import make_train_step
from clipjax.train.workdir import open_workdir

SHAPE = dict(width=32, depth=1, heads=2, mlp_dim=32)
IMAGE = ImageTower(image_size=8, patch_size=4, embed_dim=16, **SHAPE)
TEXT = TextTower(length=7, vocab_size=32, embed_dim=16, **SHAPE)
MODEL = Model(image=IMAGE, text=TEXT, attention="cudnn")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [77, 197, 196, 64])
def test_the_padded_call_has_the_values_and_gradients_of_exact_attention(length, causal):
    """Lengths of CLIP's and SigLIP's towers. Both in float32."""
    args = jax.random.normal(jax.random.key(length), (3, 2, 2, length, 16))
    weights = jax.random.normal(jax.random.key(1), (2, length, 2, 16))  # of the sum that is differentiated

    def run(fn):
        def weighted(q, k, v):
            out = fn(q, k, v)[:, :length]
            return (weights * out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*args)
        return out, *gradients

    found = run(lambda q, k, v: cudnn.attend(q, k, v, causal, implementation="xla"))
    expected = run(lambda q, k, v: attend(q, k, v, causal=causal))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_queries_and_keys_may_differ_in_number():
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 2, n, 16)) for n in (6, 9, 9))
    np.testing.assert_allclose(cudnn.attend(q, k, v, False, implementation="xla"), attend(q, k, v), atol=1e-5)


def lowered(fn, *args) -> str:
    """The StableHLO of a program for NVIDIA GPUs."""
    with cudnn.assumed():
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(fsdp=4)], ids=["data", "fsdp"])
def test_a_step_for_gpus_calls_cudnn_in_both_directions(mesh):
    """Both towers have an odd number of tokens: the image tower's keys are counted, the text tower is causal."""
    run = Run(data=Data(spec="emoji"), model=MODEL, train=Train(batch_size=8), mesh=mesh)
    placed = sharding.make_mesh(run.mesh)
    state = program.state_of(run, placed)
    step = make_train_step(run, optimizer_of(run, state.params), placed)
    text = lowered(step, state, program.abstract_batch(run, placed))
    calls = re.findall(r"__cudnn\$(\w+)\(.*?mask_type\\22: \\22(\w+)\\22", text)
    both = [(f"fmhaSoftmax{way}", mask) for way in ("", "Backward") for mask in ("CAUSAL", "PADDING")]
    assert sorted(calls) == sorted(both)


def test_explicit_masks_stay_exact():
    """Of a text tower with a class token; its decoder's masks are causal, and it attends to images without one."""
    text = dataclasses.replace(TEXT, pool="cls")
    model = dataclasses.replace(MODEL, text=text, decoder=Decoder(depth=1, heads=2, mlp_dim=32))
    params = jax.eval_shape(lambda: clip.init(model, 0))
    images, tokens = jnp.zeros((2, 8, 8, 3), jnp.uint8), jnp.ones((2, 7), int)
    program = lowered(lambda params: clip.bind(model, params, "cudnn").encode_pairs(images, tokens), params)
    assert program.count("__cudnn$fmhaSoftmax(") == 3  # of the image tower, and two of the decoder


def test_only_the_training_step_takes_it():
    params = jax.eval_shape(lambda: clip.init(MODEL, 0))
    exact = dataclasses.replace(MODEL, attention="exact")
    tokens = jnp.ones((2, 7), int)
    traced = [jax.make_jaxpr(lambda p, m=m: clip.bind(m, p).encode_text(tokens))(params) for m in (MODEL, exact)]
    assert str(traced[0]) == str(traced[1])


def test_it_keeps_no_scores_but_those_with_an_explicit_mask():
    shape = BlockShape(77, 512, 8, 2048, "gelu")
    exact, fused = (SelfAttention.kept("none", Layout(2, attention=kind), shape) for kind in ("exact", "cudnn"))
    assert exact - fused == 8 * (80 * 128 * (4 + 2) - 77 * 4)  # scores and weights, in tiles; a float32 number of each query
    masked = shape._replace(masked=True)
    assert SelfAttention.kept("none", Layout(2, attention="cudnn"), masked) == exact


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, dict(platform="cpu", device_kind="cpu"), "model.attention = 'cudnn': .* of kind cpu: use exact"),
        ({}, dict(platform="tpu", device_kind="TPU v4"), "model.attention = 'cudnn': .* of kind TPU v4: use exact"),
        ({}, dict(compute_capability="7.5"), "model.attention = 'cudnn': .* from Ampere on"),
        ({}, dict(compute_capability="gfx90a"), "model.attention = 'cudnn': .* from Ampere on"),
        ({"dtype": "float32"}, {}, "model.dtype = 'float32': model.attention = cudnn needs bfloat16; or use exact"),
        ({"text": dataclasses.replace(TEXT, heads=8)}, {}, "model.text.heads = 8: makes heads of width 4: .* a multiple of 8"),
        ({"image": dataclasses.replace(IMAGE, width=256, heads=1)}, {}, "model.image.heads = 1: makes heads of width 256"),
        ({"decoder": Decoder(heads=8)}, {}, "model.decoder.heads = 8: makes heads of width 4"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(changes, device, message):
    device = SimpleNamespace(**(vars(H100) | device))
    with pytest.raises(ConfigError, match=f"^{message}"):
        cudnn.check(dataclasses.replace(MODEL, **changes), device)
    cudnn.check(dataclasses.replace(MODEL, **changes, attention="exact"), device)
    cudnn.check(MODEL, H100)


def test_training_and_plans_are_refused_before_they_compile(tmp_path):
    run = Run(data=Data(spec="emoji"), model=MODEL, train=Train(batch_size=8))
    mesh = sharding.make_mesh(run.mesh)
    with pytest.raises(ConfigError, match=r"^model\.attention = 'cudnn': "):
        program.lower_step(run, mesh, program.state_of(run, mesh))
    with pytest.raises(ConfigError, match=r"^model\.attention = 'cudnn': "), open_workdir(run, tmp_path / "run", mesh):
        pass
    assert not (tmp_path / "run").exists()
