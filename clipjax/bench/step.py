"""The train step of a configuration on the devices that are here: its time, its memory, and its share of the chips' peak.

The step is the one that `clipjax train` takes, on a batch of noise that stays on the devices: no data is read.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax import aot, config, sharding
from clipjax.files import write_whole
from clipjax.metrics.flops import mfu, model_flops
from clipjax.models import clip
from clipjax.plan.program import abstract_batch, compile_lowered, lower_step, state_of
from clipjax.train import remat
from clipjax.train.optimizer import make_optimizer, trained_names
from clipjax.train.state import initial_state
from clipjax.train.step import Batch

TURN = 1.0  # seconds that a turn lasts at least: steps are given to the devices ahead, and waited for at its end


@dataclass(frozen=True)
class Figures:
    """Of a whole step: both towers, loss, gradients, optimizer."""

    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int  # global, in pairs
    micro_batches: int
    remat: str
    compile_seconds: float
    peak_bytes: int  # of one device, as compiled, with weights and optimizer
    flops_per_step: float  # of the model by hand, nothing that is made again; all devices
    step_seconds: float  # the median of `seconds`
    images_per_second: float  # all devices
    mfu: float | None  # 0 to 1, of the bfloat16 peak; None where that is not known
    seconds: tuple[float, ...]  # a step's, in each turn


def measure(run: config.Run, turns: int) -> Figures:
    """Raises ConfigError where the run can't be laid out here, aot.DoesNotFit and aot.CompilerError."""
    mesh = sharding.make_mesh(run.mesh)
    placed = state_of(run, mesh)
    compiled = compile_lowered(lower_step(run, mesh, placed), mesh)
    try:
        seconds = _timed(run, mesh, compiled.program, turns)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise aot.DoesNotFit(compiled.peak_bytes, aot.capacity(mesh.devices.flat)) from error
    step = statistics.median(seconds)
    flops = run.train.batch_size * model_flops(
        run.model_at_work, trained_names(run.optim.rules, placed.params), run.data.captions_per_image
    )
    return Figures(
        device_kind=mesh.devices.flat[0].device_kind,
        devices=mesh.devices.size,
        mesh=dict(mesh.shape),
        batch_size=run.train.batch_size,
        micro_batches=run.train.micro_batches,
        remat=remat.resolved(run, mesh, placed).model.remat,
        compile_seconds=compiled.seconds,
        peak_bytes=compiled.peak_bytes,
        flops_per_step=flops,
        step_seconds=step,
        images_per_second=run.train.batch_size / step,
        mfu=mfu(flops / step, list(mesh.devices.flat)),
        seconds=seconds,
    )


def noise(run: config.Run, mesh: Mesh) -> Batch:
    """A batch as `abstract_batch` tells it: random pictures, and captions of full length."""
    shapes = abstract_batch(run, mesh)

    def make() -> Batch:
        keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))

        def one(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            if name == "index":
                return jnp.arange(*shape, dtype=dtype)
            if jnp.issubdtype(dtype, jnp.floating):
                return jax.random.normal(keys[name], shape, dtype)
            if name != "text":
                return jax.random.randint(keys[name], shape, 0, 256).astype(dtype)
            end = run.model.text.vocab_size - 1  # the end token has the highest id
            return jax.random.randint(keys[name], shape, 1, end).astype(dtype).at[..., -1].set(end)

        return {name: one(name, x.shape, x.dtype) for name, x in shapes.items()}

    return jax.jit(make, out_shardings={name: x.sharding for name, x in shapes.items()})()


def _timed(run: config.Run, mesh: Mesh, program: jax.stages.Compiled, turns: int) -> tuple[float, ...]:
    """Seconds of a step in each turn. The first step's are not told, and say how many a turn has."""
    tx = make_optimizer(run.optim, run.train.steps, jax.eval_shape(lambda: clip.init(run.model, run.seed)))
    state, batch = initial_state(run, tx, mesh), noise(run, mesh)

    def go(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / steps

    go(1)
    steps = max(1, round(TURN / go(1)))
    seconds = []
    for turn in range(turns):
        seconds.append(go(steps))
        if sys.stderr.isatty():
            print(f"\rturn {turn + 1} of {turns}: {seconds[-1]:.4g} s a step", end="\033[K", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return tuple(seconds)


def lines(figures: Figures) -> Iterator[str]:
    """The figures to read."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in figures.mesh.items() if n > 1) or "one device"
    yield f"{figures.devices} x {figures.device_kind}; mesh: {mesh}"
    parts = f", in {figures.micro_batches} micro-batches" if figures.micro_batches > 1 else ""
    yield f"batch: {figures.batch_size:,} pairs{parts}; model.remat: {figures.remat}"
    yield f"  compiled in      {figures.compile_seconds:,.1f} s"
    yield f"  peak a device    {figures.peak_bytes / 2**30:,.2f} GiB, as compiled"
    low, high = min(figures.seconds), max(figures.seconds)
    yield f"  a step           {figures.step_seconds:.4g} s, median of {len(figures.seconds)} turns ({low:.4g} to {high:.4g})"
    yield f"  images/s         {figures.images_per_second:,.4g} ({figures.images_per_second / figures.devices:,.4g} a device)"
    share = "the chips' peak is not known" if figures.mfu is None else f"MFU {figures.mfu:.1%} of the bfloat16 peak"
    yield f"  model FLOP/s     {figures.flops_per_step / figures.step_seconds:.4g}; {share}"


def run(args: argparse.Namespace, run: config.Run) -> int:
    """`clipjax bench step`. The exit status: 1 where the step does not fit or the compiler failed. Raises ConfigError."""
    try:
        figures = measure(run, args.turns)
    except aot.DoesNotFit as error:
        needed, there = (f"{n / 2**30:,.2f} GiB" if n else "an unknown size" for n in (error.needed, error.capacity))
        remedy = "lower train.batch_size, or raise train.micro_batches"
        print(f"clipjax: out of memory: the step needs {needed} of {there} a device: {remedy}", file=sys.stderr)
        return 1
    except aot.CompilerError as error:
        print(f"clipjax: the compiler failed: {error}", file=sys.stderr)
        return 1
    if jax.process_index() == 0:
        print(*lines(figures), sep="\n", flush=True)
        if args.json:
            with write_whole(args.json) as part:
                part.write_text(json.dumps(dataclasses.asdict(figures) | {"jax": jax.__version__}, indent=2) + "\n")
    return 0
