"""Low-rank adapters of a tower's kernels (LoRA, Hu et al. 2106.09685): x W + alpha / rank * x A B.

A is drawn from a normal distribution and B starts at zero, so a tower with fresh adapters is the tower without them. The fused
kernel of queries, keys and values has an A and a B for each of the three: a rank then means what it means in the paper and
elsewhere, where these are three kernels.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipjax.config import Lora, Model
from clipjax.models.facts import BlockShape, Layout

LORA_A, LORA_B = "lora_a", "lora_b"  # the adapters' names beside `kernel`
PARTS = {"attention/qkv": 3}  # kernels [*inner, parts, *outer] that have an A and a B for each part; others have one
TOWERS = ("image", "text")  # those that may have adapters


def factor(lora: Lora) -> float:
    """The factor on A B."""
    return lora.alpha / lora.rank


def shapes(lora: Lora, name: str, inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of one layer's kernel `name`, which maps [..., *inner] to [..., *outer]."""
    if name in PARTS:
        return (*inner, outer[0], lora.rank), (outer[0], lora.rank, *outer[1:])
    return (*inner, lora.rank), (lora.rank, *outer)


def product(name: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """A B of one layer, in the shape of its kernel."""
    if name in PARTS:
        each = [jnp.tensordot(a[..., i, :], b[i], 1, precision=jax.lax.Precision.HIGHEST) for i in range(len(b))]
        return jnp.stack(each, a.ndim - 2)
    return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)


def without(model: Model) -> Model:
    """The model without adapters."""
    towers = {name: dataclasses.replace(getattr(model, name), lora=None) for name in TOWERS}
    return dataclasses.replace(model, **towers)


def merged(model: Model, params: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model without adapters, and the parameters that give the same embeddings: kernels W + alpha / rank * A B."""
    params = dict(params)
    for tower in TOWERS:
        if (lora := getattr(model, tower).lora) is not None and tower in params:
            params[tower] = params[tower] | {"blocks": _merged_blocks(lora, params[tower]["blocks"])}
    return without(model), params


def _merged_blocks(lora: Lora, blocks: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's stacked layers, without adapters."""
    found = {part: dict(below) for part, below in blocks.items()}
    for name in lora.kernels:
        part, _, kernel = name.partition("/")
        leaves = dict(found[part][kernel])
        a, b = leaves.pop(LORA_A), leaves.pop(LORA_B)
        found[part][kernel] = leaves | {"kernel": _merged_kernel(name, factor(lora), leaves["kernel"], a, b)}
    return found


def _merged_kernel(name: str, factor: float, kernel: Array, a: Array, b: Array) -> Array:
    """All layers' W + factor * A B, sharded as W."""
    sharding = getattr(kernel, "sharding", None)

    @functools.partial(jax.jit, out_shardings=sharding)
    def add(kernel: Array, a: Array, b: Array) -> Array:
        return kernel + factor * jax.vmap(functools.partial(product, name))(a, b)

    return add(kernel, a, b)


def _widths(shape: BlockShape) -> dict[str, tuple[int, int]]:
    """What a kernel's adapters take and give, in numbers of a token: with parts, for each part."""
    d, f = shape.width, shape.mlp_dim
    return {"attention/qkv": (d, d), "attention/out": (d, d), "mlp/up": (d, f), "mlp/down": (f, d)}


def weights(shape: BlockShape) -> int:
    """Numbers in the adapters of one layer."""
    if shape.lora is None:
        return 0
    widths = _widths(shape)
    return sum(PARTS.get(name, 1) * sum(widths[name]) * shape.lora.rank for name in shape.lora.kernels)


def flops(shape: BlockShape) -> int:
    """FLOPs of the adapters in a forward pass of one layer on one example."""
    return 2 * shape.tokens * weights(shape)


def kept(policy: str, layout: Layout, shape: BlockShape) -> float:
    """Bytes of one layer's adapters kept for the backward pass, of one example: x A, and with the policy `dots` x A B."""
    if shape.lora is None or policy not in ("none", "dots"):
        return 0
    widths, count = _widths(shape), sum(PARTS.get(name, 1) for name in shape.lora.kernels)
    found = float(count * layout.bytes(shape.tokens, shape.lora.rank))
    for name in shape.lora.kernels if policy == "dots" else ():
        split = layout.tensor if name in ("attention/qkv", "mlp/up") else 1
        found += PARTS.get(name, 1) * layout.bytes(shape.tokens, widths[name][1]) / split
    return math.ceil(found)
