"""GPUs to compile for that this machine does not have.

The compiler is in JAX's plugin for CUDA, and it runs ptxas of NVIDIA's nvcc; both run on any Linux machine: the extra `gpu-plan`.
It takes a description of the GPU as text. On a machine without one it can't try out kernels (autotuning).
"""

import re
from dataclasses import dataclass
from importlib import metadata

import jax
from jax.experimental import topologies

from clipjax.chips import chip_of
from clipjax.config import ConfigError, require

PER_HOST = 8  # at most: what NVLink joins in these servers


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU, beside its memory (clipjax.chips)."""

    device_kind: str  # as its driver names it
    capability: int  # the major number of the compute capability; the minor one is 0
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    shared: int  # KiB of shared memory of each
    l2: int  # MiB
    clock: float  # GHz: the bfloat16 peak / (cores * FLOPs of a core's tensor units in a cycle)


# NVIDIA's white papers of the A100 and the H100 architecture (the H200 has the H100's chip), for B200 its driver's figures in
# github.com/pytorch/ao/pull/4002; shared memory: "Technical specifications per compute capability" of the CUDA programming guide.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 228, 50, 1.83),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 228, 50, 1.83),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 228, 126, 1.85),
}
COMPILER = ("jax-cuda13-pjrt", "nvidia-cuda-nvcc")


def named(topology: str) -> bool:
    """Whether it is GPUs that this topology means."""
    return topology.lower().startswith(tuple(GPUS))


def gpu_devices(topology: str) -> list[jax.Device]:
    """Devices to compile for, which cannot run programs: those of e.g. h100:8, or of hosts with so many each, as h100:2x8.

    A host is a process of these devices. From this call on, the process runs programs on its CPU. Raises ConfigError.
    """
    found = re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", topology)
    kind, hosts, each = (found[1], int(found[2] or 1), int(found[3])) if found else ("", 0, 0)
    remedy = f"name GPUs as h100:8, or as h100:2x8 on two hosts, with at most {PER_HOST} each; the kinds are {', '.join(GPUS)}"
    require(kind in GPUS and hosts > 0 and 0 < each <= PER_HOST, "--topology", topology, remedy)
    _check_compiler(topology)
    jax.config.update("jax_platforms", "cpu")
    # Slices, hosts of a slice, GPUs of a host: a slice is what NVLink joins.
    return list(topologies.get_topology_desc("", "cuda", target_config=description(kind), topology=f"{hosts}x1x{each}").devices)


def _check_compiler(topology: str) -> None:
    """Raises ConfigError unless the GPU compiler is installed, and is of JAX's own version, as their interface has no other."""
    remedy = "pip install 'clipjax[gpu-plan]' (Linux only)"
    try:
        version, _ = map(metadata.version, COMPILER)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"--topology = {topology!r}: needs the GPU compiler, {error.name}: {remedy}") from error
    said = f"the GPU compiler, {COMPILER[0]}, is of version {version}, and JAX of {jax.__version__}: {remedy}"
    require(version == jax.__version__, "--topology", topology, said)


def description(kind: str) -> str:
    """The text form of XLA's GpuTargetConfigProto for one of GPUS."""
    gpu = GPUS[kind]
    chip = chip_of(gpu.device_kind)
    assert chip is not None
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.device_kind}"
        runtime_version {{ major: 13 }}
        dnn_version_info {{ major: 9 minor: 13 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.lanes}
          clock_rate_ghz: {gpu.clock}
          memory_bandwidth: {chip.memory:.0f}
          device_memory_size: {chip.capacity:.0f}
          l2_cache_size: {gpu.l2 * 2**20}
          shared_memory_per_core: {gpu.shared * 2**10}
          shared_memory_per_block_optin: {(gpu.shared - 1) * 2**10}
          shared_memory_per_block: {48 * 2**10}
          registers_per_core_limit: {2**16}
          registers_per_block_limit: {2**16}
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
        }}
    """
