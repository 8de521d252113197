"""The figures of a plan: memory of a chip, what is sharded, what a step computes and sends, and how long it might take."""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from clipjax import aot, config, sharding
from clipjax.chips import chip_count
from clipjax.plan.estimate import Estimate, estimate
from clipjax.plan.flops import step_flops
from clipjax.plan.program import abstract_batch, compile_lowered, lower_step, state_of, teacher_width
from clipjax.plan.search import Try, largest, search
from clipjax.plan.target import Target
from clipjax.train import remat
from clipjax.train.optimizer import trained_names
from clipjax.train.state import TrainState

LARGE = 10**6  # bytes; the report does not list smaller tensors

# The report's names for the fields of a state.
KINDS = {
    "params": "parameters",
    "opt_state": "optimizer state",
    "ema": "moving average",
    "memory": "example memory",
    "step": "optimizer state",
}


@dataclass(frozen=True)
class Plan:
    """What one run needs on some devices. Bytes are per chip; a chip of v2, v3 or tpu7x is two JAX devices. None: not known."""

    topology: str
    slices: int
    chips: int
    devices: int
    device_kind: str
    mesh: dict[str, int]
    batch_size: int
    micro_batches: int
    remat: str  # the policy that `auto` chose, or the configured one
    part: int | None  # of the same, model.part
    remat_reason: str | None  # why it was chosen; None: it is configured
    fits: bool
    peak_bytes_per_chip: int | None  # if it does not fit: what it needs
    argument_bytes: int  # state and batch
    temp_bytes: int | None
    capacity_bytes: int | None
    memory: dict[str, int]  # by kind; the sum is the peak
    memory_lacks: tuple[str, ...]  # what the compiler does not count in it
    state_bytes: int  # of the state, each tensor counted once
    sharded_fraction: float  # of `state_bytes`: what no device ever has in full
    # The large tensors that every device has in full: name, bytes in the state, and `when`: always, or in the step.
    unsharded: list[dict[str, Any]]
    flops_per_step: float  # counted by hand, over all chips
    flops: dict[str, float]  # the same, by part
    program_flops: int | None = None  # of the compiled program, over all chips, with everything that is recomputed
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)  # of one device: kind -> count and bytes
    estimate: Estimate = Estimate()
    compile_seconds: float | None = None
    largest_batch: int | None = None
    tries: list[Try] = field(default_factory=list)


def make_plan(run: config.Run, target: Target) -> tuple[Plan, int]:
    """The plan from one compilation, and the bytes that a device needs for any batch. Raises ConfigError and CompilerError."""
    state = state_of(run, target.mesh)
    lowered = lower_step(run, target.mesh, state)
    arguments = _argument_bytes(state, abstract_batch(run, target.mesh))
    fixed = sum(size for kind, size in arguments.items() if kind != "batch")
    plan = _uncompiled(run, target, state, arguments)
    start = time.perf_counter()
    try:
        compiled = compile_lowered(lowered, target.mesh)
    except aot.DoesNotFit as error:
        needed = error.needed and plan.devices // plan.chips * error.needed
        return replace(plan, peak_bytes_per_chip=needed, compile_seconds=time.perf_counter() - start), fixed
    return _with_program(plan, target, state, compiled), fixed


