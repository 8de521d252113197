"""Attention by cuDNN: its numbers with JAX's own implementation in its place, the program for GPUs, and what is refused."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from clipjax.config import ImageTower, Model, TextTower
from clipjax.models import cudnn
from clipjax.models.attention import attend

SHAPE = dict(width=32, depth=1, heads=2, mlp_dim=32)
IMAGE = ImageTower(image_size=8, patch_size=4, embed_dim=16, **SHAPE)
TEXT = TextTower(length=7, vocab_size=32, embed_dim=16, **SHAPE)
MODEL = Model(image=IMAGE, text=TEXT, attention="cudnn")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [77, 197, 196, 64])
def test_the_padded_call_has_the_values_and_gradients_of_exact_attention(length, causal):
    """Lengths of CLIP's and SigLIP's towers. Both in float32."""
    args = jax.random.normal(jax.random.key(length), (4, 2, 2, length, 16))
    weights = jax.random.normal(jax.random.key(1), (2, length, 2, 16))  # of the sum that is differentiated

    def run(fn):
        out, gradients = jax.value_and_grad(lambda q, k, v: (weights * fn(q, k, v)).sum(), argnums=(0, 1, 2))(*args[:3])
        return fn(*args[:3]), out, gradients

    found = run(lambda q, k, v: cudnn.attend(q, k, v, causal, implementation="xla"))
    expected = run(lambda q, k, v: attend(q, k, v, causal=causal))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_queries_and_keys_may_differ_in_number():
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 2, n, 16)) for n in (6, 9, 9))
    np.testing.assert_allclose(cudnn.attend(q, k, v, False, implementation="xla"), attend(q, k, v), atol=1e-5)
