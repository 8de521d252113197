"""The TPU compiler's estimate of a step beside what others measured on that TPU, for published runs of plain models.

    python benchmarks/calibration.py [POINT ...] [--dtype bfloat16]     (needs libtpu, no TPU; some minutes a point)

Each point is compiled as its authors' code computes: float32 arrays, products at the default precision (one pass in bfloat16 on a
TPU), no remat, images per core as published. Their times are wall-clock times of whole runs over the number of steps: input,
evaluations and checkpoints are in them. The estimate has none of these, nor the time of collectives, which is printed beside it
as their bytes over the links.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax import aot
from clipjax.plan.estimate import COLLECTIVES, estimate

IMAGENET = 1_281_167  # training images
PATCH, SIZE = 16, 224


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(x.shape[-1], dtype=x.dtype)(nn.gelu(nn.Dense(self.hidden, dtype=x.dtype)(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=x.dtype)
        x = x + attention(nn.LayerNorm(dtype=x.dtype)(x))
        return x + Mlp(4 * x.shape[-1])(nn.LayerNorm(dtype=x.dtype)(x))


class ViT(nn.Module):
    """ViT-S/16 of 2205.01580: sincos2d positions (here a constant), mean of the tokens, a hidden layer before the classes."""

    width: int = 384
    depth: int = 12
    heads: int = 6

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = patches(images, self.width)
        x = x + np.linspace(0, 1, x.shape[1] * self.width, dtype=np.float32).reshape(x.shape[1:]).astype(x.dtype)
        for _ in range(self.depth):
            x = Block(self.heads)(x)
        x = nn.LayerNorm(dtype=x.dtype)(x).mean(1)
        return nn.Dense(1000)(nn.tanh(nn.Dense(self.width)(x)))


class Mixer(nn.Module):
    """Mixer-B/16 (2105.01601). Stochastic depth is left out."""

    width: int = 768
    depth: int = 12

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = patches(images, self.width)
        for _ in range(self.depth):
            x = x + Mlp(self.width // 2)(nn.LayerNorm(dtype=x.dtype)(x).swapaxes(1, 2)).swapaxes(1, 2)
            x = x + Mlp(4 * self.width)(nn.LayerNorm(dtype=x.dtype)(x))
        return nn.Dense(1000)(nn.LayerNorm(dtype=x.dtype)(x).mean(1))


class MaskedAutoencoder(nn.Module):
    """MAE with ViT-L/16 (2111.06377): the encoder sees a quarter of the patches, or all; a small decoder sees all."""

    seen: int = 49
    decoder_depth: int = 8

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = patches(images, 1024)
        order = jnp.argsort(jax.random.uniform(jax.random.key(0), x.shape[:2]), axis=1)
        if self.seen < x.shape[1]:
            x = jnp.take_along_axis(x, order[:, : self.seen, None], axis=1)
        x = jnp.concatenate([jnp.zeros_like(x[:, :1]), x], axis=1)
        for _ in range(24):
            x = Block(16)(x)
        x = nn.Dense(512, dtype=x.dtype)(nn.LayerNorm(dtype=x.dtype)(x))
        if missing := order.shape[1] - self.seen:
            mask = self.param("mask", nn.initializers.normal(), (1, 1, 512)).astype(x.dtype)
            full = jnp.concatenate([x[:, 1:], jnp.broadcast_to(mask, (len(x), missing, 512))], axis=1)
            x = jnp.concatenate([x[:, :1], jnp.take_along_axis(full, jnp.argsort(order, 1)[..., None], axis=1)], axis=1)
        for _ in range(self.decoder_depth):
            x = Block(16)(x)
        return nn.Dense(3 * PATCH**2, dtype=x.dtype)(nn.LayerNorm(dtype=x.dtype)(x))[:, 1:]


def patches(images: jax.Array, width: int) -> jax.Array:
    x = nn.Conv(width, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", dtype=images.dtype, name="stem")(images)
    return x.reshape(len(x), -1, width)


def classify(logits: jax.Array, images: jax.Array, labels: jax.Array, sigmoid: bool) -> jax.Array:
    if sigmoid:
        return optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1).mean()
    return optax.softmax_cross_entropy(logits, labels).mean()


def reconstruct(predicted: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean squared error of the patches' normalised pixels."""
    side = SIZE // PATCH
    pixels = images.reshape(-1, side, PATCH, side, PATCH, 3).swapaxes(2, 3).reshape(len(images), side**2, -1)
    target = (pixels - pixels.mean(-1, keepdims=True)) * jax.lax.rsqrt(pixels.var(-1, keepdims=True) + 1e-6)
    return jnp.square(predicted - target).mean()