def _argument_bytes(state: TrainState, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Bytes of state and batch on one device, by kind."""
    found = dict.fromkeys(KINDS.values(), 0)
    for name, kind in KINDS.items():
        found[kind] += sharding.own_bytes(getattr(state, name))
    return {kind: size for kind, size in found.items() if size} | {"batch": sharding.own_bytes(batch)}


def _uncompiled(run: config.Run, target: Target, state: TrainState, arguments: Mapping[str, int]) -> Plan:
    """All that is known from shapes and shardings alone. It does not fit until a compiler says so."""
    chips = chip_count(target.devices)
    per_chip = len(target.devices) // chips
    placed = jax.tree.map(lambda x: x.sharding, state)
    replicated = sharding.unsharded(state, placed, *sharding.AXES)
    chosen = remat.choice(run, target.mesh, state)
    flops = step_flops(run, trained_names(run.optim_in_use.rules, state.params), teacher_width(run))
    return Plan(
        topology=target.topology,
        slices=sharding.slice_count(target.devices),
        chips=chips,
        devices=len(target.devices),
        device_kind=target.devices[0].device_kind,
        mesh=dict(target.mesh.shape),
        batch_size=run.train.batch_size,
        micro_batches=run.train.micro_batches,
        remat=chosen.policy,
        part=chosen.part,
        remat_reason=chosen.reason,
        fits=False,
        peak_bytes_per_chip=None,
        argument_bytes=per_chip * sum(arguments.values()),
        temp_bytes=None,
        capacity_bytes=target.capacity and per_chip * target.capacity,
        memory={kind: per_chip * size for kind, size in arguments.items()},
        memory_lacks=target.lacks,
        state_bytes=sharding.byte_count(state),
        sharded_fraction=sharding.sharded_fraction(state, placed, *sharding.AXES),
        unsharded=_listed(replicated, "always"),
        flops_per_step=sum(flops.values()),
        flops=flops,
    )


def _listed(tensors: Mapping[str, int], when: str) -> list[dict[str, Any]]:
    """The large ones of these tensors, name -> bytes, for a report."""
    by_size = sorted(tensors.items(), key=lambda x: -x[1])
    return [{"name": name, "bytes": size, "when": when} for name, size in by_size if size >= LARGE]


def _gathered(state: TrainState, gathered: Collection[int]) -> dict[str, int]:
    """Path -> bytes in the state, of the sharded parameters that a program gathers in full. `gathered`: hlo.Cost.gathered."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        axes, mesh = leaf.sharding.spec, leaf.sharding.mesh
        full = leaf.size // (mesh.shape["tensor"] if "tensor" in axes else 1)
        if {"fsdp", "data"} & {*axes} and full in gathered:
            found[f"params/{sharding.keystr(path)}"] = sharding.byte_count(leaf)
    return found


def _with_program(plan: Plan, target: Target, state: TrainState, compiled: aot.Compiled) -> Plan:
    """The plan with the figures of the compiled program."""
    gathered = _gathered(state, compiled.cost.gathered)
    cost, per_chip = compiled.cost, plan.devices // plan.chips
    towers = sum(n for name, n in plan.flops.items() if name.endswith("tower"))
    compiler_bytes = {
        "padding": per_chip * compiled.argument_bytes - plan.argument_bytes,
        "temporaries": per_chip * (compiled.peak_bytes - compiled.argument_bytes),
    }
    return replace(
        plan,
        fits=target.capacity is None or compiled.peak_bytes <= target.capacity,
        peak_bytes_per_chip=per_chip * compiled.peak_bytes,
        argument_bytes=per_chip * compiled.argument_bytes,
        temp_bytes=per_chip * compiled.temp_bytes,
        sharded_fraction=plan.sharded_fraction - sum(gathered.values()) / plan.state_bytes,
        unsharded=plan.unsharded + _listed(gathered, "in the step"),
        memory=plan.memory | compiler_bytes,
        program_flops=cost.flops * len(target.devices),
        collectives={kind: dataclasses.asdict(c) for kind, c in cost.collectives.items()},
        estimate=estimate(cost, target.devices, plan.batch_size, towers, compiled.cycles),
        compile_seconds=compiled.seconds,
    )


def with_largest_batch(
    run: config.Run,
    target: Target,
    plan: Plan,
    fixed: int,
    report: Callable[[Try], None],
    progress: Callable[[int], AbstractContextManager[Any]],
) -> Plan:
    """The plan with the largest batch that fits, found by compiling other batches with the same number of micro-batches.

    `fixed`: bytes that a device needs for any batch. `report` gets each try. `progress(batch_size)` is a context manager around
    each compilation. Raises ConfigError if the devices' memory is not known.
    """
    capacity = target.capacity
    remedy = f"{plan.device_kind} does not report how much memory it has"
    config.require(capacity is not None, "--find-batch", True, remedy)
    assert capacity is not None
    state = state_of(run, target.mesh)

    def attempt(size: int) -> Try:
        start = time.perf_counter()
        fits, needed, failure = None, None, None
        with progress(size):
            try:
                lowered = lower_step(replace(run, train=replace(run.train, batch_size=size)), target.mesh, state)
                needed = compile_lowered(lowered, target.mesh).peak_bytes
                fits = needed <= capacity
            except aot.DoesNotFit as error:
                fits, needed = False, error.needed
            except aot.CompilerError as error:
                failure = str(error)
        result = Try(size, fits, needed, time.perf_counter() - start, failure)
        report(result)
        return result

    needed = plan.peak_bytes_per_chip and plan.peak_bytes_per_chip // (plan.devices // plan.chips)
    first = Try(plan.batch_size, plan.fits, needed, plan.compile_seconds or 0.0)
    unit = sharding.batch_devices(target.mesh) * run.train.micro_batches
    tries = [first, *search(first, attempt, unit, capacity, fixed)]
    return replace(plan, largest_batch=largest(tries, unit), tries=tries)
