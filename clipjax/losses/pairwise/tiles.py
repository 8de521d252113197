"""All rows of the global batch against all columns. A tile is computed, reduced and dropped; the matrix is never in memory.

Rows stay on their device. Columns travel in a ring (`ring`), in memory linear in the local batch, or are gathered (`gather`):
fewer, larger transfers, with all columns on every device. If devices hold the same rows and columns, each takes a share of the
columns (`sharers`). `geometry` says which entries of a tile are own pairs.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from clipjax.losses.pairwise.axes import Axis, device_count, device_index, vary
from clipjax.losses.pairwise.gather import gather_columns, scatter_columns
from clipjax.losses.pairwise.geometry import Geometry, TilePairs
from clipjax.losses.pairwise.partials import Partial, empty, merge
from clipjax.losses.pairwise.ring import go_round, rings_of
from clipjax.losses.pairwise.sharers import join_shares, merge_devices, own_share, pad, shared_axes

Travel = Literal["ring", "gather"]
State = TypeVar("State")
GATHER = 32 * 2**20  # most bytes of columns for `gather`: up to this size, few transfers matter more than memory


def choose(travel: Travel | None, columns: int, width: int, axis: Axis) -> Travel:
    """The requested way, or the one for this size: `columns` on each device, of `width` 4-byte numbers."""
    return travel or ("gather" if device_count(axis) * columns * width * 4 <= GATHER else "ring")


def sweep(
    tile_fn: Callable[[Any, Any, TilePairs], tuple[Partial, Partial]],
    rows: Any,
    cols: Any,
    *,
    axis: Axis,
    tile: int,
    travel: Travel,
) -> tuple[Partial, Partial]:
    """All rows [b, ...] (a tree) of this device against all columns [c, ...] of all devices.

    Returns what each row and each column of this device has accumulated. `tile_fn(r, c, pairs)` takes at most `tile` rows and
    columns, and returns what the rows and the columns get from this tile. c = K b; a row's own pair is its first of K columns.
    """
    geometry, shared = _geometry(rows, cols, axis, tile, travel)
    cols = own_share(cols, geometry.share, geometry.sharers, geometry.first) if shared else cols
    rings = [] if geometry.gathered else rings_of(axis, geometry.device)
    cols = gather_columns(cols, axis) if geometry.gathered else cols
    (count, _), (pieces, _) = geometry.row_tiles, geometry.pieces
    rows, cols = to_tiles(rows, geometry.row_tiles), to_tiles(cols, geometry.pieces)

    def make_tile(i: Array | int, p: Array | int, source: Array | int, piece: Any) -> tuple[Partial, Partial]:
        row = at(rows, i)
        return tile_fn(row, piece, geometry.pairs(i, p, source))

    shapes = jax.eval_shape(lambda: make_tile(0, 0, geometry.device, at(cols, 0)))
    row_start, column_start = vary(vary((empty(shapes[0]), empty(shapes[1])), axis), shared)

    def visit(p: Array | int, found: Partial, source: Array | int, piece: Any) -> tuple[Partial, Partial]:
        """Meets all rows of this device with one piece. Returns the rows' Partial so far, and the piece's from this device."""

        def add_tile(i: Array | int, state: tuple[Partial, Partial]) -> tuple[Partial, Partial]:
            of_rows, of_piece = make_tile(i, p, source, piece)
            return put(state[0], i, merge(at(state[0], i), of_rows)), merge(state[1], of_piece)

        return repeat(count, add_tile, (found, column_start))

    def send_piece(p: Array | int, state: tuple[Partial, Partial]) -> tuple[Partial, Partial]:
        of_rows, of_piece = go_round(rings, functools.partial(visit, p), state[0], at(cols, p), column_start)
        return of_rows, put(state[1], p, of_piece)

    of_rows, of_columns = repeat(pieces, send_piece, (stack(row_start, count), stack(column_start, pieces)))
    of_rows, of_columns = from_tiles(of_rows, geometry.rows), from_tiles(of_columns, geometry.width)
    of_columns = scatter_columns(of_columns, axis) if geometry.gathered else of_columns
    if shared:
        of_rows, of_columns = merge_devices(of_rows, shared), join_shares(of_columns, shared, geometry.columns)
    return of_rows, of_columns


def _geometry(rows: Any, cols: Any, axis: Axis, tile: int, travel: Travel) -> tuple[Geometry, tuple[str, ...]]:
    """The geometry of a sweep, and the mesh axes whose devices each take a share of the columns."""
    device, devices = device_index(axis), device_count(axis)
    b, c = (len(jax.tree.leaves(side)[0]) for side in (rows, cols))
    shared = shared_axes(axis, rows, cols)
    sharers = device_count(shared)
    first = -(-c // sharers) * jax.lax.axis_index(shared) if shared else 0
    return Geometry(device, devices, b, c, sharers, first, devices > 1 and travel == "gather", tile), shared


def repeat(count: int, body: Callable[[Array | int, State], State], start: State) -> State:
    """`body(i, state)` for each i, without a loop if there is only one."""
    return body(0, start) if count == 1 else jax.lax.fori_loop(0, count, body, start)


def to_tiles(side: Any, parts: tuple[int, int]) -> Any:
    """[length, ...] as [count, size, ...], the last part padded with zeros."""
    count, size = parts
    return jax.tree.map(lambda x: pad(x, count * size).reshape(count, size, *x.shape[1:]), side)


def from_tiles(tiles: Any, length: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tiles)


def at(tree: Any, i: Array | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def put(tree: Any, i: Array | int, value: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, value)


def stack(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), tree)
