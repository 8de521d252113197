"""Which rows and columns meet in a tile of the pairwise matrix, and which of its entries are own pairs."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool


class TilePairs(NamedTuple):
    """What the entries of a tile are."""

    own: Bool[Array, "r c"]  # pairs that belong together
    real: Bool[Array, "r c"] | None  # neither row nor column is padding; None: there is no padding


@dataclass(frozen=True)
class Geometry:
    """This device's part of the global batch, and its tiles.

    Device s has the rows s b to s b + b - 1, and the columns s c to s c + c - 1. If several devices hold the same rows and
    columns, each works on a `share` of the columns. At one time the columns on this device are one share: its own, or one that
    travels around the ring. If columns are gathered, they are a share of every device.
    """

    device: Array | int  # this device's place along the axis
    devices: int  # along the axis
    rows: int  # b, of a device
    columns: int  # c, of a device: K b. The first of each K makes the own pair of a row
    sharers: int  # devices that hold the same rows and columns
    first: Array | int  # the number of this sharer's first column
    gathered: bool  # whether the columns of all devices are on this device
    tile: int  # most rows and columns of a tile

    @property
    def share(self) -> int:
        return math.ceil(self.columns / self.sharers)

    @property
    def width(self) -> int:
        """How many columns are on this device at one time."""
        return self.devices * self.share if self.gathered else self.share

    @property
    def row_tiles(self) -> tuple[int, int]:
        """How many tiles the rows make, and how many rows one has."""
        return equal_parts(self.rows, self.tile)

    @property
    def pieces(self) -> tuple[int, int]:
        """How many pieces the columns make, and how many columns one has."""
        return equal_parts(self.width, self.tile)

    @property
    def padded(self) -> bool:
        """Whether any tile has padding."""
        (count, tall), (pieces, wide) = self.row_tiles, self.pieces
        return count * tall > self.rows or pieces * wide > self.width or self.sharers * self.share > self.columns

    def pairs(self, i: Array | int, p: Array | int, source: Array | int) -> TilePairs:
        """The pairs of row tile i and column piece p. `source`: the device that the piece belongs to; unused if gathered."""
        tall, wide = self.row_tiles[1], self.pieces[1]
        r, k = i * tall + jnp.arange(tall), p * wide + jnp.arange(wide)
        source, own_k = (k // self.share, k % self.share) if self.gathered else (source, k)
        partner = (self.device * self.rows + r) * (self.columns // self.rows)  # the row's own column
        own = partner[:, None] == (source * self.columns + self.first + own_k)[None]
        if not self.padded:
            return TilePairs(own, None)
        real = (r < self.rows)[:, None] & ((k < self.width) & (self.first + own_k < self.columns))[None]
        return TilePairs(own & real, real)


def equal_parts(length: int, most: int) -> tuple[int, int]:
    """The number of equal parts of at most `most`, and the size of one. The last part may be smaller."""
    count = math.ceil(length / most)
    return count, math.ceil(length / count)
