"""The streamed losses beside their dense forms: what a device must hold, what it computes and sends, and how long it takes.

Forward and backward, float32 at the highest precision, gradients of embeddings and scalars, the batch over all devices. Dense
is the matrix as one would write it, left to the compiler with the same shardings (for the sigmoid loss as big_vision does).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from clipjax import aot, config, losses, sharding
from clipjax.bench import CPU_DEVICES
from clipjax.files import write_whole
from clipjax.losses.pairwise import tiles

SCALARS = {"softmax": (14.3,), "sigmoid": (10.0, -10.0), "cuaxu": (100.0,)}  # as each is used: scale (and bias)
MATRIX = dict(precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Figures:
    """One loss in one form at one batch size; everything is one device's, or of the whole where it says so."""

    loss: str
    batch: int
    form: str  # "streamed" or "dense"
    peak_bytes: int | None = None  # with the arguments; where it does not fit, what it needs
    argument_bytes: int | None = None
    flops: float | None = None  # of products, of all devices together, in units of batch^2 width
    collectives: dict[str, dict[str, int]] | None = None  # kind -> count and bytes
    started: int | None = None  # collectives, awaited later in the program's text
    overlapped: int | None = None  # those of them with a product in between
    compile_seconds: float | None = None
    estimated_seconds: float | None = None  # of a run, from its products
    seconds: tuple[float, ...] | None = None  # of every timed run
    failure: str | None = None


@dataclass(frozen=True)
class Setting:
    """Where it is measured. Devices of a topology are only compiled for."""

    devices: Sequence[jax.Device]
    width: int
    travel: str = "auto"
    turns: int = 7
    patience: float = 15.0  # seconds: a batch whose turns would take longer is not timed
    topology: str | None = None


def devices(count: int | None, topology: str | None) -> Sequence[jax.Device]:
    """Those of the topology, or `count` (all) of this machine's; on a CPU they are simulated. Raises ConfigError."""
    if topology:
        return aot.tpu_devices(topology)
    with contextlib.suppress(RuntimeError):  # JAX is at work already, with the devices that it has
        jax.config.update("jax_num_cpu_devices", max(count or CPU_DEVICES, jax.config.jax_num_cpu_devices))
    found = jax.devices()
    there = f"there are {len(found)} of kind {found[0].device_kind}"
    config.require(count is None or count <= len(found), "--devices", count, there)
    return found[:count]


def streamed(loss: str, mesh: Mesh) -> Callable[..., Float[Array, ""]]:
    """clipjax's, as a function of the global rows and the scalars."""
    axis = sharding.BATCH

    def cuaxu(x: Array, y: Array, scale: Array) -> Array:
        spread = (losses.uniformity(x, axis=axis) + losses.uniformity(y, axis=axis)) / 2
        drawn = losses.alignment(x, y, axis=axis)
        return losses.clip_loss(x, y, scale, axis=axis) + spread + drawn + losses.cross_uniformity(x, y, axis=axis)

    forms = {
        "softmax": lambda x, y, scale: losses.clip_loss(x, y, scale, axis=axis),
        "sigmoid": lambda x, y, scale, bias: losses.siglip_loss(x, y, scale, bias, axis=axis),
        "cuaxu": cuaxu,
    }
    return sharding.on_shards(forms[loss], mesh)


def dense(loss: str) -> Callable[..., Float[Array, ""]]:
    """The whole matrix, one of the logits and where there are more terms one of each."""

    def softmax(x: Array, y: Array, scale: Array) -> Array:
        s = scale * jnp.einsum("id,jd->ij", x, y, **MATRIX)
        own = jnp.diagonal(s)
        return (jax.nn.logsumexp(s, 1) - own + jax.nn.logsumexp(s, 0) - own).mean() / 2

    def sigmoid(x: Array, y: Array, scale: Array, bias: Array) -> Array:
        s = scale * jnp.einsum("id,jd->ij", x, y, **MATRIX) + bias
        return -jax.nn.log_sigmoid((2 * jnp.eye(len(x)) - 1) * s).sum(1).mean()

    def uniformity(x: Array, y: Array) -> Array:
        n = len(x)
        cos = jnp.einsum("id,jd->ij", x, y, **MATRIX)
        return jax.nn.logsumexp(jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, 4 * cos - 4)) - jnp.log(n * (n - 1.0))

    def cuaxu(x: Array, y: Array, scale: Array) -> Array:
        drawn = ((x - y) ** 2).sum(1).mean()
        return softmax(x, y, scale) + (uniformity(x, x) + uniformity(y, y)) / 2 + drawn + uniformity(x, y)

    return {"softmax": softmax, "sigmoid": sigmoid, "cuaxu": cuaxu}[loss]


