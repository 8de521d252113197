"""The devices that a run is planned for."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from clipjax import aot, config, gpus, sharding
from clipjax.chips import chip_of
from clipjax.train.remat import USABLE


@dataclass(frozen=True)
class Target:
    """The devices that a run is planned for, and the run's mesh over them."""

    topology: str
    devices: Sequence[jax.Device]
    mesh: Mesh
    capacity: int | None  # bytes of a device that a program may use; None: not known
    lacks: tuple[str, ...] = ()  # what the compiler does not count in a program's memory


def make_target(run: config.Run, topology: str | None, slices: int = 1) -> Target:
    """`topology`: one of `aot.TOPOLOGIES`; of GPUs, as h100:8 or h100:2x8; `cpu:N` for simulated devices; or None for this
    machine's. Raises ConfigError.
    """
    if topology and gpus.named(topology):
        config.require(slices == 1, "--slices", slices, "only TPUs have several slices: name GPUs' hosts, as h100:2x8")
        return _of_gpus(run, topology)
    devices = _devices(topology, slices)
    return Target(topology or devices[0].platform, devices, sharding.make_mesh(run.mesh, devices), aot.capacity(devices))


def _of_gpus(run: config.Run, topology: str) -> Target:
    """GPUs that this machine need not have. Their compiler refuses no program, so their capacity is of a table."""
    devices = gpus.gpu_devices(topology)
    chip = chip_of(devices[0].device_kind)
    assert chip is not None
    hosts = len({device.process_index for device in devices})
    capacity = int(USABLE["gpu"] * chip.capacity)
    lacks = ["the workspace of cuDNN", "what autotuning on a GPU would choose: other kernels, with other workspaces"]
    lacks += ["the buffers of NCCL"] if len(devices) > 1 else []
    return Target(topology, devices, sharding.make_mesh(run.mesh, devices, hosts), capacity, tuple(lacks))


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
