"""Columns that travel in a ring: a piece of them goes once around all devices and returns with what it has accumulated.

A device holds a few pieces beside its own rows and columns. Each hop sends a piece on before the device computes with it, and
what the piece has accumulated follows one hop later. So no transfer waits for a product. With several mesh axes there are two
rings: an outer one along the first axis, for slices that a slower network joins, and an inner one. A piece goes once around the
inner ring for every hop of the outer one, so the slow hop has all that time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from clipjax.losses.pairwise.axes import Axis, device_count
from clipjax.losses.pairwise.partials import Partial, merge


@dataclass(frozen=True)
class Ring:
    """`size` of the devices along `axis`, each `stride` places after the one before."""

    axis: Axis
    device: Array | int  # this device's place along the axis
    stride: int
    size: int

    def send(self, tree: Any) -> Any:
        """To the next device of the ring. Vectors go in one transfer, because each transfer costs its latency."""
        leaves, shape = jax.tree.flatten(tree)
        packs = [x.ndim == 1 and x.dtype == jnp.float32 for x in leaves]
        vectors, others = ([x for x, p in zip(leaves, packs, strict=True) if p is packed] for packed in (True, False))
        to_send = jnp.stack(vectors) if vectors else (), others
        vectors, others = map(iter, jax.lax.ppermute(to_send, self.axis, self._next()))
        return shape.unflatten([next(vectors if p else others) for p in packs])

    def _next(self) -> list[tuple[int, int]]:
        """(device, the next one in its ring) of all devices along the axis."""
        places = [(i, i // self.stride % self.size) for i in range(device_count(self.axis))]
        return [(i, i + ((place + 1) % self.size - place) * self.stride) for i, place in places]

    def sender(self, hop: Array) -> Array:
        """The place along the axis where the piece of this hop started, counting only this ring's moves."""
        return (self.device // self.stride - hop) % self.size * self.stride


def rings_of(axis: Axis, device: Array | int) -> list[Ring]:
    """The rings that columns go around, the outer one first. An empty list for a single device."""
    n = device_count(axis)
    outer = jax.lax.axis_size(axis[0]) if isinstance(axis, tuple) else 1
    sizes = (n // outer, outer), (1, n // outer)
    return [Ring(axis, device, stride, size) for stride, size in sizes if size > 1]


def go_round(
    rings: Sequence[Ring],
    visit: Callable[[Partial, Array | int, Any], tuple[Partial, Partial]],
    found: Partial,
    piece: Any,
    nothing: Partial,
    source: Array | int = 0,
) -> tuple[Partial, Partial]:
    """Takes a piece of columns around all rings. Returns what this device's rows and its own piece have accumulated.

    `visit(found, source, piece)` meets all rows of this device with a piece of device `source`. It returns what the rows have
    accumulated so far, and what the piece got here. `nothing`: what a piece has at the start. `source`: the sum of the outer
    rings' `sender`.
    """
    if not rings:
        return visit(found, source, piece)
    ring, *inner = rings

    def hop(state: tuple[Any, ...], k: Array) -> tuple[tuple[Any, ...], None]:
        # `pending` and `latest` belong to the piece before: what it had when it came to this device, and what it got here.
        found, piece, pending, latest = state
        following, pending = ring.send(piece), ring.send(merge(pending, latest))
        found, latest = go_round(inner, visit, found, piece, nothing, source + ring.sender(k))
        return (found, following, pending, latest), None

    (found, _, pending, latest), _ = jax.lax.scan(hop, (found, piece, nothing, nothing), jnp.arange(ring.size))
    return found, ring.send(merge(pending, latest))
