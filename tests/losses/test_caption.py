"""The captioning loss: exact in value and gradient however it is tiled and divided, and in little memory."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clipjax.losses import caption_loss, token_nll
from clipjax.placement import token_nll_on
from clipjax.sharding import BATCH
from tests.losses.meshes import mesh_of

N, D, V = 48, 16, 104


def inputs(scale=1.0):
    rng = np.random.default_rng(0)
    states, words = (scale**0.5 * rng.standard_normal((n, D)).astype(np.float32) for n in (N, V))
    return states, words, rng.integers(0, V, N, np.int32), rng.standard_normal(N).astype(np.float32)


def reference(states, words, targets, ct):
    """In float64: the values, and the gradients of their sum weighted by `ct`."""
    states, words = states.astype(np.float64), words.astype(np.float64)
    logits = states @ words.T
    top = logits.max(1, keepdims=True)
    p = np.exp(logits - top)
    nll = np.log(p.sum(1)) + top[:, 0] - logits[np.arange(N), targets]
    g = p / p.sum(1, keepdims=True)
    g[np.arange(N), targets] -= 1
    g *= ct[:, None]
    return nll, g @ words, g.T @ states


def check(fn, scale):
    states, words, targets, ct = inputs(scale)
    nll, pull = jax.vjp(jax.jit(lambda s, w: fn(s, w, targets)), states, words)
    for got, want in zip((nll, *pull(ct)), reference(states, words, targets, ct), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("tile", [(4096, 4096), (10, 7), (16, 26), (1, 104)], ids=str)
def test_against_float64(tile, scale):
    """At 30 logits reach 400: their exponentials are no float32."""
    check(functools.partial(token_nll, tile=tile), scale)


@pytest.mark.parametrize("words", ["tensor", None])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 2, 2, 2), (2, 1, 1, 4), (1, 1, 1, 8)], ids=str)
def test_tokens_and_words_sharded_over_devices(shape, words):
    """Words on `tensor`, or all of them on every device; their gradient is of all devices' tokens."""
    fn = functools.partial(token_nll, axis=words, tile=(5, 9))
    check(jax.shard_map(fn, mesh=mesh_of(*shape), in_specs=(P(BATCH), P(words), P(BATCH)), out_specs=P(BATCH)), 1.0)


@pytest.mark.parametrize(("shape", "words"), [((1, 1, 8, 1), None), ((2, 1, 2, 2), None), ((1, 1, 4, 2), "tensor")], ids=str)
def test_the_words_width_sharded_over_devices(shape, words):
    """A tile of words at a time comes together, and its gradient is scattered."""
    fn = functools.partial(token_nll, axis=words, columns="fsdp", tile=(5, 9))
    specs = P(BATCH), P(words, "fsdp"), P(BATCH)
    check(jax.shard_map(fn, mesh=mesh_of(*shape), in_specs=specs, out_specs=P(BATCH)), 1.0)


def test_a_width_that_the_devices_do_not_divide():
    check(token_nll_on(mesh_of(1, 2, 3, 1)), 1.0)


def test_uniform_logits_give_the_log_of_the_vocabulary():
    for vocab, nll in ((49_408, 10.8079), (64_000, 11.0666)):  # log of the size
        got = token_nll(jnp.ones((2, 4)), jnp.ones((vocab, 4)), jnp.array([0, vocab - 1]))
        np.testing.assert_allclose(got, nll, atol=1e-4)


def test_operands_are_multiplied_in_the_dtype_of_the_states():
    states, words, targets, _ = inputs()
    light = token_nll(states.astype(jnp.bfloat16), words, targets)
    want = token_nll(states.astype(jnp.bfloat16).astype(jnp.float32), words.astype(jnp.bfloat16).astype(jnp.float32), targets)
    assert light.dtype == jnp.float32
    np.testing.assert_allclose(light, want, rtol=1e-5)
    assert np.abs(light - token_nll(states, words, targets)).max() > 1e-4


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_mean_is_over_the_tokens_of_all_devices(devices):
    """Captions of very different lengths; the mean of the devices' means is another number."""
    tokens = np.array([1, 1, 2, 3, 5, 8, 13, 21], np.int32)
    nll = np.float32([3, 1, 4, 1, 5, 9, 2, 6]) * tokens
    of_rows = functools.partial(caption_loss, axis=BATCH)
    mapped = jax.shard_map(of_rows, mesh=mesh_of(devices, 1), in_specs=P(BATCH), out_specs=P())
    np.testing.assert_allclose(mapped(nll, tokens), nll.sum() / tokens.sum(), rtol=1e-6)
    means = (nll.reshape(devices, -1).sum(1) / tokens.reshape(devices, -1).sum(1)).mean()
    assert devices == 1 or abs(means / (nll.sum() / tokens.sum()) - 1) > 0.05


@pytest.mark.slow
def test_memory_and_products_on_a_pod():
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install libtpu")
    made = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "caption_loss.py"))["compiled"](
        token_nll, "v5e:4x4", captions=512, length=76, width=768, vocab=256_000
    )
    stats = made.program.memory_analysis()
    assert made.peak_bytes - stats.argument_size_in_bytes - stats.output_size_in_bytes <= 300 * 2**20
    assert made.cost.flops <= 8.3 * 512 * 76 * 768 * 256_000
