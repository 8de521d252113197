"""The mesh, which axis of a parameter lies on which mesh axis, and how a host's batch becomes a global array.

The batch lies on `data` and `fsdp`; heads and MLP width on `tensor`; of what is left, each parameter's largest axis that
divides lies on `fsdp`. What can't be sharded is known by name, and too much of it is an error. Where devices come in slices
that a slower network joins, `data` is divided: its outer part is the mesh axis `slice`, so that weights, which `fsdp` and
`tensor` divide, never leave a slice, and the losses' ring turns within one before it goes on to the next.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax import config

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")
AUTO = (AxisType.Auto,) * len(AXES)

# Which axis of a parameter lies on `tensor`, counted from the end; the first match holds. Paths as in clipjax.models; an
# optimizer's moments carry their parameter's path at the end of their own, so the same table places them.
TENSOR_AXIS = (
    (r".*attention/qkv/(kernel|bias)", -2),  # heads
    (r".*(attention|map)/(query|key_value)/(kernel|bias)", -2),
    (r".*(attention|map)/out/kernel", -3),
    (r".*mlp/up/(kernel|bias)", -1),
    (r".*mlp/down/kernel", -2),
    (r".*decoder/output/kernel", -2),  # words
)
REPLICATED = P()
MUST_SHARD = 0.95  # of the bytes, or the mesh is refused


keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")  # a path as text/blocks/mlp/up/kernel


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or these). Raises ConfigError where the axis sizes do not multiply to their number, or
    mesh.data is no multiple of the number of TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": cfg.data, "fsdp": cfg.fsdp, "tensor": cfg.tensor}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        shape = ", ".join(f"mesh.{axis} = {n}" for axis, n in sizes.items())
        raise config.ConfigError(f"{shape}: must multiply to the number of devices, {len(devices)}; -1 takes all that are left")
    data, fsdp, tensor = sizes.values()
    slices = slice_count(devices)
    if slices == 1:
        return jax.make_mesh((1, data, fsdp, tensor), AXES, devices=devices, axis_types=AUTO)
    if data % slices:
        remedy = f"must be a multiple of the {slices} slices, as neither mesh.fsdp nor mesh.tensor can reach beyond one"
        config.require(devices[0].platform != "tpu", "mesh.data", data, remedy)
        # A slice of GPUs is a host, or what NVLink joins, and all may talk to all.
        return Mesh(np.asarray(devices).reshape(1, data, fsdp, tensor), AXES, axis_types=AUTO)
    placed = mesh_utils.create_hybrid_device_mesh((1, data // slices, fsdp, tensor), (slices, 1, 1, 1), devices)
    return Mesh(placed, AXES, axis_types=AUTO)


def slice_count(devices: Iterable[jax.Device]) -> int:
    """How many TPU slices these devices are of."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def batch_devices(mesh: Mesh) -> int:
    """How many ways the batch is divided."""
    return math.prod(mesh.shape[a] for a in BATCH)


def check_batch(run: config.Run, mesh: Mesh) -> None:
    """Raises ConfigError unless the global batch divides over the mesh, and a device's part of it into the micro-batches."""
    n = batch_devices(mesh)
    size = run.train.batch_size
    lower, upper = size // n * n, -(-size // n) * n
    near = f"{lower} or {upper}" if lower else f"{upper}"
    remedy = f"must be a multiple of the {n} devices of mesh axes data x fsdp; try {near}"
    config.require(size % n == 0, "train.batch_size", size, remedy)
    own, parts = size // n, run.train.micro_batches
    if own % parts:
        lower = next(m for m in range(min(parts, own), 0, -1) if own % m == 0)
        upper = next((m for m in range(parts, own + 1) if own % m == 0), None)
        near = f"{lower} or {upper}" if upper else f"{lower}"
        remedy = f"must divide the {own} pairs of each device, train.batch_size = {size} over {n}; try {near}"
        raise config.ConfigError(f"train.micro_batches = {parts}: {remedy}")


