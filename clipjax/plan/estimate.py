"""A lower bound for the time of a step, from the chips' published peaks. It is an estimate, not a measurement.

It is the largest of four times: matrix products at the bfloat16 peak (a TPU computes a float32 product in several bfloat16
passes), memory traffic, bytes sent over the links to other chips, and bytes sent over the network to other slices. The counts
come from the program's text. The estimate assumes that the four overlap perfectly and that all links are busy at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from clipjax import hlo
from clipjax.chips import chip_of


@dataclass(frozen=True)
class Estimate:
    """The estimated time of one step. None: not known for these devices."""

    step_seconds: float | None = None
    images_per_second: float | None = None  # over all chips
    mfu: float | None = None  # 0 to 1: the share of the peak that model FLOPs take at that rate, as in `clipjax train`'s log
    bound: str | None = None  # the key of the largest of `seconds`
    seconds: dict[str, float] | None = None  # compute, memory, links, network: each alone
    lacks: tuple[str, ...] = ()  # what the estimate does not include


def estimate(cost: hlo.Cost, devices: Sequence[jax.Device], batch: int, model_flops: float) -> Estimate:
    """The estimate for a program of this cost on each device. `model_flops`: the towers' FLOPs of one step on all devices."""
    kind, tpu = devices[0].device_kind, devices[0].platform == "tpu"
    chip = chip_of(kind)
    if chip is None:
        return Estimate(lacks=(f"the peaks of {kind}",))
    flops = cost.tpu_flops if tpu else cost.flops
    demands = {
        "compute": (flops, chip.flops),
        "memory": (cost.memory_bytes, chip.memory),
        "links": (cost.sent_bytes, chip.links),
        "network": (cost.sent_between_slices, chip.network),
    }
    seconds = {name: n * chip.devices / rate for name, (n, rate) in demands.items() if rate}
    lacks = [f"the {name}, whose speed is not known" for name, (n, rate) in demands.items() if n and not rate]
    if not tpu:
        lacks += ["the time of float32 products beyond the bfloat16 peak", "transfers between hosts"]
    if cost.uncounted:
        lacks.append(f"all iterations but one of {len(cost.uncounted)} loops with an unknown trip count")
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    mfu = model_flops / (step * chip.flops / chip.devices * len(devices))
    return Estimate(step, batch / step, mfu, bound, seconds, tuple(lacks))
