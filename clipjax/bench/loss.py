"""The streamed losses beside their dense forms: the memory of a device, what it computes and sends, and the time.

`clipjax.bench.loss_forms` says what is compared.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax import aot, config, gpus, sharding
from clipjax.bench import CPU_DEVICES
from clipjax.bench.loss_forms import HIGHEST, columns_travel, dense, inputs, lower, streamed
from clipjax.files import write_json


@dataclass(frozen=True)
class BenchCase:
    """One loss at one batch size on some devices. For the devices of a topology it is only compiled."""

    loss: str
    batch: int
    width: int
    mesh: Mesh
    travel: str = "auto"
    turns: int = 7
    patience: float = 15.0  # seconds: a batch whose turns would take longer is not timed
    topology: str | None = None

    @property
    def devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)


@dataclass(frozen=True)
class LossCosts:
    """What one loss costs in one form at one batch size, on one device unless a field says otherwise. None: not known."""

    loss: str
    batch: int
    form: str  # "streamed" or "dense"
    peak_bytes: int | None = None  # with the arguments; if it does not fit, what it needs
    argument_bytes: int | None = None
    flops: float | None = None  # of matrix products, of all devices together, in units of batch^2 width
    collectives: dict[str, dict[str, int]] | None = None  # kind -> count and bytes
    started: int | None = None  # collectives that are started and awaited in two instructions
    overlapped: int | None = None  # those of them with a product in between
    compile_seconds: float | None = None
    estimated_seconds: float | None = None  # of a run, from its products
    seconds: tuple[float, ...] | None = None  # of every timed run
    failure: str | None = None


def devices(count: int | None, topology: str | None) -> Sequence[jax.Device]:
    """The devices of the topology, or `count` (None: all) of this machine's. CPU devices are simulated. Raises ConfigError."""
    if topology:
        return gpus.gpu_devices(topology) if gpus.named(topology) else aot.tpu_devices(topology)
    simulated = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]  # JAX adds it at run time
    aot.simulate_cpus(max(count or CPU_DEVICES, simulated))
    found = jax.devices()
    remedy = f"there are {len(found)} of kind {found[0].device_kind}"
    config.require(count is None or count <= len(found), "--devices", count, remedy)
    return found[:count]


def measure(case: BenchCase) -> list[LossCosts]:
    """The costs of both forms: streamed, dense."""
    compiled = [_compile(case, form) for form in ("streamed", "dense")]
    costs = [figures for figures, _ in compiled]
    programs = {figures.form: program for figures, program in compiled if program}
    turn = sum(figures.estimated_seconds or 0 for figures in costs if figures.form in programs)
    if not programs or turn * (case.turns + 1) > case.patience:
        return costs
    timed = _time(case, programs)
    return [dataclasses.replace(figures, seconds=timed.get(figures.form)) for figures in costs]


def _compile(case: BenchCase, form: str) -> tuple[LossCosts, jax.stages.Compiled | None]:
    """The figures of the compiled program, and the program if it can run on this machine."""
    costs = LossCosts(case.loss, case.batch, form)
    fn = streamed(case.loss, case.mesh) if form == "streamed" else dense(case.loss)
    try:
        with columns_travel(case.travel):
            compiled = aot.compile(lower(fn, case.loss, case.batch, case.width, case.mesh))
    except aot.DoesNotFit as error:
        return dataclasses.replace(costs, peak_bytes=error.needed, failure=str(error)), None
    except aot.CompilerError as error:
        return dataclasses.replace(costs, failure=f"the compiler failed: {error}"), None
    cost, devices = compiled.cost, case.devices
    capacity = None if case.topology else aot.capacity(devices)
    fits = capacity is None or compiled.peak_bytes <= capacity
    costs = dataclasses.replace(
        costs,
        peak_bytes=compiled.peak_bytes,
        argument_bytes=compiled.argument_bytes,
        flops=cost.flops * len(devices) / (case.batch**2 * case.width),
        collectives={kind: dataclasses.asdict(c) for kind, c in cost.collectives.items()},
        started=cost.started,
        overlapped=cost.overlapped,
        compile_seconds=compiled.seconds,
        estimated_seconds=None if case.topology else _estimate(cost.flops, devices),
        failure=None if fits else str(aot.DoesNotFit(compiled.peak_bytes, capacity)),
    )
    return costs, compiled.program if fits and not case.topology else None


