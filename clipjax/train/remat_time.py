"""How long a tower's layers take on a TPU with each remat policy and part size, by a small model of what the TPU compiler says.

`benchmarks/remat_fit.py` compiles steps, fits COSTS to the compiler's own estimates of cycles, and prints the error of the fit.
"""

from typing import NamedTuple

from clipjax.chips import Chip
from clipjax.models.facts import Layout, TowerFacts

PARTS = (2048, 4096, 8192)  # part sizes to choose from, in tokens


class Work(NamedTuple):
    """What a device gives a tower's layers at a time."""

    facts: TowerFacts
    chunks: int  # run one after the other
    examples: int  # of a chunk


class Terms(NamedTuple):
    """What a tower's layers do on one device, each in seconds at the chip's peak or at the rate of its memory."""

    products: float  # forward, backward, recomputed
    kept: float  # layers' inputs and hidden units, written for the backward pass and read in it
    dots: float  # what `dots` keeps besides: much of it is laid out by heads, and is copied chunk by chunk
    none: float  # what `none` keeps besides
    spilled: float  # activations of a chunk that do not stay in the fast memory
    chunks: float  # weights read, and their gradients summed, for every chunk


COSTS = Terms(1.37, 1.00, 7.40, 1.30, 2.67, 5.04)  # seconds of the compiler for a second of each term
RECOMPUTED = {"none": 0.0, "mlp": 2 / 3, "full": 1.0}  # share of the forward pass's products
MADE = 1.65  # bytes that a layer makes of a chunk for a byte that `none` keeps: float32 steps of norms and of GELU are not kept
IN_VMEM = 2.3  # bytes that a layer makes of a chunk for a byte of VMEM, up to which they stay there


def terms(work: Work, policy: str, layout: Layout, chip: Chip) -> Terms:
    facts, rows = work.facts, work.chunks * work.examples
    weights = facts.layer_weights // layout.tensor * layout.size
    if policy == "dots":  # all but the layers' own kernels
        again = max(0.0, 1 - 2 * facts.layer_weights * facts.depth * facts.tokens / facts.flops)
    else:
        again = RECOMPUTED[policy]
    trained = facts.held / facts.depth
    flops = rows * facts.flops / layout.tensor * (1 + trained * (2 + again))
    kept = facts.kept("full" if policy == "full" else "mlp", layout)
    layer = MADE * facts.kept("none", layout) / facts.held
    spill = max(0.0, 1 - IN_VMEM * (chip.vmem or 0) / chip.devices / (work.examples * layer))
    peak, rate = chip.flops / chip.devices, chip.memory / chip.devices
    more = 2 * rows * (facts.kept(policy, layout) - kept) / rate
    return Terms(
        flops / peak,
        2 * rows * kept / rate,
        more if policy == "dots" else 0.0,
        more if policy == "none" else 0.0,
        spill * rows * layer * facts.held / rate,
        work.chunks * facts.held * weights / rate,
    )


def seconds(works: list[Work], policy: str, layout: Layout, chip: Chip) -> float:
    """Of all towers' layers in a step's micro-batch."""
    return sum(c * t for work in works for c, t in zip(COSTS, terms(work, policy, layout, chip), strict=True))
