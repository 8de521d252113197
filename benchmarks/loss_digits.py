"""How many digits the contrastive losses keep by the dtype of their products: value and gradients against float64 NumPy.

    python benchmarks/loss_digits.py  # a minute
    python benchmarks/loss_digits.py --topology v5e:2x4 --batch 65536  # not the digits: time by the TPU compiler's estimates

On a CPU. bfloat16x3 is float32 there, so it is multiplied here as a TPU does: both operands are split into two bfloat16 parts,
and three of the four products are summed in float32. A GPU's three TF32 passes keep more.
"""

import argparse
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import aot, config, losses, sharding
from clipjax.bench.loss_forms import lower
from clipjax.chips import chip_of
from clipjax.hlo.cycles import cycles
from clipjax.losses.pairwise import logsumexp, operands, softplus

BIAS = -20.0  # of the sigmoid
DTYPES = ("float32", "bfloat16x3", "bfloat16")


def three_passes(a: jax.Array, b: jax.Array, contract: tuple[int, int], options: operands.PairwiseOptions) -> jax.Array:
    """operands.dot, with products of precision HIGH as a TPU makes them."""
    if options.precision != jax.lax.Precision.HIGH:
        return operands.dot(a, b, contract, options)

    def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = jax.lax.reduce_precision(x, 8, 7)  # XLA would take x.astype(bfloat16).astype(float32) for x
        return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product(a_low, b_high) + product(a_high, b_low) + product(a_high, b_high)


def pairs(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors as of a trained model: own cosines of about 0.3, others' around 0 with a standard deviation of 0.07."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, width + 1) ** -0.25
    x, noise = rng.normal(size=(2, count, width)) * spectrum
    y = 0.32 * x + noise
    return tuple(np.float64(np.float32(z / np.linalg.norm(z, axis=1, keepdims=True))) for z in (x, y))


def softmax(x: np.ndarray, y: np.ndarray, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and its gradients for x and y, float64."""
    s = scale * x @ y.T
    rows, cols = (np.exp(s - s.max(axis, keepdims=True)) for axis in (1, 0))
    rows, cols = rows / rows.sum(1, keepdims=True), cols / cols.sum(0, keepdims=True)
    n = len(x)
    value = -(np.log(np.diagonal(rows)) + np.log(np.diagonal(cols))).mean() / 2
    g = scale * (rows + cols - 2 * np.eye(n)) / (2 * n)
    return value, g @ y, g.T @ x


def sigmoid(x: np.ndarray, y: np.ndarray, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The same of SigLIP's."""
    n = len(x)
    sign = 2 * np.eye(n) - 1
    s = sign * (scale * x @ y.T + BIAS)
    g = -scale * sign / (1 + np.exp(s)) / n
    return np.logaddexp(0, -s).sum() / n, g @ y, g.T @ x


def errors(found: tuple, exact: tuple) -> tuple[float, float]:
    """Relative errors: of the value, and of the gradients (norm of the difference / norm)."""
    (value, gradients), (wanted, *of_sides) = found, exact
    difference = [np.linalg.norm(np.float64(g) - w) / np.linalg.norm(w) for g, w in zip(gradients, of_sides, strict=True)]
    return abs(float(value) - wanted) / wanted, max(difference)


def milliseconds(name: str, dtype: str, topology: str, batch: int, width: int) -> float:
    """Of the value and the gradients on TPUs that need not be here, without transfers: see clipjax.hlo.cycles."""
    devices, axis = aot.tpu_devices(topology), sharding.BATCH
    forms: dict[str, Callable] = {
        "softmax": lambda x, y, scale: losses.clip_loss(x, y, scale, axis=axis, dtype=dtype),
        "sigmoid": lambda x, y, scale, bias: losses.siglip_loss(x, y, scale, bias, axis=axis, dtype=dtype),
    }
    mesh, chip = sharding.make_mesh(config.Mesh(), devices), chip_of(devices[0].device_kind)
    program = lower(sharding.on_shards(forms[name], mesh), name, batch, width, mesh).compile()
    found = cycles(program.as_text(), chip)
    assert found is not None
    assert chip is not None
    assert chip.clock is not None
    return found.total / chip.clock * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scale", type=float, default=100.0)
    parser.add_argument("--topology")
    args = parser.parse_args()
    if args.topology:
        for name, dtype in itertools.product(("softmax", "sigmoid"), DTYPES):
            took = milliseconds(name, dtype, args.topology, args.batch, args.width)
            print(f"{name} {dtype:10}  {took:.1f} ms", flush=True)
        return
    logsumexp.dot = softplus.dot = three_passes
    x, y = pairs(args.batch, args.width)
    forms: dict[str, tuple[Callable, Callable]] = {
        "softmax": (softmax, lambda x, y, dtype: losses.clip_loss(x, y, args.scale, dtype=dtype)),
        "sigmoid": (sigmoid, lambda x, y, dtype: losses.siglip_loss(x, y, args.scale, BIAS, dtype=dtype)),
    }
    print(f"{args.batch} pairs of width {args.width}, scale {args.scale:g}: relative errors against float64")
    for name, (exact, streamed) in forms.items():
        wanted = exact(x, y, args.scale)
        for dtype in DTYPES:
            fn = jax.jit(jax.value_and_grad(lambda x, y, dtype=dtype, streamed=streamed: streamed(x, y, dtype), argnums=(0, 1)))
            value, gradient = errors(fn(jnp.float32(x), jnp.float32(y)), wanted)
            print(f"{name} {dtype:10}  value ({wanted[0]:.4f}) {value:.1e}  gradients {gradient:.1e}", flush=True)


if __name__ == "__main__":
    main()