def _estimate(flops: int, devices: Sequence[jax.Device]) -> float:
    """Seconds of a program with so many FLOPs on each device."""
    sharers = len(devices) if devices[0].platform == "cpu" else 1  # simulated devices share one machine
    return flops * sharers / _speed(devices[0])


@functools.cache
def _speed(device: jax.Device) -> float:
    """FLOP/s of a device that is alone on its machine, measured with a product of two 2048 x 2048 matrices."""
    n = 2048
    x = jax.device_put(jnp.ones((n, n)), device)
    product = jax.jit(lambda x: jnp.einsum("id,jd->ij", x, x, precision=HIGHEST))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        return time.perf_counter() - start

    return 2 * n**3 / min(seconds() for _ in range(4))


def _time(case: BenchCase, programs: dict[str, jax.stages.Compiled]) -> dict[str, tuple[float, ...]]:
    """Seconds of every run by form. The forms take turns, so that a noisy machine affects both. The first run is not timed."""
    args = inputs(case.loss, case.batch, case.width, case.mesh)
    runs: dict[str, list[float]] = {form: [] for form in programs}
    for turn in range(case.turns + 1):
        for form, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if turn:
                runs[form].append(time.perf_counter() - start)
    return {form: tuple(seconds) for form, seconds in runs.items()}


LINE = "{:8} {:>9} {:8} {:>10} {:>9} {:>10} {:>9} {:>6}  {}"
HEAD = LINE.format("loss", "batch", "form", "peak MiB", "arguments", "FLOPs/B2d", "seconds", "ratio", "collectives")


def lines(pair: Sequence[LossCosts]) -> Iterator[str]:
    """Both forms as rows of the table: streamed, dense."""
    medians = [statistics.median(x.seconds) if x.seconds else None for x in pair]
    top, bottom = medians
    ratio = f"{top / bottom:.2f}" if top and bottom else ""
    for x, median in zip(pair, medians, strict=True):
        sizes = (size and f"{size / 2**20:,.1f}" for size in (x.peak_bytes, x.argument_bytes))
        sent = ", ".join(f"{c['count']:,} {kind} {_mib(c['bytes'])}" for kind, c in (x.collectives or {}).items())
        if x.started:
            sent += f"; {x.overlapped} of {x.started} started collectives overlap a product"
        if median is not None:
            took = f"{median:.3f}"
        else:
            took = f"(~{x.estimated_seconds:,.0f})" if x.estimated_seconds and not x.failure else None
        flops = x.flops and f"{x.flops:.2f}"
        cells = (*sizes, flops, took, ratio if x.form == "streamed" else "", x.failure or sent)
        yield LINE.format(x.loss, f"{x.batch:,}", x.form, *("-" if cell is None else cell for cell in cells)).rstrip()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else "< 1 MiB"


def run(args: argparse.Namespace) -> None:
    """`clipjax bench loss`: prints a table, row by row, and writes all figures to the file of --json. Raises ConfigError."""
    config.require(min(args.batch) > 1, "--batch", min(args.batch), "one pair has no negatives: use 2 or more")
    found = devices(args.devices, args.topology)
    for batch in args.batch:
        config.require(batch % len(found) == 0, "--batch", batch, f"must be a multiple of the number of devices, {len(found)}")
    mesh = sharding.make_mesh(config.Mesh(), found)
    kind = f"simulated on {os.cpu_count()} cores" if found[0].platform == "cpu" else found[0].device_kind
    print(f"Value and gradients, float32, width {args.width}, {len(found)} devices ({kind}).")
    print("Memory and collectives are one device's, FLOPs (of products) all devices'.", end=" ")
    print(f"Seconds: median of {args.turns}; (~): not run, an estimate." if not args.topology else "")
    print(HEAD, flush=True)
    options = {name: getattr(args, name) for name in ("topology", "width", "travel", "turns")}
    figures: list[dict[str, Any]] = []
    for loss in args.loss:
        for batch in args.batch:
            if sys.stderr.isatty():
                print(f"{loss} {batch:,} ...", end="\r", file=sys.stderr, flush=True)
            pair = measure(BenchCase(loss, batch, mesh=mesh, patience=args.patience, **options))
            print(*lines(pair), sep="\n", flush=True)
            figures += [dataclasses.asdict(x) for x in pair]
    if args.json:
        machine = {"devices": len(found), "kind": found[0].device_kind, "jax": jax.__version__}
        write_json(args.json, machine | options | {"figures": figures})
