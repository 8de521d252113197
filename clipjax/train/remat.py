"""What a run's backward pass recomputes where the configuration leaves that open: `model.remat` and `model.part`.

Of the policies and part sizes that fit in memory by an estimate, a TPU gets the fastest (train.remat_time), and any other device
the policy that keeps most. The estimate is from the towers' own facts (models.clip.facts) and the chip's published memory. The
compiler is not asked: it takes minutes. What a device reports counts where the chip is not known, and then process 0's for all:
all processes must choose the same. tests/train/test_remat.py compares the estimate with compiled programs.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax import aot, config, distributed, sharding
from clipjax.chips import chip_of
from clipjax.models import clip
from clipjax.models.facts import Layout
from clipjax.models.runner import CHUNKED_POLICIES, DEFAULT_PART, chunk_count
from clipjax.train.remat_time import MADE, PARTS, Work, seconds
from clipjax.train.report import say
from clipjax.train.state import TrainState

POLICIES_BY_MEMORY = ("none", "dots", "mlp", "full")  # the one that keeps most comes first
USABLE = {"tpu": 0.95, "gpu": 0.75}  # share of a chip's memory that a program gets: JAX takes three quarters of a GPU's


@dataclass(frozen=True)
class Choice:
    """A policy and a part size, as a configuration has them, and why."""

    policy: str
    part: int | None = None
    reason: str | None = None  # None: as the configuration says

    def __str__(self) -> str:
        parts = f" in parts of {self.part:,} tokens" if self.part and self.policy in CHUNKED_POLICIES else ""
        return f"{self.policy}{parts}" + (f", {self.reason}" if self.reason else "")


def choice(run: config.Run, mesh: Mesh, state: TrainState) -> Choice:
    """What the run gets. `state`: arrays or shapes, with their shardings."""
    model, device = run.model, mesh.devices.flat[0]
    chip, is_open = chip_of(device.device_kind), model.remat.startswith("auto")
    timed = chip if device.platform == "tpu" else None
    asked = Choice(model.remat, model.part)
    if not is_open and not (timed and model.remat in CHUNKED_POLICIES and model.part is None):
        return asked
    available = _available(mesh)
    if available is None:
        reason = "as on every CPU" if device.platform == "cpu" else "as nothing is known of the devices' memory"
        return Choice("none", model.part, reason) if is_open else asked
    parts = PARTS if timed and model.part is None else (model.part,)
    policies = POLICIES_BY_MEMORY if is_open else (model.remat,)
    options = [Choice(p, part) for p in policies for part in (parts if p in CHUNKED_POLICIES else (model.part,))]
    sizes = {option: needed(run, mesh, state, option.policy, option.part) for option in options}
    fits = [option for option in options if sizes[option] <= available]
    if not fits:
        return replace(min(options, key=lambda c: sizes[c]), reason="the least memory: by the estimate, nothing fits")
    reason = "the fastest of what fits by the TPU compiler's estimates"
    if model.remat == "auto-memory" or not timed:
        fits, reason = [option for option in fits if option.policy == fits[0].policy], "which keeps most of what fits"
    if timed:
        layout = layout_of(run, mesh)
        fits.sort(key=lambda c: seconds(work(run, mesh, c.policy, c.part), c.policy, layout, timed))
    return replace(fits[0], reason=reason)


def resolved(run: config.Run, mesh: Mesh, state: TrainState, explain: bool = False) -> config.Run:
    """The run with what `choice` says. `state`: arrays or shapes, with their shardings. `explain`: prints the choice, and why."""
    found = choice(run, mesh, state)
    if explain and found.reason:
        say(f"model.remat = {run.model.remat}: {found}")
    return replace(run, model=replace(run.model, remat=found.policy, part=found.part))


def _available(mesh: Mesh) -> float | None:
    """Bytes of a device that a program gets; None: not known, or a CPU, which is slow and has more memory."""
    device = mesh.devices.flat[0]
    if device.platform not in USABLE:
        return None
    if chip := chip_of(device.device_kind):
        return USABLE[device.platform] * chip.capacity / chip.devices
    own = next((d for d in mesh.devices.flat if d.process_index == jax.process_index()), device)
    reported = aot.capacity([own]) if jax.process_index() == 0 else None
    return float(distributed.value_of_first("memory of a device", str(reported or 0))) or None


def work(run: config.Run, mesh: Mesh, policy: str, part: int | None = None) -> list[Work]:
    """What a device's share of a micro-batch gives each tower that runs."""
    rows = run.train.batch_size // sharding.batch_devices(mesh) // run.train.micro_batches
    found = []
    for tower, facts in clip.facts(run.model).items():
        if tower != run.embedded:
            examples = rows * (run.data.texts_per_image if facts.per_caption else run.data.views_per_image)
            most = max(1, (part or DEFAULT_PART) // facts.tokens)
            n = chunk_count(examples, most) if policy in CHUNKED_POLICIES else 1
            found.append(Work(facts, n, -(-examples // n)))
    return found


def layout_of(run: config.Run, mesh: Mesh) -> Layout:
    return Layout(jnp.dtype(run.model.dtype).itemsize, mesh.shape["tensor"], run.model.attention)


def needed(run: config.Run, mesh: Mesh, state: TrainState, policy: str, part: int | None = None) -> int:
    """Estimated bytes on one device: state, gradients, its rows of the batch, and what a micro-batch's backward pass keeps."""
    rows, layout = run.train.batch_size // sharding.batch_devices(mesh), layout_of(run, mesh)
    copies: float = min(2, run.train.micro_batches)  # of gradients: with a sum, where there are micro-batches
    if mesh.devices.flat[0].platform == "gpu" and sharding.batch_devices(mesh) > 1:
        copies += 3  # what is sent, and arrives: clip_b16 compiled for 8 H100s has 1.5 (`none`) to 1.7 GiB more than for one
    params = sharding.own_bytes(state.params, gathered="data")  # as the towers get them
    if params > sharding.own_bytes(state.params):  # gathered in the towers' dtype; B/16 at 128 pairs: 2.5 GiB, compiled 2.0
        copies += layout.size / 4
    views = run.data.views_per_image
    row = 3 * views * run.model.image.image_size**2 + 8 * 4 * run.model.embed_dim  # pixels; embeddings, gradients, some copies
    kept, weights, layer = 0, 0, 0.0
    for facts, chunks, examples in work(run, mesh, policy, part):
        kept += chunks * examples * facts.kept(policy, layout)  # with the rows that fill the last chunk
        # One layer at a time, here the largest: its gathered weights with their gradients, and the activations of a chunk; of a
        # batch in one chunk those of as many tokens, as compilers do not hold them all.
        weights = max(weights, facts.layer_weights // layout.tensor * (layout.size + 4))
        at_once = examples if policy in CHUNKED_POLICIES else DEFAULT_PART / facts.tokens
        layer = max(layer, at_once * MADE * facts.kept("none", layout) / facts.held)
    return math.ceil(sharding.own_bytes(state) + copies * params + rows * row + kept + weights + layer)
