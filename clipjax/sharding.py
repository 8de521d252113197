"""The mesh; which axis of a parameter is sharded over which mesh axis; how a process's batch becomes a global array.

The batch and class vectors are sharded over `data` and `fsdp`, heads and MLP width over `tensor` (models.layers.TENSOR_AXES). Of
a parameter's other axes, the largest that the size of `fsdp` divides is sharded over `fsdp`. Vectors of a few KB are not: each
would cost transfers and save next to nothing. What cannot be sharded is known by name, and too much of it is an error. Where
devices come in slices that a slower network joins, the outer part of `data` is the mesh axis `slice`. So weights, which are
sharded over `fsdp` and `tensor`, never leave a slice, and the losses' ring goes round within a slice before it goes to the next.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clipjax import config
from clipjax.models import clip
from clipjax.models.layers import TENSOR_AXES

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")
AUTO = (AxisType.Auto,) * len(AXES)

REPLICATED = P()
MUST_SHARD = 0.95  # share of the bytes; below it the mesh is refused
VECTOR = 2**14  # most numbers of a bias or another vector, in one layer, that is not sharded over `fsdp`: 64 KiB


keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")  # a path as text/blocks/mlp/up/kernel


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None, hosts: int = 1) -> Mesh:
    """The mesh over all devices (or these). Raises ConfigError where the axis sizes do not multiply to their number, or
    mesh.data is no multiple of the number of TPU slices.

    `hosts`: of GPUs that are compiled for. They don't say their slice, which is a host; each host is a process.
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
    slices = max(hosts, slice_count(devices))
    if slices == 1:
        return jax.make_mesh((1, data, fsdp, tensor), AXES, devices=devices, axis_types=AUTO)
    if data % slices:
        remedy = f"must be a multiple of the {slices} slices, as neither mesh.fsdp nor mesh.tensor can reach beyond one"
        config.require(devices[0].platform != "tpu", "mesh.data", data, remedy)
        # A slice of GPUs is a host, or what NVLink joins, and all may talk to all.
        return Mesh(np.asarray(devices).reshape(1, data, fsdp, tensor), AXES, axis_types=AUTO)
    within = (1, data // slices, fsdp, tensor)
    placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, process_is_granule=hosts > 1)
    return Mesh(placed, AXES, axis_types=AUTO)


def slice_count(devices: Iterable[jax.Device]) -> int:
    """How many TPU slices these devices are of."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of the batch."""
    return math.prod(mesh.shape[a] for a in BATCH)


def check_batch(run: config.Run, mesh: Mesh) -> None:
    """Raises ConfigError unless the mesh divides the global batch, and the micro-batches divide a device's shard of it."""
    n = batch_devices(mesh)
    size = run.train.batch_size
    lower, upper = size // n * n, -(-size // n) * n
    near = f"{lower} or {upper}" if lower else f"{upper}"
    remedy = f"must be a multiple of the {n} devices of mesh axes data x fsdp; try {near}"
    config.require(size % n == 0, "train.batch_size", size, remedy)
    shard, micro = size // n, run.train.micro_batches
    if shard % micro:
        lower = next(m for m in range(min(micro, shard), 0, -1) if shard % m == 0)
        upper = next((m for m in range(micro, shard + 1) if shard % m == 0), None)
        near = f"{lower} or {upper}" if upper else f"{lower}"
        remedy = f"must divide the {shard} pairs of each device, train.batch_size = {size} over {n}; try {near}"
        raise config.ConfigError(f"train.micro_batches = {micro}: {remedy}")


def check_tensor(model: config.Model, mesh: Mesh) -> None:
    """Raises ConfigError unless mesh.tensor divides all that is sharded over it. Else that would be replicated."""
    n = mesh.shape["tensor"]
    sizes = {f"model.{t}.{name}": size for t, facts in clip.facts(model).items() for name, size in facts.tensor_sizes.items()}
    sizes |= {f"model.heads.{head.name}.hidden": head.hidden for head in model.heads}
    wrong = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % n)
    remedy = f"must divide the heads and MLP widths, and does not divide {wrong}; use a divisor of {math.gcd(*sizes.values())}"
    config.require(not wrong, "mesh.tensor", n, remedy)


