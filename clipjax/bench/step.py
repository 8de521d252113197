"""The train step of a configuration on this machine's devices: its time, its memory, and its share of the chips' peak.

It is the step of `clipjax train`, on a batch of noise that stays on the devices: no data is read.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipjax import aot, config, sharding
from clipjax.files import write_json
from clipjax.metrics.flops import mfu, run_flops
from clipjax.models import clip
from clipjax.plan.program import abstract_batch, compile_lowered, lower_step, state_of
from clipjax.plan.report import axes, batch_line
from clipjax.train import remat
from clipjax.train.optimizer import optimizer_of
from clipjax.train.state import initial_state
from clipjax.train.step import Batch

TURN = 1.0  # seconds of a turn, about: its steps are started without waiting, and the last is waited for


@dataclass(frozen=True)
class StepTimes:
    """How long a full train step takes: both towers, loss, gradients, optimizer."""

    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int  # global, in pairs
    micro_batches: int
    remat: str  # the policy that `auto` chose, or the configured one
    part: int | None  # of the same, model.part
    compile_seconds: float
    peak_bytes: int  # of one device, from the compiler, with weights and optimizer state
    flops_per_step: float  # of the model, counted by hand without what is recomputed; of all devices
    step_seconds: float  # the median of `seconds`
    images_per_second: float  # of all devices
    mfu: float | None  # 0 to 1, of the bfloat16 peak; None: the chips' peak is not known
    seconds: tuple[float, ...]  # of a step, the mean of each turn


def measure(run: config.Run, turns: int) -> StepTimes:
    """Raises ConfigError if the run does not fit the mesh of this machine, aot.DoesNotFit and aot.CompilerError."""
    mesh = sharding.make_mesh(run.mesh)
    placed = state_of(run, mesh)
    compiled = compile_lowered(lower_step(run, mesh, placed), mesh)
    try:
        seconds = _timed(run, mesh, compiled.program, turns)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise aot.DoesNotFit(compiled.peak_bytes, aot.capacity(list(mesh.devices.flat))) from error
    step = statistics.median(seconds)
    flops = run.train.batch_size * run_flops(run, placed.params)
    chosen = remat.choice(run, mesh, placed)
    return StepTimes(
        device_kind=mesh.devices.flat[0].device_kind,
        devices=mesh.devices.size,
        mesh=dict(mesh.shape),
        batch_size=run.train.batch_size,
        micro_batches=run.train.micro_batches,
        remat=chosen.policy,
        part=chosen.part,
        compile_seconds=compiled.seconds,
        peak_bytes=compiled.peak_bytes,
        flops_per_step=flops,
        step_seconds=step,
        images_per_second=run.train.batch_size / step,
        mfu=mfu(flops / step, list(mesh.devices.flat)),
        seconds=seconds,
    )


def noise(run: config.Run, mesh: Mesh) -> Batch:
    """A batch with the shapes of `abstract_batch`: random images, and captions of full length."""
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
    """Seconds of a step, the mean of each turn. A first step is not timed; a second decides how many steps a turn has."""
    tx = optimizer_of(run, jax.eval_shape(lambda: clip.init(run.model, run.seed)))
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


def lines(times: StepTimes) -> Iterator[str]:
    yield f"{times.devices} x {times.device_kind}; mesh: {axes(times.mesh)}"
    yield batch_line(times.batch_size, times.micro_batches, remat.Choice(times.remat, times.part))
    yield f"  compiled in      {times.compile_seconds:,.1f} s"
    yield f"  peak a device    {times.peak_bytes / 2**30:,.2f} GiB, as compiled"
    low, high = min(times.seconds), max(times.seconds)
    yield f"  a step           {times.step_seconds:.4g} s, median of {len(times.seconds)} turns ({low:.4g} to {high:.4g})"
    yield f"  images/s         {times.images_per_second:,.4g} ({times.images_per_second / times.devices:,.4g} a device)"
    share = "the chips' peak is not known" if times.mfu is None else f"MFU {times.mfu:.1%} of the bfloat16 peak"
    yield f"  model FLOP/s     {times.flops_per_step / times.step_seconds:.4g}; {share}"


def run(args: argparse.Namespace, run: config.Run) -> int:
    """`clipjax bench step`. The exit status: 1 where the step does not fit or the compiler failed. Raises ConfigError."""
    try:
        times = measure(run, args.turns)
    except aot.DoesNotFit as error:
        remedy = "lower train.batch_size, or raise train.micro_batches"
        print(f"clipjax: {error}: {remedy}", file=sys.stderr)
        return 1
    except aot.CompilerError as error:
        print(f"clipjax: the compiler failed: {error}", file=sys.stderr)
        return 1
    if jax.process_index() == 0:
        print(*lines(times), sep="\n", flush=True)
        if args.json:
            write_json(args.json, dataclasses.asdict(times) | {"jax": jax.__version__})
    return 0
