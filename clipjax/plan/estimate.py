"""How long a step would take if the chips ran at their published peaks: a bound, not a measurement.

The largest of four times: products at the bfloat16 peak (a float32 product of a TPU in its passes), memory traffic and bytes on
the links as the program's text tells them, bytes between slices at the host's network. Everything is taken to overlap perfectly,
and all links to be busy at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from clipjax import hlo
from clipjax.chips import chip_of


@dataclass(frozen=True)
class Estimate:
    """Of one step. None: not to be told of these devices."""

    step_seconds: float | None = None
    images_per_second: float | None = None  # over all chips
    mfu: float | None = None  # model FLOPs, as `clipjax train` logs it, at that rate
    bound: str | None = None  # which of the following is the largest
    seconds: dict[str, float] | None = None  # compute, memory, links, network: each alone
    lacks: tuple[str, ...] = ()  # what the estimate leaves out


def estimate(cost: hlo.Cost, devices: Sequence[jax.Device], batch: int, model_flops: float) -> Estimate:
    """Of a program of this cost a device. `model_flops`: of a whole step on all devices, without the loss."""
    kind, tpu = devices[0].device_kind, devices[0].platform == "tpu"
    chip = chip_of(kind)
    if chip is None:
        return Estimate(lacks=(f"the peaks of {kind}",))
    flops = cost.tpu_flops if tpu else cost.flops
    demands = {
        "compute": (flops, chip.flops),
        "memory": (cost.memory_bytes, chip.memory),
        "links": (cost.sent_bytes, chip.links),
        "network": (cost.sent_across, chip.network),
    }
    seconds = {name: n * chip.devices / rate for name, (n, rate) in demands.items() if rate}
    lacks = [f"the {name}, whose speed is not known" for name, (n, rate) in demands.items() if n and not rate]
    if not tpu:
        lacks += ["what float32 products take beyond the bfloat16 peak", "transfers between hosts"]
    if cost.uncounted:
        lacks.append(f"all turns but one of {len(cost.uncounted)} loops that could not be counted")
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    used = model_flops / (step * chip.flops / chip.devices * len(devices))
    return Estimate(step, batch / step, used, bound, seconds, tuple(lacks))