def lower(fn: Callable[..., Any], loss: str, batch: int, width: int, mesh: Mesh) -> jax.stages.Lowered:
    """Value and gradients of everything, with gradients laid out as what they are of."""
    rows, same = sharding.over_rows(mesh), sharding.replicated(mesh)
    scalars = len(SCALARS[loss])
    placed = (rows, rows, *[same] * scalars)
    shapes = [(batch, width)] * 2 + [()] * scalars
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for shape, s in zip(shapes, placed, strict=True)]
    both = jax.value_and_grad(fn, tuple(range(len(args))))
    return jax.jit(both, out_shardings=(same, placed)).lower(*args)


def inputs(loss: str, batch: int, width: int, mesh: Mesh) -> tuple[Array, ...]:
    """Random unit rows and the scalars, on the mesh."""

    def make() -> tuple[Array, ...]:
        z = jax.random.normal(jax.random.key(0), (2, batch, width))
        x, y = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        return x, y, *(jnp.float32(s) for s in SCALARS[loss])

    rows, same = sharding.over_rows(mesh), sharding.replicated(mesh)
    return jax.jit(make, out_shardings=(rows, rows, *[same] * len(SCALARS[loss])))()


@contextlib.contextmanager
def travelling(how: str) -> Iterator[None]:
    """While programs are traced: the losses choose by size how columns travel, unless the choice has one side only."""
    limit = tiles.GATHER
    tiles.GATHER = {"auto": limit, "ring": 0, "gather": float("inf")}[how]
    try:
        yield
    finally:
        tiles.GATHER = limit


def measure(setting: Setting, mesh: Mesh, loss: str, batch: int) -> list[Figures]:
    """The figures of both forms: streamed, dense."""
    forms = {"streamed": streamed(loss, mesh), "dense": dense(loss)}
    compiled = [_compiled(setting, mesh, fn, loss, batch, form) for form, fn in forms.items()]
    programs = {figures.form: program for figures, program in compiled if program}
    found = [figures for figures, _ in compiled]
    turn = sum(figures.estimated_seconds or 0 for figures in found if figures.form in programs)
    if not programs or turn * (setting.turns + 1) > setting.patience:
        return found
    timed = _time(setting, mesh, loss, batch, programs)
    return [dataclasses.replace(figures, seconds=timed.get(figures.form)) for figures in found]


@functools.cache
def _speed(device: jax.Device) -> float:
    """Floating-point operations a second of a device that has the machine to itself, in a product of some size."""
    n = 2048
    x = jax.device_put(jnp.ones((n, n)), device)
    product = jax.jit(lambda x: jnp.einsum("id,jd->ij", x, x, **MATRIX))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        return time.perf_counter() - start

    return 2 * n**3 / min(seconds() for _ in range(4))


def _compiled(
    setting: Setting, mesh: Mesh, fn: Callable[..., Any], loss: str, batch: int, form: str
) -> tuple[Figures, jax.stages.Compiled | None]:
    """What the compiler says, and the program where it can run."""
    figures = Figures(loss, batch, form)
    try:
        with travelling(setting.travel):
            compiled = aot.compile(lower(fn, loss, batch, setting.width, mesh))
    except aot.DoesNotFit as error:
        return dataclasses.replace(figures, peak_bytes=error.needed, failure=_out_of_memory(error.needed, error.capacity)), None
    except aot.CompilerError as error:
        return dataclasses.replace(figures, failure=f"the compiler failed: {error}"), None
    cost = compiled.cost
    capacity = None if setting.topology else _capacity(setting.devices)
    fits = capacity is None or compiled.peak_bytes <= capacity
    figures = dataclasses.replace(
        figures,
        peak_bytes=compiled.peak_bytes,
        argument_bytes=compiled.argument_bytes,
        flops=cost.flops * len(setting.devices) / (batch**2 * setting.width),
        collectives={kind: dataclasses.asdict(c) for kind, c in cost.collectives.items()},
        started=cost.started,
        overlapped=cost.overlapped,
        compile_seconds=compiled.seconds,
        estimated_seconds=None if setting.topology else _estimate(cost.flops, setting.devices),
        failure=None if fits else _out_of_memory(compiled.peak_bytes, capacity),
    )
    return figures, compiled.program if fits and not setting.topology else None


