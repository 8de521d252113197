"""How long a step takes: a lower bound from the chips' published peaks, and the TPU compiler's own estimate. Neither is measured.

The bound is the largest of four times: matrix products at the bfloat16 peak (a TPU computes a float32 product in several bfloat16
passes), memory traffic, bytes sent over the links to other chips, and bytes sent over the network to other slices. The counts
come from the program's text. The bound assumes that the four overlap perfectly and that all links are busy at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from clipjax import hlo
from clipjax.chips import chip_of

COLLECTIVES = "collectives"


@dataclass(frozen=True)
class Compiler:
    """The TPU compiler's own estimate of one step. None: the clock of this TPU is not known."""

    cycles: float  # of one device
    clock_hz: float | None
    seconds: float | None  # without collectives, which have no estimate, and overlap with the rest in part
    mfu: float | None
    parts: dict[str, float]  # hlo.PARTS -> seconds, the largest first; then `collectives`, by their bytes over the links
    uncosted: dict[str, int]  # opcode -> how often instructions run that carry no estimate


@dataclass(frozen=True)
class Estimate:
    """The estimated time of one step. None: not known for these devices."""

    step_seconds: float | None = None
    images_per_second: float | None = None  # over all chips
    mfu: float | None = None  # 0 to 1: the share of the peak that model FLOPs take at that rate, as in `clipjax train`'s log
    bound: str | None = None  # the key of the largest of `seconds`
    seconds: dict[str, float] | None = None  # compute, memory, links, network: each alone
    lacks: tuple[str, ...] = ()  # what the bound does not include
    compiler: Compiler | None = None  # None: not for a TPU


def estimate(
    cost: hlo.Cost, devices: Sequence[jax.Device], batch: int, model_flops: float, cycles: hlo.Cycles | None = None
) -> Estimate:
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
        lacks.append("the time of float32 products beyond the bfloat16 peak")
        hosts = len({device.process_index for device in devices})
        lacks += ["how much slower the links between hosts are"] if hosts > 1 else []
    if cost.uncounted:
        lacks.append(f"all iterations but one of {len(cost.uncounted)} loops with an unknown trip count")
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    flops_at_peak = chip.flops / chip.devices * len(devices)
    mfu = model_flops / (step * flops_at_peak)
    sending = seconds.get("links", 0) + seconds.get("network", 0)
    own = cycles and _by_compiler(cycles, chip.clock, sending, model_flops / flops_at_peak)
    return Estimate(step, batch / step, mfu, bound, seconds, tuple(lacks), own)


def _by_compiler(cycles: hlo.Cycles, clock: float | None, sending: float, at_peak: float) -> Compiler:
    """`sending`: seconds of collectives; `at_peak`: seconds of the model's FLOPs at the chips' peak."""
    uncosted = dict(cycles.uncosted.most_common())
    if clock is None:
        return Compiler(cycles.total, None, None, None, {}, uncosted)
    by_size = sorted(cycles.parts.items(), key=lambda part: -part[1])
    parts = {part: count / clock for part, count in by_size} | {COLLECTIVES: sending}
    seconds = cycles.total / clock
    return Compiler(cycles.total, clock, seconds, at_peak / seconds, parts, uncosted)
