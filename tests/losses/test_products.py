"""What the platform and the dtype of a term decide: the size of tiles, and how many digits the products keep."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from clipjax import losses
from clipjax.losses.pairwise import logsumexp, operands, softplus

HIGHEST, HIGH = jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH
TF32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
DIGITS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "loss_digits.py"))


def options(platform: str, dtype) -> operands.PairwiseOptions:
    """As a program for such devices is traced."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    found = []

    def fn(x):
        found.append(operands.make_options(x, x, "data", None, None, dtype))
        return x

    mesh = AbstractMesh((2,), ("data",), abstract_device=device)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    jax.eval_shape(mapped, jax.ShapeDtypeStruct((4, 2), jnp.float32))
    return found[0]


@pytest.mark.parametrize(("platform", "tile", "three"), [("cpu", 512, HIGH), ("tpu", 512, HIGH), ("gpu", 2048, TF32)])
def test_a_program_is_for_the_devices_of_its_mesh(platform, tile, three):
    kinds = {"float32": ("float32", HIGHEST), jnp.float32: ("float32", HIGHEST), "bfloat16": ("bfloat16", None)}
    for dtype, expected in (kinds | {"bfloat16x3": ("float32", three)}).items():
        found = options(platform, dtype)
        assert (found.tile, found.dtype, found.precision) == (tile, *expected)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_three_passes_keep_four_digits_of_the_gradient_at_scale_100(name, monkeypatch):
    """On a CPU by three products of bfloat16 parts, as a TPU makes them. One pass keeps two digits."""
    for primitive in (logsumexp, softplus):
        monkeypatch.setattr(primitive, "dot", DIGITS["three_passes"])
    x, y = DIGITS["pairs"](256, 128)
    exact = DIGITS[name](x, y, 100.0)
    forms = {
        "softmax": lambda x, y, dtype: losses.clip_loss(x, y, 100.0, dtype=dtype),
        "sigmoid": lambda x, y, dtype: losses.siglip_loss(x, y, 100.0, DIGITS["BIAS"], dtype=dtype),
    }
    errors = {}
    for dtype in ("float32", "bfloat16x3", "bfloat16"):
        found = jax.jit(jax.value_and_grad(lambda x, y, dtype=dtype: forms[name](x, y, dtype), argnums=(0, 1)))
        errors[dtype] = DIGITS["errors"](found(jnp.float32(x), jnp.float32(y)), exact)
    value, gradients = errors["bfloat16x3"]
    assert value < 2e-6
    assert errors["float32"][1] < gradients < 5e-5
    assert errors["bfloat16"][1] > 1e-3