def _estimate(flops: int, devices: Sequence[jax.Device]) -> float:
    together = len(devices) if devices[0].platform == "cpu" else 1  # simulated devices share one machine
    return flops * together / _speed(devices[0])


def _out_of_memory(needed: int | None, capacity: int | None) -> str:
    sizes = (f"{size:,.2f} GiB" if size else "unknown" for size in (x and x / 2**30 for x in (needed, capacity)))
    return "out of memory: needs {} of {} a device".format(*sizes)


def _capacity(found: Sequence[jax.Device]) -> int:
    """Bytes that one device may use; a CPU's share one memory."""
    stats = found[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(found)


def _time(
    setting: Setting, mesh: Mesh, loss: str, batch: int, programs: dict[str, jax.stages.Compiled]
) -> dict[str, tuple[float, ...]]:
    """Seconds of every run, the forms taking turns, so that a noisy machine is noisy for both. The first run is not timed."""
    args = inputs(loss, batch, setting.width, mesh)
    runs = {form: [] for form in programs}
    for turn in range(setting.turns + 1):
        for form, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if turn:
                runs[form].append(time.perf_counter() - start)
    return {form: tuple(seconds) for form, seconds in runs.items()}


LINE = "{:8} {:>9} {:8} {:>10} {:>9} {:>10} {:>9} {:>6}  {}"
HEAD = LINE.format("loss", "batch", "form", "peak MiB", "arguments", "FLOPs/B2d", "seconds", "ratio", "collectives")


def lines(pair: Sequence[Figures]) -> Iterator[str]:
    """Both forms as rows of the table."""
    medians = [x.seconds and statistics.median(x.seconds) for x in pair]
    ratio = f"{medians[0] / medians[1]:.2f}" if all(medians) else ""
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
    """`clipjax bench loss`: a table, row by row, and all figures in a file where one is named. Raises ConfigError."""
    config.require(min(args.batch) > 1, "--batch", min(args.batch), "one pair has nothing to be told from: use 2 or more")
    found = devices(args.devices, args.topology)
    for batch in args.batch:
        config.require(batch % len(found) == 0, "--batch", batch, f"must be a multiple of the number of devices, {len(found)}")
    setting = Setting(found, args.width, args.travel, args.turns, args.patience, args.topology)
    kind = f"simulated on {os.cpu_count()} cores" if found[0].platform == "cpu" else found[0].device_kind
    mesh = sharding.make_mesh(config.Mesh(), found)
    print(f"Value and gradients, float32, width {args.width}, {len(found)} devices ({kind}).")
    print("Memory and collectives are one device's, FLOPs (of products) all devices'.", end=" ")
    print(f"Seconds: median of {args.turns}; (~): not run, an estimate." if not args.topology else "")
    print(HEAD, flush=True)
    figures = []
    for loss in args.loss:
        for batch in args.batch:
            if sys.stderr.isatty():
                print(f"{loss} {batch:,} ...", end="\r", file=sys.stderr, flush=True)
            pair = measure(setting, mesh, loss, batch)
            print(*lines(pair), sep="\n", flush=True)
            figures += [dataclasses.asdict(x) for x in pair]
    if args.json:
        result = {"devices": len(found), "kind": found[0].device_kind, "jax": jax.__version__}
        result |= {name: getattr(setting, name) for name in ("topology", "width", "travel", "turns")} | {"figures": figures}
        with write_whole(args.json) as part:
            part.write_text(json.dumps(result, indent=2) + "\n")
