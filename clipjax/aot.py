"""Compilation ahead of time: for TPUs that need not be there, with what a program needs and what it does told from its text.

The TPU compiler is libtpu's, which runs on any Linux machine (`pip install libtpu`).
"""

import contextlib
import difflib
import itertools
import math
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from clipjax import hlo
from clipjax.config import ConfigError
from clipjax.environment import COMPILE_ONLY

# What there is to rent; libtpu itself takes shapes that don't exist.
TOPOLOGIES = {
    "v2": "2x2 4x4 8x8 16x16",
    "v3": "2x2 4x4 8x8 16x16 32x32",
    "v4": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
    "v5e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24",
    "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "tpu7x": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
}
CORES = ("v2", "v3", "v4", "v5p", "tpu7x")  # whose short names, as v5p-128, count two cores a chip
OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e", "trillium": "v6e"}
OTHER_NAMES |= dict.fromkeys(("v7x", "7x", "v7", "ironwood"), "tpu7x")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


class DoesNotFit(Exception):
    """The compiler says that a program needs more memory than a device has. Sizes in bytes, None where it didn't tell."""

    def __init__(self, needed: int | None, capacity: int | None) -> None:
        super().__init__(f"out of memory: needs {needed} of {capacity} bytes")
        self.needed, self.capacity = needed, capacity


class CompilerError(Exception):
    """The compiler failed at a program that it should have compiled."""


@dataclass(frozen=True)
class Compiled:
    """A program that can run where its devices are real, and what the compiler says of it, for one device."""

    program: jax.stages.Compiled
    seconds: float  # it took to compile
    peak_bytes: int  # the most that is alive at any time, arguments included
    argument_bytes: int
    temp_bytes: int
    cost: hlo.Cost


def tpu_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices to compile for, not to run on, of e.g. v5e:16x16, or of several such slices joined by the data-centre network.

    Raises ConfigError, which names the nearest topology. This process runs on its CPU from then on.
    """
    kind, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(kind, "").split():
        near = nearest_topology(topology)
        kind = near.partition(":")[0]
        shapes = ", ".join(TOPOLOGIES[kind].split())
        remedy = f"the nearest is {near}; {kind} comes as {shapes}; the kinds are {', '.join(TOPOLOGIES)}"
        raise ConfigError(f"--topology = {topology!r}: there is no such; {remedy}")
    for name, value in COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        if "TPU_LIBRARY_PATH" not in os.environ:
            from libtpu import get_library_path  # noqa: F401
        how = {"chip_config_name": "megacore"} if kind == "v4" else {}  # as JAX runs it: a chip is one device
        how |= {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **how).devices)
    except ImportError as error:
        raise ConfigError(f"--topology = {topology!r}: needs the TPU compiler: pip install libtpu (Linux only)") from error


def nearest_topology(text: str) -> str:
    """The topology that was probably meant: v5litepod-256 is v5e:16x16, v5p-128 is v5p:4x4x4, v5e:15X16 is v5e:16x16."""
    name, shape = re.fullmatch(r"([^:_-]*)[:_-]*(.*)", text.lower().strip(), re.DOTALL).groups()
    kind = OTHER_NAMES.get(name) or difflib.get_close_matches(name, TOPOLOGIES, 1, cutoff=0)[0]
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    if len(sizes) < 2:  # a number of chips, or of cores
        chips = (sizes or [4])[0] // (2 if kind in CORES else 1)
        return f"{kind}:{min(TOPOLOGIES[kind].split(), key=lambda known: _apart([math.prod(_sizes_of(known))], [chips]))}"
    return f"{kind}:{min(TOPOLOGIES[kind].split(), key=lambda known: _apart(_sizes_of(known), sizes))}"


def _sizes_of(shape: str) -> list[int]:
    return [int(n) for n in shape.split("x")]


def _apart(a: list[int], b: list[int]) -> float:
    """How far two shapes are: as factors along their axes, the longest with the longest."""
    pairs = itertools.zip_longest(sorted(a, reverse=True), sorted(b, reverse=True), fillvalue=1)
    return sum(abs(math.log(max(m, 1) / max(n, 1))) for m, n in pairs)


def compile(lowered: jax.stages.Lowered, *, dumped: bool = False) -> Compiled:
    """Compiles now. Raises DoesNotFit or CompilerError.

    `dumped`: takes the program's text from what the compiler writes to files, for TPUs. libtpu 0.0.52 compiles train steps for
    v6e and then fails to hand over their text (RET_CHECK ... async-update instruction should have 1 operands but sees 3).
    """
    # Programs for devices that aren't there can be written to JAX's cache, but not read from it.
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="clipjax-") as folder:
            program = lowered.compile({"xla_dump_to": folder}) if dumped else lowered.compile()
            seconds = time.perf_counter() - start
            text = _dumped(Path(folder)) if dumped else program.as_text()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            raise DoesNotFit(*_sizes(message)) from error
        raise CompilerError(message.strip().splitlines()[0]) from error
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    memory = program.memory_analysis()
    arguments, temps, peak = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes
    devices = jax.tree.leaves(program.input_shardings)[0].device_set
    if next(iter(devices)).platform == "cpu":  # whose compiler leaves temporaries out of its peak
        peak = arguments + temps + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(program, seconds, peak, arguments, temps, hlo.cost(text))


def _dumped(folder: Path) -> str:
    """The optimised program's text among what the compiler wrote."""
    found = [*folder.glob("*.after_optimizations.txt")]
    if len(found) != 1:
        raise CompilerError(f"it wrote {len(found)} texts of the program where one was asked for, by xla_dump_to")
    return found[0].read_text()


def capacity(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that a program may use on each of these devices, None where it can't be told. CPU devices share one memory."""
    device = devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # not one of a topology, which has no statistics
        return (device.memory_stats() or {}).get("bytes_limit")
    # The compiler knows what is left for programs: it is asked for more than there can be.
    most = jax.ShapeDtypeStruct((2**24, 2**20), jnp.float32, sharding=SingleDeviceSharding(device))  # 64 TiB
    try:
        compile(jax.jit(lambda x: x.sum()).lower(most))
    except DoesNotFit as error:
        return error.capacity
    return None


def _sizes(message: str) -> tuple[int | None, int | None]:
    """What is needed and what there is, of `(16.13G) exceeds available HBM (15.75G)` or `Used 78.38G of 15.75G`."""
    size = r"([\d.]+)([KMGTP]?)"
    found = re.search(rf"\({size}\) exceeds.*?\({size}\)", message) or re.search(rf"Used {size}i?B? of {size}", message)
    if not found:
        return None, None
    return int(float(found[1]) * UNITS[found[2]]), int(float(found[3]) * UNITS[found[4]])