def check_tensor(model: config.Model, mesh: Mesh) -> None:
    """Raises ConfigError unless mesh.tensor divides what lies on it; else that would be whole on every device."""
    n = mesh.shape["tensor"]
    parts = {t: ("heads", "mlp_dim") for t in ("image", "text", "decoder") if getattr(model, t) is not None}
    parts["image"] += ("pool_heads",) * model.image.attentional
    sizes = {f"model.{t}.{f}": getattr(getattr(model, t), f) for t, fields in parts.items() for f in fields}
    whole = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % n)
    remedy = f"must divide the heads and MLP widths, and does not divide {whole}; use a divisor of {math.gcd(*sizes.values())}"
    config.require(not whole, "mesh.tensor", n, remedy)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_rows(mesh: Mesh) -> NamedSharding:
    """First axis over the devices of the batch."""
    return NamedSharding(mesh, P(BATCH))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, as many as any other's -> arrays of the global batch on the mesh.

    Raises ConfigError where this process's devices hold more or fewer rows than that.
    """
    _check_processes(mesh)
    rows, n = over_rows(mesh), jax.process_count()
    return {k: jax.make_array_from_process_local_data(rows, v, (n * len(v), *v.shape[1:])) for k, v in batch.items()}


@functools.cache
def _check_processes(mesh: Mesh) -> None:
    parts, n = batch_devices(mesh), jax.process_count()
    mine = len({index[0].start for index in over_rows(mesh).addressable_devices_indices_map((parts,)).values()})
    sizes = {"data": mesh.shape["slice"] * mesh.shape["data"], "fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"]}
    shape = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    remedy = "each needs the same share of the batch to itself; mesh.tensor must lie within a process"
    if mine * n != parts:
        raise config.ConfigError(f"{shape}: process {jax.process_index()} of {n} holds {mine} of {parts} parts; {remedy}")


def on_shards(fn: Callable[..., Any], mesh: Mesh, rows: int = 2, out: Any = REPLICATED) -> Callable[..., Any]:
    """`fn(*arrays, *scalars)` of one device's rows, as a function of the global rows.

    The first `rows` arguments are arrays [B, ...] or trees of them; the rest, the scalars, are the same on every device. What it
    returns is the same on every device too, or lies as the partition specs `out` say.
    """

    def mapped(*args: Any) -> Any:
        specs = (P(BATCH),) * rows + (P(),) * (len(args) - rows)
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out)(*args)

    return mapped


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Where one parameter (or a moment of it, or what is remembered of the examples) lies."""
    if path.startswith("memory/"):  # a row for each training example
        return P(BATCH) if shape[0] % batch_devices(mesh) == 0 else P()
    axes: list[str | None] = [None] * len(shape)
    for pattern, axis in TENSOR_AXIS:
        if re.fullmatch(pattern, path) and len(shape) >= -axis:
            if mesh.shape["tensor"] > 1 and shape[axis] % mesh.shape["tensor"] == 0:
                axes[axis] = "tensor"
            break
    first = 1 if "/blocks/" in path else 0  # the axis of the layers is scanned, so it stays whole
    fits = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and fits:
        axes[max(fits, key=lambda i: shape[i])] = "fsdp"
    return P(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf (array or shape) of a tree of parameters or of a whole train state.

    Raises ConfigError where less than 95 % of the bytes could be divided over `fsdp`, listing the largest that could not and the
    sizes that would do.
    """
    placed = _place(tree, mesh)
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and sharded_fraction(tree, placed, "fsdp") < MUST_SHARD:
        devices = mesh.shape["data"] * fsdp

        def works(n: int) -> bool:
            sizes = dict(mesh.shape) | {"data": devices // n, "fsdp": n}
            other = AbstractMesh(tuple(sizes.values()), AXES, axis_types=AUTO)
            return sharded_fraction(tree, _place(tree, other), "fsdp") >= MUST_SHARD

        sizes = ", ".join(str(n) for n in range(2, devices) if devices % n == 0 and works(n)) or "none but 1"
        largest = sorted(unsharded(tree, placed, "fsdp").items(), key=lambda x: -x[1])[:5]
        whole = ", ".join(f"{name} ({size:,} bytes)" for name, size in largest)
        share = sharded_fraction(tree, placed, "fsdp")
        raise config.ConfigError(
            f"mesh.fsdp = {fsdp}: only {share:.0%} of the bytes can be divided so; use {sizes}. Whole: {whole}"
        )
    return placed


def _place(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(keystr(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def byte_count(tree: Any) -> int:
    """Of all leaves (arrays or shapes), each counted once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def own_bytes(tree: Any) -> int:
    """Of one device's part of all leaves, which carry their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sharded_fraction(tree: Any, placed: Any, *axes: str) -> float:
    """Of the bytes, how many are divided over one of these axes or more, 0 to 1."""
    return 1 - sum(unsharded(tree, placed, *axes).values()) / byte_count(tree)


def unsharded(tree: Any, placed: Any, *axes: str) -> dict[str, int]:
    """Path -> bytes of the leaves that none of these axes divides."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(placed), strict=True)
    return {keystr(path): byte_count(leaf) for (path, leaf), lies in leaves if not _divided(lies, axes)}


def _divided(lies: NamedSharding, axes: Sequence[str]) -> bool:
    named = {axis for names in lies.spec for axis in (names if isinstance(names, tuple) else (names,))}
    return any(axis in named and lies.mesh.shape[axis] > 1 for axis in axes)


def shapes(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs that carry `shardings`: what Orbax restores into and what ahead-of-time compilation takes."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))
