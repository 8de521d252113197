"""How every row of the global batch meets every column: tile by tile, reduced and dropped, never as a matrix (METHODS E).

Rows stay on their device. Columns travel in one of two ways. Ring: a piece of at most `tile` columns goes once round the
devices and comes home with what it has gathered before the next one starts, so a device holds a few pieces beside its own
rows and columns. The next piece is sent before the present one is met, and what a piece has gathered follows one hop behind
it, so no transfer waits for a product. Of several mesh axes the first is a ring of rings, for slices that a slower network
joins: a piece goes once round its slice for every hop to the next, and has all that time for the hop. Gather: one all-gather,
and one reduce-scatter home; fewer, larger transfers, and all columns on every device.

Devices of a mesh axis that rows and columns don't vary over, as `tensor`, hold the same: they share the columns out.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Axis = str | tuple[str, ...] | None
Travel = Literal["ring", "gather"]
GATHER = 32 * 2**20  # bytes of gathered columns up to which `gather` is chosen: there, few transfers matter more than memory


class Partial(NamedTuple):
    """What rows (or columns) have gathered from the tiles they met, leading axis theirs. Each field is a tuple of arrays."""

    total: tuple[Array, ...] = ()  # added up
    best: tuple[Array, ...] = ()  # the largest
    lse: tuple[tuple[Array, tuple[Array, ...]], ...] = ()  # (m, sums): m the largest logit, sums of terms exp(logit - m) * (...)


def merge(a: Partial, b: Partial) -> Partial:
    """Of both together. NaN and +inf stay visible."""

    def one(a: tuple[Array, tuple[Array, ...]], b: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        m = jnp.maximum(a[0], b[0])
        fa, fb = (jnp.exp(part[0] - finite(m)) for part in (a, b))
        return m, tuple(fa * x + fb * y for x, y in zip(a[1], b[1], strict=True))

    return Partial(
        jax.tree.map(jnp.add, a.total, b.total),
        jax.tree.map(jnp.maximum, a.best, b.best),
        tuple(one(x, y) for x, y in zip(a.lse, b.lse, strict=True)),
    )


def finite(m: Array) -> Array:
    """The largest logit, or 0 where there is none: -inf - -inf is no number."""
    return jnp.where(m == -jnp.inf, 0, m)


def log_sum_exp(logits: Float[Array, "r c"], axis: int, *factors: Float[Array, "r c"]) -> tuple[Array, tuple[Array, ...]]:
    """The entry of Partial.lse for one tile along an axis: sums of exp(logits - m), and of that times each factor."""
    m = logits.max(axis)
    e = jnp.exp(logits - jnp.expand_dims(finite(m), axis))
    return m, tuple(x.sum(axis) for x in (e, *(e * f for f in factors)))


def vary(tree: Any, axis: Axis) -> Any:
    """Marks values as different on each device of `axis`, for shard_map's check; their gradients are then summed over it."""
    if axis is None:
        return tree
    names = (axis,) if isinstance(axis, str) else axis

    def one(x: Array) -> Array:
        missing = tuple(a for a in names if a not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def device_count(axis: Axis) -> int:
    return 1 if axis is None else jax.lax.axis_size(axis)


def choose(travel: Travel | None, columns: int, width: int, axis: Axis) -> Travel:
    """What is asked for, or what suits the size: `columns` a device of `width` 4-byte numbers."""
    return travel or ("gather" if device_count(axis) * columns * width * 4 <= GATHER else "ring")


class Meeting(NamedTuple):
    """Which of a tile's entries are what."""

    own: Bool[Array, "r c"]  # pairs that belong together
    real: Bool[Array, "r c"] | None  # neither row nor column is padding; None: there is no padding


def idle_axes(axis: Axis, *trees: Any) -> tuple[str, ...]:
    """The mesh axes whose devices all hold the same of `trees`, as shard_map with check_vma=True knows; without it, none."""
    names = () if axis is None else jax.sharding.get_abstract_mesh().manual_axes
    varying = set().union(
        (axis,) if isinstance(axis, str) else axis or (), *(jax.typeof(x).mat.varying for x in jax.tree.leaves(trees))
    )
    checked = (a for a in names if a in jax.typeof(jax.lax.axis_index(a)).mat.varying)
    return tuple(a for a in checked if a not in varying and jax.lax.axis_size(a) > 1)


def rings_of(axis: Axis) -> list[tuple[int, int]]:
    """Stride and size of the rings that columns go round, the outer one first."""
    n = device_count(axis)
    outer = jax.lax.axis_size(axis[0]) if isinstance(axis, tuple) else 1
    return [(stride, size) for stride, size in ((n // outer, outer), (1, n // outer)) if size > 1]


def sweep(
    tile_fn: Callable[[Any, Any, Meeting], tuple[Partial, Partial]],
    rows: Any,
    cols: Any,
    *,
    axis: Axis,
    tile: int,
    travel: Travel,
) -> tuple[Partial, Partial]:
    """All rows [b, ...] (a tree) of this device against all columns [c, ...] of all devices; what each row, and each column of
    this device, gathered.

    `tile_fn(r, c, meeting)` takes at most `tile` rows and columns and returns what they gather from each other. c is a
    multiple K of b; the own pair of a row is its first of K columns.
    """
    n = device_count(axis)
    me = 0 if axis is None else jax.lax.axis_index(axis)
    b, c = (len(jax.tree.leaves(side)[0]) for side in (rows, cols))
    per_row = c // b
    idle = idle_axes(axis, rows, cols)
    sharers = device_count(idle)
    share = math.ceil(c / sharers)  # of a device's columns, for each of those that hold them
    first = share * jax.lax.axis_index(idle) if idle else 0
    if idle:
        padded = jax.tree.map(lambda x: pad(x, sharers * share), cols)
        cols = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, share), padded)
    rings = rings_of(axis)
    if gathered := n > 1 and travel == "gather":
        cols, rings = jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), cols), []
    width = n * share if gathered else share  # columns held at once
    rows, tall = cut(rows, b, tile)
    cols, wide = cut(cols, width, tile)
    count, pieces = -(-b // tall), -(-width // wide)

    def meet(i: Array | int, row: Any, p: Array | int, source: Array | int, col: Any) -> tuple[Partial, Partial]:
        """Tile i of the rows and piece p of the columns that came from device `source`."""
        r, k = i * tall + jnp.arange(tall), p * wide + jnp.arange(wide)
        source, own_k = (k // share, k % share) if gathered else (source, k)
        own = ((me * b + r) * per_row)[:, None] == (source * c + first + own_k)[None]
        padded = count * tall > b or pieces * wide > width or sharers * share > c
        real = (r < b)[:, None] & ((k < width) & (first + own_k < c))[None] if padded else None
        return tile_fn(row, col, Meeting(own if real is None else own & real, real))

    zeros = nothing(jax.eval_shape(lambda: meet(0, at(rows, 0), 0, me, at(cols, 0))))
    row_zero, col_zero = vary(vary(zeros, axis), idle)
    found = stack(row_zero, count)
    out = stack(col_zero, pieces)

    def visit(found: Partial, p: Array | int, source: Array | int, col: Any) -> tuple[Partial, Partial]:
        """All rows of this device meet one piece."""

        def one(i: Array | int, state: tuple[Partial, Partial]) -> tuple[Partial, Partial]:
            found, gathering = state
            mine, theirs = meet(i, at(rows, i), p, source, col)
            return put(found, i, merge(at(found, i), mine)), merge(gathering, theirs)

        start = (found, col_zero)
        return one(0, start) if count == 1 else jax.lax.fori_loop(0, count, one, start)

    def send(tree: Any, stride: int, size: int) -> Any:
        """To the next device of a ring; vectors in one transfer, for each costs its latency."""
        leaves, shape = jax.tree.flatten(tree)
        packs = [x.ndim == 1 and x.dtype == jnp.float32 for x in leaves]
        vectors, others = ([x for x, p in zip(leaves, packs, strict=True) if p is packed] for packed in (True, False))
        sent = jnp.stack(vectors) if vectors else (), others
        following = [(i, i - i // stride % size * stride + (i // stride + 1) % size * stride) for i in range(n)]
        vectors, others = map(iter, jax.lax.ppermute(sent, axis, following))
        return shape.unflatten([next(vectors if p else others) for p in packs])

    def turn(
        rings: list[tuple[int, int]], found: Partial, p: Array | int, source: Array | int, col: Any
    ) -> tuple[Partial, Partial]:
        """A piece goes round rings within rings and what it gathered comes home. `source`: its device, as outer rings tell it."""
        if not rings:
            return visit(found, p, source, col)
        (stride, size), *inner = rings

        def hop(state: tuple[Any, ...], k: Array) -> tuple[tuple[Any, ...], None]:
            found, col, behind, latest = state  # `behind`: what `col` gathered before it came here, `latest`: from here
            following, behind = send(col, stride, size), send(merge(behind, latest), stride, size)
            found, latest = turn(inner, found, p, source + (me // stride - k) % size * stride, col)
            return (found, following, behind, latest), None

        (found, _, behind, latest), _ = jax.lax.scan(hop, (found, col, col_zero, col_zero), jnp.arange(size))
        return found, send(merge(behind, latest), stride, size)

    def round_trip(p: Array | int, state: tuple[Partial, Partial]) -> tuple[Partial, Partial]:
        found, out = state
        found, gathering = turn(rings, found, p, 0, at(cols, p))
        return found, put(out, p, gathering)

    start = (found, out)
    found, out = round_trip(0, start) if pieces == 1 else jax.lax.fori_loop(0, pieces, round_trip, start)
    found, out = uncut(found, b), uncut(out, width)
    out = home(out, axis, n) if gathered else out
    if idle:  # every row from all its sharers' columns, every column from the one that had it
        found = everywhere(found, idle)
        out = jax.tree.map(lambda x: jax.lax.all_gather(x, idle, tiled=True, to="invarying")[:c], out)
    return found, out


def pad(x: Array, length: int) -> Array:
    """With zeros behind."""
    return jnp.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1)) if length > len(x) else x


def cut(side: Any, length: int, tile: int) -> tuple[Any, int]:
    """[length, ...] as [count, size, ...] of equal tiles of at most `tile`, the last padded with zeros; and their size."""
    count = math.ceil(length / tile)
    size = math.ceil(length / count)

    return jax.tree.map(lambda x: pad(x, count * size).reshape(count, size, *x.shape[1:]), side), size


def uncut(tiles: Any, length: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tiles)


def at(tree: Any, i: Array | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put(tree: Any, i: Array | int, part: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, part)


def nothing(shapes: tuple[Partial, Partial]) -> tuple[Partial, Partial]:
    """What has met nothing yet."""

    def one(s: Partial) -> Partial:
        zeros, least = (lambda x: jnp.zeros(x.shape, x.dtype)), (lambda x: jnp.full(x.shape, -jnp.inf, x.dtype))
        lse = tuple((least(m), jax.tree.map(zeros, sums)) for m, sums in s.lse)
        return Partial(jax.tree.map(zeros, s.total), jax.tree.map(least, s.best), lse)

    return one(shapes[0]), one(shapes[1])


def stack(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), tree)


def home(out: Partial, axis: Axis, n: int) -> Partial:
    """What gathered columns found on every device -> of this device's own columns, from all devices."""

    def parts(x: Array) -> Array:  # [n c, ...] -> [n, c, ...], the same columns as n devices found them
        return jax.lax.all_to_all(x, axis, 0, 0, tiled=True).reshape(n, -1, *x.shape[1:])

    def one(m: Array, sums: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        m, sums = jax.tree.map(parts, (m, sums))
        best = m.max(0)
        factor = jnp.exp(m - finite(best)[None])
        return best, tuple((factor * s).sum(0) for s in sums)

    return Partial(
        jax.tree.map(lambda x: jax.lax.psum_scatter(x, axis, tiled=True), out.total),
        jax.tree.map(lambda x: parts(x).max(0), out.best),
        tuple(one(m, sums) for m, sums in out.lse),
    )


def everywhere(found: Partial, axis: tuple[str, ...]) -> Partial:
    """What the devices of an axis found for the same rows, together and on each of them."""

    def one(m: Array, sums: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        best = jax.lax.pmax(m, axis)
        factor = jnp.exp(m - finite(best))
        return best, tuple(jax.lax.psum(factor * s, axis) for s in sums)

    return Partial(
        jax.tree.map(lambda x: jax.lax.psum(x, axis), found.total),
        jax.tree.map(lambda x: jax.lax.pmax(x, axis), found.best),
        tuple(one(m, sums) for m, sums in found.lse),
    )
