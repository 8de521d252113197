"""The figures of a plan: what a chip holds, what is sharded, what a step computes and sends, and how long it might take."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax import aot, config, sharding
from clipjax.chips import chip_count
from clipjax.plan.estimate import Estimate, estimate
from clipjax.plan.flops import step_flops
from clipjax.plan.program import abstract_batch, compile_lowered, lower_step, state_of, teacher_width
from clipjax.plan.search import Try, largest, search
from clipjax.train import remat
from clipjax.train.optimizer import trained_names
from clipjax.train.state import TrainState

LARGE = 10**6  # bytes; a smaller tensor that is whole on every device is not worth a line

# What a state's fields are called in the report.
KINDS = {
    "params": "parameters",
    "opt_state": "optimizer state",
    "ema": "moving average",
    "memory": "example memory",
    "step": "optimizer state",
}


@dataclass(frozen=True)
class Plan:
    """Of one run on some devices. Bytes are one chip's, which on v2, v3 and tpu7x is two JAX devices; None: not known."""

    topology: str
    slices: int
    chips: int
    devices: int
    device_kind: str
    mesh: dict[str, int]
    batch_size: int
    micro_batches: int
    remat: str  # what the backward pass makes again, decided
    fits: bool
    peak_bytes_per_chip: int | None  # where it does not fit: what it needs
    argument_bytes: int  # state and batch
    temp_bytes: int | None
    capacity_bytes: int | None
    memory: dict[str, int]  # by kind; adds up to the peak
    state_bytes: int  # of the whole state, once
    sharded_fraction: float  # of those, what no device holds whole
    unsharded: list[dict[str, Any]]  # the large tensors that every device holds whole: name and bytes
    flops_per_step: float  # by hand, over all chips
    flops: dict[str, float]  # the same, by part
    program_flops: int | None = None  # in the compiled program, over all chips, with all that is made again
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)  # of one device: kind -> count and bytes
    estimate: Estimate = Estimate()
    compile_seconds: float | None = None
    largest_batch: int | None = None
    tries: list[Try] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Setting:
    """Where a run is planned for."""

    topology: str
    devices: Sequence[jax.Device]
    mesh: Mesh
    capacity: int | None  # bytes a device


def setting(run: config.Run, topology: str | None, slices: int = 1) -> Setting:
    """`topology`: of `aot.TOPOLOGIES`, or `cpu:N` simulated here, or None for the devices that are here. Raises ConfigError."""
    devices = _devices(topology, slices)
    return Setting(topology or devices[0].platform, devices, sharding.make_mesh(run.mesh, devices), aot.capacity(devices))


def _devices(topology: str | None, slices: int) -> Sequence[jax.Device]:
    kind, _, count = (topology or "").partition(":")
    if topology is not None and kind != "cpu":
        return aot.tpu_devices(topology, slices)
    config.require(slices == 1, "--slices", slices, "several slices are of TPUs: name a --topology of theirs")
    if topology is None:
        return jax.devices()
    config.require(count.isdecimal() and int(count) > 0, "--topology", topology, "name their number, as cpu:8")
    with contextlib.suppress(RuntimeError):  # JAX is at work already, with the devices that it has
        jax.config.update("jax_num_cpu_devices", int(count))
    found = jax.devices("cpu")
    config.require(len(found) >= int(count), "--topology", topology, f"JAX has started with {len(found)} here")
    return found[: int(count)]