def check_classes(model: config.Model, mesh: Mesh) -> None:
    """Raises ConfigError unless the mesh divides the class matrix, of which each device of the batch has a part."""
    rows, n = model.class_shape[0] if model.class_shape else 0, batch_devices(mesh)
    remedy = f"its matrix has {rows:,} rows, which {n} devices of mesh.data x fsdp do not divide: take a power of two of them"
    config.require(rows % n == 0, "model.classes", model.classes, remedy)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_rows(mesh: Mesh) -> NamedSharding:
    """The first axis, sharded over the devices of the batch."""
    return NamedSharding(mesh, P(BATCH))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, an equal share -> arrays of the global batch on the mesh.

    Raises ConfigError where this process's devices hold more or fewer rows than that.
    """
    _check_processes(mesh)
    rows, n = over_rows(mesh), jax.process_count()
    return {k: jax.make_array_from_process_local_data(rows, v, (n * len(v), *v.shape[1:])) for k, v in batch.items()}


@functools.cache
def _check_processes(mesh: Mesh) -> None:
    parts, n = batch_devices(mesh), jax.process_count()
    own = len({index[0].start for index in over_rows(mesh).addressable_devices_indices_map((parts,)).values() if index})
    sizes = {"data": mesh.shape["slice"] * mesh.shape["data"], "fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"]}
    shape = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    remedy = "each needs the same share of the batch to itself; mesh.tensor must lie within a process"
    if own * n != parts:
        raise config.ConfigError(f"{shape}: process {jax.process_index()} of {n} holds {own} of {parts} parts; {remedy}")


def on_shards(fn: Callable[..., Any], mesh: Mesh, rows: int = 2, out: Any = REPLICATED) -> Callable[..., Any]:
    """`fn(*arrays, *scalars)` of one device's rows, as a function of the global rows.

    The first `rows` arguments are arrays [B, ...] or trees of them. The others, the scalars, are the same on every device. The
    result is the same on every device, too, unless the partition specs `out` say otherwise.
    """

    def mapped(*args: Any) -> Any:
        specs = (P(BATCH),) * rows + (P(),) * (len(args) - rows)
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out)(*args)

    return mapped


def shards_optimizer(cfg: config.Mesh, mesh: Mesh | AbstractMesh) -> bool:
    """Whether a state's weights, moments and moving average are sharded over `data`, too: mesh.shard_optimizer. An abstract mesh
    counts as one of CPUs.
    """
    chosen = cfg.shard_optimizer
    if chosen is None:
        on_cpu = not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform == "cpu"
        chosen = not on_cpu and mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
    return chosen and mesh.shape["data"] > 1


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, over_data: bool = False) -> P:
    """The sharding of one array of a train state, by its path: a parameter, its moments, or values stored for every example.

    `over_data`: the first axis that is left, and that `data` divides, is sharded over `data`. It may be that of the layers, as
    the towers get gathered weights.
    """
    of_classes = path.split("/")[-1] == clip.CLASSES and len(shape) > 1 and shape[0] % batch_devices(mesh) == 0
    if of_classes or path.startswith("memory/"):  # a row for each class, or for each training example
        return P(BATCH)
    axes: list[str | None] = [None] * len(shape)
    axis = TENSOR_AXES.get("/".join(path.split("/")[-2:]), 0)
    if axis and len(shape) >= -axis and mesh.shape["tensor"] > 1 and shape[axis] % mesh.shape["tensor"] == 0:
        axes[axis] = "tensor"
    first = 1 if "/blocks/" in path else 0  # the axis of the layers is scanned: it is not sharded
    fits = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and fits and not _is_small_vector(path, shape):
        axes[max(fits, key=lambda i: shape[i])] = "fsdp"
    left = [i for i, n in enumerate(shape) if axes[i] is None and n % mesh.shape["data"] == 0]
    if over_data and mesh.shape["data"] > 1 and left and not _is_small_vector(path, shape):
        axes[left[0]] = "data"
    return P(*axes)


def _is_small_vector(path: str, shape: tuple[int, ...]) -> bool:
    """Whether an array is a bias or another vector that stays on every device, so that `fsdp` costs it no transfers."""
    of_layer = shape[1:] if "/blocks/" in path else shape
    return (path.endswith("/bias") or len(of_layer) <= 1) and math.prod(of_layer) <= VECTOR


def shardings(tree: Any, mesh: Mesh, over_data: Collection[str] = ()) -> Any:
    """A NamedSharding for every leaf (array or shape) of a tree of parameters, or of a train state. `over_data`: the names of the
    parameters that are sharded over `data`, too, in a train state, with its moments.

    Raises ConfigError where less than 95 % of the bytes can be sharded over `fsdp`, small vectors aside. It names the largest
    parameters that cannot, and the sizes of `fsdp` that would work.
    """
    placed = _place(tree, mesh, over_data)
    fsdp = mesh.shape["fsdp"]
    left = _not_over_fsdp(tree, placed) if fsdp > 1 else {}
    share = 1 - sum(left.values()) / byte_count(tree)
    if share < MUST_SHARD:
        largest = sorted(left.items(), key=lambda x: -x[1])[:5]
        replicated = ", ".join(f"{name} ({size:,} bytes)" for name, size in largest)
        use = ", ".join(str(n) for n in _fsdp_sizes(tree, mesh)) or "none but 1"
        message = f"only {share:.0%} of the bytes can be sharded so; use {use}. Replicated: {replicated}"
        raise config.ConfigError(f"mesh.fsdp = {fsdp}: {message}")
    return placed


def _fsdp_sizes(tree: Any, mesh: Mesh) -> Iterator[int]:
    """The sizes of `fsdp`, above 1 and with the same number of devices, over which enough of the tree can be sharded."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    for n in range(2, devices):
        if devices % n == 0:
            sizes = dict(mesh.shape) | {"data": devices // n, "fsdp": n}
            other = AbstractMesh(tuple(sizes.values()), AXES, axis_types=AUTO)
            if sum(_not_over_fsdp(tree, _place(tree, other)).values()) <= (1 - MUST_SHARD) * byte_count(tree):
                yield n


def _not_over_fsdp(tree: Any, placed: Any) -> dict[str, int]:
    """Path -> bytes, of the leaves that should be sharded over `fsdp` and are not."""
    small = {
        keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if _is_small_vector(keystr(path), leaf.shape)
    }
    return {path: size for path, size in unsharded(tree, placed, "fsdp").items() if path not in small}


def _place(tree: Any, mesh: Mesh | AbstractMesh, over_data: Collection[str] = ()) -> Any:
    def place(path: Any, leaf: Any) -> NamedSharding:
        field, _, name = (whole := keystr(path)).partition("/")
        # Parameters that are not trained have no moments.
        return NamedSharding(mesh, spec(whole, leaf.shape, mesh, name in over_data or (field == "opt_state" and bool(over_data))))

    return jax.tree_util.tree_map_with_path(place, tree)


def byte_count(tree: Any) -> int:
    """Bytes of all leaves (arrays or shapes), each counted once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def own_bytes(tree: Any, gathered: str | None = None) -> int:
    """Bytes of one device's shards of all leaves (arrays or shapes with their shardings), once gathered over a mesh axis."""

    def numbers(x: Any) -> int:
        times = x.sharding.mesh.shape[gathered] if gathered and gathered in x.sharding.spec else 1
        return math.prod(x.sharding.shard_shape(x.shape)) * times

    return sum(numbers(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sharded_fraction(tree: Any, placed: Any, *axes: str) -> float:
    """The share of the bytes that are sharded over at least one of these axes, 0 to 1."""
    return 1 - sum(unsharded(tree, placed, *axes).values()) / byte_count(tree)


def unsharded(tree: Any, placed: Any, *axes: str) -> dict[str, int]:
    """Path -> bytes, of the leaves that are sharded over none of these axes."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(placed), strict=True)
    return {keystr(path): byte_count(leaf) for (path, leaf), sharding in leaves if not _is_sharded(sharding, axes)}


def _is_sharded(sharding: NamedSharding, axes: Sequence[str]) -> bool:
    named = {axis for names in sharding.spec for axis in (names if isinstance(names, tuple) else (names,))}
    return any(axis in named and sharding.mesh.shape[axis] > 1 for axis in axes)


def shapes(tree: Any, mesh: Mesh, part: bool = False, over_data: Collection[str] = ()) -> Any:
    """ShapeDtypeStructs with `shardings`: what Orbax restores into, and what ahead-of-time compilation takes. `part`: the tree is
    a part of one, and may be what can't be sharded.
    """
    placed = _place(tree, mesh) if part else shardings(tree, mesh, over_data)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)
