"""What the backward pass makes again, where model.remat is `auto`: of the policies that fit, the one that keeps most.

By an estimate from the model's shape and what is published of the chip, not by the compiler, which takes minutes; and not by
what a device says of itself, for all processes must choose the same. tests/train/test_remat.py holds it against compiled
programs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax import config, sharding
from clipjax.chips import chip_of
from clipjax.models.runner import CHUNK_TOKENS, CHUNKED_POLICIES
from clipjax.train.state import TrainState

POLICIES_BY_MEMORY = ("none", "dots", "mlp", "full")  # from what keeps most
SHARE = {"tpu": 0.95, "gpu": 0.75}  # of a chip's memory, for a program: JAX takes three quarters of a GPU's


@dataclass(frozen=True)
class Layers:
    """A tower's, as one example goes through them."""

    depth: int
    tokens: int
    width: int
    heads: int
    mlp_dim: int
    activation: config.Activation
    pooled: bool = False  # by attention to all tokens
    seen: tuple[int, int] = (0, 0)  # tokens and width of what every layer attends to beside

    @property
    def weights(self) -> int:
        """Numbers in the kernels of one layer."""
        crossing = 2 * self.width * (self.width + self.seen[1]) if self.seen[0] else 0
        return 4 * self.width**2 + 2 * self.width * self.mlp_dim + crossing


def resolved(run: config.Run, mesh: Mesh, state: TrainState) -> config.Run:
    """The run with model.remat as it will be. `state`: arrays or shapes, with their shardings."""
    if run.model.remat != "auto":
        return run
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if chip is None or device.platform not in SHARE:  # a CPU is slow, and has more memory
        policy = "none"
    else:
        has = SHARE[device.platform] * chip.capacity / chip.devices
        policy = next((p for p in POLICIES_BY_MEMORY if needed(run, mesh, state, p) <= has), "full")
    return replace(run, model=replace(run.model, remat=policy))


def needed(run: config.Run, mesh: Mesh, state: TrainState, policy: str) -> int:
    """Bytes of one device: state, gradients, its rows of the batch, and what is kept of those that it holds at once."""
    rows = run.train.batch_size // sharding.batch_devices(mesh)
    at_once = rows // run.train.micro_batches
    size, tensor = jnp.dtype(run.model.dtype).itemsize, mesh.shape["tensor"]
    gradients = sharding.own_bytes(state.params) * min(2, run.train.micro_batches)  # a part's are added to the others'
    row = 3 * run.model.image.image_size**2 + 8 * 4 * run.model.embed_dim  # pixels; embeddings and their gradients, some copies
    towers = [*layers(run)]
    kept = sum(bytes_kept(tower, policy, size, tensor) for tower in towers)
    # What exists of one layer, whichever is larger: its weights, gathered, and their gradients; the activations of a part.
    weights = max(tower.weights for tower in towers) // tensor * (size + 4)
    inner = max(bytes_kept(tower, "none", size, tensor) / tower.depth / (tower.tokens + tower.seen[0]) for tower in towers)
    return math.ceil(sharding.own_bytes(state) + gradients + rows * row + at_once * kept + weights + CHUNK_TOKENS * inner)


def layers(run: config.Run) -> Iterator[Layers]:
    """All towers that one example goes through; of several captions each."""
    image, text, decoder = run.model.image, run.model.text, run.model.decoder
    tokens = max(1, round(image.patches * (1 - image.patch_dropout))) + image.class_token
    pooled = image.pool == "map" or image.attentional
    yield Layers(image.depth, tokens, image.width, image.heads, image.mlp_dim, image.activation, pooled)
    for _ in range(run.data.captions_per_image):
        yield Layers(text.depth, text.positions, text.width, text.heads, text.mlp_dim, text.activation)
        if decoder:
            shape = text.width, decoder.heads, decoder.mlps * decoder.mlp_dim, text.activation
            yield Layers(decoder.depth, text.length - 1, *shape, seen=image.context)


def bytes_kept(of: Layers, policy: str, size: int, tensor: int = 1) -> int:
    """For the backward pass, of one example, in numbers of `size` bytes, by each of `tensor` devices that divide heads and MLP.

    Tokens are counted as a TPU lays them out, in tiles of 8 x 128 numbers of four bytes.
    """
    rows, lanes = _up(of.tokens, 32 // size), _up(of.tokens, 128)  # before the last axis, and as the last
    seen_rows, seen_lanes = _up(of.seen[0], 32 // size), _up(of.seen[0], 128)
    d, f, heads = of.width, of.mlp_dim / tensor, of.heads / tensor
    inputs, hidden, seen = size * d * rows, size * f * rows, size * d * seen_rows
    crossing = int(of.seen[0] > 0)  # a second attention, of queries to keys and values of what is seen
    if policy == "full":
        kept = inputs
    elif policy == "mlp":
        kept = inputs + hidden
    elif policy == "dots":  # queries, keys, values and what attention adds
        kept = (2 + crossing) * inputs + hidden + ((3 + crossing) * inputs + 2 * seen) / tensor
    else:
        # In float32 both norms' steps and the scores; in `size` inputs, outputs, weights, the function between the MLP's layers.
        steps = 6 if of.activation == "gelu_tanh" else 4
        attention = heads * rows * (lanes + seen_lanes) * (4 + size) + ((4 + 2 * crossing) * inputs + 2 * seen) / tensor
        norms = 3 * 4 * (d * rows * (2 + crossing) + of.seen[1] * seen_rows)
        kept = norms + (2 + crossing) * inputs + size * of.seen[1] * seen_rows + attention + steps * hidden
    # An attention-pooling head's norm, keys and values, which are kept where a batch isn't seen in parts.
    pooling = 24 * d * rows + 6 * inputs if of.pooled and policy not in CHUNKED_POLICIES else 0
    once = size * of.seen[1] * seen_rows * 2  # what all layers see, and its gradient
    return math.ceil(of.depth * kept + pooling + once)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
