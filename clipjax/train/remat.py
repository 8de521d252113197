"""Which remat policy a run gets where model.remat is `auto`: of those that fit in memory, the one that keeps most.

The choice uses an estimate, from the towers' own facts (models.clip.facts) and the chip's published memory. It does not use the
compiler, which takes minutes, nor what a device reports, because all processes must choose the same. tests/train/test_remat.py
compares the estimate with compiled programs.
"""

import math
from dataclasses import replace

import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax import config, sharding
from clipjax.chips import chip_of
from clipjax.models import clip
from clipjax.models.facts import Layout
from clipjax.models.runner import DEFAULT_PART
from clipjax.train.report import say
from clipjax.train.state import TrainState

POLICIES_BY_MEMORY = ("none", "dots", "mlp", "full")  # the one that keeps most comes first
USABLE = {"tpu": 0.95, "gpu": 0.75}  # share of a chip's memory that a program gets: JAX takes three quarters of a GPU's


def resolved(run: config.Run, mesh: Mesh, state: TrainState) -> config.Run:
    """The run, with a policy in place of `auto`. `state`: arrays or shapes, with their shardings."""
    if run.model.remat != "auto":
        return run
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if chip is None or device.platform not in USABLE:  # a CPU is slow, and has more memory
        policy = "none"
    else:
        available = USABLE[device.platform] * chip.capacity / chip.devices
        policy = next((p for p in POLICIES_BY_MEMORY if needed(run, mesh, state, p) <= available), "full")
    return replace(run, model=replace(run.model, remat=policy))


def chosen(run: config.Run, mesh: Mesh, state: TrainState) -> config.Run:
    """`resolved`, which says what it chose."""
    found = resolved(run, mesh, state)
    if found != run:
        say(f"model.remat = auto: {found.model.remat}")
    return found


def needed(run: config.Run, mesh: Mesh, state: TrainState, policy: str) -> int:
    """Estimated bytes on one device: state, gradients, its rows of the batch, and what a micro-batch's backward pass keeps."""
    rows = run.train.batch_size // sharding.batch_devices(mesh)
    micro_batch = rows // run.train.micro_batches
    layout = Layout(jnp.dtype(run.model.dtype).itemsize, mesh.shape["tensor"])
    gradients = sharding.own_bytes(state.params) * min(2, run.train.micro_batches)  # with a sum, where there are micro-batches
    row = 3 * run.model.image.image_size**2 + 8 * 4 * run.model.embed_dim  # pixels; embeddings and their gradients, some copies
    towers = [facts for tower, facts in clip.facts(run.model).items() if tower != run.embedded]
    kept = sum((run.data.captions_per_image if t.per_caption else 1) * t.kept(policy, layout) for t in towers)
    # One layer at a time, here the largest: its gathered weights with their gradients, and the activations of a chunk.
    weights = max(t.layer_weights for t in towers) // layout.tensor * (layout.size + 4)
    token = max(t.kept("none", layout) / t.depth / t.tokens for t in towers)
    part = (run.model.part or DEFAULT_PART) * token
    return math.ceil(sharding.own_bytes(state) + gradients + rows * row + micro_batch * kept + weights + part)
