"""What a tower says about itself without running: its FLOPs, its memory in the backward pass, the sizes that a mesh must divide.

Each tower's file has a function `facts` beside its class, and each layer and pooler has `flops` and `kept` beside its `__call__`.
clipjax.metrics.flops, clipjax.train.remat and clipjax.sharding only collect them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from clipjax.config import Activation, Attention, Lora


class BlockShape(NamedTuple):
    """The shape of a transformer block's work on one example."""

    tokens: int
    width: int
    heads: int
    mlp_dim: int
    activation: Activation
    lora: Lora | None = None  # adapters of its kernels
    masked: bool = False  # by a mask of each example


@dataclass(frozen=True)
class Layout:
    """How a device stores activations of one example. A TPU pads the last two axes to tiles of 8 x 128 numbers of four bytes."""

    size: int  # bytes of a number of the towers' dtype
    tensor: int = 1  # devices over which heads and MLPs are sharded
    attention: Attention = "exact"  # how it is computed

    def rows(self, tokens: int) -> int:
        """The padded number of tokens, where they are the axis before the last."""
        return round_up(tokens, 32 // self.size)

    def lanes(self, tokens: int) -> int:
        """The padded number of tokens, where they are the last axis."""
        return round_up(tokens, 128)

    def bytes(self, tokens: int, width: int) -> int:
        """Bytes of activations [tokens, width] in the towers' dtype."""
        return self.size * width * self.rows(tokens)


Kept = Callable[[str, Layout], int]  # (policy of config.Model.remat, layout) -> bytes


@dataclass(frozen=True)
class TowerFacts:
    """What a tower costs for one example."""

    flops: float  # of a forward pass, 2 for a multiply-add; dot products only
    depth: int  # layers
    held: int  # layers with a backward pass, or 1 where none has one
    tokens: int  # of a layer's input, with those of the context that it attends to
    layer_weights: int  # numbers in the kernels of one layer, and in their adapters
    kept: Kept  # bytes kept for the backward pass on each device
    tensor_sizes: Mapping[str, int]  # config fields and their values: mesh.tensor must divide them
    after_blocks: frozenset[str]  # names of the parts after the blocks: their gradient does not go through the blocks
    adapters: float = 0.0  # FLOPs of a forward pass that are of adapters of low rank
    per_caption: bool = field(default=False)  # it runs on every caption of an image


def round_up(n: int, unit: int) -> int:
    """The least multiple of `unit` that is not below n."""
    return -(-n // unit) * unit
