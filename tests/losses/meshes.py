"""Functions of one device's rows, run and differentiated over a mesh of simulated devices in each of the supported ways."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from clipjax import sharding

# Sizes of `data` and `fsdp`, or of all four axes; None: no mesh and no axis.
Shape = tuple[int, int] | tuple[int, int, int, int] | None
# Where the derivative is taken: outside the map, checked or not, or within it. Within and not checked is not supported.
Way = Literal["outside", "outside, unchecked", "inside"]


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    sizes = shape if len(shape) == 4 else (1, *shape, 1)
    return jax.make_mesh(sizes, sharding.AXES, devices=jax.devices()[: math.prod(sizes)], axis_types=sharding.AUTO)


def axis_of(shape: Shape) -> tuple[str, ...] | None:
    return None if shape is None else sharding.BATCH


def pulled(fn: Callable, shape: Shape, way: Way = "outside") -> Callable:
    """`g(args, cotangents, constants=()) -> (outputs, gradients by args)` of `fn(*args, *constants) -> outputs`, compiled as one.

    Arrays with an axis are of rows: they lie over the mesh, and `fn` sees one device's part of each. Numbers are the same on
    every device. So it is with outputs, which their cotangents stand for.
    """

    def run(fn: Callable, args: tuple, cotangents: Any, constants: tuple) -> tuple[Any, tuple]:
        out, pull = jax.vjp(lambda *args: fn(*args, *constants), *args)
        return out, pull(cotangents)

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda x: P(sharding.BATCH) if jnp.ndim(x) else P(), tree)

    def g(args: Sequence, cotangents: Any, constants: Sequence = ()) -> tuple[Any, tuple]:
        args, constants = tuple(args), tuple(constants)
        if shape is None:
            return run(fn, args, cotangents, constants)
        mapped = functools.partial(jax.shard_map, mesh=mesh_of(*shape), check_vma=way != "outside, unchecked")
        if way == "inside":
            within, given = functools.partial(run, fn), (args, cotangents, constants)
            return mapped(within, in_specs=specs(given), out_specs=(specs(cotangents), specs(args)))(*given)
        return run(mapped(fn, in_specs=specs((*args, *constants)), out_specs=specs(cotangents)), args, cotangents, constants)

    return jax.jit(g)