@dataclass(frozen=True)
class Point:
    """A published run on TPU v3. A core's program does not depend on their number but for collectives: compiled are 8."""

    source: str
    model: nn.Module
    loss: Callable[..., jax.Array]
    hours: Sequence[float]  # of the whole run: the least and the most that its authors say
    epochs: int  # of ImageNet
    batch: int = 4096
    cores: int = 128
    share: float = 1.0  # of ImageNet that is trained on
    mixup: bool = False

    @property
    def steps(self) -> float:
        return self.epochs * self.share * IMAGENET / self.batch


BIG_VISION: Any = dict(share=0.99, mixup=True)
MAE = "MAE (2111.06377), table 2: 800 epochs on 128 cores of TPU v3"
POINTS = {
    "vit-s16": Point(
        "big_vision, configs/vit_s16_i1k.py: 6 to 7 h for 90 epochs on TPU v3-8",
        ViT(),
        partial(classify, sigmoid=False),
        hours=(6, 7),
        epochs=90,
        batch=1024,
        cores=8,
        **BIG_VISION,
    ),
    "mixer-b16": Point(
        "big_vision, configs/mlp_mixer_i1k.py: 2 h 11 min for 300 epochs on TPU v3-128",
        Mixer(),
        partial(classify, sigmoid=True),
        hours=(2 + 11 / 60,),
        epochs=300,
        **BIG_VISION,
    ),
    "mae-l16": Point(MAE, MaskedAutoencoder(), reconstruct, hours=(15.4,), epochs=800),
    "mae-l16-shallow": Point(MAE, MaskedAutoencoder(decoder_depth=1), reconstruct, hours=(11.6,), epochs=800),
    "mae-l16-all": Point(MAE, MaskedAutoencoder(seen=196), reconstruct, hours=(42.4,), epochs=800),
}


def train_step(point: Point, tx: optax.GradientTransformation, mesh: Mesh) -> Callable[..., Any]:
    """A data-parallel step, as pmap made it then: each core mixes its own images."""

    def on_core(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        if point.mixup:
            images, labels = (0.8 * x + 0.2 * jnp.roll(x, 1, axis=0) for x in (images, labels))
        loss, grads = jax.value_and_grad(lambda p: point.loss(point.model.apply(p, images), images, labels))(params)
        updates, state = tx.update(jax.lax.pmean(grads, "data"), state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(loss, "data")

    specs = P(), P(), P("data"), P("data")
    return jax.jit(jax.shard_map(on_core, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False), donate_argnums=(0, 1))


def compiled(point: Point, dtype: str) -> tuple[aot.Compiled, list[jax.Device]]:
    devices = aot.tpu_devices("v3:2x2")
    mesh = Mesh(np.array(devices), ("data",))
    adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adam, optax.add_decayed_weights(1e-4), optax.scale(-1e-3))
    count = point.batch // point.cores * len(devices)
    batch = jax.ShapeDtypeStruct((count, SIZE, SIZE, 3), dtype), jax.ShapeDtypeStruct((count, 1000), jnp.float32)
    params = jax.eval_shape(point.model.init, jax.random.key(0), batch[0])
    trees = [(params, P()), (jax.eval_shape(tx.init, params), P()), *((x, P("data")) for x in batch)]
    placed = [
        jax.tree.map(lambda x, s=s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), tree)
        for tree, s in trees
    ]
    return aot.compile(train_step(point, tx, mesh).lower(*placed), dump=True), devices


def report(name: str, dtype: str) -> str:
    """One line of the table: milliseconds a step, of the compiler and as published, and their ratio."""
    point = POINTS[name]
    program, devices = compiled(point, dtype)
    found = estimate(program.cost, devices, point.batch, 0.0, program.cycles).compiler
    assert found is not None
    assert found.seconds is not None
    published = [3600 * hours / point.steps for hours in point.hours]
    ratios = " to ".join(f"{found.seconds / seconds:.2f}" for seconds in reversed(published))
    times = " to ".join(f"{1000 * seconds:.0f}" for seconds in published)
    links = f"{1000 * found.parts[COLLECTIVES]:.1f}"
    return f"| {name} | {found.cycles / 1e6:.1f} | {1000 * found.seconds:.1f} | {links} | {times} | {ratios} | {point.source} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="*", default=[*POINTS], metavar="POINT", help=f"of {', '.join(POINTS)}; default: all")
    parser.add_argument("--dtype", default="float32", help="of the arrays: what bfloat16 would have made of it")
    args = parser.parse_args()
    print(
        "| point | Mcycles | ms | collectives, ms | published, ms | ratio | source |\n|---|---|---|---|---|---|---|", flush=True
    )
    for name in args.points:
        try:
            print(report(name, args.dtype), flush=True)
        except aot.DoesNotFit as error:  # the authors' own program was smaller
            print(f"| {name} | {error} |", flush=True)


if __name__ == "__main__":
    main()