def make_plan(run: config.Run, where: Setting) -> tuple[Plan, int]:
    """The plan, compiled once, and what a device holds whatever the batch. Raises ConfigError and aot.CompilerError."""
    state = state_of(run, where.mesh)
    lowered = lower_step(run, where.mesh, state)
    per_chip = len(where.devices) // (chips := chip_count(where.devices))
    memory = _held(state, abstract_batch(run, where.mesh))
    trained = trained_names(run.optim.rules, state.params)
    flops = step_flops(run, trained, teacher_width(run) if run.data.teacher else None)
    placed = jax.tree.map(lambda x: x.sharding, state)
    whole = sharding.unsharded(state, placed, *sharding.AXES)
    plan = Plan(
        topology=where.topology,
        slices=sharding.slice_count(where.devices),
        chips=chips,
        devices=len(where.devices),
        device_kind=where.devices[0].device_kind,
        mesh=dict(where.mesh.shape),
        batch_size=run.train.batch_size,
        micro_batches=run.train.micro_batches,
        remat=remat.resolved(run, where.mesh, state).model.remat,
        fits=False,
        peak_bytes_per_chip=None,
        argument_bytes=per_chip * sum(memory.values()),
        temp_bytes=None,
        capacity_bytes=where.capacity and per_chip * where.capacity,
        memory={kind: per_chip * size for kind, size in memory.items()},
        state_bytes=sharding.byte_count(state),
        sharded_fraction=sharding.sharded_fraction(state, placed, *sharding.AXES),
        unsharded=[{"name": k, "bytes": n} for k, n in sorted(whole.items(), key=lambda x: -x[1]) if n >= LARGE],
        flops_per_step=sum(flops.values()),
        flops=flops,
    )
    held = sum(size for kind, size in memory.items() if kind != "batch")
    start = time.perf_counter()
    try:
        compiled = compile_lowered(lowered, where.mesh)
    except aot.DoesNotFit as error:
        seconds = time.perf_counter() - start
        needed = error.needed and per_chip * error.needed
        return replace(plan, peak_bytes_per_chip=needed, compile_seconds=seconds), held
    cost = compiled.cost
    towers = sum(n for name, n in flops.items() if name.endswith("tower"))
    found = {
        "padding": compiled.argument_bytes - sum(memory.values()),
        "temporaries": compiled.peak_bytes - compiled.argument_bytes,
    }
    plan = replace(
        plan,
        fits=where.capacity is None or compiled.peak_bytes <= where.capacity,
        peak_bytes_per_chip=per_chip * compiled.peak_bytes,
        argument_bytes=per_chip * compiled.argument_bytes,
        temp_bytes=per_chip * compiled.temp_bytes,
        memory=plan.memory | {kind: per_chip * size for kind, size in found.items()},
        program_flops=cost.flops * len(where.devices),
        collectives={kind: dataclasses.asdict(c) for kind, c in cost.collectives.items()},
        estimate=estimate(cost, where.devices, run.train.batch_size, towers),
        compile_seconds=compiled.seconds,
    )
    return plan, held


def with_largest_batch(
    run: config.Run, where: Setting, plan: Plan, held: int, say: Callable[[Try], None], watch: Callable[[int], Any]
) -> Plan:
    """The plan with the largest batch that fits, found by compiling others with as many micro-batches; `say` is told each try.

    `watch(batch_size)` is a context manager around each compilation. Raises ConfigError where the devices don't tell their
    memory.
    """
    there = f"{plan.device_kind} doesn't tell how much memory it has"
    config.require(where.capacity is not None, "--find-batch", True, there)
    per_chip = plan.devices // plan.chips
    state = state_of(run, where.mesh)
    unit = sharding.batch_devices(where.mesh) * run.train.micro_batches

    def attempt(size: int) -> Try:
        start = time.perf_counter()
        needed, failure = None, None
        with watch(size):
            try:
                lowered = lower_step(replace(run, train=replace(run.train, batch_size=size)), where.mesh, state)
                needed = compile_lowered(lowered, where.mesh).peak_bytes
                fits = needed <= where.capacity
            except aot.DoesNotFit as error:
                fits, needed = False, error.needed
            except aot.CompilerError as error:
                fits, failure = None, str(error)
        made = Try(size, fits, needed, time.perf_counter() - start, failure)
        say(made)
        return made

    needed = plan.peak_bytes_per_chip and plan.peak_bytes_per_chip // per_chip
    first = Try(plan.batch_size, plan.fits, needed, plan.compile_seconds)
    tries = [first, *search(first, attempt, unit, where.capacity, held)]
    return replace(plan, largest_batch=largest(tries, unit), tries=tries)


def _held(state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Bytes of the arguments on one device, by kind."""
    found = dict.fromkeys(KINDS.values(), 0)
    for name, kind in KINDS.items():
        found[kind] += sharding.own_bytes(getattr(state, name))
    return {kind: size for kind, size in found.items() if size} | {"batch": sharding.own_bytes(batch)}
