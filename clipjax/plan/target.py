"""The devices that a run is planned for."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from clipjax import aot, config, sharding


@dataclass(frozen=True)
class Target:
    """The devices that a run is planned for, and the run's mesh over them."""

    topology: str
    devices: Sequence[jax.Device]
    mesh: Mesh
    capacity: int | None  # bytes of a device that a program may use; None: not known


def make_target(run: config.Run, topology: str | None, slices: int = 1) -> Target:
    """`topology`: one of `aot.TOPOLOGIES`, or `cpu:N` for simulated devices, or None for this machine's. Raises ConfigError."""
    devices = _devices(topology, slices)
    return Target(topology or devices[0].platform, devices, sharding.make_mesh(run.mesh, devices), aot.capacity(devices))


def _devices(topology: str | None, slices: int) -> Sequence[jax.Device]:
    kind, _, count = (topology or "").partition(":")
    if topology is not None and kind != "cpu":
        return aot.tpu_devices(topology, slices)
    config.require(slices == 1, "--slices", slices, "only TPUs have several slices: name a --topology of TPUs")
    if topology is None:
        return jax.devices()
    config.require(count.isdecimal() and int(count) > 0, "--topology", topology, "name their number, as cpu:8")
    aot.simulate_cpus(int(count))
    found = jax.devices("cpu")
    config.require(len(found) >= int(count), "--topology", topology, f"JAX has started with {len(found)} devices")
    return found[: int(count)]
