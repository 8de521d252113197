"""Published figures of accelerators: how fast they compute, read memory, and send bytes to other chips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """The peaks of one chip. None: not published, or not applicable."""

    flops: float  # dense bf16 FLOP/s
    memory: float  # bytes/s of its main memory
    links: float | None  # bytes/s to other chips of its slice or host, over all links, one way
    network: float | None  # bytes/s to other slices over the data-centre network: its share of its host's
    capacity: float  # bytes of its main memory
    devices: int = 1  # JAX devices in a chip
    clock: float | None = None  # Hz, of TPUs
    vmem: float | None = None  # bytes of the fast memory beside the matrix units, of TPUs


def _tpu(
    tflops: float,
    memory: float,
    links: float,
    network: float | None,
    capacity: float,
    clock: float | None,
    vmem: int,
    devices: int = 1,
) -> Chip:
    network, clock = network and network / 8 * GIGA, clock and clock * GIGA
    return Chip(tflops * TERA, memory * GIGA, links * GIGA, network, capacity * GIGA, devices, clock, vmem * 2**20)


def _gpu(tflops: float, memory: float, links: float, capacity: float) -> Chip:
    return Chip(tflops * TERA, memory * GIGA, links * GIGA, None, capacity * GIGA)


# By the start of JAX's `device_kind`, as in jax's pallas/mosaic/tpu_info.py; the longest match counts.
# TPU: TFLOP/s and GB/s of memory from each version's page at cloud.google.com/tpu/docs; ICI is half of its "bidirectional
# bandwidth per chip", and the network (Gbit/s) its "DCN bandwidth per chip" (tpu7x's page has v5p's and v6e's too; v5e:
# 6.4 Tbit/s a pod of 256). v4: six links of 50 GB/s (2304.01433), 25 GB/s a host of four (jax-ml.github.io/scaling-book/tpus).
# v2, v3: four links of 62 and 82 GB/s (Norrie et al., IEEE Micro 41:2, 2021), v2's memory as in tpu_info.py; they have
# no multislice. Then GB of memory, from the same pages, and the clock in GHz: v2, v3 from Norrie et al., v4 from 2304.01433, v5e
# from jax-ml.github.io/scaling-book/tpus; v5p and v6e follow from their peaks and the matrix units that Google gives (8 of
# 128 x 128; 4 of 256 x 256 in the first version of v6e's page, with which the compiler's cycles agree: 2 could not do them).
# Peak = matrix units x size^2 x 2 x clock, for all of them. tpu7x: no source. Last, MiB of VMEM of all cores, from tpu_info.py.
# GPU: NVIDIA's data sheet of each product, tensor cores without sparsity (half of a figure "with sparsity"), the slower or
# smaller memory if two products have the same name; NVLink one way (half of the figure in the sheet), or PCIe. The network
# between hosts depends on the cluster.
_CHIPS = {
    "TPU v2": _tpu(46, 716, 248, None, 16, 0.7, 32, devices=2),
    "TPU v3": _tpu(123, 900, 328, None, 32, 0.94, 32, devices=2),
    "TPU v4": _tpu(275, 1200, 300, 50, 32, 1.05, 32),
    "TPU v5 lite": _tpu(197, 819, 200, 25, 16, 1.5, 128),
    "TPU v5e": _tpu(197, 819, 200, 25, 16, 1.5, 128),
    "TPU v5": _tpu(459, 2765, 600, 50, 95, 1.75, 128),
    "TPU v5p": _tpu(459, 2765, 600, 50, 95, 1.75, 128),
    "TPU v6 lite": _tpu(918, 1638, 400, 100, 32, 1.75, 128),
    "TPU v6e": _tpu(918, 1638, 400, 100, 32, 1.75, 128),
    "TPU7x": _tpu(2307, 7380, 600, 100, 192, None, 128, devices=2),
    "NVIDIA A10": _gpu(125, 600, 32, 24),
    "NVIDIA A100": _gpu(312, 1555, 300, 40),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 2039, 300, 80),
    "NVIDIA A100 80GB PCIe": _gpu(312, 1935, 300, 80),
    "NVIDIA L4": _gpu(121, 300, 32, 24),
    "NVIDIA L40S": _gpu(362, 864, 32, 48),
    "NVIDIA H100": _gpu(989, 3350, 450, 80),
    "NVIDIA H100 NVL": _gpu(835, 3900, 300, 94),
    "NVIDIA H100 PCIe": _gpu(756, 2000, 64, 80),
    "NVIDIA H200": _gpu(989, 4800, 450, 141),
    "NVIDIA H200 NVL": _gpu(835, 4800, 450, 141),
    "NVIDIA GH200": _gpu(989, 4000, 450, 96),
    "NVIDIA B200": _gpu(2250, 8000, 900, 180),
    "NVIDIA GB200": _gpu(2500, 8000, 900, 186),
}


def chip_of(kind: str) -> Chip | None:
    """The chip of devices of this `device_kind`; None: not known, as for CPUs and for a MIG slice of a GPU."""
    fits = [k for k in _CHIPS if kind.startswith(k) and kind[len(k) : len(k) + 1] in ("", " ", "-")]
    return None if not fits or "MIG" in kind else _CHIPS[max(fits, key=len)]


def chip_count(devices: Sequence[Any]) -> int:
    """How many chips these JAX devices are; an unknown device counts as one chip."""
    chip = chip_of(devices[0].device_kind)
    return len(devices) // (chip.devices if chip else 1) or 1
