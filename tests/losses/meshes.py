"""Functions of one device's rows, run and differentiated over a mesh of simulated devices in each of the supported ways."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from clipjax import config, sharding

Shape = tuple[int, int] | None  # sizes of `data` and `fsdp`; None: no mesh and no axis
# Where the derivative is taken: outside the map, checked or not, or within it. Within and not checked is not supported.
Way = Literal["outside", "outside, unchecked", "inside"]


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])


def axis_of(shape: Shape) -> tuple[str, ...] | None:
    return None if shape is None else sharding.BATCH


def pulled(fn: Callable, shape: Shape, way: Way = "outside", *, replicated: int = 0) -> Callable:
    """`g(args, cotangents) -> (outputs, gradients)` of `fn(*args) -> tuple of outputs`, in one compiled program.

    Arrays with an axis are of rows, lie over the mesh, and go into `fn` a device's part each; numbers are the same on every
    device. So it is with what comes out, of which the first `replicated` are numbers.
    """

    def run(fn: Callable, args: tuple, cotangents: tuple) -> tuple[tuple, tuple]:
        out, pull = jax.vjp(fn, *args)
        return out, pull(cotangents)

    if shape is None:
        return jax.jit(lambda args, cotangents: run(fn, args, cotangents))
    mesh, kw = mesh_of(*shape), dict(check_vma=way != "outside, unchecked")

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda x: P(sharding.BATCH) if jnp.ndim(x) else P(), tree)

    def g(args: tuple, cotangents: tuple) -> tuple[tuple, tuple]:
        if way == "inside":
            both = jax.shard_map(
                lambda args, cotangents: run(fn, args, cotangents),
                mesh=mesh,
                in_specs=(specs(args), specs(cotangents)),
                out_specs=(specs(cotangents), specs(args)),
                **kw,
            )
            return both(args, cotangents)
        return run(jax.shard_map(fn, mesh=mesh, in_specs=specs(args), out_specs=specs(cotangents), **kw), args, cotangents)

    return jax.jit(g)
