"""Ahead-of-time compilation, also for TPUs that this machine does not have: the memory and the cost of a compiled program.

The TPU compiler is part of libtpu, which runs on any Linux machine (`pip install libtpu`). Of GPUs: clipjax.gpus.
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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from clipjax import chips, gpus, hlo
from clipjax.config import ConfigError
from clipjax.environment import COMPILE_ONLY

# The topologies that can be rented; libtpu also accepts shapes that don't exist.
TOPOLOGIES = {
    "v2": "2x2 4x4 8x8 16x16",
    "v3": "2x2 4x4 8x8 16x16 32x32",
    "v4": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
    "v5e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24",
    "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "tpu7x": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
}
NAMED_BY_CORES = ("v2", "v3", "v4", "v5p", "tpu7x")  # their short names, as v5p-128, count cores, two in each chip
OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6": "v6e", "trillium": "v6e"}
OTHER_NAMES |= dict.fromkeys(("v7x", "7x", "v7", "ironwood"), "tpu7x")
# Of JAX 0.10, for GPUs: what its tiles don't fit has to be left to cuBLAS.
UNTILED, LIBRARY_PRODUCTS = "Couldn't find output tile sizes", {"xla_gpu_enable_triton_gemm": False}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


class DoesNotFit(Exception):
    """A program needs more memory than a device has. Sizes in bytes; None: not known."""

    def __init__(self, needed: int | None, capacity: int | None) -> None:
        sizes = [f"{size / 2**30:,.2f} GiB" if size else "an unknown size" for size in (needed, capacity)]
        super().__init__(f"out of memory: needs {sizes[0]} of {sizes[1]} a device")
        self.needed, self.capacity = needed, capacity


class CompilerError(Exception):
    """The compiler failed for a reason other than memory."""


@dataclass(frozen=True)
class Compiled:
    """A compiled program, which can run if its devices are real, and its figures, each for one device."""

    program: jax.stages.Compiled
    seconds: float  # spent in the compiler
    peak_bytes: int  # the most memory in use at any time, with the arguments
    argument_bytes: int
    temp_bytes: int
    cost: hlo.Cost
    cycles: hlo.Cycles | None  # by the TPU compiler's own estimates; None: not for a TPU


def tpu_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices to compile for, which cannot run programs: those of e.g. v5e:16x16, or of several such slices.

    Slices are connected by the data-centre network. From this call on, the process runs programs on its CPU. Raises
    ConfigError with the nearest topology if there is none of this name.
    """
    kind, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(kind, "").split():
        near = nearest_topology(topology)
        kind = near.partition(":")[0]
        shapes = ", ".join(TOPOLOGIES[kind].split())
        kinds = f"the kinds are {', '.join(TOPOLOGIES)}; of GPUs {', '.join(gpus.GPUS)}"
        remedy = f"the nearest is {near}; {kind} comes as {shapes}; {kinds}"
        raise ConfigError(f"--topology = {topology!r}: there is no such topology; {remedy}")
    for name, value in COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        if "TPU_LIBRARY_PATH" not in os.environ:
            from libtpu import get_library_path  # noqa: F401
        options = {"chip_config_name": "megacore"} if kind == "v4" else {}  # as JAX runs it: a chip is one device
        options |= {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except ImportError as error:
        raise ConfigError(f"--topology = {topology!r}: needs the TPU compiler: pip install libtpu (Linux only)") from error


def simulate_cpus(count: int) -> None:
    """Asks JAX for so many simulated CPU devices. No effect if JAX has already started: it keeps the devices that it has."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def nearest_topology(text: str) -> str:
    """The topology that was probably meant: v5litepod-256 is v5e:16x16, v5p-128 is v5p:4x4x4, v5e:15X16 is v5e:16x16."""
    name, shape = re.findall(r"^([^:_-]*)[:_-]*(.*)", text.lower().strip(), re.DOTALL)[0]
    kind = OTHER_NAMES.get(name) or difflib.get_close_matches(name, TOPOLOGIES, 1, cutoff=0)[0]
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    if len(sizes) < 2:  # a number of chips, or of cores
        chips = (sizes or [4])[0] // (2 if kind in NAMED_BY_CORES else 1)
        return f"{kind}:{min(TOPOLOGIES[kind].split(), key=lambda known: _distance([math.prod(_sizes_of(known))], [chips]))}"
    return f"{kind}:{min(TOPOLOGIES[kind].split(), key=lambda known: _distance(_sizes_of(known), sizes))}"


def _sizes_of(shape: str) -> list[int]:
    return [int(n) for n in shape.split("x")]


def _distance(a: list[int], b: list[int]) -> float:
    """How far two shapes differ: the sum of |log(m / n)| over their axes, both sorted by size."""
    pairs = itertools.zip_longest(sorted(a, reverse=True), sorted(b, reverse=True), fillvalue=1)
    return sum(abs(math.log(max(m, 1) / max(n, 1))) for m, n in pairs)


def compile(lowered: jax.stages.Lowered, *, dump: bool = False) -> Compiled:
    """Compiles a program. Raises DoesNotFit and CompilerError.

    `dump`: reads the program's text from a file that the compiler writes. TPU programs need this: libtpu 0.0.52 compiles train
    steps for v6e, but then fails to return their text (RET_CHECK ... async-update instruction should have 1 operands but sees 3).
    """
    # Programs for absent devices can be written to JAX's cache, but not read from it: no program is cached here.
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]  # set by JAX
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="clipjax-") as folder:
            program = _program(lowered, {"xla_dump_to": folder} if dump else {})
            seconds = time.perf_counter() - start
            text = _dumped_text(Path(folder)) if dump else program.as_text()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            raise DoesNotFit(*_sizes(message)) from error
        raise CompilerError(message.strip().splitlines()[0]) from error
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    memory = program.memory_analysis()
    assert memory is not None  # XLA gives both for CPUs, GPUs and TPUs
    assert text is not None
    arguments, temps, peak = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes
    devices = jax.tree.leaves(program.input_shardings)[0].device_set
    device = next(iter(devices))
    if device.platform == "cpu":  # its compiler does not count temporaries in the peak
        peak = arguments + temps + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(program, seconds, peak, arguments, temps, hlo.cost(text), hlo.cycles(text, chips.chip_of(device.device_kind)))


def _program(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if UNTILED not in str(error):
            raise
        return lowered.compile(options | LIBRARY_PRODUCTS)


def _dumped_text(folder: Path) -> str:
    """The text of the optimised program, from the compiler's files."""
    found = [*folder.glob("*.after_codegen.txt")]  # as `as_text` gives it: earlier texts have no estimates of cycles
    if len(found) != 1:
        raise CompilerError(f"it wrote {len(found)} texts of the program instead of one (xla_dump_to)")
    return found[0].read_text()


def capacity(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that a program may use on each of these devices; None: not known. CPU devices share one memory."""
    device = devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a device of a topology has no statistics
        return (device.memory_stats() or {}).get("bytes_limit")
    # The compiler knows how much memory programs may use, and says so when a program asks for too much.
    most = jax.ShapeDtypeStruct((2**24, 2**20), jnp.float32, sharding=SingleDeviceSharding(device))  # 64 TiB
    try:
        compile(jax.jit(lambda x: x.sum()).lower(most))
    except DoesNotFit as error:
        return error.capacity
    return None


def _sizes(message: str) -> tuple[int | None, int | None]:
    """Needed and available bytes, from `(16.13G) exceeds available HBM (15.75G)` or `Used 78.38G of 15.75G`."""
    size = r"([\d.]+)([KMGTP]?)"
    found = re.search(rf"\({size}\) exceeds.*?\({size}\)", message) or re.search(rf"Used {size}i?B? of {size}", message)
    if not found:
        return None, None
    return int(float(found[1]) * UNITS[found[2]]), int(float(found[3]) * UNITS[found[4]])
